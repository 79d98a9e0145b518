"""The wheel and the source distribution: complete, equal, and enough to serve and to classify."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import fovea
import fovea.errors
from tests.servers import DEFAULT_MODEL, ROOT, TEACHING_MODEL, Server

pytestmark = pytest.mark.long

SHIP = ROOT / "samples" / "ship.jpg"
LINKED = ("service", "model", "export", "bench", "zoo")


@dataclass(frozen=True)
class Distributions:
    """The files that a release publishes."""

    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Build both from a copy of the sources, because setuptools writes into its folder."""
    pytest.importorskip("setuptools", reason="no setuptools; pip install setuptools")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fovea", *LINKED):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    out = tmp_path_factory.mktemp("dist")
    return Distributions(_build(source, out, "wheel"), _build(source, out, "sdist"))


def _build(source: Path, out: Path, kind: str) -> Path:
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return out / process.stdout.splitlines()[-1]


def _list_wheel(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_wheel_has_the_newest_default_model_and_the_model_for_teaching(distributions: Distributions) -> None:
    zoo, prefix = ROOT / "zoo", "fovea/default_models"
    names = _list_wheel(distributions.wheel)
    packaged = {name for name in names if name.startswith(f"{prefix}/")}
    folders = DEFAULT_MODEL.parent, TEACHING_MODEL.parent
    expected = {path.relative_to(zoo) for folder in folders for path in folder.iterdir()}
    assert packaged == {f"{prefix}/default", *(f"{prefix}/{path}" for path in expected)}
    with zipfile.ZipFile(distributions.wheel) as archive:
        for model in (DEFAULT_MODEL, TEACHING_MODEL):
            assert archive.read(f"{prefix}/{model.relative_to(zoo)}") == model.read_bytes()


def test_wheel_has_only_its_package(distributions: Distributions) -> None:
    names = _list_wheel(distributions.wheel)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fovea"}
    assert distributions.wheel.name.startswith("fovea_serve-")
    assert distributions.wheel.stat().st_size < 13e6  # 9 MB are the backbone


def test_sdist_builds_the_same_wheel(distributions: Distributions, tmp_path: Path) -> None:
    with tarfile.open(distributions.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    wheel = _build(source, tmp_path, "wheel")
    assert _list_wheel(wheel) == _list_wheel(distributions.wheel)


@pytest.fixture(scope="module")
def environment(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an environment that has only the dependencies of this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    process = subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", distributions.wheel],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    # As a path and not as a site folder, so that this environment's editable installation does not count.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n")
    return folder


def _run(environment: Path, folder: Path, *words: str) -> str:
    process = subprocess.run(
        [environment / "bin" / words[0], *words[1:]],
        cwd=folder, env={"PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_installed_command_serves_the_packaged_model(environment: Path, tmp_path: Path) -> None:
    before = _list_installed(environment)
    command = {"args": [environment / "bin" / "fovea", "serve"], "cwd": tmp_path}
    with Server(command, PYTHONPATH="", PYTHONDONTWRITEBYTECODE="1") as server:
        reply = server.client.post("/v1/classify", content=SHIP.read_bytes()).json()
        assert reply["predictions"][0]["label"] == "ship"
        assert reply["model"] == {"name": "cifar10", "version": DEFAULT_MODEL.parent.name}
        page = server.client.get("/")
        assert page.status_code == 200
        for path in re.findall(r'(?:src|href)="\./?([\w./-]+)"', page.text):
            assert server.client.get(f"/{path}").status_code == 200, path
    assert server.process.returncode == 0
    assert _list_installed(environment) == before
    assert list(tmp_path.iterdir()) == []


def _list_installed(environment: Path) -> set[Path]:
    return {path for path in environment.rglob("*") if "__pycache__" not in path.parts}


def test_installed_package_classifies(environment: Path, tmp_path: Path) -> None:
    code = f"import fovea; print(fovea.__file__, fovea.load().classify({str(SHIP)!r}).label)"
    file, label = _run(environment, tmp_path, "python", "-c", code).split()
    assert Path(file).is_relative_to(environment)
    assert label == "ship"
    assert "ship" in _run(environment, tmp_path, "fovea", "classify", str(SHIP))
    assert "cifar10/4" in _run(environment, tmp_path, "fovea", "models")


def test_installed_package_is_enough_for_a_worker_of_another_engine(
    environment: Path, tmp_path: Path
) -> None:
    """A worker unpickles what a program elsewhere sends, and sends results and errors back."""
    classifier, model = fovea.BatchClassifier(DEFAULT_MODEL, column="image"), fovea.load(DEFAULT_MODEL)
    images = {"image": [SHIP.read_bytes(), b"no image"]}
    (tmp_path / "sent").write_bytes(pickle.dumps((classifier, model, images)))
    code = (
        "import pickle; classifier, model, images = pickle.load(open('sent', 'rb')); "
        "answer = classifier(images); outcomes = model.classify(images['image'], on_error='return'); "
        "pickle.dump((answer, outcomes), open('reply', 'wb')); import fovea; print(fovea.__file__)"
    )
    assert Path(_run(environment, tmp_path, "python", "-c", code).strip()).is_relative_to(environment)
    answer, (result, error) = pickle.loads((tmp_path / "reply").read_bytes())  # noqa: S301 - ours
    assert list(answer["label"]) == ["ship", None]
    assert list(answer["error"]) == [None, "unsupported_format"]
    assert result.label == "ship"
    assert type(error) is fovea.errors.UnsupportedFormat


def test_metadata_names_version_and_licence(environment: Path, tmp_path: Path) -> None:
    code = (
        "import fovea, importlib.metadata; found = importlib.metadata.metadata('fovea-serve'); "
        "print(found['Version'], found['License-Expression'], fovea.__version__)"
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert _run(environment, tmp_path, "python", "-c", code).split() == [version, "MIT", version]
