"""The output of a foreign graph: logits or probabilities, distinguished by running the graph, not by names.

Other values (percentages of a sigmoid, 1 - p, -log p, the number of a label, …) are refused: their softmax
would be an answer that looks right and is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto

from fovea.export.importer.dynamic_batch import constants_of
from fovea.export.importer.foreign_model import ImportRefused, Plain, Values
from fovea.service.artifact.contract import Task

Doubles = npt.NDArray[np.float64]


class Kind(StrEnum):
    """The kind of the values of one image."""

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
    """Number of values per image."""
    kind: Kind
    before: str | None
    """Tensor before the softmax or sigmoid that gives the probabilities, if there is one."""
    chosen: str
    """Reason for the choice of this output."""
    total: float = 1.0
    """Sum of one image's values if they are scaled probabilities: 100 for percentages."""
    constant: bool = False
    """Flag for values that are the same for every image that was tried."""

    @property
    def described(self) -> str:
        """Description for the report."""
        kind = str(self.kind)
        if self.total != 1:
            kind = f"probabilities times {self.total:g} (each row sums to that), divided by it"
        same = "; the same for every image" if self.constant else ""
        return f"{self.count} {kind} (as seen when it is run{same})"


_FLOATS: Final = frozenset({"float16", "float32", "float64"})

_SUM_TOLERANCE: Final = {"float16": 1e-2, "float32": 1e-3, "float64": 1e-3}
"""Tolerance for a sum of probabilities to count as 1.

A thousand roundings of float16, 2^-11 each, of values that sum to 1 differ by less than 0.001; quantised
values differ by more.
"""

_SAME: Final = {"float16": 5e-3, "float32": 1e-5, "float64": 1e-5}
"""Tolerance between the graph's probabilities and those computed from the tensor before them."""

_PASSING: Final = frozenset({"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"})
"""Operators that do not change values."""

_ROUNDING: Final = frozenset({"QuantizeLinear", "DequantizeLinear", "Round", "Floor", "Ceil"})
"""Operators that round values and change nothing else, if their two scales are equal."""

_ROUNDED_SAME: Final = 1 / 128
"""Replacement of `_SAME` after a rounding: one step of int8 for 0 to 1, the coarsest in use."""

_SCALING: Final = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Clip", "Min", "Max"})
"""Operators that shift and scale values, if all but one of their inputs are constants."""

_BOUNDED: Final = frozenset(
    {"Softmax", "Sigmoid", "HardSigmoid", "Tanh", "Softsign", "QLinearSoftmax", "QLinearSigmoid"}
)
"""Operators with bounded outputs, which are not logits even if shifted or scaled."""

_DECISIONS: Final = frozenset({"ArgMax", "ArgMin", "Hardmax", "TopK", "OneHot"})
"""Operators that choose labels and drop their probabilities."""

_FULL: Final = (100.0, 255.0)
"""Maximum values of shares of a whole: percentages and bytes."""

_BASES: Final = {"2": np.log(2), "10": np.log(10)}
"""Natural logarithms of the other common logarithm bases."""


def given_by(
    model: ModelProto, plain: Plain, images: Values, extreme: Values, asked: str | None, labels: int
) -> Given:
    """Run the graph on `images`, and on `extreme` values to resolve doubts; return the output.

    `asked` names the output; None selects the only plausible output. Raises `ImportRefused`.
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
    if rows.min() == rows.max():
        raise ImportRefused(
            f"the output {name!r} is {rows.min():g} for every label and image, from black to white: its last "
            "step goes over the wrong axis, or the graph does not look at its input"
        )
    dtype = seen[name].dtype
    end = _end_of(model, name)
    beyond = _finite(plain, name, extreme)
    kind, total = kind_of(rows, beyond, dtype)
    before = None
    if end.kind in ("Softmax", "Sigmoid") and not end.scales:
        if end.rounds and end.kind == "Softmax" and rows.shape[1] > 1:
            # rounded values do not sum to 1; the kind is kept if the softmax explains the values
            kind, total = Kind.PROBABILITIES, 1.0
        tolerance = _ROUNDED_SAME if end.rounds else _SAME[dtype.name]
        if total == 1 and _explains(plain, images, end.source, rows, kind, tolerance):
            before = end.source
        else:
            kind, total = kind_of(rows, beyond, dtype)
    if before is None:
        _require_scores(name, rows, beyond, kind, end)
    constant = bool((rows == rows[0]).all())
    return Given(name, dtype, rows.shape[1], kind, before, chosen, total, constant)


def _choose(seen: dict[str, Values], images: int, asked: str | None, labels: int) -> tuple[str, str]:
    """Return the intended output and the reason for the choice."""
    if asked is not None:
        if asked not in seen:
            raise ImportRefused(f"there is no output {asked!r}; there are {', '.join(seen)}")
        return asked, "as told by --output"
    rows = {name: found for name, value in seen.items() if (found := rows_of(value, images)) is not None}
    if not rows:
        shapes = "; ".join(f"{name}: {_shape(value)}" for name, value in seen.items())
        raise ImportRefused(
            f"no output is a row of values for each image ({shapes or 'none has one shape for all images'}): "
            f"not an image classifier{_whole_numbers(seen)}"
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
    """Return values as float64 (n, count), or None if they have more than one axis longer than 1."""
    if value.dtype.name not in _FLOATS or value.ndim < 1 or len(value) != images:
        return None
    longer = [side for side in value.shape[1:] if side != 1]
    return value.reshape(images, -1).astype(np.float64) if len(longer) <= 1 else None  # (n, count)


def _shape(value: Values) -> str:
    return f"{value.dtype.name} {' x '.join(map(str, ('images', *value.shape[1:])))}"


def _whole_numbers(seen: dict[str, Values]) -> str:
    """Return a hint for graphs with 8-bit scores, else an empty string."""
    if any(value.dtype.name in ("uint8", "int8") for value in seen.values()):
        return "; scores in 8 bits are read behind a DequantizeLinear: export the graph with one at its end"
    return ""


# --- logits or probabilities ---------------------------------------------------------------------


def kind_of(rows: Doubles, beyond: Doubles, dtype: np.dtype[np.generic]) -> tuple[Kind, float]:
    """Return the kind of the values, and the sum per image for probabilities.

    `beyond` are the finite rows for images a thousand times as bright. Properties by construction hold for
    them too, properties by chance do not. The sum is not used with a single value per image.
    """
    tolerance = _SUM_TOLERANCE[dtype.name]
    if rows.shape[1] > 1:
        total = _constant_sum(rows, beyond, tolerance)
        if total is not None:
            return Kind.PROBABILITIES, total
        if rows.max() <= tolerance and _sums_to_one(np.exp(rows), np.exp(beyond), tolerance):
            return Kind.LOG_PROBABILITIES, 1.0
    if rows.min() >= 0 and rows.max() <= 1 and (not beyond.size or (beyond.min() >= 0 and beyond.max() <= 1)):
        return Kind.EACH, 1.0
    return Kind.LOGITS, 1.0


def _constant_sum(rows: Doubles, beyond: Doubles, tolerance: float) -> float | None:
    """Return the common sum of all non-negative rows, exactly 1 if near 1; None if there is none."""
    if _sums_to_one(rows, beyond, tolerance):
        return 1.0
    total = float(np.median(rows.sum(axis=1)))
    if total <= 0 or not _sums_to_one(rows / total, beyond / total, tolerance):
        return None
    # Rows that hardly differ have similar sums, whatever their kind.
    moved = float(np.abs(rows - rows.mean(axis=0)).sum(axis=1).max())
    if np.abs(rows.sum(axis=1) - total).max() > 0.1 * moved:
        return None
    return next((one for one in (100.0, 255.0, 256.0, 1000.0) if abs(total / one - 1) <= 1e-4), total)


def _sums_to_one(rows: Doubles, beyond: Doubles, tolerance: float) -> bool:
    return all(
        not one.size or (one.min() >= 0 and np.abs(one.sum(axis=1) - 1).max() <= tolerance)
        for one in (rows, beyond)
    )


def _finite(plain: Plain, name: str, extreme: Values) -> Doubles:
    """Return the rows of extreme images in which every value is finite."""
    with np.errstate(all="ignore"):
        rows = rows_of(plain(extreme)[name], len(extreme))
    if rows is None:
        return np.empty((0, 1))
    return rows[np.isfinite(rows).all(axis=1)]


def _require_scores(name: str, rows: Doubles, beyond: Doubles, kind: Kind, end: _End) -> None:
    """Raise `ImportRefused` for values that are neither logits nor probabilities."""
    what = None
    if end.kind in _DECISIONS:
        what = f"decisions (its {end.kind}), which do not say how probable a label is"
    elif kind is Kind.LOGITS:
        what = _odd(rows, beyond, end)
    elif kind is Kind.PROBABILITIES and rows.shape[1] > 2 and rows.max() <= 1:
        total = float(np.median(rows.sum(axis=1)))
        if abs(total / (rows.shape[1] - 1) - 1) < 1e-3:
            what = f"1 - p of {rows.shape[1]} labels (each row sums to {total:.3g}): the smallest is the best"
    if what:
        raise ImportRefused(
            f"the output {name!r} gives {what}; it takes logits or probabilities: export the model without "
            "its last steps"
        )


def _odd(rows: Doubles, beyond: Doubles, end: _End) -> str | None:
    """Return a description of values that look like logits but are not; None for logits."""
    span = f"{rows.min():.3g} to {rows.max():.3g}"
    count = rows.shape[1]
    if end.kind in _BOUNDED:
        return f"values of its {end.kind}{', moved, stretched or rounded' if end.changes else ''} ({span})"
    if rows.max() > 1 and (rows == np.round(rows)).all():
        return f"whole numbers ({span}): rounded, or no scores"
    highest = max(rows.max(), beyond.max(initial=0.0))
    if min(rows.min(), beyond.min(initial=0.0)) >= 0 and rows.max() > 1:
        for full in _FULL:
            if 0.999 * full <= highest <= full:
                return f"values from 0 to {full:g}, each by itself, as percentages are"
    if count > 1:
        for base, factor in (("", -1.0), *((f" to base {base}", factor) for base, factor in _BASES.items())):
            with np.errstate(over="ignore"):
                known = _sums_to_one(np.exp(rows * factor), np.exp(beyond * factor), 1e-3)
            if known:
                sign = "-" if factor < 0 else ""
                return f"{sign}log p{base} ({span}), and not the natural logarithm of p"
    return None


@dataclass(frozen=True)
class _End:
    """The last step of a graph that is more than shifting, scaling or rounding."""

    kind: str
    """Operator of the step; empty if there is none."""
    source: str
    """Input tensor of the step."""
    scales: bool
    rounds: bool

    @property
    def changes(self) -> bool:
        """Flag for values that are scaled or rounded after the step."""
        return self.scales or self.rounds


def _end_of(model: ModelProto, name: str) -> _End:
    makers: dict[str, NodeProto] = {output: node for node in model.graph.node for output in node.output}
    constants = constants_of(model)
    scales = rounds = False
    while name in makers:
        node = makers[name]
        changing = [one for one in node.input if one and one not in constants]
        if node.op_type in _SCALING and len(changing) == 1:
            scales, name = True, changing[0]
        elif node.op_type in _ROUNDING:
            rounds, name = True, node.input[0]
        elif node.op_type in _PASSING:
            name = node.input[0]
        else:
            return _End(node.op_type, node.input[0] if node.input else "", scales, rounds)
    return _End("", "", scales, rounds)


def _explains(plain: Plain, images: Values, before: str, rows: Doubles, kind: Kind, tolerance: float) -> bool:
    """Return whether softmax or sigmoid of the tensor before them gives the probabilities."""
    if kind not in (Kind.PROBABILITIES, Kind.EACH):
        return False
    found = plain.seeing(before)(images).get(before)
    before_rows = None if found is None else rows_of(found, len(images))
    if before_rows is None or before_rows.shape != rows.shape:
        return False
    again = softmax(before_rows) if kind is Kind.PROBABILITIES else sigmoid(before_rows)
    return bool(np.abs(again - rows).max() <= tolerance)


# --- the task ------------------------------------------------------------------------------------


def task_of(given: Given, asked: Task | None) -> tuple[Task, str]:
    """Return the task and its reason.

    Raises `ImportRefused` if the task must be given as an option.
    """
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


# --- reference computation -----------------------------------------------------------------------


def softmax(rows: Doubles) -> Doubles:
    """Return the softmax over the last axis."""
    powers = np.exp(rows - rows.max(axis=-1, keepdims=True))
    result: Doubles = powers / powers.sum(axis=-1, keepdims=True)
    return result


def sigmoid(rows: Doubles) -> Doubles:
    """Return the sigmoid of each value."""
    with np.errstate(over="ignore"):
        result: Doubles = 1 / (1 + np.exp(-rows))
    return result


def by_hand(rows: Doubles, kind: Kind, task: Task, total: float = 1.0) -> Doubles:
    """Return probabilities, float64 (n, labels), from the graph's values; for `binary` [1 - p, p]."""
    rows = rows / total
    if rows.shape[1] == 1:
        positive = rows if kind is Kind.EACH else sigmoid(rows)
        return np.hstack([1 - positive, positive])
    if kind in (Kind.PROBABILITIES, Kind.EACH):
        return rows
    return sigmoid(rows) if task is Task.MULTILABEL else softmax(rows)
