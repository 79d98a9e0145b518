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

from fovea.model.data.perceptual_hash import Hashes, hash_images
from fovea.model.data.sources import MAX_BYTES, EncodedImage, Source
from fovea.service.artifact.contract import Geometry, Interpolation, PixelPath
from fovea.service.errors import BadImage, RequestError, to_one_line
from fovea.service.inference.image_format import supported_formats
from fovea.service.inference.preprocess import decode_image
from fovea.service.resources.threads import get_thread_count

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

_SAMPLE_SIZE: Final = 256
"""Number of images whose headers are read to choose a size."""

_CHUNK_IMAGES: Final = 64
"""Number of images that a thread reads at a time, unless images from an archive are large."""

_CHUNK_BYTES: Final = 16 << 20

_SMALL_BYTES: Final = 4 << 10
"""Size in bytes below which images are decoded without threads.

For small images, threads would mostly wait for the interpreter lock. Two threads decode JPEG files of 2 kB at
0.8 times the rate of one thread, of 3.4 kB at the same rate, of 5 kB at 1.7 times.
"""


def square_geometry(size: int) -> Geometry:
    """Return the geometry of Fovea's own models: shorter side to `size`, centre crop, the `fast` path."""
    return Geometry.cropped(size, size, size, Interpolation.BILINEAR, PixelPath.FAST)


def decode_pixels(image: bytes, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Decode an image as the service does, to uint8 (H, W, 3).

    Raises `RequestError`.
    """
    return decode_image(image, geometry, max_pixels=MAX_PIXELS).pixels


@dataclass(frozen=True)
class ImageHashes:
    """Digests and hashes that identify equal or similar images, one row per image."""

    digests: npt.NDArray[np.uint8]
    """BLAKE2b digests of the encoded images, uint8 (N, 16)."""
    hashes: Hashes
    """Perceptual hashes of the pixels, uint64 (N,), from `model.data.perceptual_hash`."""
    read_errors: dict[int, str]
    """Reasons by row for unreadable images, which have no pixels."""

    @classmethod
    def empty(cls, count: int) -> ImageHashes:
        """Return digests and hashes with `count` empty rows."""
        return cls(np.zeros((count, DIGEST_BYTES), np.uint8), np.zeros(count, np.uint64), {})

    def select(self, rows: Sequence[int]) -> ImageHashes:
        """Return the digests and hashes of readable images, by row."""
        return ImageHashes(self.digests[list(rows)], self.hashes[list(rows)], {})


# --- the size ------------------------------------------------------------------------------------


def choose_side(source: Source, names: Sequence[str]) -> int:
    """Return the largest of `SIDES` that at least half of the images reach, based on sampled headers."""
    positions = np.unique(np.linspace(0, len(names) - 1, _SAMPLE_SIZE).astype(int))
    heads = source.open_heads([names[position] for position in positions])
    shorter_sides = [side for head in heads if (side := _read_shorter_side(head))]
    median_side = statistics.median_low(shorter_sides) if shorter_sides else 0
    return max((side for side in SIDES if side <= median_side), default=SIDES[0])


def _read_shorter_side(head: IO[bytes]) -> int | None:
    try:
        with Image.open(head, formats=supported_formats()) as image:
            return min(image.size)
    except Exception:  # reported when the image is read
        return None


# --- the images ----------------------------------------------------------------------------------

IndexedContent = tuple[int, EncodedImage]
"""Row of an image, and the encoded image or its path."""


def read_images(
    contents: Iterable[IndexedContent], count: int, geometry: Geometry, output: npt.NDArray[np.uint8] | None
) -> ImageHashes:
    """Decode `count` images into the rows of `output`, uint8 (count, H, W, 3), and return their hashes.

    If `output` is None, the images are decoded only for their hashes.
    """
    image_hashes = ImageHashes.empty(count)

    # `map_in_threads` calls this function on several threads at a time. No lock is needed: each chunk writes
    # only its own rows of the shared arrays, and inserting into `read_errors` is atomic.
    def read_chunk(chunk: list[IndexedContent]) -> int:
        _read_chunk(chunk, geometry, output, image_hashes)
        return len(chunk)

    with Progress(transient=True) as bar:
        task = bar.add_task(f"Reading {count} images", total=count)
        for image_count in map_in_threads(read_chunk, _group_chunks(contents), is_inline=_is_small):
            bar.advance(task, image_count)
    return image_hashes


def _read_chunk(
    chunk: list[IndexedContent],
    geometry: Geometry,
    output: npt.NDArray[np.uint8] | None,
    image_hashes: ImageHashes,
) -> None:
    pixels = np.empty((len(chunk), geometry.height, geometry.width, 3), np.uint8)
    rows: list[int] = []
    for row, content in chunk:
        try:
            if isinstance(content, BadImage):
                raise content
            image = _read_bytes(content) if isinstance(content, Path) else content
            pixels[len(rows)] = decode_pixels(image, geometry)
        except (RequestError, OSError) as error:
            image_hashes.read_errors[row] = _describe_error(error)
            continue
        image_hashes.digests[row] = np.frombuffer(compute_digest(image), np.uint8)
        rows.append(row)
    image_hashes.hashes[rows] = hash_images(pixels[: len(rows)])
    if output is not None:
        output[rows] = pixels[: len(rows)]


def _read_bytes(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise BadImage(f"the file is over {MAX_BYTES >> 20} MB, the limit for an image")
    return path.read_bytes()


def compute_digest(content: bytes) -> bytes:
    """Return the BLAKE2b digest, 16 bytes, which identifies identical files."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _describe_error(error: RequestError | OSError) -> str:
    return to_one_line(error) if isinstance(error, RequestError) else error.strerror or to_one_line(error)


def _group_chunks(contents: Iterable[IndexedContent]) -> Iterator[list[IndexedContent]]:
    chunk: list[IndexedContent] = []
    chunk_bytes = 0
    for row, content in contents:
        chunk.append((row, content))
        chunk_bytes += len(content) if isinstance(content, bytes) else 0
        if len(chunk) == _CHUNK_IMAGES or chunk_bytes > _CHUNK_BYTES:
            yield chunk
            chunk, chunk_bytes = [], 0
    if chunk:
        yield chunk


def _is_small(chunk: list[IndexedContent]) -> bool:
    """Return whether the chunk's middle image is small."""
    _, content = chunk[len(chunk) // 2]
    try:
        if isinstance(content, BadImage):
            return True
        return (content.stat().st_size if isinstance(content, Path) else len(content)) < _SMALL_BYTES
    except OSError:  # reported when the image is read
        return True


T = TypeVar("T")
R = TypeVar("R")


def map_in_threads(
    function: Callable[[T], R], items: Iterable[T], *, is_inline: Callable[[T], bool]
) -> Iterator[R]:
    """Yield the function's result for each item, with only a few items in flight.

    `function` runs on the threads of a pool, except for items for which `is_inline` is true: these are
    processed on the calling thread, and their results may overtake earlier ones. `items` is consumed on the
    calling thread only, because an archive cannot be read by two threads.
    """
    threads = get_thread_count()
    pool = ThreadPoolExecutor(threads, "read")
    futures: deque[Future[R]] = deque()
    try:
        for item in items:
            if is_inline(item):
                yield function(item)
                continue
            futures.append(pool.submit(function, item))
            if len(futures) > 2 * threads:  # bounds the memory of chunks that wait
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:  # also if the consumer stops early; running calls are awaited, so none writes afterwards
        pool.shutdown(cancel_futures=True)
