"""The plan of a sorting: which image goes into which folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from fovea.bulk.rows import Row
from fovea.bulk.sorting.names import name_file


class PlannedFile(NamedTuple):
    """An image, and the file that it becomes unless another image has that name."""

    source: str
    """Path or URI of the image, as in the table."""
    label: str
    target: Path


def plan_sorting(rows: Iterable[Row], folder: Path, folder_names: Mapping[str, str]) -> Iterator[PlannedFile]:
    """Yield a file for each row with a label, in the order of the rows.

    `folder_names` are the names of the folders below `folder` by label. Images with an error stay where they
    are.
    """
    for row in rows:
        if row.label is not None:
            yield PlannedFile(row.path, row.label, folder / folder_names[row.label] / name_file(row.path))
