"""Structure of a JPEG: its segments and scans, and its end (ISO/IEC 10918-1, annex B)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

_MARKER_PATTERN: Final = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
"""Pattern for the start of a segment, or the end of the image.

Within a scan, FF 00 is a value, D0 to D7 are restart markers, and FF is a fill byte. Marker 01 has no
segment.
"""

_START_OF_SCAN, _END = 0xDA, 0xD9


class Segment(NamedTuple):
    """A marker and its segment."""

    code: int
    """Second byte of the marker."""
    start: int
    """Offset of the marker's first byte."""
    end: int
    """Offset after the segment; for a scan, the offset after its header."""


class Scan(NamedTuple):
    """The header of a scan (B.2.3)."""

    components: tuple[int, ...]
    first_coefficient: int
    """First coefficient, from 0 to 63."""
    last_coefficient: int
    missing_bits: int
    """Number of low bits of the coefficients that are still missing after this scan."""


def read_segments(image: bytes) -> Iterator[Segment]:
    """Yield the segments of the first image in order, and its end marker last, if it exists.

    Metadata, and data after the image such as a video or a second picture, are not searched.
    """
    position = 2
    while marker := _MARKER_PATTERN.search(image, position):
        code, start, position = image[marker.end() - 1], marker.start(), marker.end()
        if code == _END:
            yield Segment(code, start, position)
            return
        length = int.from_bytes(image[position : position + 2])
        position += max(length, 2)
        yield Segment(code, start, position)


def read_scans(image: bytes) -> Iterator[Scan]:
    """Yield the scan headers of the first image."""
    for segment in read_segments(image):
        if segment.code == _START_OF_SCAN:
            header = image[segment.start + 4 : segment.end]
            count = header[0] if header else 0
            if len(header) >= 2 * count + 4:
                first, last, approximation = header[2 * count + 1 : 2 * count + 4]
                yield Scan(tuple(header[1 : 2 * count : 2]), first, last, approximation & 15)


def has_end_marker(image: bytes) -> bool:
    """Return True if the first image has an end marker."""
    return any(segment.code == _END for segment in read_segments(image))


def is_complete(image: bytes, components: Sequence[int]) -> bool:
    """Return True if the scans contain all bits of all coefficients of these components."""
    missing_bits = {component: [1] * 64 for component in components}
    for scan in read_scans(image):
        for component in scan.components:
            if component in missing_bits and scan.first_coefficient <= scan.last_coefficient < 64:
                missing_bits[component][scan.first_coefficient : scan.last_coefficient + 1] = [
                    scan.missing_bits
                ] * (scan.last_coefficient - scan.first_coefficient + 1)
    return not any(any(bits) for bits in missing_bits.values())
