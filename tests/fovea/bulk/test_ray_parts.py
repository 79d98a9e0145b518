"""The parts of the Ray engine that need no cluster: windows of tasks, limits, and what goes to workers."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fovea.bulk import ray_driver, ray_engine, ray_window
from fovea.bulk.inputs.basic_entries import BytesEntry
from fovea.bulk.ray_engine import RayEngine, Window
from fovea.bulk.ray_messages import Task
from fovea.bulk.ray_worker import WORKER_SETTINGS, WorkerModel
from fovea.service.artifact.repository import ModelVersion
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.standalone import create_load, load_predictor
from fovea.service.settings import Settings, load_settings


def list_chunks(count: int, size: int = 0) -> Iterator[list[BytesEntry]]:
    """Yield chunks of 8 entries that hold images of `size` bytes."""
    for chunk in range(count):
        yield [BytesEntry(f"{chunk}/{index}", bytes(size)) for index in range(8)]


def read_names(tasks: list[Task]) -> list[str]:
    chunks = [pickle.loads(chunk) for task in tasks for chunk in pickle.loads(task.content)]  # noqa: S301
    return [entry.name for chunk in chunks for entry in chunk]


def test_window_has_tasks_of_64_entries_and_says_whether_it_is_the_last() -> None:
    chunks = list_chunks(21)
    first = Window(chunks, 128)
    tasks = list(first)
    assert [task.entries for task in tasks] == [64, 64]
    assert (first.task_count, first.is_last) == (2, False)
    assert tasks[1].first_names == ["8/0", "8/1", "8/2"]
    last = Window(chunks, 128)
    tasks += last
    assert [task.entries for task in tasks] == [64, 64, 40]
    assert (last.task_count, last.is_last) == (1, True)
    assert read_names(tasks) == [entry.name for chunk in list_chunks(21) for entry in chunk]
    nothing = Window(chunks, 128)
    assert (list(nothing), nothing.task_count, nothing.is_last) == ([], 0, True)


def test_tasks_and_windows_end_by_bytes() -> None:
    """64 images of an archive in one message could take gigabytes."""
    size = 1 << 20
    chunks = list_chunks(100, size)
    window = Window(chunks, 1000)
    sizes = [(task.entries, len(task.content)) for task in window]
    chunk_size = 8 * size + 10_000
    assert all(length < ray_engine._MAX_TASK_BYTES + chunk_size for _, length in sizes)
    assert {entries for entries, _ in sizes} <= {8, 16}
    assert sum(length for _, length in sizes) < ray_engine._MAX_WINDOW_BYTES + chunk_size
    assert not window.is_last
    assert next(chunks)[0].name == f"{sum(entries for entries, _ in sizes) // 8}/0"  # nothing is lost


def test_window_of_a_slow_source_ends_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the cluster would wait for the whole window before its first image."""
    now = 0.0

    def list_slowly() -> Iterator[list[BytesEntry]]:
        nonlocal now
        for chunk in list_chunks(1000):
            now += 2
            yield chunk

    monkeypatch.setattr(ray_engine, "time", SimpleNamespace(monotonic=lambda: now))
    window = Window(list_slowly(), 8000)
    assert [task.entries for task in window] == [64] * 4  # a task takes 16 s
    assert not window.is_last


def test_next_window_follows_from_the_entries_that_came() -> None:
    assert ray_driver.choose_window(2000, 10) == 60_000
    assert ray_driver.choose_window(10, 10) == ray_driver._FIRST_WINDOW
    assert ray_driver.choose_window(20_000, 0) == ray_driver._MAX_WINDOW


def test_run_without_result_ends_with_the_names_of_the_waiting_task() -> None:
    tasks = [["z.png"], ["a.png", "b.png", "c.png"]]
    assert ray_driver.describe_hang(599, tasks) is None
    assert ray_driver.describe_hang(601, tasks) == (
        "the Ray cluster has given no result for 601 s; the first images of the task that waits are "
        "'a.png', 'b.png', 'c.png'"
    )


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), ValueError("bad")])
def test_every_end_of_a_data_set_reaches_its_client(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def iterate_and_fail(*_: Any) -> Iterator[tuple[int, bytes]]:
        yield 0, b"result"
        raise error

    monkeypatch.setattr(ray_window, "iterate_results", iterate_and_fail)
    monkeypatch.setattr(ray_window, "_POLL_SECONDS", 0.1)
    runner = ray_window._WindowRunner()
    runner.start(None, [None], None, [])  # type: ignore[arg-type]
    results: list[Any] = []
    with pytest.raises(type(error) if isinstance(error, Exception) else RuntimeError) as caught:
        for _ in range(100):
            results += runner.poll() or ["end"]
    assert results[0] == (0, b"result")
    assert "end" not in results
    assert str(error) in str(caught.value)


def test_workers_get_no_settings_but_those_that_they_need(small_zoo: Path) -> None:
    """Settings that come later, such as keys, stay with the command."""
    settings = load_settings(models=small_zoo, image_pixels=12345)
    names = set()

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            names.add(name)
            return getattr(settings, name)

    recorder: Any = Recorder()
    engine = RayEngine.load(settings, None, top_k=3, coverage=None, address=None)
    model: WorkerModel = engine._job.model
    version = ModelVersion.from_path(next(small_zoo.rglob("model.onnx")), model.name, model.version)
    load = create_load(version, recorder, 1)
    LiveModel.from_load_result(version, load, load_predictor(load).loaded_model, recorder)
    assert names - {"runners", "runner_threads"} <= set(WORKER_SETTINGS)
    assert set(model.settings) == set(WORKER_SETTINGS)
    rebuilt = Settings.model_construct(None, **model.settings)
    assert create_load(version, rebuilt, 1) == create_load(version, settings, 1)
    assert rebuilt.image_pixels == 12345
