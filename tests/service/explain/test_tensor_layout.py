"""Tensor layouts of hand-written layer tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fovea.service.explain.tensor_layout import TensorLayout, find_layouts
from tests.graphs import LayerRow, contract_with_layers

PLANES: LayerRow = ("Transpose", "pixels", "planes", (3, 16, 16), {"perm": (0, 3, 1, 2)})
PATCHES: LayerRow = ("Conv", "planes kernel", "patches", (7, 4, 2), {})
ROWS: LayerRow = ("Reshape", "patches shape", "rows", (7, 8), {})
TOKENS: LayerRow = ("Transpose", "rows", "tokens", (8, 7), {"perm": (0, 2, 1)})
CLASS: LayerRow = ("Concat", "class tokens", "all", (9, 7), {"axis": 1})


def layouts_of_rows(*rows: LayerRow) -> dict[str, TensorLayout]:
    """Return the layouts of the tensors of a graph for images of 16 x 16 pixels."""
    return find_layouts(contract_with_layers(*rows))


def test_pixels_are_channels_last_and_convolutions_first() -> None:
    layouts = layouts_of_rows(PLANES, PATCHES)
    assert layouts["pixels"] == TensorLayout("HWC", 3, 16, 16)
    assert layouts["planes"] == TensorLayout("CHW", 3, 16, 16)
    assert layouts["patches"] == TensorLayout("CHW", 7, 4, 2)


def test_token_layout_survives_class_token_and_attention() -> None:
    layouts = layouts_of_rows(
        PLANES,
        PATCHES,
        ROWS,
        TOKENS,
        CLASS,
        ("MatMul", "all weight", "keys", (9, 12), {}),
        ("Reshape", "keys shape", "heads", (9, 3, 4), {}),
        ("Transpose", "heads", "first", (3, 9, 4), {"perm": (0, 2, 1, 3)}),
        ("MatMul", "scores first", "mixed", (3, 9, 4), {}),
        ("Transpose", "mixed", "back", (9, 3, 4), {"perm": (0, 2, 1, 3)}),
        ("Reshape", "back shape", "flat", (9, 12), {}),
    )
    assert layouts["rows"].axes == "CT"
    assert layouts["tokens"] == TensorLayout("TC", 7, 4, 2)
    assert layouts["all"] == TensorLayout("TC", 7, 4, 2, leading_tokens=1)
    assert layouts["keys"] == layouts["flat"] == TensorLayout("TC", 12, 4, 2, leading_tokens=1)
    assert not {"heads", "first", "mixed", "back"} & layouts.keys()


@pytest.mark.parametrize(
    ("row", "leading_tokens"),
    [
        (("Concat", "class registers tokens", "all", (13, 7), {"axis": 1}), 5),
        (("Concat", "class tokens", "all", (None, 7), {"axis": 1}), None),
        (("Concat", "tokens class", "all", (9, 7), {"axis": 1}), None),
        (("Concat", "tokens tokens", "all", (16, 7), {"axis": 1}), None),
        (("Reshape", "tokens shape", "all", (9, 7), {}), None),
    ],
)
def test_leading_tokens_are_counted(row: LayerRow, leading_tokens: int | None) -> None:
    """If the number of leading tokens is uncertain, there are no maps."""
    layouts = layouts_of_rows(PLANES, PATCHES, ROWS, TOKENS, row)
    assert (layouts["all"].leading_tokens if "all" in layouts else None) == leading_tokens


def test_missing_size_is_taken_from_the_next_layer() -> None:
    concat: LayerRow = ("Concat", "class tokens", "all", (None, 7), {"axis": 1})
    layouts = layouts_of_rows(PLANES, PATCHES, ROWS, TOKENS, concat, ("Add", "all places", "sum", (9, 7), {}))
    assert layouts["sum"] == TensorLayout("TC", 7, 4, 2, leading_tokens=1)


def test_slice_can_remove_leading_tokens() -> None:
    token_slice: LayerRow = ("Slice", "all from to", "cut", (8, 7), {})
    assert layouts_of_rows(PLANES, PATCHES, ROWS, TOKENS, CLASS, token_slice)["cut"] == TensorLayout(
        "TC", 7, 4, 2
    )


def test_rows_of_pixels_keep_their_places() -> None:
    """An import computes the normalisation over rows, (n * H, W * C)."""
    layouts = layouts_of_rows(
        ("Reshape", "pixels shape", "rows", (48,), {}),
        ("Sub", "rows mean", "centred", (48,), {}),
        ("Reshape", "centred shape", "image", (16, 16, 3), {}),
        ("Reshape", "centred shape", "other", (16, 3, 16), {}),
    )
    assert layouts["image"] == layouts["pixels"]
    assert not {"rows", "centred", "other"} & layouts.keys()


def test_image_windows_have_no_layout() -> None:
    """A Swin transformer puts its windows beside each other in the batch."""
    layouts = layouts_of_rows(
        PLANES,
        PATCHES,
        ("Transpose", "patches", "last", (4, 2, 7), {"perm": (0, 2, 3, 1)}),
        ("Reshape", "last shape", "split", (2, 2, 1, 2, 7), {}),
        ("Transpose", "split", "apart", (2, 1, 2, 2, 7), {"perm": (0, 1, 3, 2, 4, 5)}),
        ("Reshape", "apart shape", "windows", (4, 7), {}),
        ("Reshape", "windows shape", "whole", (4, 2, 7), {}),
        ("Add", "whole last", "sum", (4, 2, 7), {}),
    )
    assert not {"split", "apart", "windows", "whole"} & layouts.keys()
    assert layouts["last"] == layouts["sum"] == TensorLayout("HWC", 7, 4, 2)


def test_only_known_reshapes_change_axes() -> None:
    """This holds for any sizes. If both orders fit, the channels stay first or last."""
    square: LayerRow = ("Conv", "planes kernel", "square", (8, 4, 2), {})
    layouts = layouts_of_rows(
        PLANES,
        square,
        ("Einsum", "square weight", "einsum", (4, 2, 8), {}),
        ("Reshape", "square shape", "rows", (8, 8), {}),
        ("Reshape", "square shape", "heads", (2, 4, 8), {}),
        ("Transpose", "heads", "turned", (2, 8, 4), {"perm": (0, 1, 3, 2)}),
    )
    assert layouts["rows"].axes == "CT"
    assert not {"einsum", "heads", "turned"} & layouts.keys()


def test_tokens_in_window_order_have_no_layout() -> None:
    """There are as many tokens as places, but ordered window by window."""
    layouts = layouts_of_rows(
        PLANES,
        PATCHES,
        ("Reshape", "patches shape", "split", (7, 2, 2, 2, 1), {}),
        ("Transpose", "split", "apart", (2, 2, 2, 1, 7), {"perm": (0, 2, 4, 3, 5, 1)}),
        ("Reshape", "apart shape", "windows", (8, 7), {}),
    )
    assert not {"split", "apart", "windows"} & layouts.keys()


def test_reshaped_patches_are_tokens() -> None:
    layouts = layouts_of_rows(
        PLANES,
        ("Reshape", "planes shape", "split", (3, 4, 4, 2, 8), {}),
        ("Transpose", "split", "apart", (4, 2, 4, 8, 3), {"perm": (0, 2, 4, 3, 5, 1)}),
        ("Reshape", "apart shape", "patches", (8, 96), {}),
        ("Reshape", "apart shape", "pixels of patches", (8, 32, 3), {}),
        ("MatMul", "patches weight", "product", (8, 7), {}),
    )
    assert layouts["patches"] == TensorLayout("TC", 96, 4, 2)
    assert layouts["product"] == TensorLayout("TC", 7, 4, 2)
    assert not {"split", "apart", "pixels of patches"} & layouts.keys()


@pytest.mark.parametrize(
    ("split_shape", "token_shape"),
    [((4, 4, 4, 4, 3), (16, 3)), ((32, 8, 3), (256, 3)), ((4, 4, 4, 4, 3), (4, 4, 48))],
)
def test_splits_other_than_patches_have_no_layout(
    split_shape: tuple[int, ...], token_shape: tuple[int, ...]
) -> None:
    """The cases are windows beside each other in the batch, rows longer than the image's, and more axes."""
    split: LayerRow = ("Reshape", "planes shape", "split", split_shape, {})
    assert layouts_of_rows(PLANES, split, ("Reshape", "split shape", "tokens", token_shape, {})).keys() == {
        "pixels",
        "planes",
    }


def test_channel_groups_keep_the_layout() -> None:
    layouts = layouts_of_rows(
        PLANES,
        PATCHES,
        ("Reshape", "patches shape", "groups", (1, 7, 4, 2), {}),
        ("Transpose", "groups", "turned", (7, 1, 4, 2), {"perm": (0, 2, 1, 3, 4)}),
        ("Reshape", "turned shape", "whole", (7, 4, 2), {}),
    )
    assert layouts["whole"] == layouts["patches"]


def test_gate_does_not_shrink_maps() -> None:
    layouts = layouts_of_rows(
        PLANES,
        PATCHES,
        ("GlobalAveragePool", "patches", "mean", (7, 1, 1), {}),
        ("Sigmoid", "mean", "gate", (7, 1, 1), {}),
        ("Mul", "gate patches", "gated", (7, 4, 2), {}),
    )
    assert layouts["gate"] == TensorLayout("CHW", 7, 1, 1)
    assert layouts["gated"] == TensorLayout("CHW", 7, 4, 2)


@pytest.mark.parametrize(
    ("axes", "leading_tokens", "shape"),
    [("CHW", 0, (5, 3, 2)), ("HWC", 0, (3, 2, 5)), ("TC", 0, (6, 5)), ("TC", 4, (10, 5)), ("CT", 1, (5, 7))],
)
def test_to_maps_puts_each_value_at_its_place(axes: str, leading_tokens: int, shape: Sequence[int]) -> None:
    values = np.random.default_rng(0).normal(size=(2, *shape))
    maps = TensorLayout(axes, 5, 3, 2, leading_tokens).to_maps(values)
    assert maps.shape == (2, 5, 3, 2)
    for image, channel, row, column in np.ndindex(maps.shape):
        indices = {"C": channel, "H": row, "W": column, "T": leading_tokens + 2 * row + column}
        assert maps[image, channel, row, column] == values[(image, *(indices[axis] for axis in axes))]
