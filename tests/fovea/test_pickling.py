"""Values that other processes and machines get: they need no module but `fovea`, and lose nothing."""

from __future__ import annotations

import pickle
import pickletools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fovea
import fovea.errors
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.servers import ROOT
from tests.test_errors import make_error

IMAGE = make_jpeg(64, 48)

ECHO = "import pickle, sys; pickle.dump(pickle.load(sys.stdin.buffer), sys.stdout.buffer)"
"""A program that knows nothing of Fovea: it reads a pickle and writes it again."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_to_repository(build_model(), tmp_path_factory.mktemp("zoo"), "pets", "3")


def send_through_process(content: bytes) -> Any:
    """Return what a fresh process makes of a pickle."""
    process = subprocess.run(
        [sys.executable, "-c", ECHO], input=content, cwd=ROOT, capture_output=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stderr.decode()
    return pickle.loads(process.stdout)  # noqa: S301 - ours


def list_packages(content: bytes) -> set[str]:
    """Return the top-level packages that a pickle of protocol 2 imports."""
    return {
        str(argument).split(".")[0]
        for operation, argument, _ in pickletools.genops(content)
        if operation.name == "GLOBAL"
    }


def list_public_errors() -> list[fovea.FoveaError]:
    """Return an error of each public class."""
    return [make_error(getattr(fovea.errors, name)) for name in fovea.errors.__all__]


def describe(error: fovea.FoveaError) -> tuple[Any, ...]:
    return type(error), str(error), error.message, error.args, vars(error), getattr(error, "code", None)


def test_public_errors_survive_a_fresh_process() -> None:
    errors = list_public_errors()
    errors += [fovea.FileError.from_os_error(FileNotFoundError(2, "No such file or directory"))]
    content = pickle.dumps(errors, 2)
    assert list_packages(content) <= {"fovea", "builtins", "__builtin__"}
    restored = send_through_process(content)
    assert [describe(one) for one in restored] == [describe(one) for one in errors]


def test_model_and_results_survive_a_fresh_process(zoo: Path) -> None:
    model = fovea.load(zoo / "pets", threads=1)
    result = model.classify(IMAGE, coverage=0.9)
    content = pickle.dumps((model, result), 2)
    assert list_packages(content) <= {"fovea", "builtins", "__builtin__"}
    restored_model, restored_result = send_through_process(content)
    assert restored_result == result
    assert restored_model.classify(IMAGE, coverage=0.9) == result
    assert (restored_model.name, restored_model.version) == ("pets", "3")


def test_parts_with_a_session_say_what_to_pickle_instead(zoo: Path) -> None:
    model = fovea.load(zoo / "pets", threads=1)
    for part in (model._predictor.predictor, model._predictor.predictor._engine):
        with pytest.raises(TypeError, match=r"pickle the model that fovea.load returns, or a fovea.Batch"):
            pickle.dumps(part)


def test_model_whose_file_is_missing_elsewhere_names_it(zoo: Path, tmp_path: Path) -> None:
    (zoo / "pets").rename(tmp_path / "pets")
    content = pickle.dumps(fovea.load(tmp_path / "pets", threads=1))
    (tmp_path / "pets").rename(zoo / "pets")
    with pytest.raises(fovea.ModelError, match=r"pets/3/model.onnx"):
        pickle.loads(content)  # noqa: S301 - ours
