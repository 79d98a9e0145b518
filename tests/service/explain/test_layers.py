"""Layer views of hand-written layer tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fovea.service.explain.layer_view import LayerView
from fovea.service.explain.layers import describe_layers
from fovea.service.explain.receptive_field import Span
from tests.graphs import LayerRow, contract_with_layers

PLANES: LayerRow = ("Transpose", "pixels", "planes", (3, 16, 16), {"perm": (0, 3, 1, 2)})
MAPS: LayerRow = ("Conv", "planes kernel", "maps", (8, 4, 2), {"kernel_shape": (3, 3)})


def describe_rows(*rows: LayerRow) -> dict[str, LayerView]:
    """Return the layer views by output tensor."""
    return {layer.tensor: layer for layer in describe_layers(contract_with_layers(*rows), {}, {})}


def test_channels_that_are_shuffled_are_not_read_as_they_are_shown() -> None:
    found = describe_rows(
        PLANES,
        MAPS,
        ("Reshape", "maps shape", "split", (2, 4, 4, 2), {}),
        ("Transpose", "split", "turned", (4, 2, 4, 2), {"perm": (0, 2, 1, 3, 4)}),
        ("Reshape", "turned shape", "shuffled", (8, 4, 2), {}),
        ("Relu", "shuffled", "relu", (8, 4, 2), {}),
        ("Sigmoid", "shuffled", "/act/sigmoid", (8, 4, 2), {}),
        ("Mul", "maps /act/sigmoid", "/act/silu", (8, 4, 2), {}),
        ("Relu", "maps", "straight", (8, 4, 2), {}),
    )
    assert found["/act/silu"].kind == "Silu"
    assert not found["/act/silu"].is_direct
    assert found["relu"].sources == found["straight"].sources == ("maps",)
    assert found["straight"].is_direct
    assert not found["relu"].is_direct
    assert found["relu"].receptive_field is None


def test_scores_that_are_turned_are_not_read_as_they_are_shown() -> None:
    found = describe_rows(
        PLANES,
        MAPS,
        ("Reshape", "maps shape", "heads", (2, 8, 4), {}),
        ("MatMul", "heads turned", "scores", (2, 4, 4), {}),
        ("Transpose", "scores", "other", (2, 4, 4), {"perm": (0, 1, 3, 2)}),
        ("Softmax", "other", "softmax", (2, 4, 4), {}),
        ("Softmax", "scores", "straight", (2, 4, 4), {}),
    )
    assert found["straight"].is_direct
    assert not found["softmax"].is_direct


def test_only_maps_with_their_channels_first_are_flattened_map_by_map() -> None:
    found = describe_rows(
        PLANES,
        MAPS,
        ("Transpose", "maps", "last", (4, 2, 8), {"perm": (0, 2, 3, 1)}),
        ("Flatten", "maps", "one", (64,), {}),
        ("Flatten", "last", "other", (64,), {}),
    )
    assert found["one"].kind == found["other"].kind == "Flatten"
    assert found["one"].is_direct
    assert not found["other"].is_direct


def test_an_average_over_one_axis_is_no_norm_of_channels() -> None:
    """The average is written as several operators in one module."""

    def norm(mean: tuple[int, ...]) -> list[str]:
        rows: list[LayerRow] = [
            ("ReduceMean", "maps", "/norm/mean", mean, {}),
            ("Sub", "maps /norm/mean", "/norm/apart", (8, 4, 2), {}),
            ("Pow", "/norm/apart two", "/norm/square", (8, 4, 2), {}),
            ("ReduceMean", "/norm/square", "/norm/variance", mean, {}),
            ("Sqrt", "/norm/variance", "/norm/spread", mean, {}),
            ("Div", "/norm/apart /norm/spread", "/norm/made", (8, 4, 2), {}),
        ]
        return [layer.kind for layer in describe_rows(PLANES, MAPS, *rows).values()]

    assert norm((1, 4, 2)) == ["Input", "Conv", "LayerNormalization"]
    assert len(norm((8, 1, 1))) == len(norm((2, 4, 2))) == 2 + 6


def test_a_gate_with_a_factor_is_no_silu() -> None:
    """CLIP uses x · sigmoid(1.702 x)."""
    sigmoid: LayerRow = ("Sigmoid", "maps", "/act/sigmoid", (8, 4, 2), {})
    scaled: LayerRow = ("Mul", "maps factor", "/act/scaled", (8, 4, 2), {})
    scaled_sigmoid: LayerRow = ("Sigmoid", "/act/scaled", "/act/sigmoid", (8, 4, 2), {})
    gated: LayerRow = ("Mul", "maps /act/sigmoid", "/act/gated", (8, 4, 2), {})
    assert describe_rows(PLANES, MAPS, sigmoid, gated)["/act/gated"].kind == "Silu"
    assert describe_rows(PLANES, MAPS, scaled, scaled_sigmoid, gated)["/act/gated"].kind == "Mul"
    shared: LayerRow = ("Relu", "/act/sigmoid", "shared", (8, 4, 2), {})
    found = describe_rows(PLANES, MAPS, sigmoid, gated, shared)
    assert found.keys() >= set(found["shared"].sources) == {"/act/sigmoid"}


def test_padding_moves_what_is_seen_wherever_the_channels_are() -> None:
    found = describe_rows(
        PLANES,
        MAPS,
        ("Transpose", "maps", "last", (4, 2, 8), {"perm": (0, 2, 3, 1)}),
        ("Pad", "last", "padded", (5, 4, 8), {"pads": (0, 1, 2, 0, 0, 0, 0, 0)}),
    )
    before, behind = found["maps"].receptive_field, found["padded"].receptive_field
    assert before
    assert behind
    assert behind.rows == Span(1, before.rows.low - 1, before.rows.high - 1)
    assert behind.columns == Span(1, before.columns.low - 2, before.columns.high - 2)


def test_the_bounds_of_a_clip_may_be_attributes() -> None:
    """They are attributes before opset 11."""
    found = describe_rows(PLANES, MAPS, ("Clip", "maps", "clip", (8, 4, 2), {"min": 0.0, "max": 6.0}))
    assert found["clip"].constants == {"min": 0, "max": 6}


def test_one_value_for_each_map_is_not_flattened() -> None:
    for shape, axes in (((8, 1, 1), (2, 3)), ((1, 1, 8), (1, 2))):
        last: LayerRow = ("Transpose", "maps", "turned", (4, 2, 8), {"perm": (0, 2, 3, 1)})
        found = describe_rows(
            PLANES,
            MAPS,
            *([last] if axes == (1, 2) else []),
            ("ReduceMean", "turned" if axes == (1, 2) else "maps", "mean", shape, {"axes": axes}),
            ("Flatten", "mean", "flat", (8,), {}),
            ("Gemm", "flat weight", "scores", (5,), {}),
        )
        assert "flat" not in found
        assert found["scores"].is_direct


TOKENS: LayerRow = ("Reshape", "maps shape", "rows", (8, 8), {})
PRODUCT: LayerRow = ("MatMul", "rows weight", "product", (8, 8), {})


@pytest.mark.parametrize(
    ("rows", "kinds"),
    [
        ([("Add", "product bias", "sum", (8, 8), {})], ["MatMul"]),
        (
            [
                ("Gather", "product order", "picked", (8, 8), {"axis": 1}),
                ("Add", "picked bias", "sum", (8, 8), {}),
            ],
            ["MatMul", "Add"],
        ),
        (
            [("Add", "product bias", "sum", (8, 8), {}), ("Mul", "product sum", "gated", (8, 8), {})],
            ["MatMul", "Add", "Mul"],
        ),
    ],
)
def test_a_sum_is_a_bias_where_nothing_else_becomes_of_the_product(
    rows: list[LayerRow], kinds: list[str]
) -> None:
    layers = describe_layers(contract_with_layers(PLANES, MAPS, TOKENS, PRODUCT, *rows), {"bias": (8,)}, {})
    assert [layer.kind for layer in layers[2:]] == kinds
    assert {source for layer in layers for source in layer.sources} <= {layer.tensor for layer in layers}


def test_a_slope_is_a_parameter() -> None:
    contract = contract_with_layers(PLANES, MAPS, ("PRelu", "maps slope", "prelu", (8, 4, 2), {}))
    layers = (*contract.layers[:-1], replace(contract.layers[-1], parameters=1))
    assert describe_layers(replace(contract, layers=layers), {}, {})[-1].parameters == 1


def test_an_input_that_the_network_resizes_is_not_told_pixel_by_pixel() -> None:
    found = describe_rows(
        PLANES,
        ("Resize", "planes sizes", "small", (3, 8, 8), {}),
        ("Conv", "small kernel", "conv", (8, 8, 8), {"kernel_shape": (3, 3)}),
    )
    assert found["small"].kind == "Input"
    assert found["small"].receptive_field is None
    assert found["conv"].receptive_field is None


def test_what_is_left_out_is_not_made_of_the_image() -> None:
    """ONNX gives omitted inputs and outputs of a node the empty name."""
    contract = contract_with_layers(PLANES, MAPS, ("Clip", "maps", "clip", (8, 4, 2), {}))
    planes, maps, clip = contract.layers
    layers = (planes, replace(maps, outputs=("maps", "")), replace(clip, inputs=("maps", "", "high")))
    layer = describe_layers(replace(contract, layers=layers), {}, {"high": np.array(6.0)})[-1]
    assert layer.is_direct
    assert layer.constants == {"max": 6}
    assert layer.receptive_field
