"""The model that made a table, and the file with the metadata of a table."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class TableFacts(NamedTuple):
    """The part of a table's metadata that describes the model and its answers."""

    model: str
    version: str
    digest: str
    """SHA-256 of the model file, as hexadecimal digits."""
    top_k: int
    """Largest number of labels in a row; 0 for all."""
    coverage: float | None
    """How often the true label is in `label_set`; None without label sets."""


def find_facts_file(out: Path) -> Path:
    """Return the file with the metadata of a table whose format has no place for them."""
    return out.with_name(f"{out.name}-metadata.json")
