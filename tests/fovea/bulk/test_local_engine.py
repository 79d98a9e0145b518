"""The engine in this process: order, memory, and batches by position."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from fovea.bulk import local_engine, table_run
from fovea.bulk.inputs.basic_entries import BytesEntry as HeldEntry
from fovea.bulk.local_engine import LocalEngine, choose_batch_size
from fovea.errors import FileError, ModelError
from fovea.service.cli import load_live_model
from fovea.service.image_files import ImageEntry
from fovea.service.serving.standalone import load_predictor
from fovea.service.settings import load_settings
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg


@dataclass(frozen=True)
class BytesEntry:
    """An image in memory; a failed entry has none."""

    name: str
    content: bytes | None
    is_named: bool = False

    def read(self, max_bytes: int) -> bytes:
        if self.content is None:
            raise FileError("gone")
        return self.content


def make_engine(zoo: Path, threads: int) -> LocalEngine:
    """Return an engine with threads; `test_worker_pool` has processes."""
    settings = load_settings(models=zoo, runners=threads)
    predictor, model = load_live_model(settings, None, load_predictor, choose_batch_size)
    return LocalEngine(predictor, model, top_k=2, coverage=None, max_bytes=settings.body_bytes)


def cut(entries: Sequence[ImageEntry], size: int) -> Iterator[Sequence[ImageEntry]]:
    yield from (entries[start : start + size] for start in range(0, len(entries), size))


@pytest.fixture(scope="module")
def entries() -> list[BytesEntry]:
    contents = [make_jpeg(30 + seed, 40, seed) for seed in range(5)]
    return [
        BytesEntry(f"{number:03d}.jpg", None if number % 11 == 3 else contents[number % 5])
        for number in range(150)
    ]


def test_rows_do_not_depend_on_the_number_of_threads(small_zoo: Path, entries: list[BytesEntry]) -> None:
    """Equality to the last bit: an exclusive call, or other batches, would differ."""
    results = []
    for threads in (1, 4):
        engine = make_engine(small_zoo, threads)
        chunks = list(engine.classify(cut(entries, engine.chunk_size)))
        assert [name for chunk in chunks for name in chunk.names] == [entry.name for entry in entries]
        results.append([row for chunk in chunks for row in chunk.rows])
    assert results[0] == results[1]
    assert [row is not None and row.error for row in results[0][2:5]] == [None, "unreadable_file", None]


def test_images_in_memory_are_few_however_many_there_are(small_zoo: Path, entries: list[BytesEntry]) -> None:
    engine = make_engine(small_zoo, 2)
    listed = 0

    def list_chunks() -> Iterator[Sequence[ImageEntry]]:
        nonlocal listed
        for chunk in cut(entries * 20, engine.chunk_size):
            listed += 1
            yield chunk

    received = 0
    for _ in engine.classify(list_chunks()):
        received += 1
        assert listed - received <= 8
    assert received == listed == -(-3000 // engine.chunk_size)


class Content(bytes):
    """An encoded image that counts how many bytes of its kind are in memory."""

    alive = most_alive = 0
    lock = threading.Lock()

    def __new__(cls, content: bytes) -> Content:
        with cls.lock:
            Content.alive += len(content)
            Content.most_alive = max(Content.most_alive, Content.alive)
        return super().__new__(cls, content)

    def __del__(self) -> None:
        with self.lock:
            Content.alive -= len(self)

    @classmethod
    def forget(cls) -> None:
        gc.collect()
        Content.alive = Content.most_alive = 0


IMAGE_BYTES = 100_000


def make_large_image(number: int) -> Content:
    """Return an image with much behind its end; some images are broken."""
    content = make_jpeg(30, 40, number) if number % 5 else b"\xff\xd8\xff"
    return Content(content.ljust(IMAGE_BYTES, b"\0"))


@pytest.mark.long
def test_bytes_that_entries_hold_are_few_however_many_threads_there_are(
    small_zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compressed archive of some MB may unpack to members of 64 MB each."""
    engine = make_engine(small_zoo, 8)
    limit = engine.chunk_size * IMAGE_BYTES
    monkeypatch.setattr(local_engine, "_HELD_BYTES", limit)
    count = 20 * engine.chunk_size + 3
    Content.forget()

    entries = (HeldEntry(f"{number}.jpg", make_large_image(number)) for number in range(count))
    chunks = table_run._cut(entries, engine.chunk_size)
    names = [name for chunk in engine.classify(chunks) for name in chunk.names]
    assert names == [f"{number}.jpg" for number in range(count)]
    assert limit <= Content.most_alive < 2 * limit


def test_each_thread_holds_one_file(small_zoo: Path) -> None:
    @dataclass(frozen=True)
    class LargeFile:
        number: int
        is_named: bool = False

        @property
        def name(self) -> str:
            return f"{self.number}.jpg"

        def read(self, max_bytes: int) -> bytes:
            if self.number % 7 == 0:
                raise FileError("gone")
            return make_large_image(self.number)

    engine = make_engine(small_zoo, 2)
    Content.forget()
    files = [LargeFile(number) for number in range(10 * engine.chunk_size)]
    rows = [row for chunk in engine.classify(cut(files, engine.chunk_size)) for row in chunk.rows]
    errors = [row.error for row in rows if row is not None]
    assert errors == [
        "unreadable_file" if number % 7 == 0 else None if number % 5 else "bad_image"
        for number in range(len(files))
    ]
    assert IMAGE_BYTES <= Content.most_alive <= 2 * IMAGE_BYTES


def test_closed_engine_leaves_no_thread(small_zoo: Path, entries: list[BytesEntry]) -> None:
    engine = make_engine(small_zoo, 2)
    outcomes = engine.classify(cut(entries, engine.chunk_size))
    assert len(list(islice(outcomes, 2))) == 2
    outcomes.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bulk")]


def test_model_that_was_replaced_while_loading_is_refused(tmp_path: Path) -> None:
    zoo = add_to_repository(build_model(), tmp_path / "zoo")
    settings = load_settings(models=zoo)
    predictor, model = load_live_model(settings, None, load_predictor)
    path = model.model_version.path
    path.write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match="was replaced while it was loaded"):
        LocalEngine(predictor, model, top_k=2, coverage=None, max_bytes=1000)
    path.unlink()
    with pytest.raises(ModelError, match="cannot read the model"):
        LocalEngine(predictor, model, top_k=2, coverage=None, max_bytes=1000)
