"""The choice of the picture in a file, camera raw files, 16 bits, and the warnings about all of these."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fovea.service.artifact.contract import Geometry, Interpolation, PixelPath
from fovea.service.errors import BadImage, UnsupportedFormat
from fovea.service.image_warnings import WarningCode
from fovea.service.inference.decode_trace import DecodeTrace
from fovea.service.inference.preprocess import DecodedImage, decode_image, decode_upright
from tests.pictures import draw_picture, encode_image, make_jpeg, make_png16

EXACT = Geometry.cropped(32, 32, 32, Interpolation.BILINEAR, PixelPath.EXACT)
FAST = replace(EXACT, pixel_path=PixelPath.FAST)
MAX_PIXELS = 20_000_000


def decode_default(content: bytes, geometry: Geometry = EXACT) -> DecodedImage:
    return decode_image(content, geometry, max_pixels=MAX_PIXELS)


def list_warning_codes(content: bytes, geometry: Geometry = EXACT) -> list[str]:
    return [warning.code for warning in decode_default(content, geometry).warnings]


# --- TIFF ----------------------------------------------------------------------------------------

SUBFILE, OLD_SUBFILE, MAKE, ORIENTATION, SUB_DIRECTORIES, DNG = 254, 255, 271, 274, 330, 50706


class TiffBuilder:
    """A TIFF with several pictures, built by hand."""

    def __init__(self, order: str = "<", *, big: bool = False) -> None:
        self._order, self._big = order, big
        self._content = bytearray(16 if big else 8)

    def add(
        self,
        image: Image.Image,
        *,
        following: int = 0,
        photometric: int | None = None,
        **tags: Any,
    ) -> int:
        """Write a picture and its directory; return the directory's offset. `tags` are `t` and a number."""
        bands = len(image.getbands())
        start = self._append(image.tobytes())
        values: dict[int, tuple[int, ...] | bytes] = {
            256: (image.width,),
            257: (image.height,),
            258: (8,) * bands,
            259: (1,),
            262: (photometric if photometric is not None else 2 if bands == 3 else 1,),
            273: (start,),
            277: (bands,),
            278: (image.height,),
            279: (image.width * image.height * bands,),
            **{int(name[1:]): value for name, value in tags.items()},
        }
        width = 8 if self._big else 4
        number = "Q" if self._big else "I"
        entries = b""
        for tag in sorted(values):
            value = values[tag]
            kind, content = (
                (2, value) if isinstance(value, bytes) else (4, self._pack(f"{len(value)}I", *value))
            )
            place = (
                content.ljust(width, b"\0")
                if len(content) <= width
                else self._pack(number, self._append(content))
            )
            entries += self._pack(f"HH{number}", tag, kind, len(value)) + place
        head = self._pack("Q" if self._big else "H", len(values))
        return self._append(head + entries + self._pack(number, following))

    def build(self, first: int) -> bytes:
        """Return the file, with the first directory at this offset."""
        mark = b"II" if self._order == "<" else b"MM"
        head = self._pack("HHHQ", 43, 8, 0, first) if self._big else self._pack("HI", 42, first)
        self._content[: len(mark) + len(head)] = mark + head
        return bytes(self._content)

    def _append(self, content: bytes) -> int:
        self._content += bytes(len(self._content) % 2)
        self._content += content
        return len(self._content) - len(content)

    def _pack(self, layout: str, *values: int) -> bytes:
        return struct.pack(self._order + layout, *values)


SMALL, LARGE = draw_picture(160, 120, 1), draw_picture(900, 600, 2)

VARIANTS = [("<", False), (">", False), ("<", True)]
"""Byte orders and variants. Pillow reads BigTIFF in one byte order only."""


@pytest.mark.parametrize(("order", "big"), VARIANTS)
@pytest.mark.parametrize("geometry", [EXACT, FAST], ids=["exact", "fast"])
def test_picture_in_a_tiff_subdirectory_is_used(order: str, big: bool, geometry: Geometry) -> None:
    marks: list[dict[str, Any]] = [{"t254": (1,)}, {}]
    for mark in marks:
        tiff = TiffBuilder(order, big=big)
        large = tiff.add(LARGE)
        content = tiff.build(tiff.add(SMALL, t330=(large,), **mark))
        result = decode_default(content, geometry)
        assert (result.width, result.height) == (900, 600)
        assert np.array_equal(result.pixels, decode_default(encode_image(LARGE, "PNG"), geometry).pixels)
        assert not result.warnings
        assert decode_upright(content, max_pixels=MAX_PIXELS).size == (900, 600)


@pytest.mark.parametrize("mark", [{"t254": (1,)}, {"t255": (2,)}, {}], ids=["reduced", "old", "by size"])
def test_picture_after_a_tiff_thumbnail_is_used(mark: Any) -> None:
    tiff = TiffBuilder()
    large = tiff.add(LARGE)
    content = tiff.build(tiff.add(SMALL, following=large, **mark))
    assert (decode_default(content).width, decode_default(content).height) == (900, 600)


def test_largest_picture_of_the_subdirectories_is_used() -> None:
    tiff = TiffBuilder()
    offsets = tuple(tiff.add(draw_picture(*size)) for size in ((320, 240), (900, 600), (640, 480)))
    assert decode_default(tiff.build(tiff.add(SMALL, t330=offsets, t254=(1,)))).width == 900


def test_thumbnail_orientation_applies_to_its_picture() -> None:
    tiff = TiffBuilder()
    large = tiff.add(LARGE)
    content = tiff.build(tiff.add(SMALL, t330=(large,), t254=(1,), t274=(6,)))
    result = decode_default(content)
    assert (result.width, result.height) == (600, 900)
    rotated_png = encode_image(LARGE.transpose(Image.Transpose.ROTATE_270), "PNG")
    assert np.array_equal(result.pixels, decode_default(rotated_png).pixels)


def test_reduced_copies_and_masks_give_no_warning() -> None:
    tiff = TiffBuilder()
    small = tiff.add(SMALL, t254=(1,))
    mask = tiff.add(Image.new("L", (900, 600)), following=small, photometric=4, t254=(4,))
    content = tiff.build(tiff.add(LARGE, following=mask))
    assert decode_default(content).width == 900
    assert list_warning_codes(content) == []


def test_first_of_several_pages_is_used_with_warning() -> None:
    first, second = draw_picture(400, 300, 1), draw_picture(500, 300, 2)
    content = encode_image(first, "TIFF", save_all=True, append_images=[second, second])
    result = decode_default(content)
    assert result.width == 400
    assert [tuple(warning) for warning in result.warnings] == [
        (WarningCode.SEVERAL_PICTURES, "the file has 3 pages; only the first was used")
    ]


def test_circular_directories_are_read_without_a_loop() -> None:
    offset = TiffBuilder().add(LARGE, t330=(8, 8, 8))
    tiff = TiffBuilder()
    assert tiff.add(LARGE, following=offset, t330=(offset, 8, 1 << 30)) == offset
    assert decode_default(tiff.build(offset)).width == 900


RAWS: dict[str, dict[str, Any]] = {
    "DNG": {"t50706": (0x01040000,)},
    "Nikon NEF": {"t271": b"NIKON CORPORATION\0", "photometric": 32803},
    "Sony ARW": {"t271": b"SONY\0", "photometric": 32803},
    "TIFF with sensor data": {"photometric": 34892},
}


@pytest.mark.parametrize("name", RAWS)
@pytest.mark.parametrize(("order", "big"), VARIANTS)
def test_raw_file_is_refused_by_name(name: str, order: str, big: bool) -> None:
    tiff = TiffBuilder(order, big=big)
    raw_offset = tiff.add(Image.new("L", (900, 600)), **{"photometric": 1, **RAWS[name]})
    for content in (tiff.build(raw_offset), tiff.build(tiff.add(SMALL, t330=(raw_offset,), t254=(1,)))):
        with pytest.raises(UnsupportedFormat, match=rf"camera's raw file \({name}\) is not served"):
            decode_default(content)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"II*\0\x10\0\0\0CR\x02\0", "Canon CR2"),
        (b"II\x1a\0\0\0HEAPCCDR", "Canon CRW"),
        (b"\0\0\0\x18ftypcrx \0\0\0\x01crx isom", "Canon CR3"),
        (b"IIU\0\x08\0\0\0", "Panasonic RW2"),
        (b"IIRO\x08\0\0\0", "Olympus ORF"),
        (b"IIRS\x08\0\0\0", "Olympus ORF"),
        (b"MMOR\0\0\0\x08", "Olympus ORF"),
        (b"FUJIFILMCCD-RAW 0201", "Fujifilm RAF"),
        (b"FOVb\0\0\2\0", "Sigma X3F"),
        (b"\0MRM\0\0\0\0", "Minolta MRW"),
        (b"II*\0\x08\0\0\0IIIITwaR", "Phase One IIQ"),
    ],
)
def test_raw_file_is_recognised_by_its_first_bytes(head: bytes, name: str) -> None:
    with pytest.raises(UnsupportedFormat, match=rf"camera's raw file \({name}\) is not served"):
        decode_default(head + bytes(200))


# --- other files of several pictures -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_animation_gives_warning(kind: str) -> None:
    first, second = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    assert list_warning_codes(encode_image(first, kind, save_all=True, append_images=[second])) == [
        WarningCode.SEVERAL_PICTURES
    ]
    assert list_warning_codes(encode_image(first, kind)) == []


def test_damaged_second_frame_is_ignored() -> None:
    first, second = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    content = encode_image(first, "GIF", save_all=True, append_images=[second])
    offset = content.rindex(b"\x2c\0\0\0\0")
    assert decode_default(content[:offset] + bytes(30)).pixels[16, 16, 0] > 200


def test_further_pictures_after_a_jpeg_give_warning() -> None:
    content = encode_image(
        draw_picture(64, 48), "MPO", save_all=True, append_images=[draw_picture(64, 48, 1)]
    )
    assert list_warning_codes(content) == [WarningCode.SEVERAL_PICTURES]


def test_gain_map_gives_no_warning() -> None:
    """Phones add a gain map to nearly every photograph."""
    content = encode_image(draw_picture(64, 48), "MPO", save_all=True, append_images=[draw_picture(32, 24)])
    offset = content.rindex(b"\xff\xd8\xff") + 2
    text = b"http://ns.adobe.com/xap/1.0/\0<x hdrgm:Version='1.0'/>"
    segment = b"\xff\xe1" + struct.pack(">H", len(text) + 2) + text
    assert list_warning_codes(content[:offset] + segment + content[offset:]) == []


# --- 16 bits -------------------------------------------------------------------------------------


def make_values(width: int = 64, height: int = 64, bands: int = 3) -> Any:
    """Return values of all kinds, including those near the rounding limits."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 65536, (height, width, bands)).astype(np.uint16)
    edges = [0, 127, 128, 129, 255, 256, 257, 385, 386, 65535, 65407, 65406, 65278, 65408]
    pixels.reshape(-1)[: len(edges)] = edges
    return pixels


def round_to_bytes(pixels: Any) -> Any:
    return np.floor(pixels.astype(np.float64) * 255 / 65535 + 0.5)


WHOLE = Geometry.stretched(64, 64, Interpolation.NEAREST, PixelPath.EXACT)


@pytest.mark.parametrize("is_interlaced", [False, True])
@pytest.mark.parametrize(
    "geometry", [WHOLE, replace(WHOLE, pixel_path=PixelPath.FAST)], ids=["exact", "fast"]
)
def test_16_bit_png_is_rounded(is_interlaced: bool, geometry: Geometry) -> None:
    values = make_values()
    result = decode_default(make_png16(values, interlaced=is_interlaced), geometry)
    assert np.array_equal(result.pixels, round_to_bytes(values))
    assert not result.warnings
    grey = make_values(bands=1)
    assert np.array_equal(
        decode_default(make_png16(grey), geometry).pixels, np.repeat(round_to_bytes(grey), 3, axis=2)
    )


@pytest.mark.parametrize("bands", [2, 4])
def test_16_bit_alpha_is_rounded(bands: int) -> None:
    values = make_values(bands=bands)
    values[..., -1] = 65535
    colours = np.repeat(values[..., :1], 3, axis=2) if bands == 2 else values[..., :3]
    assert np.array_equal(decode_default(make_png16(values), WHOLE).pixels, round_to_bytes(colours))
    values[..., -1] = 127  # rounded 0
    assert (decode_default(make_png16(values), WHOLE).pixels == 255).all()


def test_16_bit_transparent_colour_becomes_white() -> None:
    values = np.full((64, 64, 3), 1000, np.uint16)
    values[:32] = (1000, 1000, 1001)
    content = make_png16(values)
    data = b"tRNS" + struct.pack(">3H", 1000, 1000, 1001)
    chunk = struct.pack(">I", 6) + data + struct.pack(">I", zlib.crc32(data))
    pixels = decode_default(content[:33] + chunk + content[33:], WHOLE).pixels
    assert (pixels[:32] == 255).all()
    assert (pixels[32:] == 4).all()


def make_tiff16(
    pixels: Any, order: str, *, is_compressed: bool, planes: int = 1, photometric: int = 2
) -> bytes:
    """Return a TIFF of uint16 (height, width, bands), with its colours in one plane or one plane each."""
    height, width, bands = pixels.shape
    parts = np.split(pixels, bands, axis=2) if planes > 1 else [pixels]
    strips = [part.astype(f"{order}u2").tobytes() for part in parts]
    strips = [zlib.compress(strip) for strip in strips] if is_compressed else strips
    content = bytearray(8)
    places = []
    for strip in strips:
        places.append(len(content))
        content += strip + bytes(len(strip) % 2)
    tags = {
        256: (width,),
        257: (height,),
        258: (16,) * bands,
        259: (8 if is_compressed else 1,),
        262: (photometric,),
        273: tuple(places),
        277: (bands,),
        278: (height,),
        279: tuple(map(len, strips)),
        284: (2 if planes > 1 else 1,),
    }
    entries = b""
    for tag, values in tags.items():
        kind, letter = (4, "I") if tag in (273, 279) else (3, "H")
        value = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(value) > 4:
            content += value
            value = struct.pack(f"{order}I", len(content) - len(value))
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    head = struct.pack(f"{order}HI", 42, len(content))
    content[:8] = (b"II" if order == "<" else b"MM") + head
    return bytes(content) + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("is_compressed", [False, True])
def test_16_bit_tiff_is_rounded(order: str, is_compressed: bool) -> None:
    values = make_values()
    result = decode_default(make_tiff16(values, order, is_compressed=is_compressed), WHOLE)
    assert np.array_equal(result.pixels, round_to_bytes(values))
    assert not result.warnings


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_planes_are_rounded_or_give_warning(order: str) -> None:
    """Pillow by itself reads each byte of an uncompressed plane as a value."""
    values = make_values()
    assert np.array_equal(
        decode_default(make_tiff16(values, order, is_compressed=False, planes=3), WHOLE).pixels,
        round_to_bytes(values),
    )
    result = decode_default(make_tiff16(values, order, is_compressed=True, planes=3), WHOLE)
    assert np.array_equal(result.pixels, values >> 8)
    assert [warning.code for warning in result.warnings] == [WarningCode.SIXTEEN_BITS_CUT]
    cmyk_tiff = make_tiff16(make_values(bands=4), order, is_compressed=False, planes=4, photometric=5)
    with pytest.raises(BadImage, match="CMYK TIFF image of 16 bits"):
        decode_default(cmyk_tiff, WHOLE)


def test_16_bit_grey_with_12_bit_values_gives_warning() -> None:
    grey = np.linspace(0, 4095, 32 * 32).reshape(32, 32).astype(np.uint16)
    assert list_warning_codes(encode_image(Image.fromarray(grey), "PNG")) == [WarningCode.SIXTEEN_BITS_DARK]
    assert list_warning_codes(encode_image(Image.fromarray(grey * 16), "PNG")) == []
    assert list_warning_codes(encode_image(Image.fromarray(grey * 0), "PNG")) == []


# --- transparency and shape ----------------------------------------------------------------------


def draw_visible_share(colour: tuple[int, int, int], share: float, alpha: int = 0) -> Image.Image:
    """Return a canvas with this share in the opaque colour; the rest has the colour with this alpha."""
    image = Image.new("RGBA", (200, 200), (*colour, alpha))
    image.paste((*colour, 255), (0, 0, 200, round(200 * share)))
    return image


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_invisible_picture_gives_warning(kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert list_warning_codes(encode_image(draw_visible_share((200, 30, 40), 0), kind, **options)) == [
        WarningCode.INVISIBLE
    ]
    assert list_warning_codes(encode_image(draw_visible_share((255, 255, 255), 0.3), kind, **options)) == [
        WarningCode.INVISIBLE
    ]
    assert list_warning_codes(encode_image(draw_visible_share((200, 30, 40), 0.1), kind, **options)) == []
    assert (
        list_warning_codes(encode_image(draw_visible_share((200, 30, 40), 0, alpha=200), kind, **options))
        == []
    )


def test_transparent_palette_or_key_colour_gives_warning() -> None:
    image = Image.new("RGB", (40, 40), (9, 9, 9))
    assert list_warning_codes(encode_image(image, "PNG", transparency=(9, 9, 9))) == [WarningCode.INVISIBLE]
    assert list_warning_codes(encode_image(image.quantize(4), "GIF", transparency=0)) == [
        WarningCode.INVISIBLE
    ]


def test_opaque_white_picture_gives_no_warning() -> None:
    assert list_warning_codes(encode_image(Image.new("RGB", (40, 40), "white"), "PNG")) == []
    assert list_warning_codes(encode_image(Image.new("RGBA", (40, 40), "white"), "PNG")) == []


PHOTO = Geometry.cropped(224, 224, 256, Interpolation.BILINEAR, PixelPath.FAST)


@pytest.mark.parametrize(
    ("size", "code"),
    [
        ((4000, 3000), None),
        ((2400, 1080), None),
        ((32, 32), None),
        ((4000, 500), WarningCode.CROPPED),
        ((16, 16), WarningCode.ENLARGED),
    ],
)
def test_extreme_shapes_give_warning(size: tuple[int, int], code: str | None) -> None:
    assert list_warning_codes(make_jpeg(*size), PHOTO) == ([code] if code else [])
    stretch_geometry = Geometry.stretched(224, 224, Interpolation.BILINEAR, PixelPath.FAST)
    expected = [WarningCode.STRETCHED] if code == WarningCode.CROPPED else [code] if code else []
    assert list_warning_codes(make_jpeg(*size), stretch_geometry) == expected


def test_ordinary_photograph_gives_no_warning() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for content in (
        make_jpeg(1200, 900, exif=exif),
        encode_image(draw_picture(1200, 900), "WEBP"),
        encode_image(draw_picture(99, 88), "PNG"),
    ):
        for geometry in (EXACT, FAST, PHOTO):
            trace = DecodeTrace()
            assert not decode_image(content, geometry, max_pixels=MAX_PIXELS, trace=trace).warnings


def test_pillow_reads_the_files_of_these_tests() -> None:
    for order, big in VARIANTS:
        tiff = TiffBuilder(order, big=big)
        with Image.open(BytesIO(tiff.build(tiff.add(SMALL)))) as image:
            assert np.array_equal(np.asarray(image), np.asarray(SMALL))
    with Image.open(BytesIO(make_png16(make_values()))) as image:
        assert np.array_equal(np.asarray(image), make_values() >> 8)
