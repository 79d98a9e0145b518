"""The choice of the output that holds a value for each label, from relations measured between the outputs.

Exports often have more than one output of that size: logits and their softmax, the heads of a distilled
network and their average, a label with its probabilities. A relation that holds for every image that was
tried says which output to take, so that no question is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper

from fovea.export.importer.dynamic_batch import find_constants
from fovea.export.importer.foreign_model import Array, ImportRefused, MissingInformation

Float64Array = npt.NDArray[np.float64]

_FLOAT_TYPES: Final = frozenset({"float16", "float32", "float64"})

_RELATION_TOLERANCE: Final = {"float16": 5e-3, "float32": 1e-4, "float64": 1e-4}
"""Tolerance of a relation between outputs, relative to the largest value and at least absolute."""

DECISION_OPERATORS: Final = frozenset({"ArgMax", "ArgMin", "Hardmax", "TopK", "OneHot"})
"""Operators that choose labels and drop the probabilities of the others."""

_LOOKUP_OPERATORS: Final = frozenset(
    {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Add", "Sub", "Mul"}
    | {"Gather", "GatherElements", "GatherND", "Slice", "ArrayFeatureExtractor", "LabelEncoder"}
    | {"CategoryMapper", "Softmax", "Sigmoid"}
)
"""Operators after a decision that only look up its label, change its form, or rescale the chosen values."""


@dataclass(frozen=True)
class OutputChoice:
    """The chosen output."""

    name: str
    reason: str
    has_softmax: bool = False
    """Flag for logits whose softmax is another output of the graph."""


@dataclass(frozen=True)
class Decision:
    """A node that chooses labels."""

    op_type: str
    source: str
    """Tensor of the values from which the node chooses."""


def choose_output(
    model: ModelProto,
    outputs: Mapping[str, Array],
    image_count: int,
    output_name: str | None,
    label_count: int,
) -> OutputChoice:
    """Return the output for the labels; `output_name` names it, None lets the graph decide.

    `outputs` are the values for `image_count` different images. Raises `ImportRefused`.
    """
    decisions = {
        name: decision
        for name, value in outputs.items()
        if (decision := find_decision(model, name)) and not _has_maximum_of_places(decision, value)
    }
    if output_name is not None:
        if output_name not in outputs:
            raise ImportRefused(f"there is no output {output_name!r}; there are {', '.join(outputs)}")
        if output_name in decisions:
            raise ImportRefused(_describe_decisions({output_name: decisions[output_name]}))
        return OutputChoice(output_name, "from --output")
    rows = {
        name: matrix
        for name, value in outputs.items()
        if name not in decisions and (matrix := to_rows(value, image_count)) is not None
    }
    if not rows and decisions:
        raise ImportRefused(_describe_decisions(decisions))
    if not rows:
        shapes = "; ".join(f"{name}: {describe_shape(value)}" for name, value in outputs.items())
        raise ImportRefused(
            f"no output is a row of values for each image ({shapes or 'none has one shape for all images'}): "
            f"not an image classifier{_integer_hint(outputs)}"
        )
    if len(rows) == 1:
        is_alone = len(outputs) == 1
        return OutputChoice(
            next(iter(rows)),
            "the only one" if is_alone else f"the only one of {len(outputs)} with values for each label",
        )
    return _choose_by_relation(rows, outputs, label_count)


def _choose_by_relation(
    rows: Mapping[str, Float64Array], outputs: Mapping[str, Array], label_count: int
) -> OutputChoice:
    counts = {label_count, 1} if label_count == 2 else {label_count}
    candidates = {name: matrix for name, matrix in rows.items() if matrix.shape[1] in counts}
    if len(candidates) == 1:
        return OutputChoice(next(iter(candidates)), f"the only one of {len(outputs)} that fits the labels")
    tolerance = max((_RELATION_TOLERANCE[outputs[name].dtype.name] for name in candidates), default=0.0)
    dropped: dict[str, str] = {}
    softmax_sources: set[str] = set()
    for source, other in _ordered_pairs(candidates):
        if source in dropped or other in dropped:
            continue
        relation = _find_relation(candidates[source], candidates[other], tolerance)
        if relation == "sigmoid":  # says that the labels are independent, which its logits do not
            dropped[source] = f"{other!r} is its sigmoid"
        elif relation:
            dropped[other] = f"{relation} of {source!r}"
            if "softmax" in relation:
                softmax_sources.add(source)
    rest = {name: matrix for name, matrix in candidates.items() if name not in dropped}
    if len(rest) == 1:
        (name,) = rest
        notes = [f"{other!r} is the {text}" for other, text in dropped.items() if "sigmoid" not in text]
        notes += [f"the sigmoid of {other!r}" for other, text in dropped.items() if "sigmoid" in text]
        return OutputChoice(name, f"by measurement: {'; '.join(notes)}", name in softmax_sources)
    for name, heads in _find_averages(rest, tolerance):
        return OutputChoice(name, f"the average of {' and '.join(map(repr, heads))}", name in softmax_sources)
    shapes = ", ".join(f"{name} ({matrix.shape[1]} values)" for name, matrix in rows.items())
    raise MissingInformation(
        f"the graph has several outputs, {shapes}: select the one for the labels with --output",
        f"--output {next(iter(candidates or rows))}",
    )


def _ordered_pairs(candidates: Mapping[str, Float64Array]) -> Iterator[tuple[str, str]]:
    """Yield all pairs in both directions, those of equal values first."""
    pairs = list(combinations(candidates, 2))
    equal = [pair for pair in pairs if np.array_equal(candidates[pair[0]], candidates[pair[1]])]
    yield from equal
    for one, other in pairs:
        yield one, other
        yield other, one


def _find_relation(source: Float64Array, other: Float64Array, tolerance: float) -> str | None:
    """Return "copy", "softmax", "log-softmax" or "sigmoid" if `other` is that of `source`, else None."""
    if source.shape != other.shape:
        return None
    if np.abs(source - other).max() <= 1e-6 * max(1.0, float(np.abs(source).max())):
        return "copy"
    # Values that hardly differ between images agree with too much.
    if not np.isfinite(source).all() or np.ptp(other, axis=0).max() <= 2 * tolerance:
        return None
    if source.shape[1] > 1:
        probabilities = softmax(source)
        if np.abs(probabilities - other).max() <= tolerance:
            return "softmax"
        with np.errstate(divide="ignore"):
            logarithms = np.log(probabilities)
        scale = max(1.0, float(np.abs(other).max()))
        if np.isfinite(logarithms).all() and np.abs(logarithms - other).max() <= tolerance * scale:
            return "log-softmax"
    return "sigmoid" if np.abs(sigmoid(source) - other).max() <= tolerance else None


def _find_averages(
    rows: Mapping[str, Float64Array], tolerance: float
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each output that is the average of other outputs, with their names.

    The students of DeiT and LeViT have two heads, one trained by labels and one by a teacher. transformers
    exports `logits`, their average, with `cls_logits` and `distillation_logits`.
    """
    for name, matrix in rows.items():
        others = [one for one in rows if one != name and rows[one].shape == matrix.shape]
        groups = [*combinations(others, 2), *([tuple(others)] if len(others) > 2 else [])]
        for heads in groups:
            average = np.mean([rows[one] for one in heads], axis=0)
            scale = max(float(np.abs(rows[one]).max()) for one in heads)
            spread = max(float(np.abs(rows[one] - matrix).max()) for one in heads)
            limit = tolerance * max(scale, 1e-6)
            if np.abs(average - matrix).max() <= limit < spread:
                yield name, tuple(heads)


def to_rows(value: Array, image_count: int) -> Float64Array | None:
    """Return values as float64 (n, count), or None if they have more than one axis longer than 1."""
    if value.dtype.name not in _FLOAT_TYPES or value.ndim < 1 or len(value) != image_count:
        return None
    long_axes = [side for side in value.shape[1:] if side != 1]
    return value.reshape(image_count, -1).astype(np.float64) if len(long_axes) <= 1 else None  # (n, count)


def describe_shape(value: Array) -> str:
    """Return type and shape of an output for a message."""
    return f"{value.dtype.name} {' x '.join(map(str, ('images', *value.shape[1:])))}"


def _integer_hint(outputs: Mapping[str, Array]) -> str:
    """Return a hint for graphs with 8-bit scores, else an empty string."""
    if any(value.dtype.name in ("uint8", "int8") for value in outputs.values()):
        return "; 8-bit scores need a DequantizeLinear: export the graph with one at its end"
    return ""


# --- decisions -----------------------------------------------------------------------------------


def find_decision(model: ModelProto, name: str) -> Decision | None:
    """Return the node that decides what the tensor `name` says; None if it has a value for every label."""
    producers: dict[str, NodeProto] = {output: node for node in model.graph.node for output in node.output}
    constants = find_constants(model)
    while name in producers:
        node = producers[name]
        if node.op_type in DECISION_OPERATORS or _is_maximum_of_labels(model, node):
            sources = [one for one in node.input if one not in constants]
            source = sources[0] if sources else ""
            # OneHot and the like take the label that an earlier node has chosen.
            return (find_decision(model, source) if node.op_type == "OneHot" else None) or Decision(
                node.op_type, source
            )
        variable_inputs = [one for one in node.input if one and one not in constants]
        if node.op_type not in _LOOKUP_OPERATORS or len(variable_inputs) != 1:
            return None
        (name,) = variable_inputs
    return None


def _is_maximum_of_labels(model: ModelProto, node: NodeProto) -> bool:
    """Return whether a node keeps the best value of one axis, such as `torch.max(logits, dim=1)`."""
    if node.op_type not in ("ReduceMax", "ReduceMin"):
        return False
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    axes = attributes.get("axes")
    if axes is None and len(node.input) > 1:
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        tensor = constants.get(node.input[1])
        axes = None if tensor is None else numpy_helper.to_array(tensor).ravel().tolist()
    return axes is not None and list(axes) in ([1], [-1])


def _has_maximum_of_places(decision: Decision, value: Array) -> bool:
    """Return whether a maximum is one of places, which leaves several values for an image."""
    return decision.op_type.startswith("Reduce") and value.size > len(value)


def _describe_decisions(decisions: Mapping[str, Decision]) -> str:
    name, decision = next(
        ((name, one) for name, one in decisions.items() if one.op_type != "ReduceMax"),
        next(iter(decisions.items())),
    )
    others = "" if len(decisions) == 1 else ", as its other outputs do"
    advice = (
        f"give --output {decision.source} to import the values from which it chooses, or export the model "
        f"with {decision.source!r} as its output"
        if decision.source
        else "export the model with its logits or probabilities as the output"
    )
    return (
        f"the output {name!r} gives decisions (its {decision.op_type}){others}, which do not say how "
        f"probable each label is: {advice}"
    )


# --- reference computation -----------------------------------------------------------------------


def softmax(rows: Float64Array) -> Float64Array:
    """Return the softmax over the last axis."""
    powers = np.exp(rows - rows.max(axis=-1, keepdims=True))
    result: Float64Array = powers / powers.sum(axis=-1, keepdims=True)
    return result


def sigmoid(rows: Float64Array) -> Float64Array:
    """Return the sigmoid of each value."""
    with np.errstate(over="ignore"):
        result: Float64Array = 1 / (1 + np.exp(-rows))
    return result
