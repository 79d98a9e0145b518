"""Labelled images for training, as whole uint8 arrays in memory.

Three sources are understood: nothing (the original CIFAR-10 binary release is downloaded), that release
as an archive, and images in folders named by label, plain or in a tar archive, with or without `train/` and
`test/` above them. Every encoded image is read through `service.images`.
"""

from __future__ import annotations

import hashlib
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import torch
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn, track
from torch import Tensor

from model.files import replacing
from service.contract import Geometry, Interpolation, PixelPath, Resize, Task
from service.errors import FoveaError, RequestError
from service.images import decode

CIFAR10_URL: Final = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256: Final = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_LABELS: Final = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
"""In the order of the release's own `batches.meta.txt`."""

IMAGE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".mpo", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif"}
)
MAX_PIXELS: Final = 200_000_000
"""Training reads its owner's files: the limit only stops what no camera makes."""


class DataError(FoveaError):
    """The training data cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Examples:
    """`pixels`: uint8 (N, H, W, 3), RGB. `targets`: int64 (N,), indices into the labels."""

    pixels: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Tensor) -> Examples:
        """Those of `indices`, in that order."""
        return Examples(self.pixels[indices], self.targets[indices])


@dataclass(frozen=True)
class Data:
    """A labelled set in its parts. `test` is empty where the source names none."""

    name: str
    labels: tuple[str, ...]
    task: Task
    geometry: Geometry
    train: Examples
    validation: Examples
    """Held out: choices, temperature and thresholds are made on it."""
    conformal: Examples
    """Held out too: the conformal sets are measured on it, and nothing is chosen."""
    test: Examples
    unreadable: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def counts(self) -> tuple[int, ...]:
        """Images to train on, by label."""
        return tuple(torch.bincount(self.train.targets, minlength=len(self.labels)).tolist())


def square(size: int) -> Geometry:
    """The geometry of our own models: shorter side to `size`, centre crop, the `fast` path."""
    return Geometry(size, size, Resize.SHORTER, size, Interpolation.BILINEAR, PixelPath.FAST)


def load(source: Path | None, *, size: int, validation: float, seed: int) -> Data:
    """Read a labelled set and split it.

    `source` is a folder, an archive, or None for CIFAR-10. `size` is the side of the model's
    square input in pixels, 32 for CIFAR-10; `validation` the fraction of each label's training
    images that is held out, chosen by `seed`. Raises `DataError`.
    """
    if source is None:
        source = download_cifar10(Path("data"))
    if not source.exists():
        raise DataError(f"there is no {source}")
    files = list(_files(source))
    if any(path.name == "data_batch_1.bin" for path, _ in files):
        data = _cifar10_binary(files, size)
    else:
        data = _folders(files, source.absolute().name, square(size))
    return _hold_out(data, validation, seed)


def load_again(about: dict[str, Any], source: Path | None, *, cache: Path) -> Data:
    """The set that a checkpoint was trained on, split as it was; `source` takes another in its place.

    Raises `DataError`.
    """
    given = source or (Path(about["source"]) if about["source"] else None)
    recipe = about["recipe"]
    size = about["geometry"]["height"]
    return load(given, size=size, validation=recipe["validation"], seed=recipe["seed"])


def _files(source: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Every file below a folder or in a tar archive, in sorted order."""
    if source.is_dir():
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            yield PurePosixPath(path.relative_to(source).as_posix()), path.read_bytes()
        return
    try:
        with tarfile.open(source) as archive:
            members = sorted((member for member in archive if member.isfile()), key=lambda m: m.offset)
            _require_end(archive)
            contents = [(member.name, archive.extractfile(member)) for member in members]
            read = [(name, file.read()) for name, file in contents if file]
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{source} is neither a folder nor a tar archive: {error}") from None
    yield from sorted((PurePosixPath(name), content) for name, content in read)


def _require_end(archive: tarfile.TarFile) -> None:
    """Raise `ReadError` unless the members end in the zeros that end an archive (POSIX.1, ustar).

    A damaged header ends the list for `tarfile` too, and would silently cost the images behind it.
    """
    file: Any = archive.fileobj
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it is cut short or damaged")


# --- the original CIFAR-10 -----------------------------------------------------------------------


def download_cifar10(folder: Path, url: str = CIFAR10_URL, sha256: str = CIFAR10_SHA256) -> Path:
    """Fetch the binary release once, with a progress bar. Raises `DataError` on a wrong hash."""
    target = folder / url.rsplit("/", 1)[-1]
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        with (
            replacing(target) as partial,
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


def _cifar10_binary(files: list[tuple[PurePosixPath, bytes]], size: int) -> Data:
    """Rows of 1 label byte and 3072 pixel bytes: red, green, blue planes of 32 x 32."""
    if size != 32:
        raise DataError(f"CIFAR-10 is 32 x 32 px, not {size}; other sizes need images in folders")

    def examples(prefix: str) -> Examples:
        raw = b"".join(content for path, content in files if path.name.startswith(prefix))
        if not raw or len(raw) % 3073:
            raise DataError(f"the CIFAR-10 release is incomplete: {prefix}*.bin")
        rows = torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(-1, 3073).copy())
        pixels = rows[:, 1:].view(-1, 3, 32, 32).permute(0, 2, 3, 1).contiguous()  # (N, 32, 32, 3)
        return Examples(pixels, rows[:, 0].long())

    train = examples("data_batch_")
    none = _none_of(train)
    test = examples("test_batch")
    return Data("CIFAR-10", CIFAR10_LABELS, Task.MULTICLASS, square(32), train, none, none, test)


# --- folders named by label ----------------------------------------------------------------------


def _folders(files: list[tuple[PurePosixPath, bytes]], name: str, geometry: Geometry) -> Data:
    images = [
        (path, content)
        for path, content in files
        if path.suffix.lower() in IMAGE_SUFFIXES and path.parent.name
    ]
    labels = tuple(sorted({path.parent.name for path, _ in images}))
    if len(labels) < 2:
        found = f"only {labels[0]!r}" if labels else "none"
        raise DataError(f"{name} needs one sub-folder of images per label, at least two; found {found}")
    pixels = np.empty((len(images), geometry.height, geometry.width, 3), np.uint8)
    targets: list[int] = []
    in_test: list[bool] = []
    unreadable: list[str] = []
    for path, content in track(images, f"Reading {len(images)} images", transient=True):
        try:
            pixels[len(targets)] = decode(content, geometry, max_pixels=MAX_PIXELS).pixels
        except RequestError as error:
            unreadable.append(f"{path}: {error}")
            continue
        targets.append(labels.index(path.parent.name))
        in_test.append(path.parent.parent.name == "test")
    tests = torch.tensor(in_test, dtype=torch.bool)
    everything = Examples(torch.from_numpy(pixels[: len(targets)]), torch.tensor(targets, dtype=torch.int64))
    train = everything.take((~tests).nonzero().flatten())
    test = everything.take(tests.nonzero().flatten())
    none = _none_of(train)
    task = Task.BINARY if len(labels) == 2 else Task.MULTICLASS
    return Data(name, labels, task, geometry, train, none, none, test, tuple(unreadable))


def _none_of(examples: Examples) -> Examples:
    return examples.take(torch.empty(0, dtype=torch.int64))


def _hold_out(data: Data, fraction: float, seed: int) -> Data:
    """Move `fraction` of each label's images, at least one, by turns to validation and to conformal."""
    generator = torch.Generator().manual_seed(seed)
    chosen, conformal = [], []
    for index, label in enumerate(data.labels):
        members = (data.train.targets == index).nonzero().flatten()
        if len(members) < 2:
            raise DataError(f"label {label!r} has {len(members)} readable images; at least 2 are needed")
        count = max(1, round(fraction * len(members)))
        held = members[torch.randperm(len(members), generator=generator)[:count]]
        chosen.append(held[0::2])
        conformal.append(held[1::2])
    first, second = torch.cat(chosen).sort().values, torch.cat(conformal).sort().values
    kept = torch.ones(len(data.train), dtype=torch.bool)
    kept[first] = kept[second] = False
    return replace(
        data,
        train=data.train.take(kept.nonzero().flatten()),
        validation=data.train.take(first),
        conformal=data.train.take(second),
    )
