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


def test_shuffled_channels_are_not_direct() -> None:
    views = describe_rows(
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
    assert views["/act/silu"].kind == "Silu"
    assert not views["/act/silu"].is_direct
    assert views["relu"].sources == views["straight"].sources == ("maps",)
    assert views["straight"].is_direct
    assert not views["relu"].is_direct
    assert views["relu"].receptive_field is None


def test_transposed_scores_are_not_direct() -> None:
    views = describe_rows(
        PLANES,
        MAPS,
        ("Reshape", "maps shape", "heads", (2, 8, 4), {}),
        ("MatMul", "heads turned", "scores", (2, 4, 4), {}),
        ("Transpose", "scores", "other", (2, 4, 4), {"perm": (0, 1, 3, 2)}),
        ("Softmax", "other", "softmax", (2, 4, 4), {}),
        ("Softmax", "scores", "straight", (2, 4, 4), {}),
    )
    assert views["straight"].is_direct
    assert not views["softmax"].is_direct


def test_flatten_is_direct_only_for_channels_first() -> None:
    views = describe_rows(
        PLANES,
        MAPS,
        ("Transpose", "maps", "last", (4, 2, 8), {"perm": (0, 2, 3, 1)}),
        ("Flatten", "maps", "one", (64,), {}),
        ("Flatten", "last", "other", (64,), {}),
    )
    assert views["one"].kind == views["other"].kind == "Flatten"
    assert views["one"].is_direct
    assert not views["other"].is_direct


def test_only_mean_over_channels_is_layer_normalization() -> None:
    """The average is written as several operators in one module."""

    def list_kinds(mean_shape: tuple[int, ...]) -> list[str]:
        rows: list[LayerRow] = [
            ("ReduceMean", "maps", "/norm/mean", mean_shape, {}),
            ("Sub", "maps /norm/mean", "/norm/apart", (8, 4, 2), {}),
            ("Pow", "/norm/apart two", "/norm/square", (8, 4, 2), {}),
            ("ReduceMean", "/norm/square", "/norm/variance", mean_shape, {}),
            ("Sqrt", "/norm/variance", "/norm/spread", mean_shape, {}),
            ("Div", "/norm/apart /norm/spread", "/norm/made", (8, 4, 2), {}),
        ]
        return [layer.kind for layer in describe_rows(PLANES, MAPS, *rows).values()]

    assert list_kinds((1, 4, 2)) == ["Input", "Conv", "LayerNormalization"]
    assert len(list_kinds((8, 1, 1))) == len(list_kinds((2, 4, 2))) == 2 + 6


def test_gate_with_a_factor_is_not_silu() -> None:
    """CLIP uses x · sigmoid(1.702 x)."""
    sigmoid: LayerRow = ("Sigmoid", "maps", "/act/sigmoid", (8, 4, 2), {})
    scaled_maps: LayerRow = ("Mul", "maps factor", "/act/scaled", (8, 4, 2), {})
    scaled_sigmoid: LayerRow = ("Sigmoid", "/act/scaled", "/act/sigmoid", (8, 4, 2), {})
    product: LayerRow = ("Mul", "maps /act/sigmoid", "/act/gated", (8, 4, 2), {})
    assert describe_rows(PLANES, MAPS, sigmoid, product)["/act/gated"].kind == "Silu"
    assert describe_rows(PLANES, MAPS, scaled_maps, scaled_sigmoid, product)["/act/gated"].kind == "Mul"
    shared_relu: LayerRow = ("Relu", "/act/sigmoid", "shared", (8, 4, 2), {})
    views = describe_rows(PLANES, MAPS, sigmoid, product, shared_relu)
    assert views.keys() >= set(views["shared"].sources) == {"/act/sigmoid"}


def test_padding_moves_receptive_field_of_channels_last() -> None:
    views = describe_rows(
        PLANES,
        MAPS,
        ("Transpose", "maps", "last", (4, 2, 8), {"perm": (0, 2, 3, 1)}),
        ("Pad", "last", "padded", (5, 4, 8), {"pads": (0, 1, 2, 0, 0, 0, 0, 0)}),
    )
    maps_field, padded_field = views["maps"].receptive_field, views["padded"].receptive_field
    assert maps_field
    assert padded_field
    assert padded_field.rows == Span(1, maps_field.rows.low - 1, maps_field.rows.high - 1)
    assert padded_field.columns == Span(1, maps_field.columns.low - 2, maps_field.columns.high - 2)


def test_clip_bounds_can_be_attributes() -> None:
    """They are attributes before opset 11."""
    views = describe_rows(PLANES, MAPS, ("Clip", "maps", "clip", (8, 4, 2), {"min": 0.0, "max": 6.0}))
    assert views["clip"].constants == {"min": 0, "max": 6}


def test_flatten_of_one_value_per_map_is_left_out() -> None:
    for shape, axes in (((8, 1, 1), (2, 3)), ((1, 1, 8), (1, 2))):
        transpose: LayerRow = ("Transpose", "maps", "turned", (4, 2, 8), {"perm": (0, 2, 3, 1)})
        views = describe_rows(
            PLANES,
            MAPS,
            *([transpose] if axes == (1, 2) else []),
            ("ReduceMean", "turned" if axes == (1, 2) else "maps", "mean", shape, {"axes": axes}),
            ("Flatten", "mean", "flat", (8,), {}),
            ("Gemm", "flat weight", "scores", (5,), {}),
        )
        assert "flat" not in views
        assert views["scores"].is_direct


def test_flattened_axes_are_the_order_of_the_row() -> None:
    views = describe_rows(
        PLANES,
        MAPS,
        ("Transpose", "maps", "last", (4, 2, 8), {"perm": (0, 2, 3, 1)}),
        ("Reshape", "maps shape", "columns", (8, 8), {}),
        ("Transpose", "columns", "tokens", (8, 8), {"perm": (0, 2, 1)}),
        ("Gather", "last order", "shuffled", (4, 2, 8), {"axis": 1}),
        *(
            (kind, source, f"flat {source}", (64,), {})
            for kind, source in (
                ("Flatten", "maps"),
                ("Flatten", "last"),
                ("Reshape", "tokens"),
                ("Flatten", "shuffled"),
            )
        ),
    )
    axes = [views[f"flat {source}"].flattened_axes for source in ("maps", "last", "tokens", "shuffled")]
    assert axes == ["CHW", "HWC", "HWC", None]
    assert views["maps"].flattened_axes is None


@pytest.mark.parametrize(
    "rows",
    [
        [("GlobalAveragePool", "maps", "mean", (8, 1, 1), {}), ("Flatten", "mean", "row", (8,), {})],
        [("ReduceMean", "maps", "row", (8,), {"axes": (2, 3)})],
        [("Reshape", "maps shape", "flat", (8, 8), {}), ("Gather", "flat zero", "row", (8,), {"axis": 2})],
    ],
    ids=["pool", "mean", "one token"],
)
def test_linear_layer_of_a_vector_names_its_input(rows: list[LayerRow]) -> None:
    scores: LayerRow = ("Gemm", "row weight bias", "scores", (5,), {})
    views = describe_rows(PLANES, MAPS, *rows, scores)
    assert views["scores"].input_tensor == "row"
    assert views["maps"].input_tensor is None


def test_product_of_maps_has_no_input_vector() -> None:
    assert describe_rows(PLANES, MAPS, TOKENS, PRODUCT)["product"].input_tensor is None


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
def test_sum_is_bias_only_if_product_has_no_other_use(rows: list[LayerRow], kinds: list[str]) -> None:
    layers = describe_layers(contract_with_layers(PLANES, MAPS, TOKENS, PRODUCT, *rows), {"bias": (8,)}, {})
    assert [layer.kind for layer in layers[2:]] == kinds
    assert {source for layer in layers for source in layer.sources} <= {layer.tensor for layer in layers}


def test_prelu_slope_is_a_parameter() -> None:
    contract = contract_with_layers(PLANES, MAPS, ("PRelu", "maps slope", "prelu", (8, 4, 2), {}))
    layers = (*contract.layers[:-1], replace(contract.layers[-1], parameters=1))
    assert describe_layers(replace(contract, layers=layers), {}, {})[-1].parameters == 1


def test_resized_input_has_no_receptive_field() -> None:
    views = describe_rows(
        PLANES,
        ("Resize", "planes sizes", "small", (3, 8, 8), {}),
        ("Conv", "small kernel", "conv", (8, 8, 8), {"kernel_shape": (3, 3)}),
    )
    assert views["small"].kind == "Input"
    assert views["small"].receptive_field is None
    assert views["conv"].receptive_field is None


def test_omitted_inputs_and_outputs_are_ignored() -> None:
    """ONNX gives omitted inputs and outputs of a node the empty name."""
    contract = contract_with_layers(PLANES, MAPS, ("Clip", "maps", "clip", (8, 4, 2), {}))
    planes, maps, clip = contract.layers
    layers = (planes, replace(maps, outputs=("maps", "")), replace(clip, inputs=("maps", "", "high")))
    layer = describe_layers(replace(contract, layers=layers), {}, {"high": np.array(6.0)})[-1]
    assert layer.is_direct
    assert layer.constants == {"max": 6}
    assert layer.receptive_field
