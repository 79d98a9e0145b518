"""The user's decisions where the layout of a data set leaves a choice."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Case = Literal["merge", "keep"]


@dataclass(frozen=True)
class Choices:
    """How to read a data set; what is None or empty is decided by the layout, or refused."""

    path_column: str | None = None
    """The column of a CSV file that names the images."""
    label_columns: tuple[str, ...] = ()
    """The column that names the labels; several hold a 1 or a 0 for each label."""
    label_depth: int | None = None
    """The folder from the top that is the label: 1 is the top-most."""
    label_case: Case | None = None
    """Labels that differ in case, spaces, `_` or `-` alone: one label, or several."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, equal to what JSON gives back of them."""
        return {**asdict(self), "label_columns": list(self.label_columns)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Choices:
        """Read what `to_dict` wrote; runs of earlier versions have none of it."""
        return cls(**{**values, "label_columns": tuple(values.get("label_columns", ()))})
