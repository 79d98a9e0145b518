"""The original CIFAR-10 in its binary release.

Source: Krizhevsky, 2009, "Learning Multiple Layers of Features".
"""

from __future__ import annotations

import hashlib
import urllib.request
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np
import numpy.typing as npt
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from fovea.model.data.decoding import ImageHashes, compute_digest
from fovea.model.data.disk_source import Folder
from fovea.model.data.examples import DataError
from fovea.model.data.inventory import File, Part
from fovea.model.data.perceptual_hash import hash_images
from fovea.model.data.sources import EncodedImage
from fovea.model.data.tar_archive import Archive
from fovea.service.atomic_files import replace_file
from fovea.service.errors import BadImage

URL: Final = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256: Final = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
LABELS: Final = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
"""Labels in the order of the release's `batches.meta.txt`."""
SIDE: Final = 32
"""Side of the images, in pixels."""
NAME: Final = "CIFAR-10"
PARTS: Final = {Part.TRAIN: ("data_batch_*.bin",), Part.TEST: ("test_batch.bin",)}
"""File name patterns of the release's parts."""

_ROW_BYTES: Final = 1 + 3 * SIDE * SIDE
"""Bytes per image: one label byte, then the red, the green and the blue plane."""


def download_release(folder: Path, url: str = URL, sha256: str = SHA256) -> Path:
    """Download the binary release once, with a progress bar.

    Raises `DataError` if the download fails or the SHA-256 hash is wrong.
    """
    target = folder / url.rsplit("/", 1)[-1]
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        with (
            replace_file(target) as partial,
            urllib.request.urlopen(url, timeout=30) as response,  # noqa: S310 - a constant
            partial.open("wb") as file,
            Progress(*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn()) as bar,
        ):
            task = bar.add_task(target.name, total=int(response.headers.get("Content-Length", 0)) or None)
            while chunk := response.read(1 << 20):
                file.write(chunk)
                digest.update(chunk)
                bar.advance(task, len(chunk))
            if digest.hexdigest() != sha256:
                raise DataError(f"{url} has SHA-256 {digest.hexdigest()}, not {sha256}; try again")
    except (OSError, HTTPException) as error:
        raise DataError(f"cannot download {url}: {error}; `--data` takes a folder of images") from None
    return target


def is_release(source: Folder | Archive) -> bool:
    """Return whether the source contains the files of the release."""
    return any(f"/{name}".endswith("/data_batch_1.bin") for name in source.names)


def read_release(source: Folder | Archive) -> tuple[tuple[File, ...], npt.NDArray[np.uint8], ImageHashes]:
    """Return the images of the release: files, pixels, uint8 (N, 32, 32, 3), and hashes.

    A file is named by its batch file and row. Raises `DataError` if batches are missing or damaged.
    """
    names = [name for name in source.names if _is_batch(name)]
    contents_by_name = {
        names[index]: _read_content(content) for index, content in source.read_contents(names)
    }
    files: list[File] = []
    rows: list[npt.NDArray[np.uint8]] = []
    for prefix in ("data_batch_", "test_batch"):
        batches = [name for name in names if PurePosixPath(name).name.startswith(prefix)]
        if not batches or any(len(contents_by_name[name]) % _ROW_BYTES for name in batches):
            raise DataError(f"the CIFAR-10 release is incomplete: {prefix}*.bin; unpack or download it again")
        for name in batches:
            batch = np.frombuffer(contents_by_name[name], np.uint8).reshape(
                -1, _ROW_BYTES
            )  # (rows, 1 + 3 H W)
            rows.append(batch)
            files += _build_files(name, batch[:, 0], test=prefix == "test_batch")
    all_rows = np.concatenate(rows)
    # (N, 3 H W) -> (N, H, W, 3)
    pixels = np.ascontiguousarray(all_rows[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    return tuple(files), pixels, _hash_images(pixels)


def _is_batch(name: str) -> bool:
    file = PurePosixPath(name).name
    return file.endswith(".bin") and file.startswith(("data_batch_", "test_batch"))


def _read_content(content: EncodedImage) -> bytes:
    if isinstance(content, BadImage):
        raise DataError(f"the CIFAR-10 release is damaged: {content}; download it again")
    return content.read_bytes() if isinstance(content, Path) else content


def _build_files(name: str, targets: npt.NDArray[np.uint8], *, test: bool) -> list[File]:
    if targets.max(initial=0) >= len(LABELS):
        raise DataError(
            f"{name} is damaged: it has a label {targets.max()}, and the last label is {len(LABELS) - 1}; "
            "unpack or download it again"
        )
    part = Part.TEST if test else Part.TRAIN
    return [File(f"{name}#{row}", (LABELS[target],), part) for row, target in enumerate(targets)]


def _hash_images(pixels: npt.NDArray[np.uint8]) -> ImageHashes:
    digests = np.frombuffer(b"".join(compute_digest(image.tobytes()) for image in pixels), np.uint8)
    hashes = [hash_images(part) for part in np.array_split(pixels, len(pixels) // 1000 + 1)]
    return ImageHashes(digests.reshape(len(pixels), -1), np.concatenate(hashes), {})  # digests (N, 16)
