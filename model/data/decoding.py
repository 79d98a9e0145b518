"""Multi-threaded decoding of a source's images, with digests and hashes that identify copies."""

from __future__ import annotations

import hashlib
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.progress import Progress

from fovea.model.data.perceptual_hash import Hashes, likeness
from fovea.model.data.pixels import processors
from fovea.model.data.sources import MAX_BYTES, Encoded, Source
from fovea.service.artifact.contract import Geometry, Interpolation, PixelPath, Resize
from fovea.service.errors import BadImage, RequestError, to_one_line
from fovea.service.inference.preprocess import decode_image, supported_formats

MAX_PIXELS: Final = 200_000_000
"""Maximum number of pixels of an image.

Training reads its owner's files, so the limit only stops sizes that no camera produces.
"""

DIGEST_BYTES: Final = 16

SIDES: Final = (32, 48, 64, 96, 128)
"""Input sides to choose from, in pixels.

Larger sides are available only on request. Up to 128 px the default network costs about the same at every
size, because its stem downsamples larger inputs first.
"""

_SAMPLED: Final = 256
"""Number of images whose headers are read to choose a size."""

_CHUNK: Final = 64
"""Number of images that a thread reads at a time, unless images from an archive are large."""

_CHUNK_BYTES: Final = 16 << 20

_SMALL: Final = 4 << 10
"""Size in bytes below which images are decoded without threads.

For small images, threads would mostly wait for the interpreter lock. Two threads decode JPEG files of 2 kB at
0.8 times the rate of one thread, of 3.4 kB at the same rate, of 5 kB at 1.7 times.
"""


def square(size: int) -> Geometry:
    """Return the geometry of Fovea's own models: shorter side to `size`, centre crop, the `fast` path."""
    return Geometry(size, size, Resize.SHORTER, size, Interpolation.BILINEAR, PixelPath.FAST)


def pixels_of(image: bytes, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Decode an image as the service does, to uint8 (H, W, 3).

    Raises `RequestError`.
    """
    return decode_image(image, geometry, max_pixels=MAX_PIXELS).pixels


@dataclass(frozen=True)
class Prints:
    """Digests and hashes that identify equal or similar images, one row per image."""

    digests: npt.NDArray[np.uint8]
    """BLAKE2b digests of the encoded images, uint8 (N, 16)."""
    hashes: Hashes
    """Perceptual hashes of the pixels, uint64 (N,), from `model.data.perceptual_hash`."""
    unreadable: dict[int, str]
    """Reasons by row for unreadable images, which have no pixels."""

    @classmethod
    def empty(cls, count: int) -> Prints:
        """Return prints with `count` empty rows."""
        return cls(np.zeros((count, DIGEST_BYTES), np.uint8), np.zeros(count, np.uint64), {})

    def take(self, rows: Sequence[int]) -> Prints:
        """Return the prints of readable images, by row."""
        return Prints(self.digests[list(rows)], self.hashes[list(rows)], {})


# --- the size ------------------------------------------------------------------------------------


def natural_side(source: Source, names: Sequence[str]) -> int:
    """Return the largest of `SIDES` that at least half of the images reach, based on sampled headers."""
    places = np.unique(np.linspace(0, len(names) - 1, _SAMPLED).astype(int))
    heads = source.heads([names[place] for place in places])
    shorter = [side for head in heads if (side := _shorter_side(head))]
    median = statistics.median_low(shorter) if shorter else 0
    return max((side for side in SIDES if side <= median), default=SIDES[0])


def _shorter_side(head: IO[bytes]) -> int | None:
    try:
        with Image.open(head, formats=supported_formats()) as image:
            return min(image.size)
    except Exception:  # reported when the image is read
        return None


# --- the images ----------------------------------------------------------------------------------

Content = tuple[int, Encoded]
"""Row of an image, and the encoded image or its path."""


def read_images(
    contents: Iterable[Content], count: int, geometry: Geometry, into: npt.NDArray[np.uint8] | None
) -> Prints:
    """Decode `count` images into the rows of `into`, uint8 (count, H, W, 3), or for their prints only."""
    prints = Prints.empty(count)

    def read(chunk: list[Content]) -> int:
        _read_chunk(chunk, geometry, into, prints)
        return len(chunk)

    with Progress(transient=True) as bar:
        task = bar.add_task(f"Reading {count} images", total=count)
        for done in in_threads(read, _chunks(contents), alone=_is_small):
            bar.advance(task, done)
    return prints


def _read_chunk(
    chunk: list[Content], geometry: Geometry, into: npt.NDArray[np.uint8] | None, prints: Prints
) -> None:
    pixels = np.empty((len(chunk), geometry.height, geometry.width, 3), np.uint8)
    rows: list[int] = []
    for row, content in chunk:
        try:
            if isinstance(content, BadImage):
                raise content
            image = _bytes_at(content) if isinstance(content, Path) else content
            pixels[len(rows)] = pixels_of(image, geometry)
        except (RequestError, OSError) as error:
            prints.unreadable[row] = _reason(error)
            continue
        prints.digests[row] = np.frombuffer(digest(image), np.uint8)
        rows.append(row)
    prints.hashes[rows] = likeness(pixels[: len(rows)])
    if into is not None:
        into[rows] = pixels[: len(rows)]


def _bytes_at(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise BadImage(f"the file is over {MAX_BYTES >> 20} MB, the limit for an image")
    return path.read_bytes()


def digest(content: bytes) -> bytes:
    """Return the BLAKE2b digest, 16 bytes, which identifies identical files."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _reason(error: RequestError | OSError) -> str:
    return to_one_line(error) if isinstance(error, RequestError) else error.strerror or to_one_line(error)


def _chunks(contents: Iterable[Content]) -> Iterator[list[Content]]:
    chunk: list[Content] = []
    held = 0
    for row, content in contents:
        chunk.append((row, content))
        held += len(content) if isinstance(content, bytes) else 0
        if len(chunk) == _CHUNK or held > _CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _is_small(chunk: list[Content]) -> bool:
    """Return whether the chunk's middle image is small."""
    _, content = chunk[len(chunk) // 2]
    try:
        if isinstance(content, BadImage):
            return True
        return (content.stat().st_size if isinstance(content, Path) else len(content)) < _SMALL
    except OSError:  # reported when the image is read
        return True


T = TypeVar("T")
R = TypeVar("R")


def in_threads(function: Callable[[T], R], items: Iterable[T], *, alone: Callable[[T], bool]) -> Iterator[R]:
    """Yield the function's result for each item, with only a few items in flight.

    Items for which `alone` is true are processed in the calling thread.
    """
    threads = processors()
    pool = ThreadPoolExecutor(threads, "read")
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            if alone(item):
                yield function(item)
                continue
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
