"""Image files: the header promises at least what decoding takes, and any file is decoded or refused.

The service reserves memory and chooses a queue by the header, which `decode_cost` reads. A file whose header
seems small to it, and large to the decoder, would pass both limits.
"""

from __future__ import annotations

import random
import struct
import warnings
import zlib
from typing import Final

from fovea.service.artifact.contract import Geometry, Interpolation, PixelPath
from fovea.service.errors import RequestError
from fovea.service.inference import jpeg
from fovea.service.inference.boxes import PixelBox
from fovea.service.inference.decode_cost import NO_COST, DecodeCost, estimate_cost, read_header
from fovea.service.inference.image_format import identify_format, supported_formats
from fovea.service.inference.image_opening import open_image
from fovea.service.inference.preprocess import configure_pillow, decode_image
from fovea.service.inference.repair import find_repairs
from tests.fuzz.target import Target, require
from tests.pictures import draw_picture, encode_heic, encode_image

_MAX_PIXELS: Final = 20_000
_GEOMETRY: Final = Geometry.cropped(8, 8, 8, Interpolation.BILINEAR, PixelPath.FAST)
_BOXES: Final[list[PixelBox]] = [(0, 0, 5, 5)]

configure_pillow()
warnings.simplefilter("ignore")  # Pillow warns of damaged files


def check_image(image: bytes) -> bool:
    """Estimate the cost of an image, repair it, and decode it."""
    cost = estimate_cost(image, _GEOMETRY, max_pixels=_MAX_PIXELS)
    estimate_cost(image, _GEOMETRY, max_pixels=_MAX_PIXELS, boxes=_BOXES)
    for kind in supported_formats():
        for repair in find_repairs(kind, image):
            require(len(repair.image) <= 2 * len(image) + 64, "a repair is larger than the file")
    if image.startswith(b"\xff\xd8"):
        sum(1 for _ in jpeg.read_scans(image))
    if cost is not None:  # None counts as the most expensive image
        _compare_with_decoder(image, cost)
    try:
        decoded = decode_image(image, _GEOMETRY, max_pixels=_MAX_PIXELS)
    except RequestError as error:
        str(error).encode()
        return False
    require(decoded.pixels.shape == (8, 8, 3), f"the pixels have the shape {decoded.pixels.shape}")
    require(decoded.width * decoded.height <= _MAX_PIXELS, "the image has too many pixels")
    return True


def _compare_with_decoder(image: bytes, cost: DecodeCost) -> None:
    """Check that the header that the service reads promises all pixels that the decoder would allocate."""
    try:
        width, height = open_image(identify_format(image[:64]), image, _MAX_PIXELS, []).image_file.size
    except Exception:  # a file that cannot be opened costs nothing, and `decode_image` refuses it
        return
    header = read_header(image)
    require(
        cost != NO_COST and header is not None and header.width * header.height >= width * height,
        f"the header promises {header}, and the decoder allocates {width} x {height} pixels",
    )


def _make_seeds() -> list[bytes]:
    picture = draw_picture(24, 16)
    seeds = [encode_image(picture, kind) for kind in supported_formats() if kind not in ("MPO", "HEIC")]
    if "HEIC" in supported_formats():
        seeds.append(encode_heic(picture))
    seeds += [
        encode_image(picture, "JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
        encode_image(picture.convert("P"), "PNG", transparency=0),
        encode_image(picture.convert("L"), "TIFF", compression="tiff_lzw"),
        encode_image(picture.convert("RGBA"), "WEBP", lossless=True),
    ]
    return seeds


def _mutate(image: bytes, choice: random.Random) -> bytes:
    """Change a number, or remove or repeat a piece; a PNG gets right checksums."""
    content = bytearray(image)
    if not content:
        return b"\x89PNG\r\n\x1a\n"
    place = choice.randrange(min(len(content), choice.choice((64, len(content)))))
    action = choice.randrange(4)
    if action == 0:
        size = choice.choice((1, 2, 4))
        number = choice.choice(
            (0, 1, 2, 8, 24, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, len(content))
        )
        order: Final = choice.choice(("little", "big"))
        content[place : place + size] = (number % (1 << 8 * size)).to_bytes(size, order)
    elif action == 1:
        content[place] ^= 1 << choice.randrange(8)
    elif action == 2:
        del content[place : place + choice.choice((1, 2, 12, 40))]
    else:
        content[place:place] = content[place : place + choice.choice((1, 2, 12, 40))]
    return _with_checksums(bytes(content))


def _with_checksums(image: bytes) -> bytes:
    """Return a PNG with the right checksums of its chunks; any other image unchanged."""
    if not image.startswith(b"\x89PNG\r\n\x1a\n"):
        return image
    parts, position = [image[:8]], 8
    while position + 12 <= len(image):
        end = position + 8 + int.from_bytes(image[position : position + 4])
        if end + 4 > len(image):
            break
        parts += [image[position:end], struct.pack(">I", zlib.crc32(image[position + 4 : end]))]
        position = end + 4
    return b"".join([*parts, image[position:]])


TARGET = Target(
    check_image,
    _make_seeds,
    _mutate,
    words=(
        b"\xff\xd8", b"\xff\xc0", b"\xff\xc2", b"\xff\xda", b"\xff\xd9", b"\xff\xe1", b"\xff\xff", b"IHDR",
        b"IDAT",
        b"PLTE", b"iCCP", b"eXIf", b"acTL", b"fdAT", b"GIF89a", b"BM", b"RIFF", b"WEBPVP8X", b"VP8L", b"VP8 ",
        b"ANMF", b"II*\0", b"MM\0*", b"ftypavif", b"ftypheic", b"ispe", b"meta",
        b"hvcC", b"av01", b"hvc1", b"grid", b"auxl", b"dimg",
        b"ICC_PROFILE\0", b"Exif\0\0",
    ),
    max_size=3000,
)  # fmt: skip
