"""The processes of the local engine: the same rows as in one process, and every end of a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from fovea.bulk.inputs.basic_entries import BytesEntry
from fovea.bulk.local_engine import LocalEngine, choose_batch_size, count_processes
from fovea.bulk.rows import Row
from fovea.bulk.worker_pool import WorkerPool
from fovea.errors import ModelError, StartError
from fovea.service.cli import load_live_model
from fovea.service.image_files import ImageEntry
from fovea.service.resources.cgroup import Cgroup
from fovea.service.runners.load_messages import LoadCommand
from fovea.service.runners.predictor import Predictor
from fovea.service.serving.standalone import load_predictor
from fovea.service.settings import Settings, load_settings
from tests.fovea.bulk.slow_entries import DeadlyEntry, FaultyEntry, FileEntry
from tests.pictures import make_jpeg
from tests.servers import ROOT, wait_until

PROCESSES = 2


def make_engine(settings: Settings, *, has_processes: bool = True) -> LocalEngine:
    """Return an engine with processes, whatever threads the tests have."""

    def load_model(load: LoadCommand) -> Predictor | WorkerPool:
        return WorkerPool(load) if has_processes else load_predictor(load)

    loaded, model = load_live_model(settings, None, load_model, choose_batch_size)
    return LocalEngine(loaded, model, top_k=2, coverage=None, max_bytes=settings.body_bytes)


@pytest.fixture
def settings(small_zoo: Path) -> Settings:
    return load_settings(models=small_zoo, runners=PROCESSES)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the paths of images, of a broken one, and of one that does not exist."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{index:03}.jpg" for index in range(100)]
    for index, path in enumerate(paths):
        path.write_bytes(make_jpeg(30 + index % 7, 40, index))
    paths[7].write_bytes(make_jpeg()[:200])
    paths[11].unlink()
    (folder / "notes.txt").write_text("no image")
    return [*paths, folder / "notes.txt"]


def classify(engine: LocalEngine, entries: Sequence[ImageEntry]) -> list[Row | None]:
    chunks = list(engine.classify(cut(entries, engine.chunk_size)))
    assert [name for chunk in chunks for name in chunk.names] == [entry.name for entry in entries]
    return [row for chunk in chunks for row in chunk.rows]


def cut(entries: Sequence[ImageEntry], size: int) -> Iterator[Sequence[ImageEntry]]:
    yield from (entries[start : start + size] for start in range(0, len(entries), size))


def list_children() -> set[int]:
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def test_rows_are_those_of_one_process_to_the_last_bit(settings: Settings, images: list[Path]) -> None:
    entries = [FileEntry(path) for path in images]
    children = list_children()
    engine = make_engine(settings)
    assert len(list_children() - children) == PROCESSES
    rows = classify(engine, entries)
    assert rows == classify(make_engine(settings, has_processes=False), entries)
    assert [row and row.error for row in rows[6:12]] == [
        None,
        "bad_image",
        None,
        None,
        None,
        "unreadable_file",
    ]
    assert rows[-1] is None
    assert classify(engine, entries) == rows  # a second time, with the same processes
    del engine
    assert list_children() <= children


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [(None, 0, 64), (8_000, 100, 64), (2_000, 100, 55), (2_000, 1_500, 1), (400, 300, 0)],
)
def test_processes_fit_into_the_memory_of_the_container(
    settings: Settings, tmp_path: Path, limit: int | None, used: int, expected: int
) -> None:
    """A process of the small model takes about 26 MB, and all processes share what decoding may take."""
    (tmp_path / "memory.max").write_text("max" if limit is None else str(limit << 20))
    (tmp_path / "memory.current").write_text(str(used << 20))
    (tmp_path / "memory.stat").write_text("inactive_file 0\n")
    (tmp_path / "membership").write_text("0::/\n")
    load = load_live_model(settings, None, load_predictor)[1].load
    load = replace(load, plan=replace(load.plan, processes=64, decode_bytes=256 << 20))
    assert count_processes(load, Cgroup(tmp_path, tmp_path / "membership")) == expected


def test_process_with_other_threads_is_not_forked(settings: Settings, images: list[Path]) -> None:
    children = list_children()
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        engine = LocalEngine.load(settings, None, top_k=2, coverage=None)
        assert list_children() <= children
        entries = [FileEntry(path) for path in images]
        assert classify(engine, entries) == classify(make_engine(settings), entries)
    finally:
        end.set()
        thread.join()


def test_image_that_takes_most_of_the_memory_is_classified(small_zoo: Path, images: list[Path]) -> None:
    """The row must not depend on the number of processes, of which each has a share of the memory."""
    entries = [FileEntry(path) for path in images[:6]]
    generous = load_settings(models=small_zoo, runners=PROCESSES)
    rows = classify(make_engine(generous), entries)
    sizes = {"decode_bytes": 8000}
    strict = load_settings(models=small_zoo, runners=PROCESSES).model_copy(update=sizes)
    strict_rows = classify(make_engine(strict), entries)
    assert strict_rows == classify(make_engine(strict, has_processes=False), entries)
    assert len({row and row.error for row in [*rows, *strict_rows]}) == 2  # some are too large


@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_chunk_of_large_images_is_sent_one_by_one(
    size: int, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(settings)
    entries = [BytesEntry(f"{index}.jpg", make_jpeg(30, 40, index).ljust(size, b"\0")) for index in range(5)]
    sent: list[list[ImageEntry]] = []
    send = Connection.send

    def record(connection: Connection, message: object) -> None:
        if isinstance(message, list):
            sent.append(message)
        send(connection, message)

    monkeypatch.setattr(Connection, "send", record)
    rows = classify(engine, entries)
    assert [row and row.error for row in rows] == [None] * 5
    assert list(map(len, sent)) == ([5] if size == 1000 else [1] * 5)


@pytest.mark.parametrize(
    ("number", "end"),
    [
        (0, "ended with exit status 1"),
        (signal.SIGTERM, "was ended by SIGTERM"),
        (signal.SIGKILL, r"was killed \(SIGKILL\), perhaps because memory ran out,"),
    ],
)
def test_image_that_ends_a_process_is_named(
    number: int, end: str, settings: Settings, images: list[Path]
) -> None:
    engine = make_engine(settings)
    chunk = [FileEntry(images[0]), DeadlyEntry(images[1], number=number)]
    with pytest.raises(
        StartError,
        match=f"^a worker process {end} while it classified the images from '{images[0]}' to '{images[1]}'$",
    ):
        list(engine.classify(iter([chunk] * 5)))


def test_mistake_in_a_process_has_its_traceback(settings: Settings, images: list[Path]) -> None:
    engine = make_engine(settings)
    with pytest.raises(ZeroDivisionError, match="a mistake") as caught:
        classify(engine, [FaultyEntry(images[0])])
    assert "in read\n" in "".join(caught.value.__notes__)


def test_model_that_cannot_be_loaded_leaves_no_process(settings: Settings, tmp_path: Path) -> None:
    def load_damaged(load: LoadCommand) -> WorkerPool:
        return WorkerPool(replace(load, fingerprint=(1, 2, 3)))

    children = list_children()
    with pytest.raises(ModelError, match="has changed since it was found"):
        load_live_model(settings, None, load_damaged)
    assert list_children() <= children


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_end_of_the_command_is_that_of_its_processes(number: int, small_zoo: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches all processes of a terminal, and a kill only one."""
    for index in range(3000):
        (tmp_path / f"{index:04}.jpg").write_bytes(make_jpeg(30, 40, index % 9))
    command = [sys.executable, "-m", "fovea", "classify", str(tmp_path), "--out", str(tmp_path / "table.csv")]
    environment = {**os.environ, "FOVEA_MODELS": str(small_zoo), "FOVEA_RUNNERS": str(PROCESSES)}
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_until(lambda: (tmp_path / ".table.csv.parts" / "00000.json").exists())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == PROCESSES
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        _, errors = process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in errors
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
