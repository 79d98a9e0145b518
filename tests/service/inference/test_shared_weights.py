"""Weights that processes share: the same results, one copy, and no way to change them."""

from __future__ import annotations

import errno
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
from fovea.service.artifact.model_file import MemoryFile
from fovea.service.errors import ModelError
from fovea.service.inference import shared_weights
from fovea.service.inference.engine import Engine
from fovea.service.inference.session import open_session
from fovea.service.inference.shared_weights import share_weights
from tests.graphs import build_model
from tests.memory_files import is_sealed
from tests.open_files import list_open_files
from tests.pictures import make_jpeg
from tests.servers import DEFAULT_MODEL, FLOAT_MODEL, Server


@pytest.fixture
def memory_file() -> Iterator[MemoryFile]:
    """An empty memory file, as the service has one for each model."""
    descriptor = os.memfd_create("weights", os.MFD_ALLOW_SEALING)
    yield MemoryFile.from_descriptor(descriptor)
    os.close(descriptor)


@pytest.mark.parametrize("path", [FLOAT_MODEL, DEFAULT_MODEL], ids=["float", "int8"])
def test_results_are_the_same(memory_file: MemoryFile, path: Path) -> None:
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
    assert is_sealed(Path(memory_file.path))
    assert Path(memory_file.path).stat().st_size >= 0.9 * path.stat().st_size


def test_sessions_have_no_copy_of_the_weights(memory_file: MemoryFile) -> None:
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


def test_sealed_weights_cannot_be_changed(memory_file: MemoryFile) -> None:
    weights = share_weights(FLOAT_MODEL.read_bytes(), memory_file)
    assert weights is not None
    mappings = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:weights" in line]
    assert mappings
    assert {line.split()[1] for line in mappings} == {"r--p"}
    with Path(memory_file.path).open("r+b", buffering=0) as file, pytest.raises(PermissionError):
        file.write(b"x")
    with pytest.raises(PermissionError):
        os.truncate(memory_file.path, 0)


def test_half_written_file_is_written_again(memory_file: MemoryFile) -> None:
    """A process may die while it writes; the lock ends with it."""
    Path(memory_file.path).write_bytes(b"half of the weights")
    weights = share_weights(FLOAT_MODEL.read_bytes(), memory_file)
    assert weights is not None
    assert Engine.load(FLOAT_MODEL, provider="cpu", threads=1, weights_file=memory_file)._weights


def test_full_memory_leaves_an_empty_file_for_the_next_process(
    memory_file: MemoryFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(model: bytes, descriptor: int) -> None:
        os.write(descriptor, b"half of the weights")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as context:
        context.setattr(shared_weights, "_write_optimized", write_half)
        assert share_weights(FLOAT_MODEL.read_bytes(), memory_file) is None
    assert not Path(memory_file.path).stat().st_size
    assert share_weights(FLOAT_MODEL.read_bytes(), memory_file)


def test_weights_outside_of_the_model_are_not_read(
    memory_file: MemoryFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model could otherwise name any file of the machine as its weights."""
    onnx.save(onnx.load(FLOAT_MODEL), tmp_path / "model.onnx", save_as_external_data=True, location="weights")
    monkeypatch.chdir(tmp_path)
    assert share_weights((tmp_path / "model.onnx").read_bytes(), memory_file) is None
    assert not Path(memory_file.path).stat().st_size


def test_no_file_stays_open(memory_file: MemoryFile) -> None:
    before = list_open_files()
    for model in (FLOAT_MODEL.read_bytes(), b""):
        assert share_weights(model, memory_file)
        assert list_open_files() <= before


def test_other_providers_load_the_whole_model(
    memory_file: MemoryFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fovea.service.inference.engine.runs_on_cpu", lambda provider: False)
    loaded = Engine.load(FLOAT_MODEL, provider="cpu", threads=1, weights_file=memory_file)
    assert loaded._weights is None
    assert not Path(memory_file.path).stat().st_size


def test_process_waits_while_another_one_writes(memory_file: MemoryFile) -> None:
    content = FLOAT_MODEL.read_bytes()
    results = []
    with Path(memory_file.path).open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: results.append(share_weights(content, memory_file)))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        fcntl.flock(file, fcntl.LOCK_UN)
        thread.join()
    assert results[0] is not None


def test_file_of_an_unloaded_model_is_not_mistaken_for_that_of_another_model() -> None:
    """The next memory file gets the descriptor of a closed one. A late process must not write into it."""
    descriptor = os.memfd_create("weights", os.MFD_ALLOW_SEALING)
    unloaded = MemoryFile.from_descriptor(descriptor)
    os.close(descriptor)
    assert os.memfd_create("weights", os.MFD_ALLOW_SEALING) == descriptor
    with pytest.raises(ModelError, match="No such file"):
        Engine.load(FLOAT_MODEL, provider="cpu", threads=1, weights_file=unloaded)
    assert not os.fstat(descriptor).st_size
    os.close(descriptor)


def test_model_that_cannot_be_loaded_is_not_shared(memory_file: MemoryFile) -> None:
    """The usual way of loading names the reason, for the next process too."""
    for _ in range(2):
        assert share_weights(b"no model", memory_file) is None
    model = onnx.load(FLOAT_MODEL)
    model.graph.node[0].op_type = "Nonsense"
    with pytest.raises(ModelError, match="Nonsense"):
        Engine(model.SerializeToString(), provider="cpu", threads=1, weights_file=memory_file)


def test_weights_of_unknown_types_are_not_shared(
    memory_file: MemoryFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_weights, "_DTYPES", {})
    assert share_weights(FLOAT_MODEL.read_bytes(), memory_file) is None
    assert Engine.load(FLOAT_MODEL, provider="cpu", threads=1, weights_file=memory_file)._weights is None
    assert is_sealed(Path(memory_file.path))
    assert not Path(memory_file.path).stat().st_size, "a copy of the weights that no session uses"


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


def test_model_with_weights_in_a_branch_is_loaded_without_sharing(memory_file: MemoryFile) -> None:
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
    assert engine._weights is None
    assert is_sealed(Path(memory_file.path))
    assert not Path(memory_file.path).stat().st_size, "a copy of the weights that no session uses"
