"""Batches in page-locked memory and calls with IO binding, with ordinary memory in place of a GPU's."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.engine import Engine
from fovea.service.inference.pinned_memory import PinnedBatches, find_pinned_memory, pad_size
from fovea.service.providers import PROVIDERS
from fovea.service.runners.batch_messages import Answer
from fovea.service.runners.load_messages import ProcessPlan
from fovea.service.runners.predictor import Predictor
from tests.graphs import build_model
from tests.pictures import make_jpeg

MODEL = build_model().SerializeToString()
UINT8 = np.dtype(np.uint8)


def make_images(count: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU take the path of a GPU."""
    monkeypatch.setitem(PROVIDERS, "cpu", replace(PROVIDERS["cpu"], is_gpu=True))


def test_sizes_are_padded_to_powers_of_two() -> None:
    assert [pad_size(count) for count in (1, 2, 3, 4, 5, 32, 33)] == [1, 2, 4, 4, 8, 32, 64]


def test_allocated_batch_is_padded_without_a_copy() -> None:
    batches = PinnedBatches(None)
    batch = batches.allocate((3, 16, 16, 3), UINT8)
    batch[...] = make_images(3)
    padded = batches.pad_batch(batch)
    assert padded.shape == (4, 16, 16, 3)
    assert np.shares_memory(padded, batch)
    other_batch = make_images(6)
    padded = batches.pad_batch(other_batch)
    assert padded.shape == (8, 16, 16, 3)
    assert np.array_equal(padded[:6], other_batch)


def test_each_thread_has_buffers_of_its_own() -> None:
    batches = PinnedBatches(None)
    batch = batches.allocate((1, 16, 16, 3), UINT8)
    others: list[Any] = []
    thread = threading.Thread(target=lambda: others.append(batches.allocate((1, 16, 16, 3), UINT8)))
    thread.start()
    thread.join()
    assert not np.shares_memory(batch, others[0])
    assert np.shares_memory(batch, batches.allocate((1, 16, 16, 3), UINT8))


@pytest.mark.usefixtures("cpu_as_gpu")
def test_engine_on_a_gpu_gives_the_answers_of_plain_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Engine(MODEL, provider="cpu", threads=1, wide_threads=2)
    monkeypatch.undo()
    cpu = Engine(MODEL, provider="cpu", threads=1)
    gpu.warm_up(6)
    assert gpu.check_golden_set() == cpu.check_golden_set()
    for count in (5, 1, 3, 8, 2):
        images = make_images(count)
        batch = gpu.allocate_batch(images.shape, images.dtype)
        batch[...] = images
        assert np.array_equal(gpu.run(batch), cpu.run(images))
        assert np.array_equal(gpu.run(images), cpu.run(images))


@pytest.mark.usefixtures("cpu_as_gpu")
def test_runner_on_a_gpu_decodes_into_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_bytes(MODEL)
    plan = ProcessPlan("cpu", 0, 1, 0, 1, 1_000_000, 1 << 28, 1)
    images = [make_jpeg(seed=seed) for seed in range(3)]
    reports = []
    for _ in range(2):
        predictor = Predictor(tmp_path / "model.onnx", plan, DecodeMemory(1 << 28))
        reports.append((predictor.loaded_model.batch_max, predictor.predict_batch(images).answers))
        monkeypatch.undo()  # the second predictor runs on the CPU as such
    (gpu_batch_max, gpu_answers), (cpu_batch_max, cpu_answers) = reports
    assert (gpu_batch_max, cpu_batch_max) == (32, 4)
    for one, other in zip(gpu_answers, cpu_answers, strict=True):
        assert isinstance(one, Answer)
        assert isinstance(other, Answer)
        assert bytes(one.probabilities) == bytes(other.probabilities)
        assert one.brightness == other.brightness


def test_machine_without_gpu_has_no_pinned_memory() -> None:
    if not Path("/dev/nvidiactl").exists():
        assert find_pinned_memory() is None
