"""Tables as JSON Lines: an object in each line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import orjson

from fovea.bulk.columns import COLUMN_TYPES, ColumnType
from fovea.bulk.rows import Row
from fovea.bulk.tables.table_format import TableFormat


class JsonLinesFormat(TableFormat):
    """JSON Lines. Each object has all columns; probabilities have the digits of the service's JSON."""

    suffix = ".jsonl"

    @contextmanager
    def open_part(self, path: Path) -> Iterator[_JsonLinesWriter]:
        """Create the file of one part."""
        with path.open("wb") as file:
            yield _JsonLinesWriter(file)

    def join_parts(self, parts: Sequence[Path], out: Path, metadata: Mapping[str, Any]) -> None:
        """Write all parts into one file."""
        with out.open("wb") as file:
            append_files(parts, file)

    def read_rows(self, path: Path) -> Iterator[Row]:
        """Yield the rows."""
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = _parse_row(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None
                yield row


class _JsonLinesWriter:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write_rows(self, rows: Sequence[Row]) -> None:
        """Append a line for each row."""
        for row in rows:
            self._file.write(orjson.dumps(row._asdict(), option=orjson.OPT_APPEND_NEWLINE))


_TYPES: Final[Mapping[ColumnType, type]] = {
    ColumnType.TEXT: str,
    ColumnType.NUMBER: float,
    ColumnType.INTEGER: int,
    ColumnType.BOOLEAN: bool,
    ColumnType.TEXTS: str,
    ColumnType.NUMBERS: float,
}
"""Type of a value of each column, or of the items of a list."""

_LISTS: Final = frozenset({ColumnType.TEXTS, ColumnType.NUMBERS})


def _parse_row(line: bytes) -> Row:
    """Return a row. Raises `ValueError`."""
    values = orjson.loads(line)
    if not isinstance(values, dict) or values.keys() != COLUMN_TYPES.keys():
        raise ValueError("it is no object with the columns of a table")
    for name, column in COLUMN_TYPES.items():
        value = values[name]
        if value is None:
            continue
        if column in _LISTS:
            values[name] = value = tuple(value) if isinstance(value, list) else (None,)
        for one in value if column in _LISTS else (value,):
            if type(one) is not _TYPES[column]:
                raise ValueError(f"{name!r} is no {column.value}")
    return Row(**values)


def append_files(parts: Sequence[Path], file: IO[bytes]) -> None:
    """Append the content of files to an open file."""
    for part in parts:
        with part.open("rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)
