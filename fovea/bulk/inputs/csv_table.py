"""Images that a CSV file names, or has in base64."""

from __future__ import annotations

import base64
import binascii
import codecs
import csv
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple, cast

from fovea.bulk.inputs.basic_entries import BytesEntry, FailedEntry, LargeEntry, describe_error
from fovea.bulk.inputs.columns import choose_column, is_content_column
from fovea.bulk.inputs.source_files import SourceFile
from fovea.service.errors import FileError
from fovea.service.image_files import ImageEntry

_DELIMITERS: Final = ",;\t|"

_MAX_PATH_CHARS: Final = 1 << 20
"""Largest field and line of a table of paths, in characters. A quote that never ends stops here."""

_BASE64_GROWTH: Final = 4 / 3

_UTF16_MARKS: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class _Header(NamedTuple):
    delimiter: str
    position: int
    """Index of the column of images."""
    is_content: bool
    """Whether the column has images in base64."""


def check_csv(table: SourceFile, column: str | None) -> None:
    """Raise `FileError` if a table cannot be read, or has no column of images."""
    with _open_text(table) as text:
        _read_header(text, column)


def list_csv_images(
    table: SourceFile, column: str | None, create_entry: Callable[[str], ImageEntry], max_bytes: int
) -> Iterator[ImageEntry]:
    """Yield an image for each row of a table, in bounded memory.

    `create_entry` returns the entry for a field with a path or a URI. A damaged row becomes an entry with the
    error, named by its number from 0 on, as images in base64 are.
    """
    try:
        with _open_text(table) as text:
            header = _read_header(text, column)
            max_chars = (
                int(max_bytes * _BASE64_GROWTH) + _MAX_PATH_CHARS if header.is_content else _MAX_PATH_CHARS
            )
            for number, row in enumerate(_read_rows(text, header.delimiter, max_chars)):
                name = f"{table.name}/{number}"
                if isinstance(row, str):
                    yield FailedEntry(name, row)
                elif len(row) <= header.position or not row[header.position].strip():
                    yield FailedEntry(name, "the row has nothing in the column of images")
                elif header.is_content:
                    yield _decode_image(name, row[header.position], max_bytes)
                else:
                    yield create_entry(row[header.position])
    except FileError as error:
        yield FailedEntry(table.name, str(error))


def count_csv_rows(table: SourceFile) -> int | None:
    """Return about how many rows a table has: its line breaks below the header."""
    try:
        with table.open_stream() as file:
            lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except OSError:
        return None
    return max(0, lines - 1)


@contextmanager
def _open_text(table: SourceFile) -> Iterator[io.TextIOWrapper]:
    """Open a table as text. Bytes that are no UTF-8 stay, as in names of files. Raises `FileError`."""
    with table.open_stream() as stream:
        file = io.BufferedReader(cast(io.RawIOBase, stream))
        is_utf16 = file.peek(2).startswith(_UTF16_MARKS)
        text = (
            io.TextIOWrapper(file, "utf-16", "replace", newline="")
            if is_utf16
            else io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        )
        try:
            yield text
        except OSError as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"the file cannot be read: {describe_error(error)}") from None
        finally:
            text.detach()


def _read_header(text: io.TextIOWrapper, column: str | None) -> _Header:
    """Read the first line that is not blank. Raises `FileError`."""
    lines = _Lines(text, _MAX_PATH_CHARS)
    while True:
        try:
            line = next(lines).lstrip("\ufeff")
        except StopIteration:
            raise FileError("the table is empty; its first line must name the columns") from None
        except _LineTooLong as error:
            raise FileError(f"the table has no header: {error}") from None
        if line.strip():
            break
    delimiter = _guess_delimiter(line)
    try:
        columns = next(csv.reader([line], delimiter=delimiter))
    except csv.Error as error:
        raise FileError(f"the header of the table is damaged: {error}") from None
    name = choose_column(columns, column)
    return _Header(delimiter, columns.index(name), is_content_column(name))


def _guess_delimiter(line: str) -> str:
    """Return the sign that splits a header into most columns; signs in quotes do not count."""
    outside = "".join(line.split('"')[::2])
    return max(_DELIMITERS, key=outside.count)


def _read_rows(text: io.TextIOWrapper, delimiter: str, max_chars: int) -> Iterator[list[str] | str]:
    """Yield the fields of each row, or the message of its error. Rows without any field are left out."""
    reader = csv.reader(_Lines(text, max_chars), delimiter=delimiter)
    while True:
        try:
            with _field_limit(max_chars):
                row = next(reader, None)
        except (csv.Error, _LineTooLong) as error:
            yield f"the row is damaged: {error}"
            continue
        if row is None:
            return
        if row:
            yield row


@contextmanager
def _field_limit(max_chars: int) -> Iterator[None]:
    """Set the limit of the module `csv`, which counts for the whole process, while one row is read."""
    earlier = csv.field_size_limit(max_chars)
    try:
        yield
    finally:
        csv.field_size_limit(earlier)


class _LineTooLong(Exception):
    """A line has more characters than the limit."""


class _Lines:
    """The lines of a text. One that is too long raises `_LineTooLong`; the next one can be read."""

    def __init__(self, text: io.TextIOWrapper, max_chars: int) -> None:
        self._text, self._max_chars = text, max_chars

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._max_chars)
        if not line:
            raise StopIteration
        if len(line) < self._max_chars or line.endswith(("\n", "\r")):
            return line
        while line and not line.endswith(("\n", "\r")):
            line = self._text.readline(self._max_chars)
        raise _LineTooLong(f"a line has more than {self._max_chars} characters")


def _decode_image(name: str, text: str, max_bytes: int) -> ImageEntry:
    """Return the entry of an image in base64, with or without `data:image/png;base64,` before it."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        content = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError) as error:
        return FailedEntry(name, f"the field is not an image in base64: {error}")
    if not content:
        return FailedEntry(name, "the row has nothing in the column of images")
    return (
        LargeEntry(name, max_bytes, is_named=True)
        if len(content) > max_bytes
        else BytesEntry(name, content, is_named=True)
    )
