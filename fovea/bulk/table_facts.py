"""What a table says about the model that made it."""

from __future__ import annotations

from typing import NamedTuple


class TableFacts(NamedTuple):
    """Metadata of a table; the keys in a file are these names after `fovea.`, the values are texts."""

    model: str
    version: str
    digest: str
    """SHA-256 of the model file, as hexadecimal digits."""
    top_k: int
    """Largest number of labels in a row; 0 for all."""
    coverage: float | None
    """How often the true label is in `label_set`; None without label sets."""
