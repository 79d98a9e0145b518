"""Encoded images to pixels: the only pixel code in the project.

Training, export, verification and serving all come through here, so that what a model was trained
on is what it is served. An image takes these steps, always in this order:

    identify    by its first bytes, never by a file name or content type
    admit       format and pixel count, from the header, before anything is decoded
    decode      the first frame; `fast` lets the JPEG decoder scale down by 2, 4 or 8 as it goes
    orient      by EXIF; a corrupt EXIF block counts as none
    convert     to 8-bit RGB, each mode by its rule (`_to_rgb`)
    resize      and crop, by the model's `Geometry`

`fast` orients last, where there is the least to turn: the same but for the order in which the resize
rounds.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from itertools import islice
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    _imaging,
    features,
)

from service.contract import Geometry, Interpolation, PixelPath, Resize
from service.errors import BadImage, BadRequest, TooManyPixels, UnsupportedFormat
from service.memory import DecodeMemory

Pixels: TypeAlias = npt.NDArray[np.uint8]
_Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""


@dataclass(frozen=True)
class Decoded:
    """One image, ready for a batch."""

    pixels: Pixels
    """uint8 (height, width, 3), RGB, C-contiguous, read-only, of the model's geometry."""
    format: str
    """Pillow's name of the encoding, such as `JPEG`."""
    width: int
    """Of the image as it is seen, EXIF orientation applied, in pixels."""
    height: int


@dataclass
class Receipt:
    """What `decode` did to one image, for people to read."""

    steps: list[tuple[str, str]] = field(default_factory=list)
    """In order: the name of each step that changed something, and what it did, in words."""
    box: _Box = (0, 0, 0, 0)
    """What the pixels cover of the image as it is seen, in its pixels."""

    def note(self, step: str, text: str) -> None:
        """One step more."""
        self.steps.append((step, text))


def decode(
    image: bytes | memoryview,
    geometry: Geometry,
    *,
    max_pixels: int,
    memory: DecodeMemory | None = None,
    receipt: Receipt | None = None,
) -> Decoded:
    """Decode one encoded image into the pixels that the model sees.

    With `memory`, wait until the bytes that this takes at its peak, by the header, are to be had. What was
    done is written into `receipt`.

    Raises `BadRequest` when it is empty, `UnsupportedFormat` when it is of no served format,
    `TooManyPixels` when its header promises more than `max_pixels` or than `memory` ever has, and
    `BadImage` when it is truncated, corrupt or of a mode without a rule.
    """
    kind, image = _begin(image)
    try:
        return _decode(kind, _OPENERS[kind](BytesIO(image)), geometry, max_pixels, memory, image, receipt)
    except Exception as error:
        refusal = _refusal(error, kind, max_pixels)
        raise refusal from refusal.__cause__


def as_it_is(height: int, width: int) -> Geometry:
    """A geometry that changes no pixel of an image of this size."""
    return Geometry(height, width, Resize.STRETCH, 0, Interpolation.NEAREST, PixelPath.EXACT)


def upright(image: bytes, *, max_pixels: int, memory: DecodeMemory | None = None) -> Image.Image:
    """The whole image at its own size, as it is seen: 8-bit RGB, oriented by EXIF. Waits and raises as
    `decode`."""
    kind, image = _begin(image)
    try:
        return _upright(_OPENERS[kind](BytesIO(image)), max_pixels, memory, image)
    except Exception as error:
        refusal = _refusal(error, kind, max_pixels)
        raise refusal from refusal.__cause__


def _begin(image: bytes | memoryview) -> tuple[str, bytes]:
    """The format, and the bytes. Raises `BadRequest` and `UnsupportedFormat`."""
    if not image:
        raise BadRequest("the image is empty")
    image = bytes(image)  # bytes are not copied, here nor by BytesIO
    return _identify(image[:64]), image


def _refusal(error: Exception, kind: str, max_pixels: int) -> Exception:
    """What the caller is told of an error: a hostile file can make Pillow raise nearly anything."""
    error = error.with_traceback(None)  # its frames would keep what was decoded
    if isinstance(error, BadImage | TooManyPixels | MemoryError):
        return error
    if isinstance(error, Image.DecompressionBombError):  # Pillow's own limit, in some formats before the size
        return TooManyPixels(f"image is larger than {max_pixels / 1e6:g} MP")
    refusal = BadImage(f"the {kind} image cannot be decoded: {error}")
    refusal.__cause__ = error
    return refusal


def _decode(
    kind: str,
    opened: ImageFile.ImageFile,
    geometry: Geometry,
    max_pixels: int,
    memory: DecodeMemory | None,
    encoded: bytes,
    receipt: Receipt | None,
) -> Decoded:
    _admit_all(opened, max_pixels, encoded)
    width, height = opened.size
    box = _draft(opened, geometry)
    if receipt:
        _note_decoded(receipt, kind, (width, height), opened)
    needed = len(encoded) + _peak_bytes(opened, (width, height), geometry) if memory else 0
    with memory.hold(needed) if memory else nullcontext():
        opened.load()
        turn = _turn(opened)
        if turn and turn.swaps:
            width, height = height, width
        if receipt:
            _note_prepared(receipt, opened, turn)
            _note_resized(receipt, (width, height), geometry)
        image: Image.Image = opened
        del opened  # 50 MP are 200 MB: no step keeps what the one before it made
        if turn and geometry.pixel_path is PixelPath.EXACT:
            image = image.transpose(turn.method)
            turn = None  # and the box is the whole image, whichever way up
            box = 0, 0, image.width, image.height
        image = _to_rgb(image)
        return Decoded(_resize(image, geometry, (width, height), box, turn), kind, width, height)


def _upright(
    opened: ImageFile.ImageFile, max_pixels: int, memory: DecodeMemory | None, encoded: bytes
) -> Image.Image:
    _admit_all(opened, max_pixels, encoded)
    geometry = as_it_is(opened.height, opened.width)
    needed = len(encoded) + _peak_bytes(opened, opened.size, geometry) if memory else 0
    with memory.hold(needed) if memory else nullcontext():
        opened.load()
        turn = _turn(opened)
        return _to_rgb(opened.transpose(turn.method) if turn else opened)


def settle_pillow() -> None:
    """Set what Pillow keeps for the whole process; for whoever owns the process to call."""
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the decode threads are ours to count
    warnings.filterwarnings("ignore", module="PIL")  # damaged files are refused, and not also written of
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def give_blocks_back() -> None:
    """Return the memory that Pillow keeps for further images (`PILLOW_BLOCKS_MAX`) to the system."""
    _imaging.clear_cache()


# --- identify ------------------------------------------------------------------------------------

_OPENERS: Final[dict[str, Callable[[BytesIO], ImageFile.ImageFile]]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,  # MPO too: it is a JPEG with more of them behind it
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
"""Pillow's classes, called directly: `Image.open` would trust its own process-wide pixel limit."""

_SIGNATURES: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"BM", "BMP"),
    (b"PK\x03\x04", "ZIP"),
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML"),
)

_BRANDS: Final = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), "HEIC"),
}
"""Brands of ISO base media files, in the order in which they decide (ISO/IEC 23008-12)."""


@cache
def served_formats() -> tuple[str, ...]:
    """The formats that this build of Pillow can decode."""
    codecs = {"WEBP": "webp", "AVIF": "avif", "JPEG": "jpg"}
    return tuple(kind for kind in _OPENERS if kind not in codecs or features.check(codecs[kind]))


def _identify(head: bytes) -> str:
    """Name the format by its first 64 bytes. Raises `UnsupportedFormat` unless it is served."""
    kind = _signature(head)
    if kind in served_formats():
        return kind
    served = ", ".join(served_formats())
    if kind:
        raise UnsupportedFormat(f"{kind} is not served; send one of {served}")
    hint = "; JSON needs `Content-Type: application/json`" if head[:1] == b"{" else ""
    raise UnsupportedFormat(f"the bytes are not an image of a known format; send one of {served}{hint}")


def _signature(head: bytes) -> str:
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = head[8 : min(int.from_bytes(head[:4]), len(head))]
        return next((kind for brand, kind in _BRANDS.items() if brand in _chunks(brands)), "")
    return next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), "")


def _chunks(brands: bytes) -> list[bytes]:
    return [brands[start : start + 4] for start in range(0, len(brands), 4)]


# --- admit, decode, orient -----------------------------------------------------------------------


def _admit_all(opened: ImageFile.ImageFile, max_pixels: int, encoded: bytes) -> None:
    """Refuse what would take too much to decode."""
    _admit(opened, max_pixels)
    if isinstance(opened, JpegImagePlugin.JpegImageFile) and _many_scans(opened):
        _limit_scans(encoded)


def _admit(image: ImageFile.ImageFile, max_pixels: int) -> None:
    """Refuse by the header. A TIFF's tiles may be larger than the image, and are decoded whole."""
    sizes = [image.size]
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        sizes.append((tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)))
        bits, photometric = tags.get(_BITS_PER_SAMPLE, (1,))[0], tags.get(_PHOTOMETRIC)
        if image.mode.startswith("I;16") and (bits != 16 or photometric == _WHITE_IS_ZERO):
            raise BadImage(f"grey TIFF images of {bits} bits are not served unless 16, and 0 is black")
    for width, height in sizes:
        if width * height > max_pixels:
            raise TooManyPixels(f"image is {width} x {height} px; at most {max_pixels / 1e6:g} MP")


_BITS_PER_SAMPLE, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH, _ROWS_PER_STRIP = (
    258,
    262,
    322,
    323,
    278,
)  # TIFF 6.0, section 8
_WHITE_IS_ZERO: Final = 0

_MAX_SCANS: Final = 100
"""Scans in one JPEG. Encoders make about ten; each costs a pass over all pixels, but as little as a
hundred bytes."""


_SCAN: Final = re.compile(b"\xff\xda")


def _limit_scans(image: bytes) -> None:
    """Refuse a JPEG with absurdly many scans, by the markers that start one (ISO/IEC 10918-1, B.2.3)."""
    if next(islice(_SCAN.finditer(image), _MAX_SCANS, None), None):
        raise BadImage(f"the JPEG image has more than {_MAX_SCANS} scans")


_DRAFT_GAP: Final = 4
"""Least sides of the decoded image, in sides of the resize's result. Decoded at 2.9 times, photographs
differ from `exact` by 0.5 of 255 on average; at 3.9 times by 0.26, at 5.9 times by 0.17."""

_DRAFT_LEAST: Final = 256
"""Least shorter side of the decoded image, in pixels: for small models the gap alone is too little
for the same labels, and decoding so few pixels takes about a millisecond."""


def draft_scale(size: tuple[int, int], geometry: Geometry) -> int:
    """The largest divisor (1, 2, 4 or 8) at which `fast` may decode a JPEG of `size`, in pixels."""
    # of `stretch` the longer side: which side is which is not known before EXIF is
    target = geometry.resize_to or max(geometry.width, geometry.height)
    room = min(size) // max(_DRAFT_GAP * target, _DRAFT_LEAST)
    return next((scale for scale in (8, 4, 2) if scale <= room), 1)


def _draft(image: ImageFile.ImageFile, geometry: Geometry) -> _Box:
    """Choose the scale to decode at; return what of the decoded image the full image will fill.

    Where the scale does not divide a side, the decoder rounds up, and the last row or column is only
    partly filled: the box has fractions.
    """
    if geometry.pixel_path is PixelPath.FAST and isinstance(image, JpegImagePlugin.JpegImageFile):
        scale = draft_scale(image.size, geometry)
        if scale > 1 and (drafted := image.draft(None, (image.width // scale, image.height // scale))):
            return drafted[1]
    return 0, 0, image.width, image.height


@dataclass(frozen=True)
class _Turn:
    """What turns an image upright, and what it does to the axes: are they swapped, and is then x or y
    mirrored?"""

    method: Image.Transpose
    swaps: bool
    mirrors_x: bool
    mirrors_y: bool

    def before(self, box: _Box, size: tuple[int, int]) -> _Box:
        """The box, in an image of `size` not yet turned, that becomes `box` of the upright one."""
        left, top, right, bottom = box
        width, height = (size[1], size[0]) if self.swaps else size
        if self.mirrors_x:
            left, right = width - right, width - left
        if self.mirrors_y:
            top, bottom = height - bottom, height - top
        return (top, left, bottom, right) if self.swaps else (left, top, right, bottom)


_TURNS: Final = {
    2: _Turn(Image.Transpose.FLIP_LEFT_RIGHT, False, True, False),
    3: _Turn(Image.Transpose.ROTATE_180, False, True, True),
    4: _Turn(Image.Transpose.FLIP_TOP_BOTTOM, False, False, True),
    5: _Turn(Image.Transpose.TRANSPOSE, True, False, False),
    6: _Turn(Image.Transpose.ROTATE_270, True, True, False),
    7: _Turn(Image.Transpose.TRANSVERSE, True, True, True),
    8: _Turn(Image.Transpose.ROTATE_90, True, False, True),
}
"""By EXIF orientation (Exif 2.32, tag 0x0112); 1 is upright."""

_ORIENTED: Final = frozenset({"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"})
"""Where Pillow looks for an orientation, but for the tags of a TIFF."""


def _turn(image: ImageFile.ImageFile) -> _Turn | None:
    if _ORIENTED.isdisjoint(image.info) and not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # a corrupt EXIF block is no reason to refuse the image
        return None


# --- memory --------------------------------------------------------------------------------------

_WORK_BYTES: Final = 1 << 20
"""What any decode takes beside its pixels: tables, buffers, the filter's weights."""

_STORED_BYTES: Final = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
"""How Pillow stores a pixel; all other modes take 4 bytes."""

_DECODER_BYTES: Final = {"PNG": 0, "GIF": 2, "BMP": 3, "WEBP": 12, "AVIF": 16}
"""Per pixel, most that the decoder holds beside the image that it fills: the two canvases and the frame of
WebP, the planes and two copies of the frame of AVIF."""

_KEPT_BYTES: Final = {"WEBP": 8, "AVIF": 8}
"""Per pixel, what the decoder keeps as long as its image lives."""


def _peak_bytes(opened: ImageFile.ImageFile, full_size: tuple[int, int], geometry: Geometry) -> int:
    """An upper estimate, by the header alone, of the bytes that decoding takes at its peak.

    `opened` is not loaded yet, and drafted; `full_size` is of its header.
    """
    pixels = opened.width * opened.height
    kind = opened.format or ""
    stored = pixels * _STORED_BYTES.get(opened.mode, 4)
    turned = stored if geometry.pixel_path is PixelPath.EXACT else 0
    later = max(turned, pixels * _convert_bytes(opened) + _resize_bytes(opened.size, geometry))
    decoder = _decoder_bytes(opened, full_size) or pixels * _DECODER_BYTES.get(kind, 0)
    return _WORK_BYTES + stored + max(decoder, pixels * _KEPT_BYTES.get(kind, 0) + later)


def _decoder_bytes(opened: ImageFile.ImageFile, full_size: tuple[int, int]) -> int:
    """Of decoders that do not go by the pixels. A TIFF's strip or tile has up to four samples of 16 bits
    a pixel; of a JPEG in many scans all coefficients are kept, at full size."""
    if isinstance(opened, TiffImagePlugin.TiffImageFile):
        tags = opened.tag_v2
        tile: int = tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_LENGTH, 0)
        strip: int = opened.width * min(tags.get(_ROWS_PER_STRIP, opened.height), opened.height)
        return 8 * max(tile, strip)
    if isinstance(opened, JpegImagePlugin.JpegImageFile) and _many_scans(opened):
        samples = sum(across * down for _, across, down, _ in opened.layer)
        block = max(across for _, across, _, _ in opened.layer) * max(down for _, _, down, _ in opened.layer)
        return 2 * samples * (full_size[0] + 63) * (full_size[1] + 63) // max(block, 1)  # 16 bits each
    return 0


def _many_scans(opened: JpegImagePlugin.JpegImageFile) -> bool:
    """Does the decoder keep all coefficients? Unless its first scan, just opened, has every component."""
    components = len(opened.layer)
    length = 6 + 2 * components
    header = b"\xff\xda" + length.to_bytes(2) + bytes([components])
    stream = opened.fp
    if "progressive" in opened.info or stream is None:
        return True
    end = stream.tell()
    stream.seek(max(end - length - 2, 0))
    scan = stream.read(length + 2)
    return not scan.startswith(header)


def _convert_bytes(opened: ImageFile.ImageFile) -> int:
    """Per pixel, what `_to_rgb` makes beside the image that it is given."""
    if opened.mode.startswith("I;16"):
        return 12
    if opened.has_transparency_data:
        return 8 if opened.mode == "RGBA" else 12
    return 0 if opened.mode == "RGB" else 4


def _resize_bytes(size: tuple[int, int], geometry: Geometry) -> int:
    """Of the result, and of what is between the two passes: its width, and the height of the source.

    Which side is the width is not known before EXIF is: the worse of the two.
    """
    width, height = _target(size, geometry)
    if geometry.pixel_path is PixelPath.EXACT and width * height <= _WHOLE_RESIZE_PIXELS:
        return 4 * (max(width * size[1], height * size[0]) + width * height)
    across = max(geometry.width, geometry.height)
    rows = max(size) if geometry.resize is Resize.STRETCH else min(size) + 1  # of what the crop keeps
    return 4 * across * (rows + across)


# --- convert -------------------------------------------------------------------------------------

_DIRECT_MODES: Final = frozenset({"1", "L", "P", "CMYK", "YCbCr", "HSV"})


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB by the rule of the image's mode.

    Transparency is composited on white. 16-bit grey is scaled, not clipped. Grey, palette, CMYK
    and YCbCr are converted as Pillow does. Other modes (32-bit integers and floats, whose range
    nothing tells, and LAB) raise `BadImage`.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image), image.info.get("transparency"))).convert("RGB")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode in _DIRECT_MODES:
        return image.convert("RGB")
    raise BadImage(f"images of mode {image.mode} cannot be converted to 8-bit RGB")


def _eight_bits(grey: npt.NDArray[np.generic], transparent: int | None) -> Pixels:
    """0 … 65535 to 0 … 255, rounded: 257 is 65535 / 255. The transparent grey, if any, becomes white."""
    eight = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return eight if transparent is None else np.where(grey == transparent, np.uint8(255), eight)


# --- resize --------------------------------------------------------------------------------------

_WHOLE_RESIZE_PIXELS: Final = 16_000_000
"""Above this many pixels after the resize, `exact` resizes only what the crop keeps.

A 1 x 20,000 strip for a model of 224 would otherwise pass through 224 x 4,480,000. No photograph
comes near: a 10:1 panorama for a model of 384 makes 1.5 million.
"""


def _target(size: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Width and height of the whole image after the resize.

    The longer side is rounded down, as torchvision's `Resize` does.
    """
    if geometry.resize is Resize.STRETCH:
        return geometry.width, geometry.height
    width, height = size
    shorter = min(size)
    return geometry.resize_to * width // shorter, geometry.resize_to * height // shorter


def _corner(size: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Left and top of the crop, in an image resized to `size`; rounded as torchvision's `CenterCrop` does."""
    return round((size[0] - geometry.width) / 2), round((size[1] - geometry.height) / 2)


def _resize(
    image: Image.Image, geometry: Geometry, full_size: tuple[int, int], box: _Box, turn: _Turn | None
) -> Pixels:
    """Resize and crop, then turn. The full image, upright of `full_size`, fills `box` of `image`."""
    width, height = _target(full_size, geometry)
    left, top = _corner((width, height), geometry)
    filter_ = Image.Resampling[geometry.interpolation.upper()]
    if geometry.pixel_path is PixelPath.EXACT and width * height <= _WHOLE_RESIZE_PIXELS:
        if image.size != (width, height):
            image = image.resize((width, height), filter_)
        if image.size != (geometry.width, geometry.height):
            image = image.crop((left, top, left + geometry.width, top + geometry.height))
        return _array(image)
    size = geometry.width, geometry.height
    kept: _Box = left, top, left + geometry.width, top + geometry.height  # of the resized image
    if turn:
        kept = turn.before(kept, (height, width) if turn.swaps else (width, height))
        size = (geometry.height, geometry.width) if turn.swaps else size
        width, height = (height, width) if turn.swaps else (width, height)
    across, down = (box[2] - box[0]) / width, (box[3] - box[1]) / height
    source = (
        box[0] + kept[0] * across,
        box[1] + kept[1] * down,
        min(box[0] + kept[2] * across, image.width),  # float rounding may pass the edge
        min(box[1] + kept[3] * down, image.height),
    )
    if (image.size, source) != (size, (0, 0, *size)):
        image = image.resize(size, filter_, box=source)
    return _array(image.transpose(turn.method) if turn else image)


def _array(image: Image.Image) -> Pixels:
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)


# --- the receipt ---------------------------------------------------------------------------------


def _note_decoded(receipt: Receipt, kind: str, size: tuple[int, int], opened: ImageFile.ImageFile) -> None:
    """`opened` is drafted, and no longer of its full `size`."""
    receipt.note("decode", f"{kind} of {_by(size)} pixels")
    if opened.size != size:
        receipt.note("scale", f"decoded at {_by(opened.size)}: the JPEG decoder can leave detail out")


def _note_prepared(receipt: Receipt, opened: ImageFile.ImageFile, turn: _Turn | None) -> None:
    if turn:
        orientation = next(number for number, other in _TURNS.items() if other is turn)
        receipt.note("orient", f"turned upright, as EXIF orientation {orientation} says")
    if opened.has_transparency_data:
        receipt.note("convert", f"from {opened.mode} to RGB, what is transparent on white")
    elif opened.mode != "RGB":
        receipt.note("convert", f"from {opened.mode} to RGB")


def _note_resized(receipt: Receipt, size: tuple[int, int], geometry: Geometry) -> None:
    """Of an upright image of full `size`. What the crop leaves out need not have been resized."""
    whole = _target(size, geometry)
    left, top = _corner(whole, geometry)
    kept = geometry.width, geometry.height
    if whole != size:
        receipt.note("resize", f"from {_by(size)} to {_by(whole)}, {geometry.interpolation}")
    if whole != kept:
        receipt.note("crop", f"the middle {_by(kept)}, {left} from the left and {top} from the top")
    across, down = size[0] / whole[0], size[1] / whole[1]
    receipt.box = left * across, top * down, (left + kept[0]) * across, (top + kept[1]) * down


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
