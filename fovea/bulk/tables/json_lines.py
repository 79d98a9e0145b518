"""Tables as JSON Lines: an object in each line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import orjson

from fovea.bulk.rows import Row
from fovea.bulk.table_facts import TableFacts
from fovea.bulk.tables.table_format import TableFormat


class JsonLinesFormat(TableFormat):
    """JSON Lines. Each object has all columns; probabilities have the digits of the service's JSON."""

    suffix = ".jsonl"

    @contextmanager
    def open_part(self, path: Path) -> Iterator[_JsonLinesWriter]:
        """Create the file of one part."""
        with path.open("wb") as file:
            yield _JsonLinesWriter(file)

    def join_parts(self, parts: Sequence[Path], out: Path, facts: TableFacts) -> None:
        """Write all parts into one file."""
        with out.open("wb") as file:
            append_files(parts, file)

    def read_rows(self, path: Path) -> Iterator[Row]:
        """Yield the rows."""
        with path.open("rb") as file:
            for line in file:
                values = orjson.loads(line)
                yield Row._make(tuple(one) if isinstance(one, list) else one for one in values.values())


class _JsonLinesWriter:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write_rows(self, rows: Sequence[Row]) -> None:
        """Append a line for each row."""
        for row in rows:
            self._file.write(orjson.dumps(row._asdict(), option=orjson.OPT_APPEND_NEWLINE))


def append_files(parts: Sequence[Path], file: IO[bytes]) -> None:
    """Append the content of files to an open file."""
    for part in parts:
        with part.open("rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)
