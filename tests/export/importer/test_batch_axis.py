"""The batch axis in graphs that are run with one image."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import NodeProto, helper

from fovea.export.importer.batch_axis import BatchPosition, Shape, find_batch_positions, reshape_position


@pytest.mark.parametrize(
    ("position", "shape", "result", "expected"),
    [
        (BatchPosition(0), (1, 48, 4, 4), (1, 48, 16), BatchPosition(0)),
        (BatchPosition(0), (1, 48, 1, 1), (48,), BatchPosition(0)),
        (BatchPosition(0), (1, 17, 48), (1, 17, 3, 3, 16), BatchPosition(0)),
        (BatchPosition(0), (1, 17, 48), (17, 48), BatchPosition(0)),
        (BatchPosition(1), (17, 1, 48), (17, 3, 16), BatchPosition(1)),  # images * heads
        (BatchPosition(1), (17, 1, 48), (17, 48), BatchPosition(0, inner=True)),  # tokens * images
        (BatchPosition(1), (17, 1, 3, 16), (17, 48), BatchPosition(0, inner=True)),
        (BatchPosition(0, inner=True), (17, 48), (17, 1, 48), BatchPosition(1)),
        (BatchPosition(0), (3, 17, 16), (1, 3, 17, 16), BatchPosition(0)),
        (BatchPosition(1), (17, 1), (17,), BatchPosition(0, inner=True)),
        (BatchPosition(1), (6, 1, 5), (3, 10), None),  # no axis begins at the images
    ],
)
def test_reshape_moves_the_batch_position(
    position: BatchPosition, shape: Shape, result: Shape, expected: BatchPosition | None
) -> None:
    assert reshape_position(position, shape, result) == expected


@pytest.mark.parametrize(
    ("node", "shape", "result", "expected"),
    [
        (helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0, 2]), (1, 5, 7), (5, 1, 7), BatchPosition(1)),
        (helper.make_node("Transpose", ["x"], ["y"]), (1, 5, 7), (7, 5, 1), BatchPosition(2)),
        (helper.make_node("Unsqueeze", ["x", "0"], ["y"]), (1, 5), (1, 1, 5), BatchPosition(1)),
        (helper.make_node("Unsqueeze", ["x"], ["y"], axes=[-1]), (1, 5), (1, 5, 1), BatchPosition(0)),
        (helper.make_node("Squeeze", ["x", "2"], ["y"]), (1, 5, 1), (1, 5), BatchPosition(0)),
        (helper.make_node("Squeeze", ["x", "0"], ["y"]), (1, 5, 1), (5, 1), None),  # only for one image
        (helper.make_node("Gather", ["x", "0"], ["y"], axis=1), (1, 5, 7), (1, 7), BatchPosition(0)),
        (
            helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0),
            (1, 5, 2, 2),
            (1, 5),
            BatchPosition(0),
        ),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (1, 5, 7), (1, 5, 3), BatchPosition(0)),
        (helper.make_node("Shape", ["x"], ["y"]), (1, 5, 7), (3,), None),
    ],
)
def test_operators_move_the_batch_position(
    node: NodeProto, shape: Shape, result: Shape, expected: BatchPosition | None
) -> None:
    constants = {str(number): np.array([number]) for number in range(3)}
    positions = find_batch_positions([node], "x", {"x": shape, "y": result}, constants)
    assert positions.get("y") == expected
