"""A labelled set as its source has it: every file with its labels, and where its pixels are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from model import cifar10
from model.cache import Cache, NoRoom
from model.examples import DataError
from model.labels import labels_of, require_labels
from model.pixels import Pixels, Streamed
from model.reading import Prints, natural_side, pixels_of, read_images, square
from model.sources import Archive, File, Folder, OnDisk
from model.table import SUFFIXES, Table
from service.contract import Geometry
from service.errors import RequestError, one_line

Say = Callable[[str], None]


@dataclass(frozen=True)
class Whole:
    """A set before it is split, a row a file, some of them unreadable."""

    name: str
    geometry: Geometry
    files: tuple[File, ...]
    pixels: Pixels
    prints: Prints


def source_at(path: Path) -> Folder | Archive | Table:
    """What lies there; a folder without labels and with one CSV file is that file. Raises `DataError`."""
    if not path.exists():
        raise DataError(f"there is no {path}")
    if not path.is_dir():
        return Table(path) if path.suffix.lower() in SUFFIXES else Archive(path)
    folder = Folder(path)
    tables = [name for name in folder.names if "/" not in name and Path(name).suffix.lower() in SUFFIXES]
    if len(tables) == 1 and len(labels_of(folder.files())) < 2:
        return Table(path / tables[0])
    return folder


def read(
    source: Folder | Archive | Table, size: int | None, folder: Path | None, *, stream: bool, say: Say
) -> Whole:
    """Everything in `source`; the arguments are those of `model.data.load`. Raises `DataError`."""
    cache = Cache(folder, source.fingerprint(), size) if folder else None
    if cache and (kept := _kept(source, cache, stream=stream)):
        return kept
    if not isinstance(source, Table) and cifar10.is_release(source):
        return _cifar10(source, size)
    files = source.files()
    require_labels(source.name, files)
    geometry = square(size or natural_side(source, [file.name for file in files]))
    pixels, prints = _decoded(source, files, geometry, cache, stream=stream, say=say)
    return Whole(source.name, geometry, files, pixels, prints)


def _kept(source: Folder | Archive | Table, cache: Cache, *, stream: bool) -> Whole | None:
    """What the cache has of the source; without its pixels only where they are, or must be, streamed."""
    kept = cache.read()
    if not kept:
        return None
    pixels, geometry = kept.pixels, square(kept.side)
    if stream or (pixels is None and not cache.has_room(_shape(kept.files, geometry))):
        pixels = _streamed(source, kept.files, geometry)
    return None if pixels is None else Whole(source.name, geometry, kept.files, pixels, kept.prints)


def _cifar10(source: Folder | Archive, size: int | None) -> Whole:
    if size not in (None, cifar10.SIDE):
        raise DataError(f"CIFAR-10 is 32 x 32 px, not {size}; other sizes need images in folders")
    files, pixels, prints = cifar10.read(source)
    return Whole(cifar10.NAME, square(cifar10.SIDE), files, torch.from_numpy(pixels), prints)


def _decoded(
    source: Folder | Archive | Table,
    files: tuple[File, ...],
    geometry: Geometry,
    cache: Cache | None,
    *,
    stream: bool,
    say: Say,
) -> tuple[Pixels, Prints]:
    """Decode all images once: to the cache, to memory or, where they are to be streamed, to nowhere."""
    shape = _shape(files, geometry)
    streamed = _streamed(source, files, geometry) if stream else None

    def read_to(into: npt.NDArray[np.uint8] | None) -> Prints:
        return read_images(source.contents([file.name for file in files]), len(files), geometry, into)

    if not cache and not streamed:
        pixels = np.empty(shape, np.uint8)
        prints = read_to(pixels)
        return torch.from_numpy(pixels), prints
    if cache:
        cache.clear()
    if cache and not streamed:
        try:
            with cache.writing(shape) as pixels:
                prints = read_to(pixels)
            cache.write(geometry.height, files, prints, pixels=True)
            return cache.mapped(shape), prints
        except NoRoom:
            say(
                f"{cache.folder} has no room for {math.prod(shape) / 1e9:.1f} GB of pixels: "
                "images are decoded anew each time, which is slow"
            )
    streamed = streamed or _streamed(source, files, geometry)
    prints = read_to(None)
    if cache:
        cache.write(geometry.height, files, prints, pixels=False)
    return streamed, prints


def _shape(files: Sequence[File], geometry: Geometry) -> tuple[int, ...]:
    return len(files), geometry.height, geometry.width, 3


def _streamed(source: Folder | Archive | Table, files: Sequence[File], geometry: Geometry) -> Streamed:
    if not isinstance(source, OnDisk):
        raise DataError(
            f"there is no room for the pixels of {source.name}, and of an archive they cannot be "
            "decoded one by one instead: unpack it, or make room"
        )

    def decode(path: Path) -> npt.NDArray[np.uint8]:
        try:
            return pixels_of(path.read_bytes(), geometry)
        except (RequestError, OSError) as error:
            raise DataError(f"{path} was readable before: {one_line(error)}") from None

    return Streamed(source.paths(file.name for file in files), geometry, decode)
