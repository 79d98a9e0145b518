"""The workloads: images, networks and geometries, created once and kept under `build/bench/`."""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from fovea.service.artifact.geometry import Geometry, Interpolation, PixelPath

ROOT: Final = Path(__file__).resolve().parents[1]
CACHE: Final = ROOT / "build" / "bench"

THUMBNAIL_COUNT: Final = 500
"""Number of CIFAR test files, spread over all labels."""

_DRAWN_FOLDER: Final = CACHE / "drawn"
"""Folder of drawn pictures that replace test data."""

DRAWN_PHOTOGRAPH_COUNT: Final = 40
DRAWN_SIZE: Final = (500, 375)
"""Size of most photographs in ImageNet, in pixels (width, height)."""

PHONE_PHOTO_COUNT: Final = 12
PHONE_SIZE: Final = (4000, 3000)
PHONE_QUALITY: Final = 94
"""JPEG quality at which the mosaics have 3 to 5 MB, as a phone's photographs do."""


class BenchError(Exception):
    """The benchmark cannot be run as requested; the message says what to do."""


@dataclass(frozen=True)
class Workload:
    """Images and the network for these images."""

    name: str
    network: str
    geometry: Geometry
    pixel_paths: tuple[PixelPath, ...]
    """Pixel paths of Fovea to measure; the goals apply to the first."""
    duration_factor: float
    """Factor on the duration of the measurement for slow workloads."""
    find_images: Callable[[], list[Path]]

    @property
    def images(self) -> list[Path]:
        """Encoded images, extracted or drawn if they do not exist yet.

        Raises `BenchError`.
        """
        return self.find_images()

    @property
    def is_drawn(self) -> bool:
        """Flag for drawn images in place of missing test data."""
        return any(path.is_relative_to(_DRAWN_FOLDER) for path in self.images[:1])

    def build_model(self, kind: str) -> Path:
        """Return the path of the network as `plain`, `exact` or `fast`, built once.

        See `bench.networks.build_models`.
        """
        suffix = "-drawn" if self.is_drawn else ""
        folder = CACHE / f"models-{_compute_fingerprint()}{suffix}" / self.name
        if not (folder / f"{kind}.onnx").exists():
            from fovea.bench import networks  # torch is not needed if everything is built

            print(f"building {self.network} for {self.name}", flush=True)
            networks.build_models(self.name, self.network, self.geometry, self.images, folder)
        return folder / f"{kind}.onnx"


def _compute_fingerprint() -> str:
    """Return a digest of the files on which the models depend; a change leads to a rebuild."""
    content = b"".join((ROOT / path).read_bytes() for path in _MODEL_SOURCES)
    return hashlib.sha256(content).hexdigest()[:12]


_MODEL_SOURCES: Final = (
    "bench/networks.py",
    "export/from_checkpoint.py",
    "export/layer_table.py",
    "export/golden.py",
    "service/artifact/contract.py",
)


def _find_thumbnails() -> list[Path]:
    folder = _extract_archive("cifar10-jpeg.tar.gz", "cifar10/test/")
    if folder is None:
        return _draw_pictures("thumbnails", THUMBNAIL_COUNT, (32, 32))
    paths = sorted(folder.rglob("*.jpg"))
    return paths[:: len(paths) // THUMBNAIL_COUNT][:THUMBNAIL_COUNT]


def find_photographs() -> list[Path]:
    """Return the photographs of `TEST_DATA`, or drawn pictures if they are missing."""
    folder = _extract_archive("photos.tar", "photos/")
    if folder is None:
        return _draw_pictures("photographs", DRAWN_PHOTOGRAPH_COUNT, DRAWN_SIZE)
    return sorted(folder.rglob("*.JPEG"))


def _draw_pictures(kind: str, count: int, size: tuple[int, int]) -> list[Path]:
    """Draw pictures in place of missing test data: coarse colours, an edge and some noise."""
    folder = _DRAWN_FOLDER / kind
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03}.jpg" for number in range(count)]
    for seed, path in enumerate(paths):
        if not path.exists():
            partial = path.with_suffix(".tmp")
            draw_picture(size, seed).save(partial, "JPEG", quality=90)
            partial.rename(path)
    return paths


def draw_picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Draw one picture of (width, height), different for each seed."""
    random = np.random.default_rng(seed)
    width, height = size
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16).copy()
    top, left = (int(random.integers(0, side // 2)) for side in (height, width))
    picture[top : top + height // 3, left : left + width // 3] = random.integers(0, 256, 3)
    noisy = picture + random.integers(-12, 13, picture.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _draw_phone_photos() -> list[Path]:
    photographs = find_photographs()
    folder = (
        _DRAWN_FOLDER if photographs[0].is_relative_to(_DRAWN_FOLDER) else CACHE / "images"
    ) / f"phone-{PHONE_QUALITY}"
    paths = [folder / f"{number:02}.jpg" for number in range(PHONE_PHOTO_COUNT)]
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths):
        if not path.exists():
            draw_mosaic(photographs, path, seed=number)
    return paths


def draw_mosaic(photographs: Sequence[Path], path: Path, *, seed: int) -> None:
    """Fill 4000 x 3000 px with photographs in a seed-dependent order and size, as a 4:2:0 JPEG."""
    random = np.random.default_rng(seed)
    columns = 4 + seed % 3
    width, height = PHONE_SIZE[0] // columns, PHONE_SIZE[1] // columns
    mosaic = Image.new("RGB", PHONE_SIZE)
    order = random.permutation(len(photographs))
    for cell in range((columns + 1) ** 2):
        with Image.open(photographs[order[cell % len(order)]]) as photograph:
            tile = photograph.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        mosaic.paste(tile, (cell % (columns + 1) * width, cell // (columns + 1) * height))
    partial = path.with_suffix(".tmp")
    mosaic.save(partial, "JPEG", quality=PHONE_QUALITY)
    partial.rename(path)


def _extract_archive(archive: str, prefix: str) -> Path | None:
    """Return the folder with the contents of `archive` below `prefix`; None without such an archive."""
    target = CACHE / "images" / prefix
    if target.exists():
        return target
    source = ROOT / os.environ.get("TEST_DATA", "data") / archive
    if not source.exists():
        _warn_once(
            f"bench: {source} does not exist: drawn pictures take its place, and the figures cannot be "
            "compared with docs/benchmarks.md; set TEST_DATA to the folder of the test data"
        )
        return None
    partial = CACHE / "images.tmp"
    with tarfile.open(source) as archive_file:
        archive_file.extractall(
            partial, [one for one in archive_file if one.name.startswith(prefix)], filter="data"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    (partial / prefix).rename(target)
    return target


@cache
def _warn_once(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


_IMAGENET: Final = Geometry.cropped(224, 224, 256, Interpolation.BILINEAR, PixelPath.FAST)
_CIFAR: Final = Geometry.cropped(32, 32, 32, Interpolation.BILINEAR, PixelPath.FAST)

WORKLOADS: Final = {
    workload.name: workload
    for workload in (
        Workload("thumbnails", "resnet20", _CIFAR, (PixelPath.FAST,), 1, _find_thumbnails),
        Workload(
            "photographs", "mobilenetv2", _IMAGENET, (PixelPath.FAST, PixelPath.EXACT), 1, find_photographs
        ),
        Workload("phone", "mobilenetv2", _IMAGENET, (PixelPath.FAST,), 1.6, _draw_phone_photos),
    )
}
