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
from fovea.model.data.decoding import ImageHashes, choose_side, decode_pixels, read_images, square_geometry
from fovea.model.data.disk_source import DiskSource, Folder
from fovea.model.data.examples import DataError
from fovea.model.data.inventory import File, Inventory, Part, join_names
from fovea.model.data.labels import collect_labels, merge_similar_labels, require_labels
from fovea.model.data.parts import parse_part
from fovea.model.data.pixel_cache import DiskFullError, PixelCache
from fovea.model.data.pixels import Pixels, StreamedPixels
from fovea.model.data.tar_archive import Archive
from fovea.model.data.zip_archive import ZipArchive, is_zip
from fovea.model.recipe import SMALL_SET
from fovea.service.artifact.contract import Geometry
from fovea.service.errors import RequestError, to_one_line

WarningHandler = Callable[[str], None]
"""Receives one sentence, on the thread that loads the data, before loading continues."""


@dataclass(frozen=True)
class RawDataset:
    """A data set before the split, one row per file; some files may be unreadable."""

    name: str
    geometry: Geometry
    files: tuple[File, ...]
    inventory: Inventory
    pixels: Pixels
    image_hashes: ImageHashes


def open_source(path: Path, choices: Choices) -> Folder | Archive | Table:
    """Return the source at a path; for a folder without labels but with CSV files, return a `Table`.

    Raises `DataError`.
    """
    if not path.exists():
        raise DataError(f"there is no {path}")
    if not path.is_dir():
        return Table(path, choices=choices) if is_table(path.name) else open_archive(path, choices)
    folder = Folder(path, choices)
    if cifar10.is_release(folder):
        return folder
    names = [name for name in folder.names if is_table(name)]
    if not names:
        return folder
    problem: DataError | None = None
    if not (choices.path_column or choices.label_columns):
        try:
            if len(collect_labels(folder.list_files())) > 1:
                return folder
        except DataError as error:
            problem = error
    table = Table(*_select_tables(path, names), choices=choices, root=path)
    try:
        table.survey  # noqa: B018 - to see whether it can be read
    except DataError as error:
        if problem:
            raise DataError(
                f"{problem}; the CSV file there does not give the labels either: {error}"
            ) from None
        raise
    return table


def _select_tables(path: Path, names: Sequence[str]) -> list[Path]:
    """Return the tables of a folder that belong together.

    Raises `DataError`.
    """
    top_names = [name for name in names if "/" not in name and "submission" not in name.lower()]
    if len(top_names) == 1:
        return [path / top_names[0]]
    part_names = [name for name in top_names if parse_part(Path(name).stem)]  # train.csv, test.csv
    if not top_names:  # train/metadata.csv, test/metadata.csv
        part_names = [name for name in names if name.count("/") == 1 and parse_part(name.split("/")[0])]
    if any(
        parse_part(Path(name).stem if top_names else name.split("/")[0]) is Part.TRAIN for name in part_names
    ):
        return [path / name for name in part_names]
    raise DataError(
        f"{path} has no sub-folder of images per label and several CSV files: {join_names(names)}; pass the "
        "one with the labels as --data"
    )


def open_archive(path: Path, choices: Choices) -> Archive:
    """Return the archive at a path, in the format of its first bytes."""
    return ZipArchive(path, choices) if is_zip(path) else Archive(path, choices)


def read_source(
    source: Folder | Archive | Table,
    size: int | None,
    small_set_size: int | None,
    cache_folder: Path | None,
    choices: Choices,
    *,
    stream: bool,
    on_warning: WarningHandler,
) -> RawDataset:
    """Read all images of `source`, with the arguments of `model.data.dataset.load_dataset`.

    Raises `DataError`.
    """
    cache = PixelCache(cache_folder, f"{source.fingerprint()} {choices}", size) if cache_folder else None
    if cache and (cached_data := _load_cached(source, cache, choices, stream=stream)):
        return cached_data
    if not isinstance(source, Table) and cifar10.is_release(source):
        return _read_cifar10(source, size)
    files, inventory = _resolve_labels(source, choices)
    require_labels(source.name, files, inventory)
    if size is None and sum(file.part is Part.TRAIN for file in files) <= SMALL_SET:
        size = small_set_size
    geometry = square_geometry(size or choose_side(source, [file.name for file in files]))
    pixels, image_hashes = _decode_images(
        source, files, inventory, geometry, cache, stream=stream, on_warning=on_warning
    )
    return RawDataset(source.name, geometry, files, inventory, pixels, image_hashes)


def _resolve_labels(source: Folder | Archive | Table, choices: Choices) -> tuple[tuple[File, ...], Inventory]:
    """Return the images with their final labels, and the inventory."""
    survey = source.survey
    files, notes = merge_similar_labels(survey.files, choices.label_case)
    return files, replace(survey.inventory, notes=(*survey.inventory.notes, *notes))


def _load_cached(
    source: Folder | Archive | Table, cache: PixelCache, choices: Choices, *, stream: bool
) -> RawDataset | None:
    """Return the cached data set; without cached pixels only if images are streamed."""
    cached_data = cache.read()
    if not cached_data:
        return None
    pixels, geometry = cached_data.pixels, square_geometry(cached_data.side)
    if stream or (pixels is None and not cache.has_room(_pixel_shape(cached_data.files, geometry))):
        pixels = _stream_pixels(source, cached_data.files, geometry)
    if pixels is None:
        return None
    # The left-out files may have changed even if the images have not. Listing an archive again takes too
    # long.
    inventory = cached_data.inventory if isinstance(source, Archive) else _resolve_labels(source, choices)[1]
    return RawDataset(source.name, geometry, cached_data.files, inventory, pixels, cached_data.image_hashes)


def _read_cifar10(source: Folder | Archive, size: int | None) -> RawDataset:
    if size not in (None, cifar10.SIDE):
        raise DataError(f"CIFAR-10 is 32 x 32 px, not {size}; other sizes need images in folders")
    files, pixels, image_hashes = cifar10.read_release(source)
    inventory = Inventory(len(files), cifar10.PARTS, "the release's own")
    return RawDataset(
        cifar10.NAME, square_geometry(cifar10.SIDE), files, inventory, torch.from_numpy(pixels), image_hashes
    )


def _decode_images(
    source: Folder | Archive | Table,
    files: tuple[File, ...],
    inventory: Inventory,
    geometry: Geometry,
    cache: PixelCache | None,
    *,
    stream: bool,
    on_warning: WarningHandler,
) -> tuple[Pixels, ImageHashes]:
    """Decode all images once: into the cache, into memory, or for their hashes only if streamed."""
    shape = _pixel_shape(files, geometry)
    streamed_pixels = _stream_pixels(source, files, geometry) if stream else None

    def decode_to(output: npt.NDArray[np.uint8] | None) -> ImageHashes:
        return read_images(source.read_contents([file.name for file in files]), len(files), geometry, output)

    if not cache and not streamed_pixels:
        pixels = np.empty(shape, np.uint8)
        image_hashes = decode_to(pixels)
        return torch.from_numpy(pixels), image_hashes
    if cache:
        cache.clear()  # before any write: an old index must never describe new pixels
    if cache and not streamed_pixels:
        try:
            with cache.create_pixels(shape) as pixels:
                image_hashes = decode_to(pixels)
            cache.write_index(geometry.height, files, inventory, image_hashes, has_pixels=True)
            return cache.map_pixels(shape), image_hashes
        except DiskFullError:
            on_warning(
                f"{cache.folder} has no room for {math.prod(shape) / 1e9:.1f} GB of pixels: "
                "images are decoded on every access, which is slow; make room to avoid this"
            )
    streamed_pixels = streamed_pixels or _stream_pixels(source, files, geometry)
    image_hashes = decode_to(None)
    if cache:
        cache.write_index(geometry.height, files, inventory, image_hashes, has_pixels=False)
    return streamed_pixels, image_hashes


def _pixel_shape(files: Sequence[File], geometry: Geometry) -> tuple[int, ...]:
    return len(files), geometry.height, geometry.width, 3


def _stream_pixels(
    source: Folder | Archive | Table, files: Sequence[File], geometry: Geometry
) -> StreamedPixels:
    if not isinstance(source, DiskSource):
        raise DataError(
            f"the disk has no room for the pixels of {source.name}, and images in an archive cannot be "
            "decoded on every access instead: unpack it, or make room"
        )

    # Called on the threads of `StreamedPixels`; the exception reaches the thread that asked for the pixels.
    def decode_file(path: Path) -> npt.NDArray[np.uint8]:
        try:
            return decode_pixels(path.read_bytes(), geometry)
        except (RequestError, OSError) as error:
            raise DataError(f"{path} can no longer be read: {to_one_line(error)}") from None

    return StreamedPixels(source.resolve_paths(file.name for file in files), geometry, decode_file)
