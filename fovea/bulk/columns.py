"""The columns of a table of classified images, with their types: the fields of `Row`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, Final, get_type_hints

from fovea.bulk.rows import Row


class ColumnType(Enum):
    """Type of the values of a column, any of which may be missing."""

    TEXT = "text"
    NUMBER = "number"
    """A float32."""
    INTEGER = "integer"
    BOOLEAN = "boolean"
    TEXTS = "list of texts"
    NUMBERS = "list of numbers"


_TYPES: Final[Mapping[Any, ColumnType]] = {
    str: ColumnType.TEXT,
    str | None: ColumnType.TEXT,
    float | None: ColumnType.NUMBER,
    int | None: ColumnType.INTEGER,
    bool | None: ColumnType.BOOLEAN,
    tuple[str, ...] | None: ColumnType.TEXTS,
    tuple[float, ...] | None: ColumnType.NUMBERS,
}

COLUMN_TYPES: Final[Mapping[str, ColumnType]] = MappingProxyType(
    {name: _TYPES[hint] for name, hint in get_type_hints(Row).items()}
)
"""Type of each column, in the order of the columns."""
