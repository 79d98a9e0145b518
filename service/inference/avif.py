"""AVIF: a check of each file before Pillow's codec runs.

`heif_file` says why the structure of a file is checked. libavif decodes a coded picture of any size up to 268
MP, and then makes it as small as the file promises: 10 KB may take 500 MB. This module reads the size
of a coded picture from its sequence headers (AV1 Bitstream & Decoding Process Specification, 5.5 and 5.9).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Final

from PIL import AvifImagePlugin, ImageFile

from fovea.service.inference.heif_file import Bits, Box, HeifFile, check_pictures, check_promise

_SEQUENCE_HEADER: Final = 1
_FRAME_HEADERS: Final = frozenset({3, 6, 7})
"""Types of units that begin with a frame header: alone, with its frame, and repeated (6.2.2)."""

_HEADER_BYTES: Final = 256
"""Bytes of a unit that are read. A sequence header with all operating points has some 200."""

_MAX_FRAMES: Final = 32
"""Largest number of frames in one coded picture, which is decoded up to the first frame that is shown. A
picture in layers has up to 4, and the first sample of a film a few that are not shown."""

_SELECT: Final = 2
"""Value of `seq_force_screen_content_tools` and `seq_force_integer_mv` if each frame has its own."""

_KEY_FRAME, _SWITCH_FRAME = 0, 3

_CONTAINERS: Final = frozenset({b"moov", b"trak", b"mdia", b"minf", b"stbl"})


def open_avif(stream: BytesIO) -> ImageFile.ImageFile:
    """Open an AVIF whose structure is sound. No pixel is decoded. Raises `BadImage` or Pillow's errors."""
    image_file = AvifImagePlugin.AvifImageFile(stream)
    check_structure(stream.getvalue(), image_file.size)
    return image_file


def check_structure(data: bytes, size: tuple[int, int]) -> None:
    """Raise `BadImage` if decoding could take more than `size`, in pixels, suggests.

    libavif decodes the picture, or else the first frame of a film.
    """
    file = HeifFile(data, "AVIF", may_end_early=True)
    tables = list(_find_sample_tables(file, file.boxes))
    for table in tables:
        check_promise(file.format_name, size, _read_frames_size(file, _read_first_sample(file, table)))
    if file.primary is not None or not tables:
        check_pictures(file, b"av01", lambda file, item: _read_frames_size(file, file.read_item(item)))


def _find_sample_tables(file: HeifFile, boxes: Iterable[Box]) -> Iterator[dict[bytes, Box]]:
    """Yield the boxes that say where the samples of each track of AV1 are (ISO/IEC 14496-12, 8.5)."""
    for box in boxes:
        if box.kind == b"stbl":
            table = {}
            for child in file.read_boxes(box.start, box.end):
                if child.kind in table:
                    raise file.error(f"a track has several boxes `{child.kind.decode('latin-1')}`")
                table[child.kind] = child
            entries = table.get(b"stsd")
            if entries and b"av01" in file.data[entries.start : entries.end]:
                yield table
        elif box.kind in _CONTAINERS:
            yield from _find_sample_tables(file, file.read_boxes(box.start, box.end))


def _read_first_sample(file: HeifFile, table: dict[bytes, Box]) -> memoryview:
    """Return the first sample of a track (ISO/IEC 14496-12, 8.7). Raises `BadImage`."""
    sizes = table.get(b"stsz")
    chunks, width = table.get(b"stco"), 4
    if chunks is None:
        chunks, width = table.get(b"co64"), 8
    if sizes is None or chunks is None or len(table.keys() & {b"stco", b"co64"}) != 1:
        raise file.error("a track has no place for its samples")
    length = file.number(sizes.start + 4, 4) or file.number(sizes.start + 12, 4)
    offset = file.number(chunks.start + 8, width)
    if offset + length > len(file.data):
        raise file.error("it ends within a frame")
    return memoryview(file.data)[offset : offset + length]


def _read_frames_size(file: HeifFile, content: memoryview) -> tuple[int, int]:
    """Return the largest size of all frames in a coded picture. Raises `BadImage`."""
    sequence: _Sequence | None = None
    width = height = frame_count = 0
    for kind, unit in _read_units(file, content):
        if kind == _SEQUENCE_HEADER:
            sequence = _read_sequence(file, unit)
            width, height = max(width, sequence.width), max(height, sequence.height)
        elif kind in _FRAME_HEADERS:
            if sequence is None:
                raise file.error("a frame comes before its sequence header")
            frame_count += 1
            if sequence.has_own_size(Bits(unit, file)):
                width, height = max(width, sequence.max_width), max(height, sequence.max_height)
    if frame_count > _MAX_FRAMES:
        raise file.error(f"a picture has {frame_count} frames")
    if not width:
        raise file.error("the size of its coded picture is missing")
    return width, height


def _read_units(file: HeifFile, content: memoryview) -> Iterator[tuple[int, bytes]]:
    """Yield type and first bytes of each unit (OBU, 5.3). Raises `BadImage`."""
    position = 0
    while position < len(content):
        file.count()
        head = content[position]
        kind = head >> 3 & 15
        position += 2 if head & 4 else 1
        length = len(content) - position
        if head & 2:
            length = 0
            for index in range(8):  # leb128 (4.10.5)
                byte = content[position] if position < len(content) else 0
                position += 1
                length |= (byte & 0x7F) << 7 * index
                if not byte & 0x80:
                    break
        if length > len(content) - position or length < 0:
            raise file.error("it ends within a picture")
        yield kind, bytes(content[position : position + min(length, _HEADER_BYTES)])
        position += length


@dataclass(frozen=True)
class _Sequence:
    """The fields of a sequence header that say how large frames are."""

    width: int
    height: int
    max_width: int
    """Largest width that the bits of a frame's own size can express."""
    max_height: int
    is_reduced: bool
    """True if frames have neither a header of their own nor a size."""
    time_bits: int
    """Bits of the time in the header of a frame that is shown."""
    id_bits: int
    screen_content_tools: int
    integer_motion: int

    def has_own_size(self, bits: Bits) -> bool:
        """Return whether a frame has another size than the sequence (`frame_size_override_flag`, 5.9.2)."""
        if self.is_reduced or bits.read(1):  # a frame that was decoded before is shown
            return False
        kind, is_shown = bits.read(2), bits.read(1)
        bits.read(self.time_bits if is_shown else 1)
        if kind != _SWITCH_FRAME and not (kind == _KEY_FRAME and is_shown):
            bits.read(1)  # error_resilient_mode
        bits.read(1)  # disable_cdf_update
        has_tools = bits.read(1) if self.screen_content_tools == _SELECT else self.screen_content_tools
        if has_tools and self.integer_motion == _SELECT:
            bits.read(1)
        bits.read(self.id_bits)
        return kind == _SWITCH_FRAME or bool(bits.read(1))


def _read_sequence(file: HeifFile, unit: bytes) -> _Sequence:
    """Read a sequence header (5.5.1). Raises `BadImage`."""
    bits = Bits(unit, file)
    bits.read(3 + 1)  # profile, still picture
    is_reduced = bool(bits.read(1))
    time_bits = 0
    if is_reduced:
        bits.read(5)
    else:
        time_bits = _skip_timing(bits)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    width, height = bits.read(width_bits) + 1, bits.read(height_bits) + 1
    id_bits, tools, motion = 0, _SELECT, _SELECT
    if not is_reduced:
        if bits.read(1):
            id_bits = bits.read(4) + 2 + bits.read(3) + 1
        bits.read(3 + 4)  # tools
        if bits.read(1):  # enable_order_hint
            bits.read(2)
        if not bits.read(1):
            tools = bits.read(1)
        if tools and not bits.read(1):
            motion = bits.read(1)
    return _Sequence(
        width, height, 1 << width_bits, 1 << height_bits, is_reduced, time_bits, id_bits, tools, motion
    )


def _skip_timing(bits: Bits) -> int:
    """Read timing and operating points (5.5.1), and return the bits of a frame's time."""
    delay_bits = time_bits = 0
    if bits.read(1):  # timing_info_present_flag
        bits.read(32 + 32)
        is_equal = bits.read(1)
        if is_equal:
            bits.read_golomb()
        if bits.read(1):  # decoder_model_info_present_flag
            delay_bits = bits.read(5) + 1
            bits.read(32 + 5)
            frame_time_bits = bits.read(5) + 1
            time_bits = 0 if is_equal else frame_time_bits
    has_display_delay = bits.read(1)
    for _ in range(bits.read(5) + 1):
        bits.read(12)
        if bits.read(5) > 7:
            bits.read(1)
        if delay_bits and bits.read(1):
            bits.read(2 * delay_bits + 1)
        if has_display_delay and bits.read(1):
            bits.read(4)
    return time_bits
