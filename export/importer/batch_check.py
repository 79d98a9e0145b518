"""The check that a graph answers images in a batch as the file answers single images."""

from __future__ import annotations

from typing import Final

import numpy as np
from onnx import ModelProto

from fovea.export.importer.foreign_model import Arithmetic, Array, ImportRefused, ReferenceModel
from fovea.export.importer.graph_output import GraphOutput
from fovea.export.importer.output_choice import to_rows

BATCHES: Final = (1, 2, 3)
"""Batch sizes at which an import is compared with the original file."""

_NEIGHBOUR_TOLERANCE: Final = 1e-5
"""Maximum difference of an answer with other neighbours in a batch of the same size.

The difference is relative to the largest value. The sums are the same in any arithmetic.
"""


def is_equivalent(
    reference: ReferenceModel,
    images: Array,
    graph_output: GraphOutput,
    arithmetic: Arithmetic,
    model: ModelProto,
) -> bool:
    """Return whether the model gives in batches the results of the file for single images."""
    expected_rows = to_rows(reference(images)[graph_output.name], len(images))
    if expected_rows is None:
        return False
    indices = _pick_different_rows(expected_rows, max(BATCHES) + 1)
    if not _are_different(expected_rows[indices], arithmetic):
        return False  # a row in the wrong place would not be noticed
    try:
        candidate = ReferenceModel(model, threads=1, weights=reference.weights)
        batches = [indices[:batch] for batch in BATCHES]
        for batch in (*batches, *(one[::-1] for one in batches)):
            output = candidate.run_batch(images[batch])[graph_output.name]
            if output.size != len(batch) * graph_output.count:
                return False
            if not _are_close(
                output.reshape(len(batch), graph_output.count), expected_rows[batch], arithmetic
            ):
                return False
        return all(
            _is_independent(candidate, graph_output, images, index, indices, expected_rows)
            for index in indices
        )
    except ImportRefused:
        return False


def _is_independent(
    candidate: ReferenceModel,
    graph_output: GraphOutput,
    images: Array,
    index: int,
    indices: list[int],
    expected_rows: Array,
) -> bool:
    """Return whether one image's answer is independent of the other image in a batch of two.

    The answer depends on the other image if values are rounded to a scale that the batch shares, as by
    DynamicQuantizeLinear.
    """
    batches = [[index, other] for other in indices if other != index]
    outputs = [candidate.run_batch(images[batch])[graph_output.name] for batch in batches]
    # (pairs, count)
    rows = np.stack([output.reshape(2, graph_output.count)[0].astype(np.float64) for output in outputs])
    return bool(
        np.ptp(rows, axis=0).max() <= _NEIGHBOUR_TOLERANCE * max(1.0, float(np.abs(expected_rows).max()))
    )


def _pick_different_rows(rows: Array, count: int) -> list[int]:
    """Return the positions of rows that are as far apart as possible."""
    indices = [int(np.abs(rows - rows.mean(axis=0)).max(axis=1).argmax())]
    while len(indices) < count:
        distances = np.min([np.abs(rows - rows[index]).max(axis=1) for index in indices], axis=0)
        indices.append(int(distances.argmax()))
    return indices


def _are_different(rows: Array, arithmetic: Arithmetic) -> bool:
    """Return whether all rows are distinguishable."""
    return not any(
        _are_close(rows[one], rows[other], arithmetic) for one in range(len(rows)) for other in range(one)
    )


def _are_close(actual: Array, expected: Array, arithmetic: Arithmetic) -> bool:
    """Return whether the values agree up to rounding, relative to the largest value.

    A wrong row differs by about as much as the largest value.
    """
    tolerance = 1e-5 if arithmetic is Arithmetic.FLOAT32 else 1e-2
    return bool(np.abs(actual - expected).max() <= tolerance * max(1.0, float(np.abs(expected).max())))
