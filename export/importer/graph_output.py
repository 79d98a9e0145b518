"""The output of a foreign graph: logits or probabilities, distinguished by running the graph, not by names.

Other values (percentages of a sigmoid, 1 - p, -log p, the number of a label, …) are refused: their softmax
would be an answer that looks right and is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
from onnx import ModelProto

from fovea.export.importer.foreign_model import (
    Array,
    ImportRefused,
    MissingInformation,
    ReferenceModel,
)
from fovea.export.importer.last_step import LastStep, find_last_step
from fovea.export.importer.output_choice import (
    DECISION_OPERATORS,
    Float64Array,
    choose_output,
    describe_shape,
    sigmoid,
    softmax,
    to_rows,
)
from fovea.export.importer.repeatability import require_repeatable
from fovea.service.artifact.contract import Task

TASK_OPTION: Final = "from --task"
"""Origin of a task that is given."""


class ValueKind(StrEnum):
    """The kind of the values of one image."""

    LOGITS = "logits"
    LOG_PROBABILITIES = "logarithms of probabilities that sum to 1"
    PROBABILITIES = "probabilities that sum to 1"
    INDEPENDENT = "independent probabilities from 0 to 1"


@dataclass(frozen=True)
class GraphOutput:
    """The graph's output."""

    name: str
    dtype: np.dtype[np.generic]
    count: int
    """Number of values per image."""
    kind: ValueKind
    logits_tensor: str | None
    """Tensor before the softmax or sigmoid that gives the probabilities, if there is one."""
    choice_reason: str
    """Reason for the choice of this output."""
    total: float = 1.0
    """Sum of one image's values if they are scaled probabilities: 100 for percentages."""
    has_softmax: bool = False
    """Flag for logits whose softmax is another output of the graph."""
    sums: tuple[float, float] = (0.0, 0.0)
    """Smallest and largest sum of one image's values among the images that were tried."""

    @property
    def has_logits(self) -> bool:
        """True if the graph has logits, and not only probabilities or their logarithms."""
        return self.kind is ValueKind.LOGITS or self.logits_tensor is not None

    @property
    def description(self) -> str:
        """Description for the report."""
        kind = str(self.kind)
        if self.total != 1:
            kind = f"probabilities times {self.total:g} (each row sums to that), divided by it"
        return f"{self.count} {kind} (measured by running the graph)"


_REPEATED_IMAGE_COUNT: Final = 3
"""Number of images that the graph gets twice, to see whether its answers are the same."""

_SUM_TOLERANCE: Final = {"float16": 1e-2, "float32": 1e-3, "float64": 1e-3}
"""Tolerance for a sum of probabilities to count as 1.

A thousand roundings of float16, 2^-11 each, of values that sum to 1 differ by less than 0.001; quantised
values differ by more.
"""

_PROBABILITY_TOLERANCE: Final = {"float16": 5e-3, "float32": 1e-5, "float64": 1e-5}
"""Tolerance between the graph's probabilities and those computed from the tensor before them."""

_ROUNDED_TOLERANCE: Final = 1 / 128
"""Replacement of `_PROBABILITY_TOLERANCE` after a rounding: one step of int8 for 0 to 1, the coarsest in use.
"""

_BOUNDED_OPERATORS: Final = frozenset(
    {"Softmax", "Sigmoid", "HardSigmoid", "Tanh", "Softsign", "QLinearSoftmax", "QLinearSigmoid"}
)
"""Operators with bounded outputs, which are not logits even if shifted or scaled."""

_FULL_SCALES: Final = (100.0, 255.0)
"""Maximum values of shares of a whole: percentages and bytes."""

_LOG_BASES: Final = {"2": np.log(2), "10": np.log(10)}
"""Natural logarithms of the other common logarithm bases."""


def detect_graph_output(
    model: ModelProto,
    reference: ReferenceModel,
    images: Array,
    extreme: Array,
    output_name: str | None,
    label_count: int,
) -> GraphOutput:
    """Run the graph on `images`, and on `extreme` values to resolve doubts; return the output.

    `output_name` names the output; None selects the only plausible output. Raises `ImportRefused`.
    """
    outputs = reference(images)
    choice = choose_output(model, outputs, len(images), output_name, label_count)
    name = choice.name
    rows = to_rows(outputs[name], len(images))
    if rows is None:
        raise ImportRefused(
            f"the output {name!r} is {describe_shape(outputs[name])}: not a row of values for each image"
        )
    require_repeatable(model, reference, name, images[-_REPEATED_IMAGE_COUNT:])
    if not np.isfinite(rows).all():
        raise ImportRefused(f"the output {name!r} is not finite for every image; is the normalisation right?")
    if rows.min() == rows.max():
        raise ImportRefused(
            f"the output {name!r} is {rows.min():g} for every label and image, from black to white: its last "
            "step uses the wrong axis, or the graph ignores its input"
        )
    dtype = outputs[name].dtype
    last_step = find_last_step(model, name)
    extreme_rows = _run_extreme_images(reference, name, extreme)
    kind, total = detect_kind(rows, extreme_rows, dtype)
    logits_tensor = None
    if last_step.op_type in ("Softmax", "Sigmoid") and not last_step.is_scaled:
        if last_step.is_rounded and last_step.op_type == "Softmax" and rows.shape[1] > 1:
            # rounded values do not sum to 1; the kind is kept if the softmax explains the values
            kind, total = ValueKind.PROBABILITIES, 1.0
        tolerance = _ROUNDED_TOLERANCE if last_step.is_rounded else _PROBABILITY_TOLERANCE[dtype.name]
        if total == 1 and _is_explained_by(reference, images, last_step.source, rows, kind, tolerance):
            logits_tensor = last_step.source
        else:
            kind, total = detect_kind(rows, extreme_rows, dtype)
    if (rows == rows[0]).all() and not _varies(reference, images, logits_tensor):
        raise ImportRefused(
            f"the output {name!r} says the same for every image, from black to white: the graph ignores its "
            "input, its weights are missing or zero, or the normalisation is far from that of its training"
        )
    if logits_tensor is None:
        _require_scores(name, rows, extreme_rows, kind, last_step)
    sums = rows.sum(axis=1)
    return GraphOutput(
        name,
        dtype,
        rows.shape[1],
        kind,
        logits_tensor,
        choice.reason,
        total,
        choice.has_softmax,
        (float(sums.min()), float(sums.max())),
    )


# --- logits or probabilities ---------------------------------------------------------------------


def detect_kind(
    rows: Float64Array, extreme_rows: Float64Array, dtype: np.dtype[np.generic]
) -> tuple[ValueKind, float]:
    """Return the kind of the values, and the sum per image for probabilities.

    `extreme_rows` are the finite rows for images a thousand times as bright. Properties by construction hold
    for them too, properties by chance do not. The sum is not used with a single value per image.
    """
    tolerance = _SUM_TOLERANCE[dtype.name]
    if rows.shape[1] > 1:
        total = _find_constant_sum(rows, extreme_rows, tolerance)
        if total is not None:
            return ValueKind.PROBABILITIES, total
        if rows.max() <= tolerance and _sums_to_one(np.exp(rows), np.exp(extreme_rows), tolerance):
            return ValueKind.LOG_PROBABILITIES, 1.0
    if (
        rows.min() >= 0
        and rows.max() <= 1
        and (not extreme_rows.size or (extreme_rows.min() >= 0 and extreme_rows.max() <= 1))
    ):
        return ValueKind.INDEPENDENT, 1.0
    return ValueKind.LOGITS, 1.0


def _find_constant_sum(rows: Float64Array, extreme_rows: Float64Array, tolerance: float) -> float | None:
    """Return the common sum of all non-negative rows, exactly 1 if near 1; None if there is none."""
    if _sums_to_one(rows, extreme_rows, tolerance):
        return 1.0
    total = float(np.median(rows.sum(axis=1)))
    if total <= 0 or not _sums_to_one(rows / total, extreme_rows / total, tolerance):
        return None
    # Rows that hardly differ have similar sums, whatever their kind.
    variation = float(np.abs(rows - rows.mean(axis=0)).sum(axis=1).max())
    if np.abs(rows.sum(axis=1) - total).max() > 0.1 * variation:
        return None
    return next((one for one in (100.0, 255.0, 256.0, 1000.0) if abs(total / one - 1) <= 1e-4), total)


def _sums_to_one(rows: Float64Array, extreme_rows: Float64Array, tolerance: float) -> bool:
    return all(
        not one.size or (one.min() >= 0 and np.abs(one.sum(axis=1) - 1).max() <= tolerance)
        for one in (rows, extreme_rows)
    )


def _run_extreme_images(reference: ReferenceModel, name: str, extreme: Array) -> Float64Array:
    """Return the rows of extreme images in which every value is finite."""
    with np.errstate(all="ignore"):
        rows = to_rows(reference(extreme)[name], len(extreme))
    if rows is None:
        return np.empty((0, 1))
    return rows[np.isfinite(rows).all(axis=1)]


def _require_scores(
    name: str, rows: Float64Array, extreme_rows: Float64Array, kind: ValueKind, last_step: LastStep
) -> None:
    """Raise `ImportRefused` for values that are neither logits nor probabilities."""
    oddity = None
    if last_step.op_type in DECISION_OPERATORS:
        oddity = f"decisions (its {last_step.op_type}), which do not say how probable a label is"
    elif kind is ValueKind.LOGITS:
        oddity = _describe_oddity(rows, extreme_rows, last_step)
    elif kind is ValueKind.PROBABILITIES and rows.shape[1] > 2 and rows.max() <= 1:
        total = float(np.median(rows.sum(axis=1)))
        if abs(total / (rows.shape[1] - 1) - 1) < 1e-3:
            oddity = (
                f"1 - p of {rows.shape[1]} labels (each row sums to {total:.3g}): the smallest is the best"
            )
    if oddity:
        raise ImportRefused(
            f"the output {name!r} gives {oddity}; logits or probabilities are needed: export the model "
            "without its last steps"
        )


def _describe_oddity(rows: Float64Array, extreme_rows: Float64Array, last_step: LastStep) -> str | None:
    """Return a description of values that look like logits but are not; None for logits."""
    span = f"{rows.min():.3g} to {rows.max():.3g}"
    count = rows.shape[1]
    if last_step.op_type in _BOUNDED_OPERATORS:
        change = ", shifted, scaled or rounded" if last_step.is_changed else ""
        return f"values of its {last_step.op_type}{change} ({span})"
    if rows.max() > 1 and (rows == np.round(rows)).all():
        return f"whole numbers ({span}): rounded, or not scores"
    highest = max(rows.max(), extreme_rows.max(initial=0.0))
    if min(rows.min(), extreme_rows.min(initial=0.0)) >= 0 and rows.max() > 1:
        for full in _FULL_SCALES:
            if 0.999 * full <= highest <= full:
                return f"independent values from 0 to {full:g}, like percentages"
    if count > 1:
        for base, factor in (
            ("", -1.0),
            *((f" to base {base}", factor) for base, factor in _LOG_BASES.items()),
        ):
            with np.errstate(over="ignore"):
                is_log_probability = _sums_to_one(np.exp(rows * factor), np.exp(extreme_rows * factor), 1e-3)
            if is_log_probability:
                sign = "-" if factor < 0 else ""
                return f"{sign}log p{base} ({span}), not the natural logarithm of p"
    return None


def _varies(reference: ReferenceModel, images: Array, logits_tensor: str | None) -> bool:
    """Return whether the logits differ between images although their softmax is saturated."""
    if logits_tensor is None:
        return False
    values = reference.with_outputs(logits_tensor)(images)[logits_tensor]
    return bool((values != values[0]).any())


def _is_explained_by(
    reference: ReferenceModel,
    images: Array,
    logits_tensor: str,
    rows: Float64Array,
    kind: ValueKind,
    tolerance: float,
) -> bool:
    """Return whether softmax or sigmoid of the tensor before them gives the probabilities."""
    if kind not in (ValueKind.PROBABILITIES, ValueKind.INDEPENDENT):
        return False
    values = reference.with_outputs(logits_tensor)(images).get(logits_tensor)
    logits = None if values is None else to_rows(values, len(images))
    if logits is None or logits.shape != rows.shape:
        return False
    expected = softmax(logits) if kind is ValueKind.PROBABILITIES else sigmoid(logits)
    return bool(np.abs(expected - rows).max() <= tolerance)


# --- the task ------------------------------------------------------------------------------------


def choose_task(output: GraphOutput, requested_task: Task | None) -> tuple[Task, str]:
    """Return the task and its reason.

    Raises `ImportRefused` if the task must be given as an option.
    """
    if output.count == 1:
        return _require_task(requested_task, Task.BINARY, "one value for an image")
    if output.kind is ValueKind.INDEPENDENT:
        if requested_task is None:
            low, high = output.sums
            raise MissingInformation(
                f"the output {output.name!r} has {output.kind}, which sum to {low:.3g} … {high:.3g}: give "
                "--task multilabel if any number of labels may be true of an image, or --task multiclass if "
                "exactly one is true; its probabilities are then divided by their sum",
                "--task multilabel",
            )
        if requested_task is Task.BINARY and output.count != 2:
            raise ImportRefused(_describe_binary(output))
        is_multilabel = requested_task is Task.MULTILABEL
        note = "" if is_multilabel else "; each probability is divided by their sum"
        return requested_task, f"{TASK_OPTION}{note}"
    if requested_task is Task.MULTILABEL and output.kind is not ValueKind.LOGITS:
        raise ImportRefused(f"the output {output.name!r} has {output.kind}: that is not multilabel")
    if requested_task is Task.BINARY and output.count != 2:
        raise ImportRefused(_describe_binary(output))
    if requested_task is not None:
        return requested_task, TASK_OPTION
    if output.count == 2:
        return Task.BINARY, "assumed from two labels; --task overrides it"
    if output.has_softmax:
        return Task.MULTICLASS, "the graph has their softmax as another output"
    is_certain = output.kind is not ValueKind.LOGITS
    return Task.MULTICLASS, output.kind.value if is_certain else "assumed from logits; --task overrides it"


def _describe_binary(output: GraphOutput) -> str:
    return f"--task binary takes one value or two for an image; the graph gives {output.count}"


def _require_task(requested_task: Task | None, task: Task, reason: str) -> tuple[Task, str]:
    if requested_task not in (None, task):
        raise ImportRefused(f"--task {requested_task} does not fit {reason}, which is {task}")
    return task, reason


# --- reference computation -----------------------------------------------------------------------


def to_probabilities(rows: Float64Array, kind: ValueKind, task: Task, total: float = 1.0) -> Float64Array:
    """Return probabilities, float64 (n, labels), from the graph's values; for `binary` [1 - p, p]."""
    rows = rows / total
    if rows.shape[1] == 1:
        positive = rows if kind is ValueKind.INDEPENDENT else sigmoid(rows)
        return np.hstack([1 - positive, positive])
    if kind is ValueKind.INDEPENDENT and task is not Task.MULTILABEL:
        rows = np.maximum(rows, np.finfo(np.float32).tiny)  # no label at all is as likely as any other
        shares: Float64Array = rows / rows.sum(axis=1, keepdims=True)
        return shares
    if kind in (ValueKind.PROBABILITIES, ValueKind.INDEPENDENT):
        return rows
    return sigmoid(rows) if task is Task.MULTILABEL else softmax(rows)
