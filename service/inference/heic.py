"""HEIC, the format of iPhones: an optional codec (extra `heic`), and a check of each file before it runs.

`heif_file` says why the structure of a file is checked. This module reads the size of a coded picture from
its parameters (H.265), wherever the decoder may find them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from io import BytesIO
from typing import Any, Final

from PIL import ImageFile

from fovea.service.errors import BadImage
from fovea.service.inference.heif_file import Bits, Box, HeifFile, check_pictures

EXTRA_HINT: Final = "HEIC needs the extra `heic` on the side of the service: pip install 'fovea-serve[heic]'"
"""Sentence for whoever sends HEIC to a service without the codec."""

_SPS: Final = 33
"""Type of the unit that has the size of the coded picture (H.265, table 7-1)."""

_SPS_BYTES: Final = 256
"""Bytes of such a unit that are read: the size is near its beginning."""

_LENGTH_BYTES: Final = 4
"""Bytes of the length before each unit of a coded picture."""


@cache
def is_available() -> bool:
    """Return True if the codec is installed."""
    return importlib.util.find_spec("pi_heif") is not None


def open_heic(stream: BytesIO) -> ImageFile.ImageFile:
    """Open an HEIC whose structure is sound. No pixel is decoded. Raises `BadImage` or Pillow's errors."""
    check_structure(stream.getvalue())
    image_file: ImageFile.ImageFile = _load_image_class()(stream)
    return image_file


@cache
def _load_image_class() -> Callable[[BytesIO], ImageFile.ImageFile]:
    """Return the class of Pillow's plugin. The module is imported with the first HEIC: it takes 30 ms."""
    pi_heif: Any = importlib.import_module("pi_heif")
    options: Any = importlib.import_module("pi_heif.options")
    options.DECODE_THREADS = 1  # a runner has one processor
    options.THUMBNAILS = options.DEPTH_IMAGES = options.AUX_IMAGES = False

    class HeicImageFile(pi_heif.HeifImageFile):  # type: ignore[misc]
        """Pillow's image of an HEIC, under the name that the service has for the format."""

        # The codec turns the picture upright by the file's own property (`irot`, `imir`), and the plugin sets
        # the orientation in EXIF and XMP to upright: nothing is turned twice (ISO/IEC 23008-12, A.2.3).
        format = "HEIC"

    return HeicImageFile


# --- structure -----------------------------------------------------------------------------------


def check_structure(data: bytes) -> None:
    """Raise `BadImage` if decoding could take more than the size in the header suggests."""
    check_pictures(HeifFile(data, "HEIC"), b"hvc1", _read_coded_size)


def _read_coded_size(file: HeifFile, item: int) -> tuple[int, int]:
    """Return the largest size in the configuration of the decoder and in the coded picture itself.

    Raises `BadImage`. A decoder takes the parameters where they are, so the type of a unit is the one in the
    unit, whatever the list that it stands in is for.
    """
    boxes = file.find_properties(item, b"hvcC")
    if not boxes:
        raise file.error("a picture has no parameters (hvcC)")
    width = height = 0
    for box in boxes:
        # Codecs differ in what they do with shorter lengths (ISO/IEC 14496-15, 8.3.2.1: lengthSizeMinusOne).
        if file.number(box.start + 21, 1) & 3 != _LENGTH_BYTES - 1:
            raise BadImage("the HEIC file has lengths that are not of 4 bytes")
        for unit in _read_configuration(file, box):
            width, height = _enlarge(file, unit, width, height)
    if not width:
        raise file.error("the size of its coded picture is missing")
    for unit in _read_units(file, file.read_item(item)):
        width, height = _enlarge(file, unit, width, height)
    return width, height


def _enlarge(file: HeifFile, unit: bytes, width: int, height: int) -> tuple[int, int]:
    """Return the size, enlarged to the size in a unit if the unit has one."""
    if not unit or unit[0] >> 1 & 0x3F != _SPS:
        return width, height
    unit_width, unit_height = _read_sps_size(file, unit)
    return max(width, unit_width), max(height, unit_height)


def _read_configuration(file: HeifFile, box: Box) -> Iterator[bytes]:
    """Yield the units in the configuration of the decoder (ISO/IEC 14496-15, 8.3.2.1)."""
    position = box.start + 23
    for _ in range(file.number(box.start + 22, 1)):
        count = file.number(position + 1, 2)
        position += 3
        for _ in range(count):
            file.count()
            length = file.number(position, 2)
            yield file.data[position + 2 : position + 2 + length]
            position += 2 + length
    if position > box.end:
        raise file.error("its parameters end too late")


def _read_units(file: HeifFile, content: memoryview) -> Iterator[bytes]:
    """Yield the first bytes of the units of a coded picture."""
    position = 0
    while position + _LENGTH_BYTES <= len(content):
        file.count()
        start = position + _LENGTH_BYTES
        position = start + int.from_bytes(content[position:start])
        yield bytes(content[start : min(position, start + _SPS_BYTES)])


def _read_sps_size(file: HeifFile, unit: bytes) -> tuple[int, int]:
    """Return the size in a sequence parameter set (H.265, 7.3.2.2.1). Raises `BadImage`."""
    bits = Bits(unit[2:_SPS_BYTES].replace(b"\0\0\3", b"\0\0"), file)
    bits.read(4)
    max_sub_layers = bits.read(3)
    bits.read(1)
    bits.read(88 + 8)  # the general profile, tier and level
    present = [(bits.read(1), bits.read(1)) for _ in range(max_sub_layers)]
    if max_sub_layers:
        bits.read(2 * (8 - max_sub_layers))
    for has_profile, has_level in present:
        bits.read(88 * has_profile + 8 * has_level)
    bits.read_golomb()
    if bits.read_golomb() == 3:  # chroma_format_idc
        bits.read(1)
    return bits.read_golomb(), bits.read_golomb()
