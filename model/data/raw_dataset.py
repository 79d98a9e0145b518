"""A labelled data set before the split: every file with its labels, and the pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fovea.model.data import cifar10
from fovea.model.data.choices import Choices
from fovea.model.data.csv_table import Table, is_table
from fovea.model.data.decoding import Prints, natural_side, pixels_of, read_images, square
from fovea.model.data.examples import DataError
from fovea.model.data.inventory import File, Inventory, Part, some
from fovea.model.data.labels import labels_of, require_labels, settle_labels
from fovea.model.data.parts import part_of
from fovea.model.data.pixel_cache import Cache, NoRoom
from fovea.model.data.pixels import Pixels, Streamed
from fovea.model.data.sources import Archive, Folder, OnDisk
from fovea.model.data.zip_archive import ZipArchive, is_zip
from fovea.service.artifact.contract import Geometry
from fovea.service.errors import RequestError, to_one_line

Say = Callable[[str], None]


@dataclass(frozen=True)
class Whole:
    """A data set before the split, one row per file; some files may be unreadable."""

    name: str
    geometry: Geometry
    files: tuple[File, ...]
    inventory: Inventory
    pixels: Pixels
    prints: Prints


def source_at(path: Path, choices: Choices) -> Folder | Archive | Table:
    """Return the source at a path; for a folder without labels but with CSV files, return a `Table`.

    Raises `DataError`.
    """
    if not path.exists():
        raise DataError(f"there is no {path}")
    if not path.is_dir():
        return Table(path, choices=choices) if is_table(path.name) else archive_at(path, choices)
    folder = Folder(path, choices)
    if cifar10.is_release(folder):
        return folder
    names = [name for name in folder.names if is_table(name)]
    if not names:
        return folder
    problem: DataError | None = None
    if not (choices.path_column or choices.label_columns):
        try:
            if len(labels_of(folder.files())) > 1:
                return folder
        except DataError as error:
            problem = error
    table = Table(*_tables(path, names), choices=choices, root=path)
    try:
        table.survey  # noqa: B018 - to see whether it can be read
    except DataError as error:
        if problem:
            raise DataError(f"{problem}; the CSV file there does not say them either: {error}") from None
        raise
    return table


def _tables(path: Path, names: Sequence[str]) -> list[Path]:
    """Return the tables of a folder that belong together.

    Raises `DataError`.
    """
    top = [name for name in names if "/" not in name and "submission" not in name.lower()]
    if len(top) == 1:
        return [path / top[0]]
    split = [name for name in top if part_of(Path(name).stem)]  # train.csv, test.csv
    if not top:  # train/metadata.csv, test/metadata.csv
        split = [name for name in names if name.count("/") == 1 and part_of(name.split("/")[0])]
    if any(part_of(Path(name).stem if top else name.split("/")[0]) is Part.TRAIN for name in split):
        return [path / name for name in split]
    raise DataError(
        f"{path} has no sub-folder of images per label and several CSV files: {some(names)}; give the one "
        "with the labels as --data"
    )


def archive_at(path: Path, choices: Choices) -> Archive:
    """Return the archive at a path, in the format of its first bytes."""
    return ZipArchive(path, choices) if is_zip(path) else Archive(path, choices)


def read(
    source: Folder | Archive | Table,
    size: int | None,
    folder: Path | None,
    choices: Choices,
    *,
    stream: bool,
    say: Say,
) -> Whole:
    """Read all images of `source`, with the arguments of `model.data.dataset.load`.

    Raises `DataError`.
    """
    cache = Cache(folder, f"{source.fingerprint()} {choices}", size) if folder else None
    if cache and (kept := _kept(source, cache, choices, stream=stream)):
        return kept
    if not isinstance(source, Table) and cifar10.is_release(source):
        return _cifar10(source, size)
    files, inventory = _settled(source, choices)
    require_labels(source.name, files, inventory)
    geometry = square(size or natural_side(source, [file.name for file in files]))
    pixels, prints = _decoded(source, files, inventory, geometry, cache, stream=stream, say=say)
    return Whole(source.name, geometry, files, inventory, pixels, prints)


def _settled(source: Folder | Archive | Table, choices: Choices) -> tuple[tuple[File, ...], Inventory]:
    """Return the images with their final labels, and the inventory."""
    survey = source.survey
    files, notes = settle_labels(survey.files, choices.label_case)
    return files, replace(survey.inventory, notes=(*survey.inventory.notes, *notes))


def _kept(source: Folder | Archive | Table, cache: Cache, choices: Choices, *, stream: bool) -> Whole | None:
    """Return the cached data set; without cached pixels only if images are streamed."""
    kept = cache.read()
    if not kept:
        return None
    pixels, geometry = kept.pixels, square(kept.side)
    if stream or (pixels is None and not cache.has_room(_shape(kept.files, geometry))):
        pixels = _streamed(source, kept.files, geometry)
    if pixels is None:
        return None
    # The left-out files may have changed even if the images have not. Listing an archive again takes too
    # long.
    inventory = kept.inventory if isinstance(source, Archive) else _settled(source, choices)[1]
    return Whole(source.name, geometry, kept.files, inventory, pixels, kept.prints)


def _cifar10(source: Folder | Archive, size: int | None) -> Whole:
    if size not in (None, cifar10.SIDE):
        raise DataError(f"CIFAR-10 is 32 x 32 px, not {size}; other sizes need images in folders")
    files, pixels, prints = cifar10.read(source)
    inventory = Inventory(len(files), cifar10.PARTS, "the release's own")
    return Whole(cifar10.NAME, square(cifar10.SIDE), files, inventory, torch.from_numpy(pixels), prints)


def _decoded(
    source: Folder | Archive | Table,
    files: tuple[File, ...],
    inventory: Inventory,
    geometry: Geometry,
    cache: Cache | None,
    *,
    stream: bool,
    say: Say,
) -> tuple[Pixels, Prints]:
    """Decode all images once: into the cache, into memory, or for their prints only if streamed."""
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
            cache.write(geometry.height, files, inventory, prints, pixels=True)
            return cache.mapped(shape), prints
        except NoRoom:
            say(
                f"{cache.folder} has no room for {math.prod(shape) / 1e9:.1f} GB of pixels: "
                "images are decoded anew each time, which is slow"
            )
    streamed = streamed or _streamed(source, files, geometry)
    prints = read_to(None)
    if cache:
        cache.write(geometry.height, files, inventory, prints, pixels=False)
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
            raise DataError(f"{path} was readable before: {to_one_line(error)}") from None

    return Streamed(source.paths(file.name for file in files), geometry, decode)
