"""Labels and normalisation in the metadata of a TFLite file.

A file with metadata has a FlatBuffer of its own inside, `ModelMetadata`, and a ZIP archive at its end with
the files that the metadata names. Every offset is checked: the file comes from elsewhere.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fovea.export.importer.preprocessing import Normalization
from fovea.export.importer.sources.archive import ARCHIVE_ERRORS

IDENTIFIER: Final = b"TFL3"
"""Identifier of a TFLite file, after its first four bytes."""

_METADATA_NAME: Final = b"TFLITE_METADATA"
_MAX_ITEMS: Final = 10_000
"""Maximum number of items of a list of tables. Models have tens of buffers to thousands."""

_MAX_LABELS_BYTES: Final = 4 << 20
_AXIS_LABELS: Final = 2
"""Type of an associated file with one label a line: `TENSOR_AXIS_LABELS`."""

_NORMALIZATION: Final = 1
"""Type of a process unit with mean and standard deviation: `NormalizationOptions`."""


@dataclass(frozen=True)
class TfliteMetadata:
    """The facts in the metadata; None for what it does not state."""

    labels: str | None = None
    """Text with one label a line."""
    labels_file: str = ""
    normalization: Normalization | None = None
    problems: tuple[str, ...] = ()


def read_tflite_metadata(path: Path) -> TfliteMetadata:
    """Return the facts in the metadata. Damaged metadata is a problem. Raises `OSError`."""
    content = path.read_bytes()
    try:
        metadata = _find_metadata(content)
        if metadata is None:
            return TfliteMetadata(problems=("the file has no metadata",))
        subgraphs = metadata.tables(3)
        inputs, outputs = (subgraphs[0].tables(2), subgraphs[0].tables(3)) if subgraphs else ([], [])
        normalization = _read_normalization(inputs[0]) if inputs else None
        files = [one for output in outputs for one in output.tables(6)]
        names = [one.text(0) for one in files if one.byte(2) == _AXIS_LABELS]
    except (struct.error, _DamagedError, UnicodeDecodeError):
        return TfliteMetadata(problems=("the metadata of the file is damaged",))
    problems = () if normalization else ("the metadata of the file states no mean and std",)
    if len(names) != 1:  # none, or one for each language
        count = len(names) or "no"
        return TfliteMetadata(
            normalization=normalization,
            problems=(*problems, f"the metadata of the file names {count} files of labels"),
        )
    try:
        return TfliteMetadata(_read_text(path, names[0]), names[0], normalization, problems)
    except (*ARCHIVE_ERRORS, KeyError):
        problem = f"the metadata of the file names {names[0]!r}, which cannot be read"
        return TfliteMetadata(normalization=normalization, problems=(*problems, problem))


def _read_text(path: Path, name: str) -> str:
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo(name).file_size > _MAX_LABELS_BYTES:
            raise ValueError(name)
        return archive.read(name).decode()


def _read_normalization(tensor: _Table) -> Normalization | None:
    """Return (pixels - mean) / std, in levels from 0 to 255; one number counts for all channels."""
    for unit in tensor.tables(4):
        options = unit.table(1)
        if unit.byte(0) == _NORMALIZATION and options is not None:
            mean, std = (values * 3 if len(values) == 1 else values for values in map(options.floats, (0, 1)))
            if len(mean) == len(std) == 3 and all(std):
                return Normalization(1.0, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
    return None


def _find_metadata(content: bytes) -> _Table | None:
    model = _read_root(content)
    buffers = model.tables(4)
    for entry in model.tables(6):
        if entry.text(0).encode() == _METADATA_NAME:
            index = entry.number(1)
            if index >= len(buffers):
                raise _DamagedError
            return _read_root(buffers[index].bytes(0))
    return None


# --- FlatBuffers ---------------------------------------------------------------------------------


class _DamagedError(Exception):
    """An offset or a length leads out of the file."""


def _read_root(content: bytes) -> _Table:
    return _Table(content, _unpack("<I", content, 0))


def _unpack(layout: str, content: bytes, position: int) -> int:
    if position < 0:  # which `struct` counts from the end
        raise _DamagedError
    value: int = struct.unpack_from(layout, content, position)[0]
    return value


@dataclass(frozen=True)
class _Table:
    """A table of a FlatBuffer. Fields are named by their number in the schema."""

    content: bytes
    position: int

    def _find(self, field: int) -> int | None:
        """Return the position of a field; None if it has its default."""
        fields = self.position - _unpack("<i", self.content, self.position)
        entry = 4 + 2 * field
        if entry + 2 > _unpack("<H", self.content, fields):
            return None
        offset = _unpack("<H", self.content, fields + entry)
        return self.position + offset if offset else None

    def byte(self, field: int) -> int:
        """Return a byte, by default 0."""
        position = self._find(field)
        return 0 if position is None else _unpack("<B", self.content, position)

    def number(self, field: int) -> int:
        """Return an unsigned number of four bytes, by default 0."""
        position = self._find(field)
        return 0 if position is None else _unpack("<I", self.content, position)

    def table(self, field: int) -> _Table | None:
        """Return a table, or None."""
        position = self._find(field)
        return None if position is None else _Table(self.content, self._follow(position))

    def tables(self, field: int) -> list[_Table]:
        """Return a list of tables."""
        return [_Table(self.content, self._follow(one)) for one in self._walk(field, 4, _MAX_ITEMS)]

    def floats(self, field: int) -> tuple[float, ...]:
        """Return a list of numbers, of which a normalisation has at most three."""
        return tuple(struct.unpack_from("<f", self.content, one)[0] for one in self._walk(field, 4, 3))

    def bytes(self, field: int) -> bytes:
        """Return a list of bytes."""
        position = self._find(field)
        if position is None:
            return b""
        start = self._follow(position)
        length = _unpack("<I", self.content, start)
        if start + 4 + length > len(self.content):
            raise _DamagedError
        return self.content[start + 4 : start + 4 + length]

    def text(self, field: int) -> str:
        """Return a text."""
        return self.bytes(field).decode()

    def _follow(self, position: int) -> int:
        return position + _unpack("<I", self.content, position)

    def _walk(self, field: int, size: int, most: int) -> Iterator[int]:
        """Yield the position of each item of a list."""
        position = self._find(field)
        if position is None:
            return
        start = self._follow(position)
        count = _unpack("<I", self.content, start)
        if count > most:
            raise _DamagedError
        for index in range(count):
            yield start + 4 + size * index
