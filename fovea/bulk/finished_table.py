"""A finished table: its metadata, and its rows for tasks such as a report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from fovea.bulk.inputs.patterns import is_pattern
from fovea.bulk.inputs.sources import STANDARD_INPUT
from fovea.bulk.rows import Row
from fovea.bulk.run_options import RunOptions, describe_difference
from fovea.bulk.tables.table_format import TableFormat
from fovea.errors import StartError
from fovea.service.errors import to_one_line
from fovea.service.remote.store_uri import has_scheme

_FREE_OPTIONS: Final = frozenset({"engine", "part_size", "fovea"})
"""Options that may differ: rows of two versions, machines or engines differ in their last bits at most."""


class FinishedTable:
    """A table that `fovea classify` has finished. The file is opened by the methods, and may be any file."""

    def __init__(self, path: Path, table_format: TableFormat) -> None:
        """Create the object for the table at `path`; no file is touched."""
        self.path, self._format = path, table_format

    def read_options(self) -> RunOptions:
        """Return the sources and options of the run that wrote the table. Raises `StartError`."""
        try:
            return RunOptions.from_metadata(self._format.read_metadata(self.path))
        except (OSError, ValueError) as error:
            raise self._create_error(error) from None

    def is_readable(self) -> bool:
        """Return whether the file has the metadata of a table, and its first row can be read."""
        try:
            self.read_options()
            next(self.read_rows(), None)
        except StartError:
            return False
        return True

    def check_options(self, options: RunOptions) -> None:
        """Raise `StartError` unless a run with these options would write the same rows.

        Sources that have been moved since need not be named: the shell no longer finds them for a pattern.
        """
        previous, current = self.read_options().to_metadata(), options.to_metadata()
        previous["sources"] = _list_remaining(previous["sources"], current["sources"])
        keys = [key for key in current if key not in _FREE_OPTIONS]
        if difference := describe_difference(previous, current, keys):
            raise StartError(
                f"{self.path} was made with other options: {difference}; repeat its options, or name another "
                "table with --out"
            )

    def read_rows(self) -> Iterator[Row]:
        """Yield the rows. Raises `StartError` for a damaged table, and for a file that is none."""
        try:
            for row in self._format.read_rows(self.path):
                if row.probability is not None and not 0 <= row.probability <= 1:
                    raise ValueError(f"the probability {row.probability} is not between 0 and 1")
                yield row
        except (OSError, ValueError) as error:
            raise self._create_error(error) from None

    def _create_error(self, error: OSError | ValueError) -> StartError:
        if isinstance(error, OSError):
            reason = os.strerror(error.errno) if error.errno else to_one_line(error)
            return StartError(f"cannot read the table {error.filename or self.path}: {reason}")
        return StartError(
            f"{self.path} is no table of `fovea classify`, or it was changed: {to_one_line(error)}; name "
            "another table with --out, or replace this one with --force"
        )


def _list_remaining(previous: Sequence[str], current: Sequence[str]) -> list[str]:
    """Return the previous sources but local files that are gone, and are not named any more."""
    named = set(current)
    return [
        source
        for source in previous
        if source in named
        or source == STANDARD_INPUT
        or has_scheme(source)
        or is_pattern(source)
        or os.path.lexists(source)
    ]
