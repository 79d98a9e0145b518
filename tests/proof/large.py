"""Large pictures, as a phone writes them: JPEG, quality 90, 4:2:0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from tests.pictures import encode_image

PHONE_SIZE = (4000, 3000)


def encode_phone_jpeg(image: Image.Image) -> bytes:
    """Encode an image as a phone does."""
    return encode_image(image, "JPEG", quality=90, subsampling=2)


def make_mosaic(
    photographs: Sequence[Image.Image],
    random: np.random.Generator,
    across: int,
    size: tuple[int, int] = PHONE_SIZE,
) -> Image.Image:
    """Return a picture of `across` x `across` pieces of photographs, some mirrored."""
    whole = Image.new("RGB", size)
    width, height = -(-size[0] // across), -(-size[1] // across)
    for top in range(0, size[1], height):
        for left in range(0, size[0], width):
            photograph = photographs[int(random.integers(len(photographs)))]
            box_size = random.uniform(0.6, 1, 2) * photograph.size
            x, y = random.uniform(0, 1, 2) * (np.array(photograph.size) - box_size)
            piece = photograph.resize(
                (width, height), Image.Resampling.BICUBIC, box=(x, y, x + box_size[0], y + box_size[1])
            )
            tile = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else piece
            whole.paste(tile, (left, top))
    return whole


def make_zone_plate(size: tuple[int, int] = PHONE_SIZE, cycles: float = 0.5) -> Image.Image:
    """Draw rings of growing frequency, `cycles` per pixel at the nearer edge; 0.5 is the highest frequency.

    The mean is 128 and not 127.5: otherwise the mean of every fine ring would lie between two levels, and
    rounding alone would make a difference of one.
    """
    down, across = np.mgrid[: size[1], : size[0]]
    squared_radius = (across - size[0] / 2) ** 2 + (down - size[1] / 2) ** 2
    rings = 128 + 127 * np.cos(2 * np.pi * cycles * squared_radius / min(size))
    return Image.fromarray(rings.round().astype(np.uint8)).convert("RGB")


def extract_detail(image: Image.Image) -> Image.Image:
    """Return the fine detail of an image around a grey of 128: the image less its own blur."""
    return ImageChops.subtract(image, image.filter(ImageFilter.BoxBlur(12)), offset=128)


def add_detail(small: Image.Image, fine: Image.Image, shift: int) -> Image.Image:
    """Enlarge a small picture and add the fine detail of a large one, moved aside by `shift`."""
    enlarged_image = small.resize(fine.size, Image.Resampling.BICUBIC)
    return ImageChops.add(enlarged_image, ImageChops.offset(fine, shift, 0), offset=-128)


def open_photographs(paths: Sequence[Path]) -> list[Image.Image]:
    """Load images as RGB."""
    return [Image.open(path).convert("RGB") for path in paths]
