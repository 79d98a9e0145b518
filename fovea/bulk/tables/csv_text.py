"""Tables as CSV (RFC 4180) in UTF-8, with a line of headings; lists are JSON."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

import orjson

from fovea.bulk.columns import COLUMN_TYPES, ColumnType
from fovea.bulk.rows import Row
from fovea.bulk.tables.json_lines import append_files
from fovea.bulk.tables.table_format import TableFormat

_LINE_END: Final = "\r\n"
"""End of a line. Python's writer quotes a carriage return in a cell only if the line's end has one too."""


class CsvFormat(TableFormat):
    """CSV. A missing value is an empty cell; booleans are `true` and `false`; a list is a JSON list."""

    suffix = ".csv"

    @contextmanager
    def open_part(self, path: Path) -> Iterator[_CsvWriter]:
        """Create the file of one part, without headings."""
        with path.open("w", encoding="utf-8", newline="") as file:
            yield _CsvWriter(file)

    def join_parts(self, parts: Sequence[Path], out: Path, metadata: Mapping[str, Any]) -> None:
        """Write the headings and all parts into one file."""
        headings = io.StringIO()
        csv.writer(headings, lineterminator=_LINE_END).writerow(Row._fields)
        with out.open("wb") as file:
            file.write(headings.getvalue().encode())
            append_files(parts, file)

    def read_rows(self, path: Path) -> Iterator[Row]:
        """Yield the rows."""
        csv.field_size_limit(sys.maxsize)  # a list of all labels may be long
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            try:
                if next(reader, None) != list(Row._fields):
                    raise ValueError("it has other columns")
                for cells in reader:
                    yield _parse_row(cells)
            except (csv.Error, ValueError) as error:
                raise ValueError(f"line {reader.line_num}: {error}") from None


class _CsvWriter:
    def __init__(self, file: IO[str]) -> None:
        self._writer = csv.writer(file, lineterminator=_LINE_END)

    def write_rows(self, rows: Sequence[Row]) -> None:
        """Append a line for each row."""
        self._writer.writerows([_format_cell(value) for value in row] for row in rows)


def _format_cell(value: Any) -> Any:
    if isinstance(value, tuple):
        return orjson.dumps(value).decode()
    if isinstance(value, bool):
        return "true" if value else "false"
    return value


def _parse_row(cells: Sequence[str]) -> Row:
    """Return a row. Raises `ValueError`."""
    if len(cells) != len(_PARSERS):
        raise ValueError(f"it has {len(cells)} cells, not {len(_PARSERS)}")
    return Row._make(None if cell == "" else parse(cell) for parse, cell in zip(_PARSERS, cells, strict=True))


def _parse_boolean(cell: str) -> bool:
    if cell not in ("true", "false"):
        raise ValueError(f"{cell!r} is neither 'true' nor 'false'")
    return cell == "true"


def _parse_list(cell: str, of: type) -> tuple[Any, ...]:
    values = orjson.loads(cell)
    if not isinstance(values, list) or not all(isinstance(one, of) for one in values):
        raise ValueError(f"{cell!r} is no list of this column")
    return tuple(values)


_PARSERS_BY_TYPE: Final[Mapping[ColumnType, Callable[[str], Any]]] = {
    ColumnType.TEXT: str,
    ColumnType.NUMBER: float,
    ColumnType.INTEGER: int,
    ColumnType.BOOLEAN: _parse_boolean,
    ColumnType.TEXTS: partial(_parse_list, of=str),
    ColumnType.NUMBERS: partial(_parse_list, of=float),
}

_PARSERS: Final = [_PARSERS_BY_TYPE[one] for one in COLUMN_TYPES.values()]
