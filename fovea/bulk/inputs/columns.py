"""The column of a table that has the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fovea.service.errors import FileError

_COLUMN_NAMES: Final = (
    "path",
    "file",
    "filename",
    "file_name",
    "file_path",
    "filepath",
    "image",
    "image_path",
    "url",
    "uri",
    "image_url",
    "bytes",
    "image_bytes",
)
"""Names by which the column is found, best first."""

_CONTENT_NAMES: Final = frozenset({"bytes", "image_bytes"})

_MAX_COLUMNS_SHOWN: Final = 20


def choose_column(columns: Sequence[str], name: str | None) -> str:
    """Return the column of the images: the one of this name, or one of a usual name.

    Case does not matter. Raises `FileError`, which lists the columns.
    """
    by_key: dict[str, str] = {}
    for column in columns:
        by_key.setdefault(_normalise(column), column)
    if name is not None and name in columns:
        return name
    for candidate in _COLUMN_NAMES if name is None else (name,):
        if (found := by_key.get(_normalise(candidate))) is not None:
            return found
    wanted = (
        f"no column {name!r}"
        if name is not None
        else f"no column named {', '.join(_COLUMN_NAMES[:3])}, image, url or bytes"
    )
    shown = ", ".join(map(repr, columns[:_MAX_COLUMNS_SHOWN])) or "none"
    more = f" and {len(columns) - _MAX_COLUMNS_SHOWN} more" if len(columns) > _MAX_COLUMNS_SHOWN else ""
    raise FileError(f"the table has {wanted}; its columns are {shown}{more}; name one with --column")


def is_content_column(column: str) -> bool:
    """Return True if a column of texts has images in base64, by its name."""
    return _normalise(column) in _CONTENT_NAMES


def _normalise(column: str) -> str:
    return column.strip().casefold().replace("-", "_").replace(" ", "_")
