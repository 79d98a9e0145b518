"""A cache of decoded pixels in a folder: `pixels.u8`, (N, H, W, 3), and `index.json`.

The index is written last and states the size and modification time of the pixels. An incomplete or damaged
cache, or a cache of another source, is therefore detected and rebuilt.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import PIL

from fovea.model.data.decoding import DIGEST_BYTES, ImageHashes
from fovea.model.data.examples import DataError
from fovea.model.data.inventory import File, Inventory, Part
from fovea.model.data.pixels import Pixels, map_pixels
from fovea.service.atomic_files import replace_file, write_file

INDEX_FILE: Final = "index.json"
PIXELS_FILE: Final = "pixels.u8"

_FORMAT_VERSION: Final = 2
"""Version of the index and the decoding; increase it when decoding changes."""

_MIN_FREE_BYTES: Final = 512 << 20
"""Bytes that stay free on the disk, for checkpoints and other programs."""


@dataclass(frozen=True)
class CachedDataset:
    """The cached contents of a source."""

    side: int
    """Side of the images, in pixels."""
    files: tuple[File, ...]
    inventory: Inventory
    image_hashes: ImageHashes
    pixels: Pixels | None
    """Pixels; None if the disk was too full."""


class DiskFullError(Exception):
    """The disk is too full for the pixels."""


class PixelCache:
    """A cache folder for one source at a time.

    `fingerprint` identifies the source. `requested_side` is the requested side in pixels, or None to derive
    the side from the images.
    """

    def __init__(self, folder: Path, fingerprint: str, requested_side: int | None) -> None:
        self.folder, self.requested_side = folder, requested_side
        self._key = [_FORMAT_VERSION, PIL.__version__, fingerprint]

    def read(self) -> CachedDataset | None:
        """Return the cached contents of this source; None if missing, damaged or of another source."""
        try:
            index = json.loads((self.folder / INDEX_FILE).read_bytes())
            if index["key"] != self._key or (self.requested_side not in (index["asked"], index["side"])):
                return None
            files, image_hashes = _parse_files(index), _parse_hashes(index)
            inventory = Inventory.from_dict(index["inventory"])
            return CachedDataset(
                index["side"], files, inventory, image_hashes, self._load_pixels(index, len(files))
            )
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None

    def _load_pixels(self, index: dict[str, Any], count: int) -> Pixels | None:
        if index["pixels"] is None:
            return None
        path, shape = self.folder / PIXELS_FILE, (count, index["side"], index["side"], 3)
        if index["pixels"] != _stat_file(path) or path.stat().st_size != math.prod(shape):
            raise ValueError("the pixel file is not the one that was indexed")
        return self.map_pixels(shape)

    def map_pixels(self, shape: tuple[int, ...]) -> Pixels:
        """Return the pixels after they are written."""
        return map_pixels(self.folder / PIXELS_FILE, shape)

    def clear(self) -> None:
        """Create the folder and remove the cached files.

        Raises `DataError`.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (INDEX_FILE, PIXELS_FILE):
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"cannot store pixels in {self.folder}: {error.strerror}") from None

    def has_room(self, shape: tuple[int, ...]) -> bool:
        """Return whether the disk has room for the pixels."""
        return shutil.disk_usage(self.folder).free >= math.prod(shape) + _MIN_FREE_BYTES

    @contextmanager
    def create_pixels(self, shape: tuple[int, ...]) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield an array for the pixels, uint8 (N, H, W, 3), which is published when the block ends.

        Raises `DiskFullError` if the disk is too full.
        """
        with replace_file(self.folder / PIXELS_FILE) as partial:
            if not self.has_room(shape):
                raise DiskFullError
            try:
                with partial.open("wb") as file:  # else a full disk would end the process
                    os.posix_fallocate(file.fileno(), 0, math.prod(shape))
            except OSError as error:
                raise DiskFullError from error
            array = np.memmap(partial, np.uint8, "r+", shape=shape)
            yield array  # the block writes, possibly on several threads; all must have ended when it ends
            array.flush()  # before `replace_file` gives the file its final name

    def write_index(
        self,
        side: int,
        files: tuple[File, ...],
        inventory: Inventory,
        image_hashes: ImageHashes,
        *,
        has_pixels: bool,
    ) -> None:
        """Write the index; if `has_pixels` is true, the pixels must be published already.

        The index is what makes a cache valid, and it holds size and time of the finished pixel file.
        """
        index = {
            "key": self._key,
            "asked": self.requested_side,
            "side": side,
            "pixels": _stat_file(self.folder / PIXELS_FILE) if has_pixels else None,
            "names": [file.name for file in files],
            "labels": [file.labels for file in files],
            "parts": [file.part for file in files],
            "inventory": inventory.to_dict(),
            "digests": image_hashes.digests.tobytes().hex(),
            "hashes": image_hashes.hashes.tobytes().hex(),
            "unreadable": sorted(image_hashes.read_errors.items()),
        }
        write_file(self.folder / INDEX_FILE, json.dumps(index))


def _stat_file(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _parse_files(index: dict[str, Any]) -> tuple[File, ...]:
    columns = zip(index["names"], index["labels"], index["parts"], strict=True)
    return tuple(File(name, tuple(labels), Part(part)) for name, labels, part in columns)


def _parse_hashes(index: dict[str, Any]) -> ImageHashes:
    count = len(index["names"])
    digests = np.frombuffer(bytes.fromhex(index["digests"]), np.uint8).reshape(count, DIGEST_BYTES)  # (N, 16)
    hashes = np.frombuffer(bytes.fromhex(index["hashes"]), np.uint64).reshape(count)  # (N,)
    return ImageHashes(digests, hashes, {row: str(reason) for row, reason in index["unreadable"]})
