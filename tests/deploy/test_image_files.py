"""Files of the images: lock files, the targets of the Dockerfile, the entry point and the health check."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.graphs import add_to_repository, build_model
from tests.servers import ROOT, Server

IMAGE = ROOT / "deploy" / "image"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
CUDA = [Requirement(line) for line in PROJECT["optional-dependencies"]["cuda"]]


def read_lock_file(target: str) -> dict[str, str]:
    """Return the locked version of each package; every entry must have hashes."""
    text = (IMAGE / f"{target}.txt").read_text()
    for entry in re.split(r"\n(?=\S)", text.strip()):
        assert re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+", entry), entry
    return dict(re.findall(r"^(\S+)==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_lock_file_satisfies_service_requirements(target: str) -> None:
    versions = read_lock_file(target)
    requirements = (
        [requirement for requirement in RUNTIME if requirement.name != "onnxruntime"] + CUDA
        if target == "cuda"
        else RUNTIME
    )
    for requirement in requirements:
        assert requirement.specifier.contains(versions[requirement.name]), requirement.name


def test_lock_files_have_the_same_packages() -> None:
    cpu, cuda = read_lock_file("cpu"), read_lock_file("cuda")
    assert cpu.pop("onnxruntime")
    assert cuda.pop("onnxruntime-gpu")
    assert cpu == cuda


def test_dockerfile_targets_differ_only_in_base_and_provider() -> None:
    text = (ROOT / "Dockerfile").read_text()
    cpu, cuda = (_read_stage(text, target) for target in ("cpu", "cuda"))
    assert [line for line in cuda if "apt-get" not in line] == cpu


def _read_stage(text: str, target: str) -> list[str]:
    """Return the instructions of a stage without the parts that may differ."""
    (lines,) = re.findall(rf"^FROM \S+ AS {target}\n(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL)
    plain = re.sub(r"^#.*\n|\n(?=\n)|\n\Z", "", lines, flags=re.MULTILINE)
    instructions = plain.replace(f"--from={target}-packages", "--from=packages").replace(
        " FOVEA_PROVIDER=cuda", ""
    )
    return re.sub(r"--start-period=\d+s", "", instructions).strip().splitlines()


# --- the entry point and the health check --------------------------------------------------------

ENTRY = [sys.executable, str(IMAGE / "serve")]


@pytest.mark.long
@pytest.mark.parametrize(
    "arguments", [[], ["--workers", "1"], ["serve"], ["fovea", "serve", "--host", "127.0.0.1"]]
)
def test_entrypoint_serves_by_default(small_zoo: Path, arguments: list[str]) -> None:
    settings = {"FOVEA_MODELS": str(small_zoo), "PYTHONPATH": str(ROOT)}
    with Server({"args": [*ENTRY, *arguments]}, **settings) as server:
        assert server.client.get("/health/ready").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0


def test_entrypoint_publishes_a_model(tmp_path: Path) -> None:
    model_path = add_to_repository(build_model(), tmp_path / "made") / "small" / "1" / "model.onnx"
    repository = tmp_path / "zoo"
    repository.mkdir()
    process = _run_entrypoint("publish", str(model_path), "--models", str(repository))
    assert (process.returncode, process.stdout) == (0, f"published {repository}/small/1/model.onnx\n")


def test_entrypoint_without_training_code_reports_one_line(tmp_path: Path) -> None:
    (tmp_path / "fovea").mkdir()
    for name in ("__init__.py", "cli.py", "commands", "service"):
        (tmp_path / "fovea" / name).symlink_to(ROOT / "fovea" / name)
    shutil.copy(IMAGE / "serve", tmp_path)
    process = subprocess.run(
        [sys.executable, "-S", tmp_path / "serve", "train"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if "site-packages" in p)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    hint = "run the command in a checkout of the repository"
    assert process.stderr == f"fovea: this installation contains only the service; {hint}\n"
    assert process.returncode == 2


def _run_entrypoint(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*ENTRY, *words], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.long
@pytest.mark.parametrize(
    ("host", "variables"),
    [
        ("127.0.0.1", {"FOVEA_PORT": "{port}"}),
        ("0.0.0.0", {"FOVEA_PORT": "{port}", "FOVEA_HOST": "0.0.0.0", "PORT": "1"}),  # noqa: S104
        ("127.0.0.1", {"PORT": "{port}"}),
        ("127.0.0.1", {"FOVEA_PORT": "tcp://10.0.0.1:1", "PORT": "{port}"}),
        ("::1", {"FOVEA_PORT": "{port}", "FOVEA_HOST": "::1"}),
        ("::", {"fovea_port": "{port}", "fovea_host": "::"}),
    ],
)
def test_health_check_uses_the_configured_address(
    small_zoo: Path, host: str, variables: dict[str, str]
) -> None:
    def is_healthy(port: str) -> bool:
        environment = {name: value.format(port=port) for name, value in variables.items()}
        check = [sys.executable, "-IS", str(IMAGE / "healthy.py")]
        return not subprocess.run(check, env=environment, capture_output=True, check=False).returncode

    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_HOST=host) as server:
        port = server.url.rsplit(":", 1)[1]
        assert is_healthy(port)
    assert not is_healthy(port)
