"""Class activation maps: the evidence for a label at each place of the last feature maps (Zhou et al., 2016).

If a network ends in global average pooling of its last feature maps and a linear layer, a logit is an average
over all places. The number at each place is the label's row of weights times the feature maps there. This is
exact. Grad-CAM (Selvaraju et al., 2017) gives the same maps for such networks, but needs gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final, TypeAlias

import numpy as np

from fovea.service.artifact.contract import Contract, Layer, Task
from fovea.service.explain.layers import is_transposed
from fovea.service.explain.tensor_layout import TensorLayout, find_image_tensors, find_layouts
from fovea.service.inference.engine import Floats, decode_golden_pixels
from fovea.service.inference.pixels import Pixels

_SHAPE_KINDS: Final = frozenset(
    {"Identity", "Cast", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "QuantizeLinear",
     "DequantizeLinear"}
)  # fmt: skip
"""Operators that change only the shape, or round values to int8 and back."""

_TOLERANCE: Final = 1e-3
"""Tolerance relative to the difference between the logits of two images."""

_QUANTIZED_TOLERANCE: Final = 5e-2
"""Tolerance for a quantized model, whose averages are rounded to 256 levels before the linear layer.

A misread layer table causes differences as large as the logits.
"""

_ROUNDING_TOLERANCE: Final = 1e-5
"""Tolerance relative to the logits themselves. The rounding error of float32 sums in another order is
smaller."""


class NoCam(Exception):
    """Error for a network without class activation maps; the message is a sentence that says why."""


@dataclass(frozen=True)
class Head:
    """The final layers of a network, by the names of their tensors."""

    maps: str
    """Tensor that is averaged over its places."""
    layout: TensorLayout
    """Layout of the maps in that tensor."""
    weight: str | None
    """Weight tensor (labels, channels); None if the maps belong to the labels directly."""
    is_transposed: bool = False
    """True if the weight is (channels, labels)."""
    factor: float = 1.0
    """Factor by which the products are multiplied."""


def find_head(contract: Contract) -> Head:
    """Find the head of a network in its layer table.

    Raises `NoCam`. The result is a guess until `verify_cam` has verified it.
    """
    producers = {tensor: layer for layer in contract.layers for tensor in layer.outputs}
    image_tensors = find_image_tensors(contract)
    layouts = find_layouts(contract)

    def find_producer(tensor: str) -> Layer | None:
        """Return the layer that computed the values of a tensor."""
        layer = producers.get(tensor)
        while layer and (source := find_same_values(layer)):
            layer = producers.get(source)
        return layer

    def find_same_values(layer: Layer) -> str | None:
        """Return the tensor whose values a layer gives in another shape; None for other layers."""
        if layer.kind in _SHAPE_KINDS:
            return layer.inputs[0]
        # torch exports adaptive pooling as a mean and an `as_strided` of the same shape, which is a Gather.
        flat = producers.get(layer.inputs[0]) if layer.kind == "Gather" else None
        source = producers.get(flat.inputs[0]) if flat and flat.kind == "Reshape" else None
        return source.outputs[0] if source and source.shape == layer.shape else None

    def find_maps(layer: Layer | None) -> tuple[str, TensorLayout] | None:
        """Return the maps that a layer seems to average, with their layout; `verify_cam` verifies the guess.

        Averages may be taken of the same values in another shape, such as one row of all places.
        """
        if layer and layer.kind in ("Mul", "Div"):  # a sum, divided by the number of places
            layer = find_producer(next((name for name in layer.inputs if name in image_tensors), ""))
            if layer and layer.kind != "ReduceSum":
                return None
        elif layer and layer.kind == "ReduceSum":
            return None
        source = layer
        while layer and source:
            tensor = source.inputs[0]
            layout = layouts.get(tensor)
            if layout and _is_global_average(layer, layout):
                return tensor, layout
            source = producers.get(tensor)
            if source and source.kind not in _SHAPE_KINDS:
                break
        return None

    last_layer = find_producer(contract.logits_name)
    if last_layer and last_layer.kind == "Add":  # the bias
        last_layer = find_producer(next((name for name in last_layer.inputs if name in image_tensors), ""))
    if maps := find_maps(last_layer):
        return Head(*maps, None)
    if (
        last_layer is None
        or last_layer.kind not in ("Gemm", "MatMul", "Conv")
        or last_layer.inputs[1] in image_tensors
    ):
        raise NoCam(_NO_CAM_REASON)
    maps = find_maps(find_producer(last_layer.inputs[0]))
    if maps is None:
        raise NoCam(_NO_CAM_REASON)
    # ONNX defines `alpha` of a Gemm as a float.
    factor = float(last_layer.attributes.get("alpha", 1.0))  # type: ignore[arg-type]
    return Head(*maps, last_layer.inputs[1], is_transposed(last_layer), factor)


_NO_CAM_REASON: Final = "the network does not end in an average over its last maps and one linear layer"


def _is_global_average(layer: Layer, layout: TensorLayout) -> bool:
    """Return True if the layer averages over the whole height and width."""
    if layer.kind == "AveragePool":
        kernel_shape: tuple[int, ...] = tuple(layer.attributes.get("kernel_shape", ()))  # type: ignore[arg-type]
        return prod(kernel_shape) == layout.height * layout.width
    sizes = [size for size in layer.shape if size != 1]
    return layer.kind == "GlobalAveragePool" or (
        layer.kind in ("ReduceMean", "ReduceSum") and sizes == [layout.channels]
    )


RunGraph: TypeAlias = Callable[[list[str], Pixels], Sequence[Floats]]
"""Function that returns the values of the named tensors, each (n, ...), for a uint8 batch (n, height, width,
3)."""


@dataclass(frozen=True)
class Cam:
    """The class activation maps of all labels."""

    head: Head
    weights: Floats | None
    """float32 (logits, channels); None if the maps are those of the logits themselves."""
    is_binary: bool
    """True if the only logit is for the second label, and its negative for the first."""

    def compute_map(self, values: Floats, label: int) -> Floats:
        """Return the evidence for a label at each place, float32 (height, width).

        `values` are those of `head.maps` for one image, (1, …).
        """
        (maps,) = self.head.layout.to_maps(values)
        logit, sign = (0, 1 if label else -1) if self.is_binary else (label, 1)
        if self.weights is None:
            return np.asarray(np.float32(sign) * maps[logit], np.float32)
        return np.asarray(np.tensordot(np.float32(sign) * self.weights[logit], maps, axes=1), np.float32)


def verify_cam(head: Head, contract: Contract, run_graph: RunGraph) -> Cam:
    """Verify that the class activation maps are exact, and return them.

    The head may be a misreading of the layer table. Therefore the averages must reproduce the logits of two
    images, up to the bias. `run_graph` is called twice at most, in the calling thread, and must know the
    tensors of `head`. Raises `NoCam`.
    """
    images = np.stack([decode_golden_pixels(contract.golden.images[0]), _create_grey_image(contract)])
    values, logits = run_graph([head.maps, contract.logits_name], images)
    maps = head.layout.to_maps(values)  # (2, channels, height, width)
    weights = None
    if head.weight:
        (weights,) = run_graph([head.weight], images[:1])
        weight_shape = (
            (maps.shape[1], logits.shape[1]) if head.is_transposed else (logits.shape[1], maps.shape[1])
        )
        if weights.size != weight_shape[0] * weight_shape[1]:
            raise NoCam(_NO_CAM_REASON)
        # The weights may be kernels of 1 x 1.
        weights = np.float32(head.factor) * weights.reshape(weight_shape)
        weights = weights.T if head.is_transposed else weights
    averages = maps.mean(axis=(2, 3), dtype=np.float64)  # (2, channels)
    computed_logits = averages if weights is None else averages @ weights.T.astype(np.float64)
    if computed_logits.shape != logits.shape:
        raise NoCam(_NO_CAM_REASON)
    # The difference between the two images removes the bias.
    computed_change, expected_change = (
        np.diff(values.astype(np.float64), axis=0) for values in (computed_logits, logits)
    )
    relative_tolerance = _QUANTIZED_TOLERANCE if contract.quantization else _TOLERANCE
    tolerance = relative_tolerance * float(np.abs(expected_change).max()) + _ROUNDING_TOLERANCE * float(
        np.abs(logits).max()
    )
    if not float(np.abs(computed_change - expected_change).max()) <= tolerance:
        raise NoCam("the averages of the last maps and the linear layer do not give the logits")
    return Cam(head, weights, contract.task is Task.BINARY)


def _create_grey_image(contract: Contract) -> Pixels:
    return np.full((contract.input.height, contract.input.width, 3), 128, np.uint8)
