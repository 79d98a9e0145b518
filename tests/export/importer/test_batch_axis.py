"""The batch axis in graphs that are run with one image."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import NodeProto, helper

from fovea.export.importer.batch_axis import BatchPosition, Shape, find_batch_positions, reshape_position


@pytest.mark.parametrize(
    ("place", "shape", "result", "wanted"),
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
        (BatchPosition(1), (6, 1, 5), (3, 10), None),  # no axis begins where the images are
    ],
)
def test_as_much_lies_outside_the_images_after_a_reshape(
    place: BatchPosition, shape: Shape, result: Shape, wanted: BatchPosition | None
) -> None:
    assert reshape_position(place, shape, result) == wanted


@pytest.mark.parametrize(
    ("node", "shape", "result", "wanted"),
    [
        (helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0, 2]), (1, 5, 7), (5, 1, 7), BatchPosition(1)),
        (helper.make_node("Transpose", ["x"], ["y"]), (1, 5, 7), (7, 5, 1), BatchPosition(2)),
        (helper.make_node("Unsqueeze", ["x", "0"], ["y"]), (1, 5), (1, 1, 5), BatchPosition(1)),
        (helper.make_node("Unsqueeze", ["x"], ["y"], axes=[-1]), (1, 5), (1, 5, 1), BatchPosition(0)),
        (helper.make_node("Squeeze", ["x", "2"], ["y"]), (1, 5, 1), (1, 5), BatchPosition(0)),
        (helper.make_node("Squeeze", ["x", "0"], ["y"]), (1, 5, 1), (5, 1), None),  # of one image alone
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
def test_the_images_are_followed_from_operator_to_operator(
    node: NodeProto, shape: Shape, result: Shape, wanted: BatchPosition | None
) -> None:
    constants = {str(number): np.array([number]) for number in range(3)}
    found = find_batch_positions([node], "x", {"x": shape, "y": result}, constants)
    assert found.get("y") == wanted
