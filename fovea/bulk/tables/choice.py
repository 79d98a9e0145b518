"""Choice of a table's format by the end of its name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fovea.bulk.tables.csv_text import CsvFormat
from fovea.bulk.tables.json_lines import JsonLinesFormat
from fovea.bulk.tables.table_format import TableFormat
from fovea.errors import StartError


def choose_format(path: Path) -> TableFormat:
    """Return the format of a table. Raises `StartError` for another end, and for Parquet without pyarrow."""
    match path.suffix.lower():
        case ".parquet":
            if importlib.util.find_spec("pyarrow") is None:
                raise StartError(
                    "Parquet needs pyarrow: pip install 'fovea-serve[bulk]', or end --out with .csv or .jsonl"
                )
            from fovea.bulk.tables.parquet import ParquetFormat

            return ParquetFormat()
        case ".csv":
            return CsvFormat()
        case ".jsonl":
            return JsonLinesFormat()
    raise StartError(f"--out is {str(path)!r}; end the name with .parquet, .csv or .jsonl")
