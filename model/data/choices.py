"""The user's choices on how a data set is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

LabelCase = Literal["merge", "keep"]


@dataclass(frozen=True)
class Choices:
    """The choices for reading a data set.

    A field that is None or empty is decided by the layout; an ambiguous layout is an error.
    """

    path_column: str | None = None
    """Column of a CSV file with the image paths."""
    label_columns: tuple[str, ...] = ()
    """Column with the labels; several columns hold a 1 or a 0 for each label."""
    label_depth: int | None = None
    """Depth of the folder that is the label, counted from the top; 1 is the topmost folder."""
    label_case: LabelCase | None = None
    """Treatment of labels that differ only in case, spaces, `_` or `-`: one label or several."""
    other: str | None = None
    """Label of the images of other things, which is no label of the model."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that survive a round trip through JSON unchanged."""
        return {**asdict(self), "label_columns": list(self.label_columns)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Choices:
        """Build the choices from the output of `to_dict`; a missing field gets its default."""
        return cls(**{**values, "label_columns": tuple(values.get("label_columns", ()))})
