"""Pixels that are decoded once and kept, or never kept."""

from __future__ import annotations

import json
import math
import os
import shutil
import tarfile
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fovea.model.data.dataset import DataError, Dataset, load_dataset
from fovea.model.data.pixel_cache import INDEX_FILE, PIXELS_FILE
from fovea.model.data.pixels import PixelSelection, StreamedPixels
from fovea.model.data.tar_archive import Archive
from fovea.service.errors import BadImage
from tests.model.data.test_dataset import make_archive
from tests.training import draw_images, stack_pixels


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Nine images, one of which cannot be read."""
    folder = draw_images(tmp_path / "squares", count=4)
    (folder / "red" / "3.png").write_bytes(b"GIF89a")
    return folder


def read_dataset(source: Path, cache: Path | None, **options: Any) -> Dataset:
    return load_dataset(source, **{"size": 16, "validation": 0.4, "seed": 0, "cache": cache, **options})


def is_equal(first: Dataset, second: Dataset) -> bool:
    """Are they the same to whoever trains on them?"""
    for name in ("train", "validation", "conformal", "test"):
        one, other = getattr(first, name), getattr(second, name)
        if one.names != other.names or not torch.equal(one.targets, other.targets):
            return False
        if not torch.equal(stack_pixels(one.pixels), stack_pixels(other.pixels)):
            return False
    descriptions = [
        (data.unreadable_files, data.warnings, data.labels, data.geometry) for data in (first, second)
    ]
    return descriptions[0] == descriptions[1]


def pixel_store(data: Dataset) -> object:
    """Where the pixels are that the parts show."""
    pixels = data.train.pixels
    assert isinstance(pixels, PixelSelection)
    return pixels.pixels


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each image that is decoded from here on."""
    from fovea.model.data import decoding, raw_dataset

    calls: list[int] = []
    original = decoding.decode_pixels

    def counting_decode(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(decoding, "decode_pixels", counting_decode)
    monkeypatch.setattr(raw_dataset, "decode_pixels", counting_decode)
    return calls


@pytest.mark.parametrize("packed", [False, True])
def test_what_was_kept_is_mapped_and_not_decoded_again(
    tmp_path: Path, source: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_archive(source, tmp_path / "set.tar.gz") if packed else source
    cache = tmp_path / "deep" / "cache"
    expected = read_dataset(source, None)
    made = count_decodes(monkeypatch)
    first = read_dataset(source, cache)
    assert len(made) == 12
    second = read_dataset(source, cache)
    assert len(made) == 12
    assert is_equal(first, expected)
    assert is_equal(second, expected)
    assert len(second.unreadable_files) == 1
    assert sorted(path.name for path in cache.iterdir()) == [INDEX_FILE, PIXELS_FILE]
    assert (cache / PIXELS_FILE).stat().st_size == 12 * 16 * 16 * 3


def test_the_parts_share_the_one_map(tmp_path: Path, source: Path) -> None:
    data = read_dataset(source, tmp_path / "cache")
    parts = (data.train, data.validation, data.conformal)
    starts = {part.pixels.pixels.data_ptr() for part in parts}  # type: ignore[attr-defined]
    assert len(starts) == 1
    some = data.train.select(torch.tensor([2, 0]))
    assert some.pixels.pixels.data_ptr() in starts  # type: ignore[attr-defined]
    assert torch.equal(stack_pixels(some.pixels), stack_pixels(data.train.pixels)[[2, 0]])
    assert some.names == (data.train.names[2], data.train.names[0])
    assert some.pixels.shape == (2, 16, 16, 3)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "cache" / PIXELS_FILE) in maps.read_text()


def test_a_size_that_was_chosen_may_be_asked_for_later(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = count_decodes(monkeypatch)
    assert read_dataset(source, tmp_path / "cache", size=None).geometry.height == 32
    for size in (None, 32):
        assert read_dataset(source, tmp_path / "cache", size=size).geometry.height == 32
    assert len(made) == 12
    assert read_dataset(source, tmp_path / "cache", size=16).geometry.height == 16
    assert len(made) == 24


def rewrite_image(source: Path, cache: Path) -> None:
    state = (source / "blue" / "0.png").stat()
    (source / "blue" / "0.png").write_bytes((source / "blue" / "1.png").read_bytes())
    os.utime(source / "blue" / "0.png", ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def touch_image(source: Path, cache: Path) -> None:
    os.utime(source / "blue" / "0.png", ns=(1, 1))


def add_image(source: Path, cache: Path) -> None:
    shutil.copy(source / "blue" / "0.png", source / "green" / "9.png")


def move_image(source: Path, cache: Path) -> None:
    (source / "blue" / "0.png").rename(source / "green" / "7.png")


def repair_image(source: Path, cache: Path) -> None:
    shutil.copy(source / "red" / "0.png", source / "red" / "3.png")


def truncate_pixels(source: Path, cache: Path) -> None:
    os.truncate(cache / PIXELS_FILE, 1000)


def overwrite_pixels(source: Path, cache: Path) -> None:
    with (cache / PIXELS_FILE).open("r+b") as file:
        file.write(bytes(1000))


def remove_pixels(source: Path, cache: Path) -> None:
    (cache / PIXELS_FILE).unlink()


def remove_index(source: Path, cache: Path) -> None:
    (cache / INDEX_FILE).unlink()


def truncate_index(source: Path, cache: Path) -> None:
    os.truncate(cache / INDEX_FILE, (cache / INDEX_FILE).stat().st_size // 2)


def change_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], None]:
    def damage(source: Path, cache: Path) -> None:
        index = json.loads((cache / INDEX_FILE).read_text())
        change(index)
        (cache / INDEX_FILE).write_text(json.dumps(index))

    return damage


@pytest.mark.parametrize(
    "change",
    [
        rewrite_image,
        touch_image,
        add_image,
        move_image,
        repair_image,
        truncate_pixels,
        overwrite_pixels,
        remove_pixels,
        remove_index,
        truncate_index,
        change_index(lambda index: index["names"].pop()),
        change_index(lambda index: index.pop("hashes")),
        change_index(lambda index: index.update(digests="zz")),
        change_index(lambda index: index.update(side=8, asked=16)),
        change_index(lambda index: index.update(key=[0])),
        change_index(lambda index: index.update(unreadable=7)),
    ],
)
def test_a_changed_source_or_a_damaged_cache_is_read_anew(
    tmp_path: Path, source: Path, change: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    read_dataset(source, cache)
    change(source, cache)
    made = count_decodes(monkeypatch)
    data = read_dataset(source, cache)
    assert len(made) >= 12
    made.clear()
    assert is_equal(read_dataset(source, cache), data)
    assert not made
    assert is_equal(data, read_dataset(source, None))


def test_another_label_in_a_csv_file_is_another_source(tmp_path: Path, source: Path) -> None:
    table = source / "labels.csv"
    lines = [f"{label}/{row}.png,{label}" for label in ("blue", "green") for row in range(4)]
    for label in ("green", "blue"):
        lines[3] = f"blue/3.png,{label}"
        table.write_text("\n".join(["path,label", *lines]))
        data = read_dataset(table, tmp_path / "cache")
        targets = dict(zip(data.train.names, data.train.targets.tolist(), strict=True))
        targets |= dict(zip(data.validation.names, data.validation.targets.tolist(), strict=True))
        targets |= dict(zip(data.conformal.names, data.conformal.targets.tolist(), strict=True))
        assert data.labels[targets["blue/3.png"]] == label


@pytest.mark.parametrize(
    ("size", "count", "most"), [(10, 200, 64), (5000, 2000, 6 * 64), (5 << 20, 100, 6 * 4)]
)
def test_only_a_few_images_are_held_at_a_time(
    size: int, count: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Archives deliver encoded images faster than they can be decoded."""
    from fovea.model.data import decoding

    monkeypatch.setattr(decoding, "get_thread_count", lambda: 2)
    made = count_decodes(monkeypatch)
    ahead: list[int] = []

    def contents() -> Iterator[tuple[int, Path | bytes]]:
        for row in range(count):
            ahead.append(row + 1 - len(made))
            yield row, image

    image = bytes(size)
    prints = decoding.read_images(contents(), count, decoding.square_geometry(16), None)
    assert len(prints.read_errors) == len(made) == count
    assert max(ahead) <= most


@pytest.mark.parametrize(("size", "threaded"), [(4000, False), (5000, True)])
@pytest.mark.parametrize("packed", [False, True])
def test_small_images_are_not_given_to_threads(
    tmp_path: Path, size: int, threaded: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fovea.model.data import decoding

    threads: set[int] = set()

    def pixels_of(*_: object) -> None:
        threads.add(threading.get_ident())
        raise BadImage("it is none")

    monkeypatch.setattr(decoding, "decode_pixels", pixels_of)
    path = tmp_path / "image"
    path.write_bytes(bytes(size))
    image = path.read_bytes() if packed else path
    decoding.read_images([(row, image) for row in range(100)], 100, decoding.square_geometry(16), None)
    assert (threading.get_ident() not in threads) == threaded


def test_an_archive_is_read_from_its_beginning_to_its_end(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "set.tar"
    names = sorted(file.relative_to(source).as_posix() for file in source.rglob("*.png"))
    with tarfile.open(path, "w") as file:
        for name in names[::-1]:
            file.add(source / name, name)
    found = list(Archive(path).read_contents(names))
    assert [index for index, _ in found] == list(range(len(names)))[::-1]
    assert all(content == (source / names[index]).read_bytes() for index, content in found)


def test_a_cache_of_another_source_is_not_taken(tmp_path: Path, source: Path) -> None:
    read_dataset(source, tmp_path / "cache")
    other = draw_images(tmp_path / "other", count=4, seed=9)
    assert is_equal(read_dataset(other, tmp_path / "cache"), read_dataset(other, None))


def test_a_read_that_was_broken_off_leaves_nothing_to_be_taken(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier cache is gone by then, and the new one is not there yet."""
    from fovea.model.data import decoding

    cache = tmp_path / "cache"
    read_dataset(source, cache)
    touch_image(source, cache)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(decoding, "decode_pixels", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read_dataset(source, cache)
    assert list(cache.iterdir()) == []
    assert is_equal(read_dataset(source, cache), read_dataset(source, None))


def test_a_folder_that_cannot_be_made_is_told_of(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot store pixels in .*/file/cache: Not a directory"):
        read_dataset(source, tmp_path / "file" / "cache")


# --- streamed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_streamed_is_the_same(
    tmp_path: Path, source: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" if cached else None
    expected = read_dataset(source, None)
    made = count_decodes(monkeypatch)
    for passes in (1, 1 if cached else 2):
        data = read_dataset(source, cache, stream=True)
        assert isinstance(pixel_store(data), StreamedPixels)
        assert len(made) == 12 * passes
    assert is_equal(data, expected)
    assert not (tmp_path / "cache" / PIXELS_FILE).exists()
    assert pixel_store(data).shape == (12, 16, 16, 3)  # type: ignore[attr-defined]
    assert data.train.pixels[torch.empty(0, dtype=torch.int64)].shape == (0, 16, 16, 3)
    assert torch.equal(data.train.pixels[:2], stack_pixels(expected.train.pixels)[:2])


Usage = namedtuple("Usage", "total used free")  # as shutil has it


def test_without_room_on_the_disk_images_are_streamed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    cache = tmp_path / "cache"
    read_dataset(source, cache, size=32)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 1 << 20))
        first = read_dataset(source, cache, on_warning=said.append)
        assert isinstance(pixel_store(first), StreamedPixels)
        (line,) = said
        assert line.startswith(
            f"{cache} has no room for 0.0 GB of pixels: images are decoded on every access"
        )
        made = count_decodes(full)
        again = read_dataset(source, cache, on_warning=said.append)
        assert isinstance(pixel_store(again), StreamedPixels)
        assert not made
    assert is_equal(first, again)
    later = read_dataset(source, cache)
    assert not isinstance(pixel_store(later), StreamedPixels)
    assert is_equal(first, later)


def test_a_disk_that_fills_at_that_moment_is_no_room_either(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, offset: int, length: int) -> None:
        assert (offset, length) == (0, math.prod((12, 16, 16, 3)))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    data = read_dataset(source, tmp_path / "cache")
    assert isinstance(pixel_store(data), StreamedPixels)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [INDEX_FILE]


@pytest.mark.parametrize("cached", [False, True])
def test_an_archive_cannot_be_streamed(tmp_path: Path, source: Path, cached: bool) -> None:
    packed = make_archive(source, tmp_path / "set.tar")
    if cached:
        read_dataset(packed, tmp_path / "cache")
    with pytest.raises(DataError, match="unpack it, or make room"):
        read_dataset(packed, tmp_path / "cache", stream=True)


def test_an_image_that_is_gone_when_it_is_wanted_is_named(tmp_path: Path, source: Path) -> None:
    data = read_dataset(source, None, stream=True)
    (source / data.train.names[1]).unlink()
    with pytest.raises(DataError, match=f"{data.train.names[1]} can no longer be read: "):
        stack_pixels(data.train.pixels)
