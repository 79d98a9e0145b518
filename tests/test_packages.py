"""Imports between packages point downwards only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import ROOT

SERVICE = [
    {"__main__"},
    {"app", "cli", "model_display"},
    {"grpc"},
    {"api", "supervisor"},
    {"explain", "rollout"},
    {"serving", "http"},
    {"access"},
    {"runners"},
    {"inference", "observability"},
    {"artifact", "resources", "settings"},
    {"atomic_files", "image_files", "image_folders", "remote"},
    {
        "allocator",
        "environment",
        "errors",
        "image_warnings",
        "packaged_models",
        "providers",
        "setting_values",
        "signals",
        "timer",
        "validation",
    },
]
"""Layers from the top down. Packages of one layer import each other only as `ALLOWED_SIDEWAYS` lists."""

MODEL = [{"run"}, {"training"}, {"evaluation"}, {"networks"}, {"data"}, {"recipe"}]

EXPORT = [
    {"quantize"},
    {"importer"},
    {"from_checkpoint"},
    {
        "drift_reference",
        "golden",
        "known_threshold",
        "layer_table",
        "model_card",
        "model_output",
        "pixel_steps",
        "verify",
    },
    {"node_builder", "verification_error"},
]

ALLOWED_SIDEWAYS = {("resources", "settings")}

SHARED_SERVICE_PACKAGES = {
    "allocator",
    "artifact",
    "atomic_files",
    "errors",
    "image_folders",
    "inference",
    "providers",
    "resources",
}
"""Packages of `service` that `model` and `export` may import."""


LIGHT_MODEL_MODULES = {
    "data.inventory",
    "data.spelling",
    "evaluation.plots",
    "evaluation.report_page",
    "evaluation.scores",
}
"""Modules of `model` that need no PyTorch, so that bulk classification may use them: the wheel has none."""


def list_imports(file: Path) -> Iterator[tuple[str, ...]]:
    """Yield the modules that a file imports, also inside functions, split at the dots."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(name.name.split(".")) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = tuple(node.module.split("."))
            yield from ((*parts, name.name) for name in node.names)


def list_files(package: str) -> Iterator[tuple[str, Path]]:
    """Yield every file of a top-level package, after the subpackage or module to which it belongs."""
    for file in sorted((ROOT / package).rglob("*.py")):
        part = file.relative_to(ROOT / package).with_suffix("").parts[0]
        if part != "__init__":
            yield part, file


@pytest.mark.parametrize(("package", "layers"), [("service", SERVICE), ("model", MODEL), ("export", EXPORT)])
def test_imports_point_downwards(package: str, layers: list[set[str]]) -> None:
    height = {part: number for number, layer in enumerate(layers) for part in layer}
    upwards = [
        f"{file.relative_to(ROOT)} imports {package}.{other}"
        for part, file in list_files(package)
        for top, *rest in map(list, list_imports(file))
        if top == "fovea" and rest[:1] == [package] and len(rest) > 1
        for other in rest[1:2]
        if other in height and other != part
        if height[other] <= height[part] and (part, other) not in ALLOWED_SIDEWAYS
    ]
    assert upwards == []
    assert height.keys() == {part for part, _ in list_files(package)}


def test_service_imports_no_training_code() -> None:
    forbidden = {"torch", "onnx", "onnxscript", "safetensors"}
    violations = [
        f"{file.relative_to(ROOT)} imports {'.'.join(module)}"
        for _, file in list_files("service")
        for module in list_imports(file)
        if module[0] in forbidden
        or module[:2] in {("fovea", "model"), ("fovea", "export"), ("fovea", "bench")}
    ]
    assert violations == []


SERVICE_IMPORTS = """
from fovea.service.http.log_setup import configure_logs
from fovea.service.settings import Settings
configure_logs(Settings())
import fovea.service.app, fovea.service.rollout.startup, fovea.service.supervisor.participant
"""

RUNNER_IMPORTS = "import fovea.service.runners.fork_server_process"


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        (SERVICE_IMPORTS, {"fsspec", "numpy", "PIL", "onnxruntime", "rich"}),
        (RUNNER_IMPORTS, {"asyncio", "ssl", "pydantic", "fastapi"}),
    ],
    ids=["service", "runner"],
)
def test_process_imports_only_what_it_needs_at_rest(code: str, forbidden: set[str]) -> None:
    """NumPy and Pillow take 9 MB, asyncio with ssl 9 MB, and rich, which structlog imports, 4 MB."""
    code += f"\nimport sys; sys.exit(' '.join({forbidden} & sys.modules.keys()) or 0)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("package", ["model", "export"])
def test_model_and_export_import_only_lower_service_packages(package: str) -> None:
    violations = [
        f"{file.relative_to(ROOT)} imports {'.'.join(module)}"
        for _, file in list_files(package)
        for module in list_imports(file)
        if module[:2] == ("fovea", "service") and module[2] not in SHARED_SERVICE_PACKAGES
    ]
    assert violations == []


def test_model_does_not_import_export() -> None:
    violations = [
        str(file)
        for _, file in list_files("model")
        for module in list_imports(file)
        if module[:2] == ("fovea", "export")
    ]
    assert violations == []


@pytest.mark.parametrize("package", ["service", "model", "export"])
def test_packages_do_not_import_the_python_api(package: str) -> None:
    """The modules of `fovea/` stand above the packages that it links to."""
    own_modules = {path.stem for path in (ROOT / "fovea").glob("*.py")} | {"bulk", "commands"}
    violations = [
        f"{file.relative_to(ROOT)} imports {'.'.join(module)}"
        for _, file in list_files(package)
        for module in list_imports(file)
        if module[0] == "fovea" and len(module) > 1 and module[1] in own_modules
    ]
    assert violations == []


def test_bulk_classification_needs_no_pytorch() -> None:
    files = [*(ROOT / "fovea" / "bulk").rglob("*.py")]
    files += [ROOT / "model" / f"{name.replace('.', '/')}.py" for name in LIGHT_MODEL_MODULES]
    violations = [
        f"{file.relative_to(ROOT)} imports {'.'.join(module)}"
        for file in files
        for module in list_imports(file)
        if module[0] in {"torch", "onnx", "onnxscript", "safetensors"}
        or module[:2] in {("fovea", "export"), ("fovea", "bench")}
        or (module[:2] == ("fovea", "model") and ".".join(module[2:4]) not in LIGHT_MODEL_MODULES)
    ]
    assert violations == []
