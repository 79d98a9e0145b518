"""The layers of a model in a readable form, with their connections and receptive fields.

The sources are the contract's layer table and an opened graph (see `introspection`). The graph adds the
shapes of the weights, and constants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Final

import numpy.typing as npt

from fovea.service.artifact.contract import Contract, Layer
from fovea.service.explain.layer_fusion import assign_blocks, is_bias, merge_bias, merge_composites
from fovea.service.explain.layer_view import LayerView
from fovea.service.explain.receptive_field import ReceptiveField, Span, Window, apply_window, unite_fields
from fovea.service.explain.tensor_layout import RESHAPE_KINDS, TensorLayout, find_image_tensors, find_layouts

Constants = Mapping[str, npt.NDArray[Any]]
"""Values of small tensors that do not depend on the image, by name."""

Shapes = Mapping[str, Sequence[int]]
"""Shapes of tensors that do not depend on the image, by name."""

_HIDDEN_KINDS: Final = frozenset(
    {"Identity", "Cast", "CastLike", "Dropout", "Transpose", "Shape", "Constant", "Expand",
     "ConstantOfShape", "Gather", "Slice", "Split", "Range", "Where", "Size", "QuantizeLinear",
     "DequantizeLinear", "DynamicQuantizeLinear"}
)  # fmt: skip
"""Operators that change no value, round values to int8 and back, or work on shapes."""

_ELEMENTWISE_KINDS: Final = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish",
     "Tanh", "Softplus", "Softsign", "Gelu", "Mish", "Erf", "Exp", "Log", "Sqrt", "Abs", "Neg", "Pow",
     "Reciprocal", "ThresholdedRelu", "Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean",
     "BatchNormalization", "LRN", "Silu", "Swish", "Concat"}
)  # fmt: skip
"""Elementwise operators: each value depends only on values at the same place, in any channel."""

LINEAR_KINDS: Final = frozenset({"Gemm", "MatMul"})
"""Operators of linear layers."""

_WEIGHTED_KINDS: Final = frozenset({"Conv", "ConvInteger", "QLinearConv", *LINEAR_KINDS})
"""Operators that can be the first layer of a network; everything before it prepares the input."""


_WEIGHT_NAMES: Final = {
    "Conv": ("weight", "bias"),
    "Gemm": ("weight", "bias"),
    "MatMul": ("weight",),
    "BatchNormalization": ("scale", "bias", "mean", "variance"),
    **dict.fromkeys(("LayerNormalization", "InstanceNormalization", "GroupNormalization"), ("scale", "bias")),
    "ConvTranspose": ("weight", "bias"),
}
"""Names of an operator's weights, from its second input on."""

_SCALAR_NAMES: Final = {
    "Clip": ("", "min", "max"),
    **dict.fromkeys(("Pow", "Add", "Sub", "Mul", "Div", "Max", "Min"), ("left", "right")),
}
"""Names of scalar constants, by their position among the inputs."""


def describe_layers(contract: Contract, shapes: Shapes, constants: Constants) -> list[LayerView]:
    """Return the layers in the order of computation.

    `shapes` and `constants` are empty if the graph cannot be opened; sliding windows that only they define
    are then missing.
    """
    reader = _LayerReader(contract, shapes, constants)
    return assign_blocks(merge_composites(reader.read_layers()))


def find_input_tensor(contract: Contract) -> str:
    """Return the tensor that the first layer with weights reads: the input of the network itself."""
    image_tensors = find_image_tensors(contract)
    for layer in contract.layers:
        if layer.kind in _WEIGHTED_KINDS and layer.inputs[0] in image_tensors:
            return layer.inputs[0]
    return contract.input_name


def is_transposed(layer: Layer) -> bool:
    """Return True if a linear layer's weight is (inputs, outputs) instead of (outputs, inputs)."""
    return layer.kind == "MatMul" or (layer.kind == "Gemm" and not layer.attributes.get("transB"))


def find_receptive_field(contract: Contract, tensor: str) -> ReceptiveField | None:
    """Return the receptive field of one value of the maps, or None if it is unknown."""
    reader = _LayerReader(contract, {}, {})
    reader.read_layers()
    return reader.find_receptive_field(tensor)


_IDENTITY_KINDS: Final = frozenset(
    {"Identity", "Cast", "Dropout", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
)
"""Operators that are not shown and leave each value at its place."""

_REARRANGING_KINDS: Final = frozenset({"Transpose", *RESHAPE_KINDS})


class _LayerReader:
    """A reader of the layer table of one contract."""

    def __init__(self, contract: Contract, shapes: Shapes, constants: Constants) -> None:
        self._contract = contract
        self._shapes = shapes
        self._constants = constants
        self._producers = {tensor: layer for layer in contract.layers for tensor in layer.outputs}
        self._consumer_counts = Counter(name for layer in contract.layers for name in layer.inputs)
        self._image_tensors = find_image_tensors(contract)
        self._layouts = find_layouts(contract)
        self._input_name = find_input_tensor(contract)
        self._views: dict[str, LayerView] = {}
        self._sources: dict[str, tuple[str, ...]] = {}
        """Shown layers from which each tensor is computed."""

    def read_layers(self) -> list[LayerView]:
        """Return all layers; the first is the input."""
        self._views[self._input_name] = self._create_input_view()
        hidden_tensors = self._find_ancestors(self._input_name)
        self._sources[self._input_name] = (self._input_name,)
        for layer in self._contract.layers:
            self._record_sources(layer)
            if layer.outputs[0] not in hidden_tensors and self._is_shown(layer):
                view = self._create_view(layer)
                product = self._views.get(next(iter(view.sources), ""))
                if product and self._consumer_counts[product.tensor] == 1 and is_bias(view, product):
                    del self._views[product.tensor]
                    view = merge_bias(product, view)
                self._views[view.tensor] = view
                self._sources[layer.outputs[0]] = (view.tensor,)
        return list(self._views.values())

    def find_receptive_field(self, tensor: str) -> ReceptiveField | None:
        """Return the receptive field of a tensor's values; call `read_layers` first."""
        view = self._views.get(self._find_source(tensor))
        return view.receptive_field if view else None

    def _create_input_view(self) -> LayerView:
        layout = self._layouts.get(self._input_name)
        return LayerView(
            self._input_name,
            "input",
            "Input",
            (),
            layout.shape if layout else self._find_shape(self._input_name),
            layout,
            receptive_field=layout and self._find_patch_field(layout),
        )

    def _find_patch_field(self, layout: TensorLayout) -> ReceptiveField | None:
        """Return the receptive field of one value of the input: a pixel, or the patch of a token."""
        geometry = self._contract.input
        patch_height, patch_width = geometry.height // layout.height, geometry.width // layout.width
        if (patch_height, patch_width) != (1, 1) and "T" not in layout.axes:
            return None  # the network itself resizes the image
        return ReceptiveField(Span(patch_height, 0, patch_height - 1), Span(patch_width, 0, patch_width - 1))

    def _record_sources(self, layer: Layer) -> None:
        sources = dict.fromkeys(one for name in layer.inputs for one in self._sources.get(name, ()))
        for tensor in layer.outputs:
            if tensor != self._input_name and tensor in self._image_tensors:
                self._sources[tensor] = tuple(sources)

    def _find_ancestors(self, tensor: str) -> set[str]:
        """Return a tensor and all tensors from which it is computed."""
        ancestors: set[str] = set()
        queue = [tensor]
        while queue:
            name = queue.pop()
            if name not in ancestors:
                ancestors.add(name)
                queue += self._producers[name].inputs if name in self._producers else ()
        return ancestors

    def _find_shape(self, tensor: str) -> tuple[int | None, ...]:
        geometry = self._contract.input
        if tensor == self._contract.input_name:
            return geometry.height, geometry.width, 3
        return self._producers[tensor].shape

    def _is_shown(self, layer: Layer) -> bool:
        if layer.kind in _HIDDEN_KINDS or layer.outputs[0] not in self._image_tensors:
            return False
        if layer.kind in RESHAPE_KINDS:
            # Only the flattening of maps is shown, not a reshape of one value per channel.
            return len(layer.shape) == 1 and len(_drop_ones(self._find_shape(layer.inputs[0]))) > 1
        return True

    def _create_view(self, layer: Layer) -> LayerView:
        sources = self._sources[layer.outputs[0]]
        window = self._find_window(layer)
        weights = self._find_weights(layer)
        layout = self._layouts.get(layer.outputs[0])
        view = LayerView(
            layer.outputs[0],
            layer.name,
            "Flatten" if layer.kind in RESHAPE_KINDS else layer.kind,
            sources,
            layout.shape if layout else layer.shape,
            layout,
            self._is_direct(layer),
            window=window,
            # ONNX defines `group` as an integer.
            groups=int(layer.attributes.get("group", 1)),  # type: ignore[arg-type]
            parameters=self._count_parameters(layer, weights),
            constants=self._find_scalars(layer),
            attributes={
                key: value for key, value in layer.attributes.items() if key not in _WINDOW_ATTRIBUTES
            },
            weights=weights,
            is_transposed=is_transposed(layer),
            input_tensor=self._find_input_vector(layer, weights),
            flattened_axes=self._find_flattened_axes(layer),
        )
        return replace(view, receptive_field=self._find_field(layer, view))

    def _find_weights(self, layer: Layer) -> dict[str, str]:
        if layer.kind == "Add":  # a vector that is added may be the bias of a product
            vectors = [name for name in layer.inputs if _is_vector(self._shapes.get(name, ()))]
            return {"bias": vectors[0]} if vectors else {}
        parts = zip(_WEIGHT_NAMES.get(layer.kind, ()), layer.inputs[1:], strict=False)
        return {part: name for part, name in parts if name and name not in self._image_tensors}

    def _find_input_vector(self, layer: Layer, weights: Mapping[str, str]) -> str | None:
        name = layer.inputs[0]
        if layer.kind not in LINEAR_KINDS or "weight" not in weights or name not in self._producers:
            return None
        return name if len(_drop_ones(self._find_shape(name))) <= 1 else None

    def _find_flattened_axes(self, layer: Layer) -> str | None:
        """Return the order of the values of a flattened source, as its axes."""
        layout = self._layouts.get(layer.inputs[0])
        if layer.kind not in RESHAPE_KINDS or layout is None or layout.leading_tokens:
            return None
        return layout.axes.replace("T", "HW") if self._find_source(layer.inputs[0]) in self._views else None

    def _count_parameters(self, layer: Layer, weights: Mapping[str, str]) -> int:
        """Return the number of learned parameters, without paddings, sizes and scalar constants."""
        is_learned = layer.kind in _ELEMENTWISE_KINDS and layer.parameters >= len(layer.inputs)
        if is_learned or layer.kind == "PRelu":
            return layer.parameters
        # The weights may be outputs of Constant nodes.
        weight_count = sum(prod(self._shapes.get(name, (0,))) for name in weights.values())
        return layer.parameters or weight_count if weights else 0

    def _find_scalars(self, layer: Layer) -> dict[str, float]:
        names = _SCALAR_NAMES.get(layer.kind, ())
        # Clip had attributes before opset 11
        scalars: dict[str, Any] = {name: layer.attributes.get(name) for name in names}
        for name, tensor in zip(names, layer.inputs, strict=False):
            if (
                tensor not in self._image_tensors
                and (value := self._find_constant(tensor)) is not None
                and value.size == 1
            ):
                scalars[name] = value.item()
        return {name: float(value) for name, value in scalars.items() if value is not None}

    def _find_constant(self, name: str) -> npt.NDArray[Any] | None:
        """Return the value of an initializer, also through operators that change no value."""
        layer = self._producers.get(name)
        if layer and layer.kind in _HIDDEN_KINDS and len(layer.inputs) == 1:
            return self._find_constant(layer.inputs[0])
        return self._constants.get(name)

    # --- windows ---

    def _find_window(self, layer: Layer) -> Window | None:
        kernel = layer.attributes.get("kernel_shape")
        if kernel is None and layer.kind == "Conv":
            kernel = tuple(self._shapes.get(layer.inputs[1], ())[2:])
        if not isinstance(kernel, tuple) or len(kernel) != 2:
            return None
        rows, columns = int(kernel[0]), int(kernel[1])
        stride = _read_pair(layer, "strides", 1)
        dilation = _read_pair(layer, "dilations", 1)
        padding = self._find_padding(layer, (rows, columns), stride, dilation)
        return padding and Window((rows, columns), stride, padding, dilation)

    def _find_padding(
        self, layer: Layer, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
    ) -> tuple[int, int, int, int] | None:
        auto_pad = layer.attributes.get("auto_pad", "NOTSET")
        if auto_pad in ("NOTSET", ""):
            return tuple(map(int, layer.attributes.get("pads", (0, 0, 0, 0))))  # type: ignore[return-value,arg-type]
        if auto_pad == "VALID":
            return 0, 0, 0, 0
        leading, trailing = [], []
        input_shape = self._find_shape(layer.inputs[0])
        if len(input_shape) != 3 or len(layer.shape) != 3:
            return None
        sizes = zip(input_shape[1:], layer.shape[1:], kernel, stride, dilation, strict=True)
        for input_size, output_size, window, step, spacing in sizes:
            if input_size is None or output_size is None:
                return None
            total = max(0, (output_size - 1) * step + spacing * (window - 1) + 1 - input_size)
            leading.append(total // 2 if auto_pad == "SAME_UPPER" else total - total // 2)
            trailing.append(total - leading[-1])
        return leading[0], leading[1], trailing[0], trailing[1]

    def _find_field(self, layer: Layer, view: LayerView) -> ReceptiveField | None:
        """Return the receptive field of one value of a map."""
        sources = [self._views[source] for source in view.sources]
        fields = [source.receptive_field for source in sources if source.receptive_field]
        if not view.layout or not view.is_direct or not sources or len(fields) < len(sources):
            return None
        receptive_field = unite_fields(fields)
        if layer.kind == "Pad":
            padding = self._read_pads(layer, view.layout.axes)
            return (
                receptive_field
                and padding
                and apply_window(receptive_field, Window((1, 1), (1, 1), (*padding, 0, 0), (1, 1)))
            )
        if layer.kind in ("Conv", "MaxPool", "AveragePool", "LpPool"):
            return apply_window(receptive_field, view.window) if receptive_field and view.window else None
        is_same_size = all(source.shape[1:] == view.shape[1:] for source in sources)
        return receptive_field if is_same_size and self._keeps_positions(layer, view) else None

    def _keeps_positions(self, layer: Layer, view: LayerView) -> bool:
        """Return True if each value depends only on values at the same place, in any channel."""
        if layer.kind not in ("LayerNormalization", "MatMul"):
            return layer.kind in _ELEMENTWISE_KINDS or layer.kind == "ReduceMean"
        input_layout = self._layouts.get(layer.inputs[0])
        if input_layout is None or input_layout.axes[-1] != "C":
            return False
        if layer.kind == "MatMul":
            return "weight" in view.weights
        return layer.attributes.get("axis", -1) in (-1, len(input_layout.axes))

    def _is_direct(self, layer: Layer) -> bool:
        """Return True if the layer reads its sources as they are shown.

        Only operators that move no value may lie in between, and the layer must not read tokens that are left
        out.
        """
        output_layout = self._layouts.get(layer.outputs[0])
        for name in layer.inputs:
            source, input_layout = self._find_source(name), self._layouts.get(name)
            if name in self._image_tensors and source not in self._views:
                return False
            if (
                input_layout
                and input_layout.leading_tokens
                and (output_layout is None or output_layout.leading_tokens != input_layout.leading_tokens)
            ):
                return False
            if input_layout and layer.kind in RESHAPE_KINDS and input_layout.axes != "CHW":
                return False
        return True

    def _find_source(self, tensor: str) -> str:
        """Return the shown tensor before operators that move no value, or else the last one reached."""
        while tensor not in self._views and tensor in self._producers and self._keeps_layout(tensor):
            tensor = self._producers[tensor].inputs[0]
        return tensor

    def _keeps_layout(self, tensor: str) -> bool:
        """Return True if the tensor is shown in the same layout as its input."""
        layer = self._producers[tensor]
        if layer.kind not in _REARRANGING_KINDS:
            return layer.kind in _IDENTITY_KINDS
        if {layer.inputs[0], tensor} <= self._layouts.keys():
            return True
        input_shape, output_shape = (_drop_ones(self._find_shape(name)) for name in (layer.inputs[0], tensor))
        return layer.kind != "Transpose" and input_shape == output_shape

    def _read_pads(self, layer: Layer, axes: str) -> tuple[int, int] | None:
        """Return the padding above and left of a map, or None if it is unknown."""
        pads: Any = layer.attributes.get("pads")
        if pads is None and len(layer.inputs) > 1:
            pads = self._find_constant(layer.inputs[1])
        is_known = pads is not None and len(pads) == 8  # the beginnings and the ends of four axes
        return (int(pads[1 + axes.index("H")]), int(pads[1 + axes.index("W")])) if is_known else None


_WINDOW_ATTRIBUTES: Final = frozenset(
    {"kernel_shape", "strides", "pads", "dilations", "group", "auto_pad", "storage_order"}
)
"""Attributes that `Window` contains or that change no value."""


def _drop_ones(shape: Sequence[int | None]) -> list[int | None]:
    return [size for size in shape if size != 1]


def _is_vector(shape: Sequence[int]) -> bool:
    """Return True if an array of this shape has one value for each output of a linear layer."""
    return len(shape) > 0 and shape[-1] == prod(shape)


def _read_pair(layer: Layer, name: str, default: int) -> tuple[int, int]:
    values: Any = layer.attributes.get(name, (default, default))
    return int(values[0]), int(values[1])
