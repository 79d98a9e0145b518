"""The images of a quantization: some calibrate the ranges, and the others compare the two models.

Labelled images lie in one sub-folder for each label, as in `fovea train` and `fovea import --check`. Images
without sub-folders have no labels.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from fovea.export.importer.label_file import Labels
from fovea.export.importer.label_syntax import WORDNET_ID
from fovea.export.importer.labelled_images import decode_or_explain, load_labelled_images
from fovea.export.quantize.refusal import QuantizeRefused
from fovea.model.data.decoding import map_in_threads
from fovea.model.data.disk_source import Folder
from fovea.model.data.formats import has_image_suffix
from fovea.service.artifact.contract import Contract, Geometry, Task
from fovea.service.errors import FoveaError
from fovea.service.inference.pixels import Pixels

MIN_IMAGES: Final = 16
"""Minimum number of images: fewer show nothing about a loss of some points."""

Targets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PixelSet:
    """Decoded images."""

    pixels: Pixels
    """uint8 (n, height, width, 3), in a temporary file."""
    targets: Targets | None
    """Label indices, int64 (n,); None without labels."""

    def __len__(self) -> int:
        return len(self.pixels)

    def select(self, rows: npt.NDArray[np.int64]) -> PixelSelection:
        """Return the images at `rows`."""
        return PixelSelection(self.pixels, rows, None if self.targets is None else self.targets[rows])


@dataclass(frozen=True)
class PixelSelection:
    """Some images of a `PixelSet`, without a copy of their pixels."""

    pixels: Pixels
    rows: npt.NDArray[np.int64]
    targets: Targets | None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, count: int) -> PixelSelection:
        """Return at most `count` images, spread evenly over all."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64))
        return PixelSelection(
            self.pixels, self.rows[chosen], None if self.targets is None else self.targets[chosen]
        )

    def iterate_batches(self, size: int) -> Iterator[Pixels]:
        """Yield the images in order, uint8 (at most `size`, height, width, 3)."""
        for start in range(0, len(self.rows), size):
            yield self.pixels[self.rows[start : start + size]]

    def iterate_images(self) -> Iterator[Pixels]:
        """Yield the images in order, uint8 (height, width, 3)."""
        for row in self.rows:
            yield self.pixels[row]


@dataclass(frozen=True)
class QuantizationImages:
    """The images for calibration, and the images for the comparison."""

    name: str
    """Name of the folder."""
    calibration: PixelSelection
    held_out: PixelSelection
    unreadable: dict[str, str]
    """Reasons why files could not be decoded, by path."""


def load_images(
    folder: Path, contract: Contract, calibration_count: int, *, is_unlabelled: bool
) -> QuantizationImages:
    """Decode all images of the folder, and divide them.

    At most `calibration_count` images, and at most half of all, are for calibration: spread evenly over the
    labels. Labels are ignored if `is_unlabelled` is set, and for `multilabel`. Raises `QuantizeRefused`.
    """
    paths, targets = _list_images(folder, contract, is_unlabelled=is_unlabelled)
    pixels, rows, unreadable = _decode_images(paths, contract.input)
    if len(rows) < MIN_IMAGES:
        reason = f"; {len(unreadable)} files cannot be read" if unreadable else ""
        raise QuantizeRefused(
            f"--images {folder} has {len(rows)} readable images{reason}; at least {MIN_IMAGES} are needed, "
            "and some hundreds to prove anything"
        )
    images = PixelSet(pixels, None if targets is None else targets[rows])
    count = min(calibration_count, len(rows) // 2)
    is_calibration = np.zeros(len(rows), bool)
    is_calibration[np.linspace(0, len(rows) - 1, count).astype(np.int64)] = True
    return QuantizationImages(
        name=Folder(folder).name,
        calibration=images.select(np.flatnonzero(is_calibration)),
        held_out=images.select(np.flatnonzero(~is_calibration)),
        unreadable=unreadable,
    )


def _list_images(
    folder: Path, contract: Contract, *, is_unlabelled: bool
) -> tuple[Sequence[Path], Targets | None]:
    """Return the paths, and the label indices, int64 (n,), or None.

    Raises `QuantizeRefused`.
    """
    if not folder.is_dir():
        raise QuantizeRefused(
            f"--images {folder} is not a folder; it takes a folder of images, best with a sub-folder "
            "for each label"
        )
    has_folders = any(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir())
    if is_unlabelled or not has_folders or contract.task is Task.MULTILABEL:
        names = [name for name in Folder(folder).names if has_image_suffix(name)]
        if not names:
            raise QuantizeRefused(
                f"--images {folder} has no images; give images like those that the model will meet"
            )
        return [folder / name for name in names], None
    try:
        images = load_labelled_images(folder, _read_labels(contract), "--images")
    except FoveaError as error:
        raise QuantizeRefused(
            f"{error}; give images of the labels of this model, or --unlabelled to compare with the float "
            "model's answers instead"
        ) from None
    return images.paths, images.targets


def _read_labels(contract: Contract) -> Labels:
    """Return the contract's labels, with the WordNet ids with which they begin."""
    matches = [WORDNET_ID.match(label) for label in contract.labels]
    return Labels(contract.labels, tuple(match[0] if match else "" for match in matches))


def _decode_images(
    paths: Sequence[Path], geometry: Geometry
) -> tuple[Pixels, npt.NDArray[np.int64], dict[str, str]]:
    """Return the pixels, the rows of `paths` to which they belong, and the reasons for the other paths.

    Raises `QuantizeRefused` if the temporary file does not fit on the disk.
    """
    decode_file = partial(decode_or_explain, geometry=geometry)
    store = _create_store(len(paths), geometry)
    rows: list[int] = []
    unreadable: dict[str, str] = {}
    console = Console(stderr=True)
    results = track(
        map_in_threads(decode_file, paths, is_inline=lambda _: False),
        description=f"Reading {len(paths)} images",
        total=len(paths),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    for row, result in enumerate(results):
        if isinstance(result, str):
            unreadable[str(paths[row])] = result
        else:
            store[len(rows)] = result
            rows.append(row)
    return store[: len(rows)], np.array(rows, np.int64), unreadable


def _create_store(count: int, geometry: Geometry) -> Pixels:
    """Return memory for the pixels, uint8 (count, height, width, 3), in a temporary file without a name."""
    shape = (count, geometry.height, geometry.width, 3)
    size = count * geometry.height * geometry.width * 3
    try:
        with tempfile.TemporaryFile() as file:
            # Without this, a full disk would end the process at a write to the memory.
            os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, np.uint8, "r+", shape=shape)
    except OSError as error:
        raise QuantizeRefused(
            f"cannot store the pixels of {count} images, {size / 1e6:.0f} MB, in {tempfile.gettempdir()}: "
            f"{error.strerror}; set TMPDIR to a folder on a larger disk"
        ) from None
