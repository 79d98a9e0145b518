"""Weights that processes share: the same results, one copy, and no way to change them."""

from __future__ import annotations

import fcntl
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fovea.service.allocator import trim_heap
from fovea.service.errors import ModelError
from fovea.service.inference import shared_weights
from fovea.service.inference.engine import Engine
from fovea.service.inference.session import open_session
from fovea.service.inference.shared_weights import share_weights
from tests.graphs import build_model
from tests.pictures import make_jpeg
from tests.servers import DEFAULT_MODEL, FLOAT_MODEL, Server


@pytest.fixture
def memory_file() -> Iterator[Path]:
    """An empty memory file, as the service has one for each model."""
    descriptor = os.memfd_create("weights", os.MFD_ALLOW_SEALING)
    yield Path(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)


def _is_sealed(file: Path) -> bool:
    with file.open("rb") as opened:
        return bool(fcntl.fcntl(opened, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE)


@pytest.mark.parametrize("path", [FLOAT_MODEL, DEFAULT_MODEL], ids=["float", "int8"])
def test_results_are_the_same(memory_file: Path, path: Path) -> None:
    private = Engine.load(path, provider="cpu", threads=1, wide_threads=2)
    shared = [
        Engine.load(path, provider="cpu", threads=1, wide_threads=2, weights_file=memory_file)
        for _ in range(2)
    ]
    geometry = private.contract.input
    pixels = np.random.default_rng(0).integers(0, 256, (3, geometry.height, geometry.width, 3), np.uint8)
    for engine in shared:
        assert engine._weights is not None
        assert engine.contract == private.contract
        assert np.array_equal(engine.compute_logits(pixels), private.compute_logits(pixels))
        one = pixels[:1]
        assert np.array_equal(engine.run(one, exclusive=True), private.run(one, exclusive=True))
        engine.check_golden_set()
    assert _is_sealed(memory_file)
    assert memory_file.stat().st_size >= 0.9 * path.stat().st_size


def test_sessions_have_no_copy_of_the_weights(memory_file: Path) -> None:
    weights = share_weights(FLOAT_MODEL.read_bytes(), memory_file)
    assert weights is not None
    trim_heap()
    before = _read_anonymous_bytes()
    sessions = [open_session(b"", "cpu", threads, weights=weights) for threads in (1, 2)]
    trim_heap()
    assert len(sessions) * FLOAT_MODEL.stat().st_size > 4 * (_read_anonymous_bytes() - before)


def test_sessions_keep_no_bytes() -> None:
    content = FLOAT_MODEL.read_bytes()
    references = sys.getrefcount(content)
    session = open_session(content, "cpu", 1)
    assert session.get_inputs()
    assert sys.getrefcount(content) == references


def _read_anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) << 10


def test_sealed_weights_cannot_be_changed(memory_file: Path) -> None:
    weights = share_weights(FLOAT_MODEL.read_bytes(), memory_file)
    assert weights is not None
    with memory_file.open("r+b", buffering=0) as file, pytest.raises(PermissionError):
        file.write(b"x")
    with pytest.raises(PermissionError):
        os.truncate(memory_file, 0)


def test_half_written_file_is_written_again(memory_file: Path) -> None:
    """A process may die while it writes; the lock ends with it."""
    memory_file.write_bytes(b"half of the weights")
    weights = share_weights(FLOAT_MODEL.read_bytes(), memory_file)
    assert weights is not None
    assert Engine.load(FLOAT_MODEL, provider="cpu", threads=1, weights_file=memory_file)._weights


def test_process_waits_while_another_one_writes(memory_file: Path) -> None:
    content = FLOAT_MODEL.read_bytes()
    results = []
    with memory_file.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: results.append(share_weights(content, memory_file)))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        fcntl.flock(file, fcntl.LOCK_UN)
        thread.join()
    assert results[0] is not None


def test_model_that_cannot_be_loaded_is_not_shared(memory_file: Path) -> None:
    """The usual way of loading names the reason, for the next process too."""
    for _ in range(2):
        assert share_weights(b"no model", memory_file) is None
    model = onnx.load(FLOAT_MODEL)
    model.graph.node[0].op_type = "Nonsense"
    with pytest.raises(ModelError, match="Nonsense"):
        Engine(model.SerializeToString(), provider="cpu", threads=1, weights_file=memory_file)


def test_weights_of_unknown_types_are_not_shared(memory_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_weights, "_DTYPES", {})
    assert share_weights(FLOAT_MODEL.read_bytes(), memory_file) is None
    assert Engine.load(FLOAT_MODEL, provider="cpu", threads=1, weights_file=memory_file)._weights is None


@pytest.mark.long
def test_runners_share_the_weights() -> None:
    """The weights of the default model have 2 MB; a private copy would be memory without a file."""
    with Server(FOVEA_RUNNERS="2") as server:
        assert server.client.post("/v1/classify", content=make_jpeg()).status_code == 200
        for pid in server.runner_pids:
            sizes = _read_mappings(pid, "/memfd:weights")
            assert sizes["Size"] >= 1_900
            assert sizes["Anonymous"] == 0


def _read_mappings(pid: int, name: str) -> dict[str, int]:
    """Return the sums of all entries of smaps for the mappings of a file, in KB."""
    sums = {"Size": 0, "Anonymous": 0}
    is_of_file = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            is_of_file = name in line
        elif is_of_file and (key := key.removesuffix(":")) in sums:
            sums[key] += int(values[0])
    return sums


def test_model_with_weights_in_a_branch_is_loaded_without_sharing(memory_file: Path) -> None:
    model = build_model()
    value = numpy_helper.from_array(np.ones(1000, np.float32))
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["branch"], value=value)],
        "branch",
        [],
        [helper.make_tensor_value_info("branch", TensorProto.FLOAT, [1000])],
    )
    reader = helper.make_node("ReduceMax", [model.graph.input[0].name], ["largest"], keepdims=0)
    condition = helper.make_node("Cast", ["largest"], ["condition"], to=TensorProto.BOOL)
    choice = helper.make_node("If", ["condition"], ["chosen"], then_branch=branch, else_branch=branch)
    model.graph.node.extend([reader, condition, choice])
    model.graph.output.append(helper.make_tensor_value_info("chosen", TensorProto.FLOAT, [1000]))
    engine = Engine(model.SerializeToString(), provider="cpu", threads=1, weights_file=memory_file)
    engine.check_golden_set()
