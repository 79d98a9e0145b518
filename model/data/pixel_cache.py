"""Pixels that were decoded once, kept in a folder: `pixels.u8`, (N, H, W, 3), and `index.json` beside it.

The index is written last and names the size and the time of the pixels, so that what was cut short, damaged
or made of another source is never taken for whole: it is made again.
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

from fovea.model.atomic_files import replacing, write
from fovea.model.data.decoding import DIGEST_BYTES, Prints
from fovea.model.data.examples import DataError
from fovea.model.data.inventory import File, Inventory, Part
from fovea.model.data.pixels import Pixels, mapped

INDEX: Final = "index.json"
PIXELS: Final = "pixels.u8"

_FORMAT: Final = 2
"""Of the index, and of what the pixels are: to be counted up when decoding changes."""

_MARGIN: Final = 512 << 20
"""Bytes that stay free on the disk, for checkpoints and for others."""


@dataclass(frozen=True)
class Kept:
    """What a cache holds of a source."""

    side: int
    """Of the images, in pixels."""
    files: tuple[File, ...]
    inventory: Inventory
    prints: Prints
    pixels: Pixels | None
    """None where there was no room for them."""


class NoRoom(Exception):
    """The disk is too small for the pixels."""


class Cache:
    """One folder, for one source at a time; `fingerprint` names that, and `asked` the side it is wanted in,
    where None leaves it to the images."""

    def __init__(self, folder: Path, fingerprint: str, asked: int | None) -> None:
        self.folder, self.asked = folder, asked
        self._key = [_FORMAT, PIL.__version__, fingerprint]

    def read(self) -> Kept | None:
        """What was kept of this very source, unless it is damaged."""
        try:
            index = json.loads((self.folder / INDEX).read_bytes())
            if index["key"] != self._key or (self.asked not in (index["asked"], index["side"])):
                return None
            files, prints = _files(index), _prints(index)
            inventory = Inventory.from_dict(index["inventory"])
            return Kept(index["side"], files, inventory, prints, self._pixels(index, len(files)))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None

    def _pixels(self, index: dict[str, Any], count: int) -> Pixels | None:
        if index["pixels"] is None:
            return None
        path, shape = self.folder / PIXELS, (count, index["side"], index["side"], 3)
        if index["pixels"] != _state(path) or path.stat().st_size != math.prod(shape):
            raise ValueError("these are other pixels")
        return self.mapped(shape)

    def mapped(self, shape: tuple[int, ...]) -> Pixels:
        """The pixels, once they are written."""
        return mapped(self.folder / PIXELS, shape)

    def clear(self) -> None:
        """Make the folder, empty. Raises `DataError`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (INDEX, PIXELS):
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"cannot keep pixels in {self.folder}: {error.strerror}") from None

    def has_room(self, shape: tuple[int, ...]) -> bool:
        """Is the disk large enough for so many pixels?"""
        return shutil.disk_usage(self.folder).free >= math.prod(shape) + _MARGIN

    @contextmanager
    def writing(self, shape: tuple[int, ...]) -> Iterator[npt.NDArray[np.uint8]]:
        """The pixels, to be filled; they are there for others when all are. Raises `NoRoom` before that."""
        with replacing(self.folder / PIXELS) as partial:
            if not self.has_room(shape):
                raise NoRoom
            try:
                with partial.open("wb") as file:  # else, on a full disk, the system would end who writes
                    os.posix_fallocate(file.fileno(), 0, math.prod(shape))
            except OSError as error:
                raise NoRoom from error
            array = np.memmap(partial, np.uint8, "r+", shape=shape)
            yield array
            array.flush()

    def write(
        self, side: int, files: tuple[File, ...], inventory: Inventory, prints: Prints, *, pixels: bool
    ) -> None:
        """The index, after the `pixels` if there are any."""
        index = {
            "key": self._key,
            "asked": self.asked,
            "side": side,
            "pixels": _state(self.folder / PIXELS) if pixels else None,
            "names": [file.name for file in files],
            "labels": [file.labels for file in files],
            "parts": [file.part for file in files],
            "inventory": inventory.to_dict(),
            "digests": prints.digests.tobytes().hex(),
            "hashes": prints.hashes.tobytes().hex(),
            "unreadable": sorted(prints.unreadable.items()),
        }
        write(self.folder / INDEX, json.dumps(index))


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _files(index: dict[str, Any]) -> tuple[File, ...]:
    columns = zip(index["names"], index["labels"], index["parts"], strict=True)
    return tuple(File(name, tuple(labels), Part(part)) for name, labels, part in columns)


def _prints(index: dict[str, Any]) -> Prints:
    count = len(index["names"])
    digests = np.frombuffer(bytes.fromhex(index["digests"]), np.uint8).reshape(count, DIGEST_BYTES)
    hashes = np.frombuffer(bytes.fromhex(index["hashes"]), np.uint64).reshape(count)
    return Prints(digests, hashes, {row: str(reason) for row, reason in index["unreadable"]})
