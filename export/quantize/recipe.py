"""The recipes of a quantization, and the graphs that they make."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import ModelProto

from fovea.export.pixel_steps import arrange_pixel_steps
from fovea.export.quantize.calibration import CalibrationMethod, Histogram
from fovea.export.quantize.refusal import QuantizeRefused
from fovea.export.quantize.regions import MATRIX_OPERATORS, Region
from fovea.service.errors import to_one_line

WEIGHT_BITS: Final = 8
REDUCED_WEIGHT_BITS: Final = 7
"""Bits of weights in reduced range: the sum of two products of 7 and 8 bits fits into 16 bits."""

_FLOAT16_BITS: Final = 16


class RecipeKind(StrEnum):
    """The kind of a conversion."""

    STATIC = "static"
    """int8 weights for each channel, and activations with fixed ranges (QDQ)."""
    DYNAMIC = "dynamic"
    """int8 weights of matrix products, and activations with ranges of each call."""
    FLOAT16 = "float16"


@dataclass(frozen=True)
class Recipe:
    """A conversion of the float graph."""

    kind: RecipeKind
    weight_bits: int = WEIGHT_BITS
    method: CalibrationMethod | None = None
    float_layers: tuple[str, ...] = field(default=(), repr=False)
    """Names of the nodes with weights that stay in float."""

    def describe(self) -> str:
        """Return a short description for people."""
        if self.kind is RecipeKind.FLOAT16:
            return "float16"
        parts = [
            f"static int8, {self.method}"
            if self.kind is RecipeKind.STATIC
            else "dynamic int8 of matrix products"
        ]
        if self.weight_bits == REDUCED_WEIGHT_BITS:
            parts.append("reduced range")
        if self.float_layers and self.kind is RecipeKind.STATIC:
            layers = "layer" if len(self.float_layers) == 1 else "layers"
            parts.append(f"{len(self.float_layers)} {layers} in float")
        return ", ".join(parts)

    def with_float_layers(self, names: tuple[str, ...]) -> Recipe:
        """Return the recipe with other layers in float."""
        return replace(self, float_layers=names)


def convert_graph(
    graph: ModelProto, region: Region, histograms: Mapping[str, Histogram], recipe: Recipe
) -> ModelProto:
    """Return a copy of the graph that a recipe has converted.

    Raises `QuantizeRefused` if a library cannot convert the graph.
    """
    converters = {
        RecipeKind.STATIC: lambda: _quantize_statically(graph, region, histograms, recipe),
        RecipeKind.DYNAMIC: lambda: _quantize_dynamically(graph, region, recipe),
        RecipeKind.FLOAT16: lambda: _convert_to_float16(graph, region),
    }
    try:
        with _silence_library():
            converted_graph = _sort_nodes(converters[recipe.kind]())
        if recipe.kind is RecipeKind.STATIC:
            arrange_pixel_steps(converted_graph)  # int8 convolutions run channels last
        return converted_graph
    except OSError as error:
        raise QuantizeRefused(
            f"cannot write into {tempfile.gettempdir()}: {error.strerror}; "
            "set TMPDIR to a folder on a larger disk"
        ) from None
    except Exception as error:  # the libraries raise ValueError, AssertionError, RuntimeError and others
        raise QuantizeRefused(
            f"an operator cannot be quantized ({recipe.describe()}): {to_one_line(error)}; "
            "serve the float model"
        ) from error


@contextlib.contextmanager
def _silence_library() -> Iterator[None]:
    """Silence the progress that the quantizers print, and their advice in the log."""
    import logging

    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _sort_nodes(graph: ModelProto) -> ModelProto:
    """Return the graph in the order of computation; the libraries append nodes."""
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = ONNXModel(graph)
    model.topological_sort()
    sorted_graph: ModelProto = model.model
    return sorted_graph


def _copy_graph(graph: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(graph)
    return copy


def _quantize_statically(
    graph: ModelProto, region: Region, histograms: Mapping[str, Histogram], recipe: Recipe
) -> ModelProto:
    from onnxruntime.quantization import CalibrationMethod as LibraryMethod
    from onnxruntime.quantization import QDQQuantizer, QuantType, TensorData, TensorsData

    if recipe.method is None:
        raise ValueError("a static recipe needs a calibration method")
    nodes = _select_nodes(graph, region, recipe.float_layers)
    ranges = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, histogram in histograms.items()
        for low, high in [histogram.find_range(recipe.method)]
    }
    copy = _copy_graph(graph)
    quantizer = QDQQuantizer(
        copy,
        per_channel=True,
        reduce_range=recipe.weight_bits == REDUCED_WEIGHT_BITS,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(LibraryMethod.MinMax, ranges),
        nodes_to_quantize=sorted(nodes),
        nodes_to_exclude=[],
        op_types_to_quantize=sorted({node.op_type for node in graph.graph.node if node.name in nodes}),
        # Logits and the inputs of float operators behind matrix products need no rounding.
        extra_options={"OpTypesToExcludeOutputQuantization": sorted(MATRIX_OPERATORS)},
    )
    quantizer.quantize_model()
    quantized_graph: ModelProto = quantizer.model.model
    return quantized_graph


_LOSSLESS_OPERATORS: Final = frozenset({"MaxPool", "Relu", "Clip"})
"""Operators whose result on quantized values needs no further rounding."""


def _select_nodes(graph: ModelProto, region: Region, float_layers: tuple[str, ...]) -> set[str]:
    """Return the nodes to quantize.

    These are the int8 layers, the operators whose result an int8 layer reads, and the operators behind an
    int8 layer that lose nothing.
    """
    layers, between = set(region.weighted) - set(float_layers), set(region.between)
    nodes = set(layers)
    needed_tensors: set[str] = set()
    for node in reversed(graph.graph.node):
        if node.name in layers:
            needed_tensors.add(node.input[0])
        elif node.name in between and not needed_tensors.isdisjoint(node.output):
            nodes.add(node.name)
            needed_tensors.update(node.input)
    quantized_tensors: set[str] = set()
    for node in graph.graph.node:
        if (
            node.name in between
            and node.op_type in _LOSSLESS_OPERATORS
            and node.input[0] in quantized_tensors
        ):
            nodes.add(node.name)
        if node.name in nodes and node.op_type not in MATRIX_OPERATORS:
            quantized_tensors.update(node.output)
    return nodes


def _quantize_dynamically(graph: ModelProto, region: Region, recipe: Recipe) -> ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = [name for name in region.matrices if name not in recipe.float_layers]
    with tempfile.TemporaryDirectory(prefix="fovea-quantize-") as folder:
        path = Path(folder) / "dynamic.onnx"
        quantize_dynamic(
            _copy_graph(graph),
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=recipe.weight_bits == REDUCED_WEIGHT_BITS,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=nodes,
        )
        return onnx.load(path)


def _convert_to_float16(graph: ModelProto, region: Region) -> ModelProto:
    """Convert all but the steps before the first layer with weights and after the logits."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy: Any = convert_float_to_float16(
        _copy_graph(graph), keep_io_types=True, node_block_list=list(region.outside)
    )
    converted_graph: ModelProto = copy
    # The converter writes float16 as the type of weights that stay in float32, too. ONNX needs no types here.
    del converted_graph.graph.value_info[:]
    return converted_graph


def get_weight_bits(kind: RecipeKind, *, is_reduced: bool) -> int:
    """Return the bits of a weight."""
    if kind is RecipeKind.FLOAT16:
        return _FLOAT16_BITS
    return REDUCED_WEIGHT_BITS if is_reduced else WEIGHT_BITS
