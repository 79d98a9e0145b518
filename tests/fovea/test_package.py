"""The package `fovea`: names that are imported on first use, types, and the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fovea
from tests.servers import ROOT


def run_python(code: str) -> str:
    """Return what a new interpreter prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_import_loads_no_module_of_its_own() -> None:
    modules = run_python("import fovea, sys; print(*sys.modules)").split()
    assert [name for name in modules if name.startswith("fovea.")] == []
    assert {"numpy", "importlib.metadata"}.isdisjoint(modules)


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        (
            "fovea.load('zoo').classify('samples/ship.jpg')",
            {"torch", "onnx", "fastapi", "httpx", "rich", "structlog"},
        ),
        ("fovea.Client()", {"torch", "onnx", "onnxruntime", "numpy", "PIL", "pydantic"}),
    ],
    ids=["load", "client"],
)
def test_each_part_imports_only_what_it_needs(code: str, forbidden: set[str]) -> None:
    output = run_python(f"import fovea, sys; {code}; print(*sys.modules)")
    assert forbidden & set(output.split()) == set()


def test_public_names_exist_and_are_listed() -> None:
    assert set(fovea.__all__) <= set(dir(fovea))
    assert fovea.__all__ == sorted(fovea.__all__)
    for name in fovea.__all__:
        assert getattr(fovea, name) is not None
    with pytest.raises(AttributeError, match="module 'fovea' has no attribute 'lode'"):
        fovea.lode  # type: ignore[attr-defined] # noqa: B018
    with pytest.raises(ImportError):
        from fovea import lode  # type: ignore[attr-defined] # noqa: F401


@pytest.mark.long
def test_type_checkers_see_names_and_results(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import fovea\n"
        "model = fovea.load('zoo')\n"
        "label: str = model.classify('a.jpg').label\n"
        "labels: list[str] = [one.label for one in model.classify(['a.jpg', b''])]\n"
        "outcome = model.classify('a.jpg', on_error='return')\n"
        "label = outcome.label  # an error has none\n"
        "fovea.lode\n"
        "async def ask(client: fovea.AsyncClient) -> float:\n"
        "    return (await client.classify(b'')).probability\n"
        "label = fovea.Client().classify(['a.jpg'], top_k=1)\n"
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        str(program),
    ]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line.split(": error: ") for line in process.stdout.splitlines() if ": error: " in line]
    assert [int(place.split(":")[1]) for place, _ in lines] == [6, 6, 7, 10]


@pytest.mark.long
def test_wheel_contains_the_api_and_its_types(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="no setuptools; pip install setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("service", "model", "export", "bench", "fovea"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"fovea/{path.name}" for path in (ROOT / "fovea").glob("*.py")}
    assert {*modules, "fovea/py.typed", "fovea/service/serving/standalone.py"} <= names
