"""Rows of a table file: CSV in the dialects that programs write, or JSON lines."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fovea.model.data.examples import DataError

SUFFIXES: Final = frozenset({".csv", ".tsv", ".jsonl"})
_DELIMITERS: Final = ",;\t"

Columns = tuple[str, ...]


@dataclass(frozen=True)
class ParsedTable:
    """A table: the column names as written, and the fields of each row."""

    path: Path
    columns: Columns
    rows: tuple[tuple[int, tuple[str, ...]], ...]
    """(line number, fields) of each row: one field per column, without surrounding white space."""
    notes: tuple[str, ...] = ()

    def format_position(self, line: int) -> str:
        """Return the position of a line in the file, for messages."""
        return f"{self.path}, line {line}"


def read_table(path: Path, rate_columns: Callable[[Columns], int]) -> ParsedTable:
    """Read a table.

    `rate_columns` rates how well a header's columns fit, 0 for not at all. It is called once for each
    possible delimiter, and the delimiter with the best rating is used. Raises `DataError`.
    """
    text, notes = _decode_text(path)
    if path.suffix.lower() == ".jsonl":
        return _parse_json_lines(path, text, notes)
    first_line, _, rest = text.partition("\n")
    skipped_lines = 0
    if re.fullmatch(r"sep=.\s*", first_line):  # a directive for Excel
        text, skipped_lines = rest, 1
    delimiter, columns = _detect_header(path, text, rate_columns)
    return ParsedTable(path, columns, tuple(_parse_csv(path, text, delimiter, columns, skipped_lines)), notes)


def _decode_text(path: Path) -> tuple[str, tuple[str, ...]]:
    """Decode a file and return notes: UTF-8, UTF-16 with a byte order mark, or else Windows-1252."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    notes: tuple[str, ...] = ()
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            text = content.decode("utf-16")
        else:
            text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            raise DataError(
                f"{path}, line {line}: this is neither UTF-8 nor Windows-1252; save it as CSV in UTF-8"
            ) from None
        excerpt = text.splitlines()[line - 1][:80]
        notes = (f"{path.name} is not UTF-8 and was read as Windows-1252: line {line} is {excerpt!r}",)
    if "\0" in text:
        raise DataError(f"{path} contains zero bytes; save it as CSV in UTF-8")
    return text, notes


def _detect_header(path: Path, text: str, rate_columns: Callable[[Columns], int]) -> tuple[str, Columns]:
    """Return the delimiter that gives the best columns of the first line, with the columns."""
    first_line = next(iter(text.splitlines()), "")
    candidates: list[tuple[int, str, Columns]] = []
    for delimiter in _DELIMITERS:
        with suppress(csv.Error):
            columns = tuple(
                field.strip() for field in next(csv.reader([first_line], delimiter=delimiter), [])
            )
            candidates.append((rate_columns(columns), delimiter, columns))
    best = max(candidates, key=lambda one: one[0], default=(0, "", ()))  # ties: the first
    if not best[0]:
        raise DataError(
            f"{path} needs a first line with the columns path and label; it has {first_line[:80]!r}; or "
            "name its columns with --path-column and --label-column"
        )
    return best[1], best[2]


def _parse_csv(
    path: Path, text: str, delimiter: str, columns: Columns, skipped_lines: int
) -> Iterator[tuple[int, tuple[str, ...]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if reader.line_num == 1 or not any(field.strip() for field in row):
                continue
            line = reader.line_num + skipped_lines
            if len(row) != len(columns):
                raise DataError(
                    f"{path}, line {line}: {len(row)} fields, {len(columns)} columns; "
                    "quote a field that contains the delimiter"
                )
            yield line, tuple(field.strip() for field in row)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num + skipped_lines}: {error}; save it as CSV again"
        ) from None


def _parse_json_lines(path: Path, text: str, notes: tuple[str, ...]) -> ParsedTable:
    objects: list[tuple[int, dict[str, Any]]] = []
    columns: dict[str, None] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: this is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f'{path}, line {number}: this is not a JSON object, such as {{"file_name": …}}')
        objects.append((number, value))
        columns |= dict.fromkeys(value)
    names: Sequence[str] = tuple(columns)
    rows = tuple(
        (number, tuple(_format_field(value.get(name)) for name in names)) for number, value in objects
    )
    return ParsedTable(path, tuple(names), rows, notes)


def _format_field(value: Any) -> str:
    """Format a JSON value as a CSV field; a list is joined with `|`."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "|".join(map(_format_field, value))
    return str(value).strip()
