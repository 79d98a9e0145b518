"""Images that a Parquet file names or has, as those of the Hugging Face Hub.

pyarrow is imported when a table is opened, and never before.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, cast

from fovea.bulk.inputs.basic_entries import (
    BytesEntry,
    FailedEntry,
    LargeEntry,
    clean_member_name,
    describe_error,
)
from fovea.bulk.inputs.columns import choose_column
from fovea.bulk.inputs.source_files import SourceFile
from fovea.service.errors import FileError, StartError
from fovea.service.image_files import ImageEntry

_PATH_ROWS: Final = 8192
"""Rows with paths that are read at once."""

_IMAGE_ROWS: Final = 1
"""Rows with images that are read at once: an image may have 64 MB."""

_BUFFER_BYTES: Final = 1 << 20
"""Bytes of a column that are read at once; without a buffer, pyarrow reads a whole row group."""

_BOMB_BYTES: Final = 256 << 20
_BOMB_RATIO: Final = 20
_BOMB_ROW_BYTES: Final = 1 << 20
"""A row group above all three limits is a bomb: its size, its compression, and its bytes for each row."""


class _Column(NamedTuple):
    name: str
    has_content: bool


def check_parquet(table: SourceFile, column: str | None) -> None:
    """Raise `FileError` for a table without a column of images, and `StartError` without pyarrow."""
    with _open_table(table) as parquet:
        _choose_column(parquet.schema_arrow, column)


def count_parquet_rows(table: SourceFile) -> int | None:
    """Return the number of rows; None if the table cannot be read."""
    try:
        with _open_table(table) as parquet:
            return int(parquet.metadata.num_rows)
    except FileError:
        return None


def list_parquet_images(
    table: SourceFile, column: str | None, create_entry: Callable[[str], ImageEntry], max_bytes: int
) -> Iterator[ImageEntry]:
    """Yield an image for each row of a table, a few rows at a time.

    `create_entry` returns the entry for a path or a URI. An image in the table itself is named by the table
    and its path, if it has one, or the number of its row from 0 on.
    """
    try:
        with _open_table(table) as parquet:
            chosen = _choose_column(parquet.schema_arrow, column)
            _check_sizes(parquet.metadata, chosen.name)
            rows = _IMAGE_ROWS if chosen.has_content else _PATH_ROWS
            number = 0
            for batch in parquet.iter_batches(rows, columns=[chosen.name], use_threads=False):
                for value in batch.column(0):
                    yield _create_entry(f"{table.name}/", number, value.as_py(), create_entry, max_bytes)
                    number += 1
    except FileError as error:
        yield FailedEntry(table.name, str(error))


@contextmanager
def _open_table(table: SourceFile) -> Iterator[Any]:
    """Open a table. Raises `FileError`, and `StartError` without pyarrow."""
    try:
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise StartError("reading Parquet needs pyarrow: pip install 'fovea-serve[bulk]'") from None
    with table.open_stream() as stream:
        try:
            with parquet.ParquetFile(
                io.BufferedReader(cast(io.RawIOBase, stream)),
                buffer_size=_BUFFER_BYTES,
                pre_buffer=False,
                page_checksum_verification=True,
            ) as file:
                yield file
        except FileError:
            raise
        except (arrow.ArrowException, OSError, ValueError) as error:
            raise FileError(f"the Parquet file is damaged or incomplete: {describe_error(error)}") from None


def _choose_column(schema: Any, wanted: str | None) -> _Column:
    """Return the column of images. Raises `FileError`."""
    name = choose_column(schema.names, wanted)
    kind = schema.field(name).type
    content = kind
    if _is_struct(kind):  # the hub's feature `Image`: content, path, or both
        members = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
        content = members.get("bytes") or members.get("path") or kind
    elif hasattr(kind, "value_type") and hasattr(kind, "index_type"):  # a dictionary of texts
        content = kind.value_type
    text = str(content)
    if text in ("string", "large_string", "string_view"):
        return _Column(name, has_content=False)
    if text in ("binary", "large_binary", "binary_view") or text.startswith("fixed_size_binary"):
        return _Column(name, has_content=True)
    raise FileError(f"the column {name!r} has the type {kind}; it must be text (paths) or binary (images)")


def _check_sizes(metadata: Any, column: str) -> None:
    """Raise `FileError` for a bomb: pyarrow unpacks at least a whole value, whatever its size."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        parts = [group.column(index) for index in range(group.num_columns)]
        parts = [part for part in parts if part.path_in_schema.split(".")[0] == column]
        size = sum(part.total_uncompressed_size for part in parts)
        packed_size = sum(part.total_compressed_size for part in parts)
        if size > max(_BOMB_BYTES, _BOMB_RATIO * packed_size, _BOMB_ROW_BYTES * group.num_rows):
            raise FileError(
                f"the column {column!r} unpacks from {packed_size} to {size} bytes, as no images or paths do"
            )


def _is_struct(kind: Any) -> bool:
    return str(kind).startswith("struct<")


def _create_entry(
    prefix: str, number: int, value: Any, create_entry: Callable[[str], ImageEntry], max_bytes: int
) -> ImageEntry:
    path: str | None = None
    if isinstance(value, dict):
        path = value.get("path")
        value = value.get("bytes") or path
    if not value:
        return FailedEntry(f"{prefix}{number}", "the row has nothing in the column of images")
    if isinstance(value, str):
        return create_entry(value)
    name = prefix + ((clean_member_name(path) if path else None) or str(number))
    if len(value) > max_bytes:
        return LargeEntry(name, max_bytes, is_named=True)
    return BytesEntry(name, value, is_named=True)
