"""Tables as Parquet, by pyarrow (extra `bulk`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from fovea.bulk.columns import COLUMN_TYPES, ColumnType
from fovea.bulk.rows import Row
from fovea.bulk.table_facts import TableFacts
from fovea.bulk.tables.table_format import TableFormat
from fovea.service.errors import to_one_line

_ARROW_TYPES: Final[Mapping[ColumnType, Any]] = {
    ColumnType.TEXT: pa.string(),
    ColumnType.NUMBER: pa.float32(),
    ColumnType.INTEGER: pa.int32(),
    ColumnType.BOOLEAN: pa.bool_(),
    ColumnType.TEXTS: pa.list_(pa.string()),
    ColumnType.NUMBERS: pa.list_(pa.float32()),
}

SCHEMA: Final = pa.schema(
    [pa.field(name, _ARROW_TYPES[one], nullable=name != "path") for name, one in COLUMN_TYPES.items()]
)
"""The columns. `path` is never null."""

_RUN_KEY: Final = b"fovea.run"
"""Key of the metadata as JSON."""

_COMPRESSION: Final = "zstd"

_PART_VALUES: Final = 1 << 16
"""Number of labels and other values in memory before a part's row group is written."""

_GROUP_ROWS: Final = 1 << 16
"""Rows of a row group of the joined file; the last may have fewer."""

_GROUP_BYTES: Final = 32 << 20
"""Bytes in memory at which a row group of the joined file ends, if its rows are fewer."""


class ParquetFormat(TableFormat):
    """Parquet. The schema has the metadata, as `fovea.run`; `fovea.digest` and others are for readers."""

    suffix = ".parquet"

    @contextmanager
    def open_part(self, path: Path) -> Iterator[_ParquetWriter]:
        """Create the file of one part."""
        with _open_writer(path, SCHEMA) as writer:
            rows = _ParquetWriter(writer)
            yield rows
            rows.flush()

    def join_parts(self, parts: Sequence[Path], out: Path, metadata: Mapping[str, Any]) -> None:
        """Write all parts into one file, in row groups of bounded size."""
        texts = {key: "" if metadata[key] is None else str(metadata[key]) for key in TableFacts._fields}
        schema = SCHEMA.with_metadata(
            {f"fovea.{key}": text for key, text in texts.items()} | {_RUN_KEY: json.dumps(metadata)}
        )
        with _open_writer(out, schema) as writer:
            for table in _group_tables(_read_tables(parts)):
                writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=len(table))

    def read_rows(self, path: Path) -> Iterator[Row]:
        """Yield the rows."""
        with _name_damage():
            for table in _read_tables([path]):
                if not table.schema.equals(SCHEMA):
                    raise ValueError("it has other columns")
                columns = [column.to_pylist() for column in table.columns]
                for values in zip(*columns, strict=True):
                    yield Row._make(tuple(one) if isinstance(one, list) else one for one in values)

    def read_metadata(self, path: Path) -> Any:
        """Return the metadata as JSON has them."""
        with _name_damage():
            metadata = pq.read_schema(path).metadata or {}
        if _RUN_KEY not in metadata:
            raise ValueError("it has no metadata of Fovea")
        return json.loads(metadata[_RUN_KEY])

    def has_facts(self) -> bool:
        """Return True."""
        return True


class _ParquetWriter:
    """Collects rows until they are worth a row group."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._rows: list[Row] = []
        self._value_count = 0

    def write_rows(self, rows: Sequence[Row]) -> None:
        """Append rows."""
        self._rows += rows
        for row in rows:
            self._value_count += len(row) + (0 if row.labels is None else 2 * len(row.labels))
        if self._value_count >= _PART_VALUES:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are in memory."""
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [pa.array(column, one.type) for column, one in zip(columns, SCHEMA, strict=True)]
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))
            self._rows, self._value_count = [], 0


@contextmanager
def _name_damage() -> Iterator[None]:
    """Turn pyarrow's errors about the content of a file into `ValueError`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # "Unexpected end of stream", and not one of the system
            raise ValueError(to_one_line(error)) from None
        raise
    except pa.ArrowException as error:
        raise ValueError(to_one_line(error)) from None


@contextmanager
def _open_writer(path: Path, schema: Any) -> Iterator[Any]:
    """Yield a writer; complete the file unless the block fails.

    A writer that is only dropped would write the end of the file when it is destroyed, and print what fails.
    """
    writer = pq.ParquetWriter(path, schema, compression=_COMPRESSION)
    try:
        yield writer
        writer.close()
    except BaseException:
        with suppress(OSError):
            writer.close()
        raise


def _read_tables(paths: Sequence[Path]) -> Iterator[Any]:
    """Yield the row groups of files."""
    for path in paths:
        with pq.ParquetFile(path) as file:
            for index in range(file.num_row_groups):
                yield file.read_row_group(index, use_threads=False)


def _group_tables(tables: Iterator[Any]) -> Iterator[Any]:
    """Yield tables of `_GROUP_ROWS` rows, or of fewer if they have `_GROUP_BYTES` bytes."""
    group: list[Any] = []
    for table in tables:
        group.append(table)
        row_count = sum(map(len, group))
        if row_count >= _GROUP_ROWS or sum(one.nbytes for one in group) >= _GROUP_BYTES:
            whole = pa.concat_tables(group)
            yield whole.slice(0, _GROUP_ROWS)
            group = [whole.slice(_GROUP_ROWS)] if row_count > _GROUP_ROWS else []
    if group:
        yield pa.concat_tables(group)
