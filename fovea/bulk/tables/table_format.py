"""The format of a table's file.

A table is written in parts, which are then joined: part by part, so that a table of any length takes the same
memory. The same rows give the same bytes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Protocol

from fovea.bulk.rows import Row
from fovea.bulk.table_facts import find_facts_file


class RowWriter(Protocol):
    """Writes rows into an open file."""

    def write_rows(self, rows: Sequence[Row]) -> None:
        """Append rows. Raises `OSError`."""


class TableFormat(ABC):
    """A format of tables."""

    suffix: ClassVar[str]
    """End of the names of such files."""

    @abstractmethod
    def open_part(self, path: Path) -> AbstractContextManager[RowWriter]:
        """Create the file of one part. Leaving the context completes the file. Raises `OSError`."""

    @abstractmethod
    def join_parts(self, parts: Sequence[Path], out: Path, metadata: Mapping[str, Any]) -> None:
        """Write all parts into one file, with `metadata` if the format can hold them. Raises `OSError`."""

    @abstractmethod
    def read_rows(self, path: Path) -> Iterator[Row]:
        """Yield the rows of a complete table, in bounded memory.

        Raises `OSError`, and `ValueError` for a file that is no such table or is damaged.
        """

    def has_facts(self) -> bool:
        """Return whether `join_parts` writes the metadata. Otherwise they are in a file of their own."""
        return False

    def read_metadata(self, path: Path) -> Any:
        """Return the metadata of a complete table as JSON has them. Raises `OSError` and `ValueError`."""
        return json.loads(find_facts_file(path).read_bytes())
