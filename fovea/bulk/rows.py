"""The rows of a table of classified images.

The names and the order of the fields of `Row` are those of the columns, whatever the format of the file.
"""

from __future__ import annotations

from typing import NamedTuple

from fovea.errors import FileError, RequestError
from fovea.results import Result


class Row(NamedTuple):
    """One image: its answer, or its error."""

    path: str
    """Path or URI; for a file in an archive, the archive's path, `/`, and the member's."""
    label: str | None = None
    """The most probable label; None for an image with an error, as all other fields of the answer."""
    probability: float | None = None
    """Probability of `label`, from 0 to 1; float32 in typed formats, as all probabilities and scores."""
    labels: tuple[str, ...] | None = None
    """The most probable labels, best first."""
    probabilities: tuple[float, ...] | None = None
    """Probabilities of `labels`."""
    label_set: tuple[str, ...] | None = None
    """Labels among which the true one is as often as requested by `coverage`."""
    known: bool | None = None
    """Whether the image is like those that the model was trained on; None if the model does not tell."""
    known_score: float | None = None
    """Score on which `known` rests; higher is more alike."""
    width: int | None = None
    """Width of the upright image in pixels."""
    height: int | None = None
    """Height of the upright image in pixels."""
    format: str | None = None
    """Format of the file, such as `JPEG`."""
    error: str | None = None
    """Code of the error; None for an image with an answer."""
    message: str | None = None
    """Message of the error."""


def create_row(path: str, outcome: Result | RequestError | FileError) -> Row:
    """Return the row of an image."""
    if not isinstance(outcome, Result):
        return create_error_row(path, outcome)
    return Row(
        path,
        label=outcome.label,
        probability=outcome.probability,
        labels=tuple(one.label for one in outcome.predictions),
        probabilities=tuple(one.probability for one in outcome.predictions),
        label_set=None if outcome.coverage is None else outcome.coverage.labels,
        known=outcome.known,
        known_score=outcome.known_score,
        width=outcome.image.width,
        height=outcome.image.height,
        format=outcome.image.format,
    )


def create_error_row(path: str, error: RequestError | FileError) -> Row:
    """Return the row of an image without an answer. Tables hold valid UTF-8 only, and messages may not."""
    return Row(path, error=error.code, message=str(error).encode(errors="backslashreplace").decode())
