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

from fovea.model.atomic_files import replacing, write
from fovea.model.data.decoding import DIGEST_BYTES, Prints
from fovea.model.data.examples import DataError
from fovea.model.data.inventory import File, Inventory, Part
from fovea.model.data.pixels import Pixels, mapped

INDEX: Final = "index.json"
PIXELS: Final = "pixels.u8"

_FORMAT: Final = 2
"""Version of the index and the decoding; increase it when decoding changes."""

_MARGIN: Final = 512 << 20
"""Bytes that stay free on the disk, for checkpoints and other programs."""


@dataclass(frozen=True)
class Kept:
    """The cached contents of a source."""

    side: int
    """Side of the images, in pixels."""
    files: tuple[File, ...]
    inventory: Inventory
    prints: Prints
    pixels: Pixels | None
    """Pixels; None if the disk was too full."""


class NoRoom(Exception):
    """The disk is too full for the pixels."""


class Cache:
    """A cache folder for one source at a time.

    `fingerprint` identifies the source. `asked` is the requested side in pixels, or None to derive the side
    from the images.
    """

    def __init__(self, folder: Path, fingerprint: str, asked: int | None) -> None:
        self.folder, self.asked = folder, asked
        self._key = [_FORMAT, PIL.__version__, fingerprint]

    def read(self) -> Kept | None:
        """Return the cached contents of this source; None if missing, damaged or of another source."""
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
        """Return the pixels after they are written."""
        return mapped(self.folder / PIXELS, shape)

    def clear(self) -> None:
        """Create the folder and remove the cached files.

        Raises `DataError`.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (INDEX, PIXELS):
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"cannot keep pixels in {self.folder}: {error.strerror}") from None

    def has_room(self, shape: tuple[int, ...]) -> bool:
        """Return whether the disk has room for the pixels."""
        return shutil.disk_usage(self.folder).free >= math.prod(shape) + _MARGIN

    @contextmanager
    def writing(self, shape: tuple[int, ...]) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield an array for the pixels, uint8 (N, H, W, 3), which is published when the block ends.

        Raises `NoRoom` if the disk is too full.
        """
        with replacing(self.folder / PIXELS) as partial:
            if not self.has_room(shape):
                raise NoRoom
            try:
                with partial.open("wb") as file:  # else a full disk would end the process
                    os.posix_fallocate(file.fileno(), 0, math.prod(shape))
            except OSError as error:
                raise NoRoom from error
            array = np.memmap(partial, np.uint8, "r+", shape=shape)
            yield array
            array.flush()

    def write(
        self, side: int, files: tuple[File, ...], inventory: Inventory, prints: Prints, *, pixels: bool
    ) -> None:
        """Write the index, after the pixels if `pixels` is true."""
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
    digests = np.frombuffer(bytes.fromhex(index["digests"]), np.uint8).reshape(count, DIGEST_BYTES)  # (N, 16)
    hashes = np.frombuffer(bytes.fromhex(index["hashes"]), np.uint64).reshape(count)  # (N,)
    return Prints(digests, hashes, {row: str(reason) for row, reason in index["unreadable"]})
