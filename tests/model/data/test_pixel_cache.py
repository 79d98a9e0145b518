"""The cache of decoded pixels, and streaming, which stores no pixels."""

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
    """Compare two data sets in all that training and its messages use."""
    for name in ("train", "validation", "conformal", "test"):
        first_part, second_part = getattr(first, name), getattr(second, name)
        if first_part.names != second_part.names or not torch.equal(first_part.targets, second_part.targets):
            return False
        if not torch.equal(stack_pixels(first_part.pixels), stack_pixels(second_part.pixels)):
            return False
    descriptions = [
        (data.unreadable_files, data.warnings, data.labels, data.geometry) for data in (first, second)
    ]
    return descriptions[0] == descriptions[1]


def get_pixel_store(data: Dataset) -> object:
    """Return the store that the parts select their pixels from."""
    pixels = data.train.pixels
    assert isinstance(pixels, PixelSelection)
    return pixels.pixels


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one entry with each image decoded from now on."""
    from fovea.model.data import decoding, raw_dataset

    calls: list[int] = []
    original = decoding.decode_pixels

    def counting_decode(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(decoding, "decode_pixels", counting_decode)
    monkeypatch.setattr(raw_dataset, "decode_pixels", counting_decode)
    return calls


@pytest.mark.parametrize("is_packed", [False, True])
def test_cached_pixels_are_not_decoded_again(
    tmp_path: Path, source: Path, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_archive(source, tmp_path / "set.tar.gz") if is_packed else source
    cache = tmp_path / "deep" / "cache"
    expected = read_dataset(source, None)
    decodes = count_decodes(monkeypatch)
    first = read_dataset(source, cache)
    assert len(decodes) == 12
    second = read_dataset(source, cache)
    assert len(decodes) == 12
    assert is_equal(first, expected)
    assert is_equal(second, expected)
    assert len(second.unreadable_files) == 1
    assert sorted(path.name for path in cache.iterdir()) == [INDEX_FILE, PIXELS_FILE]
    assert (cache / PIXELS_FILE).stat().st_size == 12 * 16 * 16 * 3


def test_parts_share_one_memory_map(tmp_path: Path, source: Path) -> None:
    data = read_dataset(source, tmp_path / "cache")
    parts = (data.train, data.validation, data.conformal)
    starts = {part.pixels.pixels.data_ptr() for part in parts}  # type: ignore[attr-defined]
    assert len(starts) == 1
    selection = data.train.select(torch.tensor([2, 0]))
    assert selection.pixels.pixels.data_ptr() in starts  # type: ignore[attr-defined]
    assert torch.equal(stack_pixels(selection.pixels), stack_pixels(data.train.pixels)[[2, 0]])
    assert selection.names == (data.train.names[2], data.train.names[0])
    assert selection.pixels.shape == (2, 16, 16, 3)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "cache" / PIXELS_FILE) in maps.read_text()


def test_cache_serves_the_size_that_was_chosen(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodes = count_decodes(monkeypatch)
    assert read_dataset(source, tmp_path / "cache", size=None).geometry.height == 32
    for size in (None, 32):
        assert read_dataset(source, tmp_path / "cache", size=size).geometry.height == 32
    assert len(decodes) == 12
    assert read_dataset(source, tmp_path / "cache", size=16).geometry.height == 16
    assert len(decodes) == 24


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
def test_changed_source_or_damaged_cache_is_read_again(
    tmp_path: Path, source: Path, change: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    read_dataset(source, cache)
    change(source, cache)
    decodes = count_decodes(monkeypatch)
    data = read_dataset(source, cache)
    assert len(decodes) >= 12
    decodes.clear()
    assert is_equal(read_dataset(source, cache), data)
    assert not decodes
    assert is_equal(data, read_dataset(source, None))


def test_changed_csv_label_invalidates_the_cache(tmp_path: Path, source: Path) -> None:
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
    ("size", "count", "max_held"), [(10, 200, 64), (5000, 2000, 6 * 64), (5 << 20, 100, 6 * 4)]
)
def test_few_encoded_images_are_held_in_memory(
    size: int, count: int, max_held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Archives deliver encoded images faster than they can be decoded."""
    from fovea.model.data import decoding

    monkeypatch.setattr(decoding, "get_thread_count", lambda: 2)
    decodes = count_decodes(monkeypatch)
    held_counts: list[int] = []

    def yield_contents() -> Iterator[tuple[int, Path | bytes]]:
        for row in range(count):
            held_counts.append(row + 1 - len(decodes))
            yield row, image

    image = bytes(size)
    result = decoding.read_images(yield_contents(), count, decoding.square_geometry(16), None)
    assert len(result.read_errors) == len(decodes) == count
    assert max(held_counts) <= max_held


@pytest.mark.parametrize(("size", "uses_threads"), [(4000, False), (5000, True)])
@pytest.mark.parametrize("is_packed", [False, True])
def test_only_large_images_are_decoded_in_threads(
    tmp_path: Path, size: int, uses_threads: bool, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fovea.model.data import decoding

    threads: set[int] = set()

    def record_thread(*_: object) -> None:
        threads.add(threading.get_ident())
        raise BadImage("it is none")

    monkeypatch.setattr(decoding, "decode_pixels", record_thread)
    path = tmp_path / "image"
    path.write_bytes(bytes(size))
    image = path.read_bytes() if is_packed else path
    decoding.read_images([(row, image) for row in range(100)], 100, decoding.square_geometry(16), None)
    assert (threading.get_ident() not in threads) == uses_threads


def test_archive_is_read_in_member_order(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "set.tar"
    names = sorted(file.relative_to(source).as_posix() for file in source.rglob("*.png"))
    with tarfile.open(path, "w") as file:
        for name in names[::-1]:
            file.add(source / name, name)
    contents = list(Archive(path).read_contents(names))
    assert [index for index, _ in contents] == list(range(len(names)))[::-1]
    assert all(content == (source / names[index]).read_bytes() for index, content in contents)


def test_cache_of_another_source_is_not_used(tmp_path: Path, source: Path) -> None:
    read_dataset(source, tmp_path / "cache")
    other_source = draw_images(tmp_path / "other", count=4, seed=9)
    assert is_equal(read_dataset(other_source, tmp_path / "cache"), read_dataset(other_source, None))


def test_interrupted_read_leaves_an_empty_cache(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier cache is removed, and no new one is written."""
    from fovea.model.data import decoding

    cache = tmp_path / "cache"
    read_dataset(source, cache)
    touch_image(source, cache)

    def interrupt_decoding(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as decoding_patch:
        decoding_patch.setattr(decoding, "decode_pixels", interrupt_decoding)
        with pytest.raises(KeyboardInterrupt):
            read_dataset(source, cache)
    assert list(cache.iterdir()) == []
    assert is_equal(read_dataset(source, cache), read_dataset(source, None))


def test_unusable_cache_folder_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot store pixels in .*/file/cache: Not a directory"):
        read_dataset(source, tmp_path / "file" / "cache")


# --- streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_cache", [False, True])
def test_streamed_data_equals_stored_data(
    tmp_path: Path, source: Path, has_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" if has_cache else None
    expected = read_dataset(source, None)
    decodes = count_decodes(monkeypatch)
    for passes in (1, 1 if has_cache else 2):
        data = read_dataset(source, cache, stream=True)
        assert isinstance(get_pixel_store(data), StreamedPixels)
        assert len(decodes) == 12 * passes
    assert is_equal(data, expected)
    assert not (tmp_path / "cache" / PIXELS_FILE).exists()
    assert get_pixel_store(data).shape == (12, 16, 16, 3)  # type: ignore[attr-defined]
    assert data.train.pixels[torch.empty(0, dtype=torch.int64)].shape == (0, 16, 16, 3)
    assert torch.equal(data.train.pixels[:2], stack_pixels(expected.train.pixels)[:2])


Usage = namedtuple("Usage", "total used free")  # as shutil has it


def test_images_are_streamed_without_disk_space(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    cache = tmp_path / "cache"
    read_dataset(source, cache, size=32)
    with monkeypatch.context() as disk_patch:
        disk_patch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 1 << 20))
        first_data = read_dataset(source, cache, on_warning=warnings.append)
        assert isinstance(get_pixel_store(first_data), StreamedPixels)
        (line,) = warnings
        assert line.startswith(
            f"{cache} has no room for 0.0 GB of pixels: images are decoded on every access"
        )
        decodes = count_decodes(disk_patch)
        second_data = read_dataset(source, cache, on_warning=warnings.append)
        assert isinstance(get_pixel_store(second_data), StreamedPixels)
        assert not decodes
    assert is_equal(first_data, second_data)
    cached_data = read_dataset(source, cache)
    assert not isinstance(get_pixel_store(cached_data), StreamedPixels)
    assert is_equal(first_data, cached_data)


def test_images_are_streamed_after_a_disk_full_error(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_disk_full(file: int, offset: int, length: int) -> None:
        assert (offset, length) == (0, math.prod((12, 16, 16, 3)))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", raise_disk_full)
    data = read_dataset(source, tmp_path / "cache")
    assert isinstance(get_pixel_store(data), StreamedPixels)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [INDEX_FILE]


@pytest.mark.parametrize("has_cache", [False, True])
def test_streaming_an_archive_is_refused(tmp_path: Path, source: Path, has_cache: bool) -> None:
    archive = make_archive(source, tmp_path / "set.tar")
    if has_cache:
        read_dataset(archive, tmp_path / "cache")
    with pytest.raises(DataError, match="unpack it, or make room"):
        read_dataset(archive, tmp_path / "cache", stream=True)


def test_missing_streamed_image_is_named_in_the_error(tmp_path: Path, source: Path) -> None:
    data = read_dataset(source, None, stream=True)
    (source / data.train.names[1]).unlink()
    with pytest.raises(DataError, match=f"{data.train.names[1]} can no longer be read: "):
        stack_pixels(data.train.pixels)
