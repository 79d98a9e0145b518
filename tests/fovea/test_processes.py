"""A model goes to other processes as its path, and a forked child has a session of its own."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

import fovea
from fovea.local import _predictors
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.servers import ROOT, Server

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")]
"""Python 3.12 warns of `fork` in a process with threads, which is what these tests try."""

IMAGES = [make_jpeg(64, 48, seed) for seed in range(4)]


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    root = add_to_repository(build_model(), tmp_path / "zoo", "pets", "1")
    return add_to_repository(build_model(seed=7), root, "pets", "2")


def classify_in_child(model: fovea.Model, results: Any) -> None:
    results.put(([model.classify(image) for image in IMAGES], model.classify(IMAGES)))


def run_child(context: BaseContext, model: fovea.Model) -> Any:
    """Return what a child process of a context answers, within five minutes."""
    results = context.SimpleQueue()
    child = context.Process(target=classify_in_child, args=(model, results))  # type: ignore[attr-defined]
    child.start()
    child.join(timeout=300)
    if child.is_alive():
        child.kill()
        raise TimeoutError("the child did not answer")
    assert child.exitcode == 0
    return results.get()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_child_process_answers_like_its_parent(method: str, zoo: Path) -> None:
    model = fovea.load(zoo / "pets", threads=2)
    expected = model.classify(IMAGES)  # the session and the pool of the parent have threads by now
    assert run_child(multiprocessing.get_context(method), model) == (expected, expected)
    assert model.classify(IMAGES) == expected


def test_forked_child_may_end_like_any_process(zoo: Path) -> None:
    """The end of the interpreter must not wait for the threads of the parent's session."""
    code = f"""
import os, sys
import fovea
model = fovea.load({str(zoo / "pets")!r}, threads=2)
images = {IMAGES!r}
expected = model.classify(images)
pid = os.fork()
if not pid:
    assert model.classify(images) == expected
    del model
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (process.stdout, process.stderr, process.returncode) == ("7\n", "", 0)


def test_forked_child_has_its_own_session_and_keeps_the_parents(zoo: Path) -> None:
    model = fovea.load(zoo / "pets")
    inherited = model._predictor
    pid = os.fork()
    if not pid:  # the child must not run the rest of the tests
        try:
            loaded = model._get_predictor()
            is_right = (
                loaded is not inherited
                and fovea.load(zoo / "pets")._predictor is loaded
                and sys.getrefcount(inherited) > 2
            )
            os._exit(0 if is_right else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert model._get_predictor() is inherited


def test_pickle_is_the_path_of_one_version(zoo: Path) -> None:
    model = fovea.load(zoo, version=1)
    content = pickle.dumps(model)
    assert len(content) < 1000
    assert str(zoo / "pets" / "1" / "model.onnx").encode() in content
    restored = pickle.loads(content)  # noqa: S301
    assert (restored.name, restored.version) == ("pets", "1")
    assert restored._predictor is model._predictor
    assert restored.classify(IMAGES) == model.classify(IMAGES)
    assert copy.deepcopy(model) is copy.copy(model) is model


def test_pickle_of_a_single_file_keeps_its_names(zoo: Path) -> None:
    file = (zoo / "pets" / "2" / "model.onnx").rename(zoo / "cats.onnx")
    model = fovea.load(file, threads=1, provider="cpu")
    restored = pickle.loads(pickle.dumps(model))  # noqa: S301
    assert (restored.name, restored.version) == (model.name, model.version) == ("pets", "2")
    assert restored._predictor is model._predictor


def test_session_ends_with_its_last_model_unless_it_was_unpickled(zoo: Path) -> None:
    first, second = fovea.load(zoo), fovea.load(zoo)
    key = next(key for key, one in _predictors._shared.items() if one is first._predictor)
    del first
    assert key in _predictors._shared
    del second
    assert key not in _predictors._shared
    content = pickle.dumps(fovea.load(zoo))
    pickle.loads(content)  # noqa: S301
    assert key in _predictors._shared


def test_clients_work_in_forked_and_other_processes(server: Server, small_zoo: Path) -> None:
    expected = fovea.load(small_zoo).classify(IMAGES)
    with fovea.Client(server.url) as client:
        assert client.classify(IMAGES) == expected
        for method in ("fork", "spawn"):
            assert run_child(multiprocessing.get_context(method), client) == (expected, expected)  # type: ignore[arg-type]
        assert client.classify(IMAGES) == expected
