"""What a foreign graph gives: logits or probabilities, told apart by running it, and never by a name."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto

from export.foreign import ImportRefused, Plain, Values
from service.contract import Task

Doubles = npt.NDArray[np.float64]


class Kind(StrEnum):
    """What the values of one image are."""

    LOGITS = "logits"
    LOG_PROBABILITIES = "logarithms of probabilities that sum to 1"
    PROBABILITIES = "probabilities that sum to 1"
    EACH = "probabilities, each from 0 to 1 by itself"


@dataclass(frozen=True)
class Given:
    """The graph's output."""

    name: str
    dtype: np.dtype[np.generic]
    count: int
    """Values for one image."""
    kind: Kind
    before: str | None
    """The tensor whose softmax or sigmoid the probabilities are, where the graph has one."""
    chosen: str
    """Why it is this output."""


_FLOATS: Final = frozenset({"float16", "float32", "float64"})

_SUM_TOLERANCE: Final = {"float16": 1e-2, "float32": 1e-3, "float64": 1e-3}
"""By how much a sum of probabilities may differ from 1: a thousand roundings of float16, 2^-11 each, of
values that sum to 1 leave less than 0.001; of quantised values more."""

_SAME: Final = {"float16": 5e-3, "float32": 1e-5, "float64": 1e-5}
"""By how much probabilities may differ from those that we compute from the tensor before them."""

_PASSING: Final = frozenset({"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Operators that leave values as they are."""


def given_by(
    model: ModelProto, plain: Plain, images: Values, extreme: Values, asked: str | None, labels: int
) -> Given:
    """Run the graph on `images`, and where that leaves room for doubt on `extreme` values.

    `asked` names the output; else it is the only one that could be meant. Raises `ImportRefused`.
    """
    seen = plain(images)
    name, chosen = _choose(seen, len(images), asked, labels)
    rows = rows_of(seen[name], len(images))
    if rows is None:
        raise ImportRefused(
            f"the output {name!r} is {_shape(seen[name])}: not a row of values for each image"
        )
    if not np.isfinite(rows).all():
        raise ImportRefused(f"the output {name!r} is not finite for every image; is the normalisation right?")
    kind = kind_of(rows, seen[name].dtype)
    if kind is Kind.EACH and not _stays(plain, name, extreme):
        kind = Kind.LOGITS
    before = _before(model, name)
    if before and not _explains(plain, images, before, rows, kind, seen[name].dtype):
        before = None
    return Given(name, seen[name].dtype, rows.shape[1], kind, before, chosen)


def _choose(seen: dict[str, Values], images: int, asked: str | None, labels: int) -> tuple[str, str]:
    """The output that is meant, and why."""
    if asked is not None:
        if asked not in seen:
            raise ImportRefused(f"there is no output {asked!r}; there are {', '.join(seen)}")
        return asked, "as told by --output"
    rows = {name: found for name, value in seen.items() if (found := rows_of(value, images)) is not None}
    if not rows:
        shapes = "; ".join(f"{name}: {_shape(value)}" for name, value in seen.items())
        raise ImportRefused(
            f"no output is a row of values for each image ({shapes}): not an image classifier"
        )
    if len(seen) == 1:
        return next(iter(rows)), "the only one"
    counts = {labels, 1} if labels == 2 else {labels}
    fitting = [name for name, found in rows.items() if found.shape[1] in counts]
    if len(fitting) != 1:
        shapes = ", ".join(f"{name} ({found.shape[1]} values)" for name, found in rows.items())
        raise ImportRefused(
            f"the graph has several outputs, {shapes}: name the one with the labels as --output"
        )
    return fitting[0], f"the only one of {len(seen)} that fits the labels"


def rows_of(value: Values, images: int) -> Doubles | None:
    """Values as float64 (n, count), if they are that but for axes of length 1."""
    if value.dtype.name not in _FLOATS or value.ndim < 1 or len(value) != images:
        return None
    longer = [side for side in value.shape[1:] if side != 1]
    return value.reshape(images, -1).astype(np.float64) if len(longer) <= 1 else None


def _shape(value: Values) -> str:
    return f"{value.dtype.name} {' x '.join(map(str, ('images', *value.shape[1:])))}"


# --- logits or probabilities ---------------------------------------------------------------------


def kind_of(rows: Doubles, dtype: np.dtype[np.generic]) -> Kind:
    """What they look like; of a single value per image a sum says nothing."""
    tolerance = _SUM_TOLERANCE[dtype.name]
    if rows.shape[1] > 1 and _sum_to_one(rows, tolerance):
        return Kind.PROBABILITIES
    if rows.shape[1] > 1 and rows.max() <= tolerance and _sum_to_one(np.exp(rows), tolerance):
        return Kind.LOG_PROBABILITIES
    return Kind.EACH if rows.min() >= 0 and rows.max() <= 1 else Kind.LOGITS


def _sum_to_one(rows: Doubles, tolerance: float) -> bool:
    return bool(rows.min() >= 0 and np.abs(rows.sum(axis=1) - 1).max() <= tolerance)


def _stays(plain: Plain, name: str, extreme: Values) -> bool:
    """Do the values stay from 0 to 1 whatever comes in? Those of a sigmoid do, small logits do not."""
    with np.errstate(all="ignore"):
        rows = rows_of(plain(extreme)[name], len(extreme))
    if rows is None:
        return False
    known = rows[np.isfinite(rows)]
    return bool(known.size == 0 or (known.min() >= 0 and known.max() <= 1))


def _before(model: ModelProto, name: str) -> str | None:
    """The input of the softmax or sigmoid that an output comes from, if one is its last step."""
    makers: dict[str, NodeProto] = {output: node for node in model.graph.node for output in node.output}
    while name in makers and makers[name].op_type in _PASSING:
        name = makers[name].input[0]
    maker = makers.get(name)
    return maker.input[0] if maker is not None and maker.op_type in ("Softmax", "Sigmoid") else None


def _explains(
    plain: Plain, images: Values, before: str, rows: Doubles, kind: Kind, dtype: np.dtype[np.generic]
) -> bool:
    """Are the probabilities what we would compute of the tensor before them?"""
    if kind not in (Kind.PROBABILITIES, Kind.EACH):
        return False
    found = rows_of(plain.seeing(before)(images)[before], len(images))
    if found is None or found.shape != rows.shape:
        return False
    again = softmax(found) if kind is Kind.PROBABILITIES else sigmoid(found)
    return bool(np.abs(again - rows).max() <= _SAME[dtype.name])


# --- the task ------------------------------------------------------------------------------------


def task_of(given: Given, asked: Task | None) -> tuple[Task, str]:
    """What the labels are to each other, and why. Raises `ImportRefused` where that must be told."""
    if given.count == 1:
        return _only(asked, Task.BINARY, "one value for an image")
    if given.kind is Kind.EACH:
        if asked is not Task.MULTILABEL:
            raise ImportRefused(
                f"the output {given.name!r} has {given.kind}: give --task multilabel "
                "if any number of labels may be true of an image"
            )
        return Task.MULTILABEL, "as told by --task"
    if asked is Task.MULTILABEL and given.kind is not Kind.LOGITS:
        raise ImportRefused(f"the output {given.name!r} has {given.kind}: that is not multilabel")
    if asked is Task.BINARY and given.count != 2:
        raise ImportRefused(
            f"--task binary takes one value or two for an image; the graph gives {given.count}"
        )
    if asked is not None:
        return asked, "as told by --task"
    if given.count == 2:
        return Task.BINARY, "assumed, of two labels; --task tells otherwise"
    known = given.kind is not Kind.LOGITS
    return Task.MULTICLASS, given.kind.value if known else "assumed, of logits; --task tells otherwise"


def _only(asked: Task | None, task: Task, why: str) -> tuple[Task, str]:
    if asked not in (None, task):
        raise ImportRefused(f"--task {asked} does not fit {why}, which is {task}")
    return task, why


# --- by hand -------------------------------------------------------------------------------------


def softmax(rows: Doubles) -> Doubles:
    """Over the last axis."""
    powers = np.exp(rows - rows.max(axis=-1, keepdims=True))
    result: Doubles = powers / powers.sum(axis=-1, keepdims=True)
    return result


def sigmoid(rows: Doubles) -> Doubles:
    """Of each value."""
    with np.errstate(over="ignore"):
        result: Doubles = 1 / (1 + np.exp(-rows))
    return result


def by_hand(rows: Doubles, kind: Kind, task: Task) -> Doubles:
    """The probabilities, float64 (n, labels), that what the graph gives means; for `binary` [1 - p, p]."""
    if rows.shape[1] == 1:
        positive = rows if kind is Kind.EACH else sigmoid(rows)
        return np.hstack([1 - positive, positive])
    if kind in (Kind.PROBABILITIES, Kind.EACH):
        return rows
    return sigmoid(rows) if task is Task.MULTILABEL else softmax(rows)
