"""A model whose inner values can be read: every tensor of the graph is one of its outputs.

The model computes the same results as the served model, but more slowly, because no operators are fused. Only
explanations run this model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fovea.service.artifact.contract import Contract
from fovea.service.artifact.onnx_edit import add_outputs
from fovea.service.errors import BadRequest, ModelError, NotFound
from fovea.service.explain.cam import NoCam, find_head, verify_cam
from fovea.service.explain.layer_view import LayerView
from fovea.service.explain.layers import LINEAR_KINDS, describe_layers, find_input_tensor
from fovea.service.explain.tensor_layout import find_image_tensors
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.engine import Floats, decode_golden_pixels
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.preprocess import decode_image, identity_geometry
from fovea.service.inference.session import open_session, run_outputs
from fovea.service.runners.load_messages import ProcessPlan

_MAX_CONSTANT_VALUES: Final = 16
"""Maximum number of values of a constant of the arithmetic, such as an exponent or paddings."""

_MAX_CACHED_BYTES: Final = 512 << 20
"""Maximum size in bytes of all values for one image that are kept. A ResNet-50 has 109 MB, a VGG-16 120
MB."""

_MAX_CACHED_WEIGHT_BYTES: Final = 1 << 18
"""Maximum size in bytes of a weight that is kept, such as weights of first layers, biases and norms."""

_MAX_REPLY_BYTES: Final = 16 << 20
"""Maximum size in bytes of the values in one reply, because they pass through the service."""


class IntrospectedModel:
    """A graph, and the values of its tensors for the last image.

    Only one thread at a time may use the model. The explaining process uses it on its only thread.
    """

    def __init__(self, model: bytes, contract: Contract, plan: ProcessPlan) -> None:
        """Open the graph from the content of the model file.

        Raises `ModelError`, with a sentence as its message, if the graph cannot be opened.
        """
        output_tensors = {tensor for layer in contract.layers for tensor in layer.outputs if tensor}
        input_tensors = {tensor for layer in contract.layers for tensor in layer.inputs if tensor}
        contract_tensors = {contract.input_name, contract.logits_name, contract.probabilities_name}
        self._contract = contract
        self._session = open_session(
            add_outputs(model, sorted((output_tensors | input_tensors) - contract_tensors)),
            "cpu",
            plan.max_threads,
            unoptimized=True,
        )
        shapes = {one.name: one.shape for one in self._session.get_outputs()}
        self._black_image = np.zeros((1, contract.input.height, contract.input.width, 3), np.uint8)
        fixed_tensors = input_tensors - find_image_tensors(contract)
        self._weights = {name: shapes[name] for name in fixed_tensors if name in shapes}
        small_tensors = [
            name for name, shape in self._weights.items() if _count_values(shape) <= _MAX_CONSTANT_VALUES
        ]
        test_card = _create_test_card(contract)
        *small_values, input_value = self._run_graph([*small_tensors, find_input_tensor(contract)], test_card)
        constants = dict(zip(small_tensors, small_values, strict=True))
        input_view, *other_views = describe_layers(self._complete_shapes(), self._weights, constants)
        self.layers: list[LayerView] = [
            replace(input_view, attributes=_describe_colours(input_view, input_value, test_card)),
            *other_views,
        ]
        self._layers_by_tensor = {layer.tensor: layer for layer in self.layers}
        self._input_tensors = {
            layer.input_tensor for layer in self.layers if layer.input_tensor
        } - self._layers_by_tensor.keys()
        self._image_pixels = plan.image_pixels
        self._memory = DecodeMemory(plan.decode_bytes)
        self._last_pixels: tuple[bytes, bool, Pixels] | None = None
        """The last image, whether it was prepared, and its pixels: questions about layers come in series."""
        self._last_outputs: tuple[bytes, Mapping[str, npt.NDArray[Any]]] = (b"", {})
        self._cached_weights: Mapping[str, npt.NDArray[Any]] = {}
        """Weights by their tensors."""
        self._verify_golden()

    @cached_property
    def has_cam(self) -> bool:
        """True if the network has class activation maps."""
        try:
            verify_cam(find_head(self._contract), self._contract, self._run_graph)
        except NoCam:
            return False
        return True

    def decode_image(self, image: bytes, *, is_prepared: bool) -> Pixels:
        """Decode an image; a `is_prepared` image is the model's input itself.

        Raises the errors of `preprocess.decode_image`, and `BadRequest` if a prepared image has another size.
        """
        if self._last_pixels and self._last_pixels[:2] == (image, is_prepared):
            return self._last_pixels[2]
        geometry = self._contract.input
        if is_prepared:
            geometry = identity_geometry(geometry.height, geometry.width)
        decoded_image = decode_image(image, geometry, max_pixels=self._image_pixels, memory=self._memory)
        if is_prepared and (decoded_image.width, decoded_image.height) != (geometry.width, geometry.height):
            raise BadRequest(
                f"a prepared image must have {geometry.width} x {geometry.height} pixels; "
                f"this image has {decoded_image.width} x {decoded_image.height}"
            )
        self._last_pixels = image, is_prepared, decoded_image.pixels
        return decoded_image.pixels

    def compute_output(self, tensor: str, pixels: Pixels) -> Floats:
        """Return the output of a layer, or the input vector of a linear layer, for an image.

        The image is uint8 (height, width, 3). The result is float32, maps are (channels, height, width).
        Raises `NotFound` if no layer has this tensor.
        """
        layout = None if tensor in self._input_tensors else self._find_layer(tensor).layout
        key = pixels.tobytes()
        if self._last_outputs[0] != key:
            self._last_outputs = (key, self._compute_outputs(pixels[None]))
        outputs = self._last_outputs[1]
        value = outputs[tensor] if tensor in outputs else self._run_graph([tensor], pixels[None])[0]
        maps = layout.to_maps(value) if layout else value
        image_maps = np.asarray(maps[0], np.float32)
        return image_maps.reshape(-1) if tensor in self._input_tensors else np.atleast_1d(image_maps)

    def read_weights(self, tensor: str, part: str) -> Floats:
        """Return a part of a layer's weights (`LayerView.weights`): float32, one row for each output.

        Raises `NotFound` if the layer does not exist or has no such part.
        """
        layer = self._find_layer(tensor)
        if part not in layer.weights:
            raise NotFound(
                f"layer {tensor!r} has no {part!r}; it has {', '.join(layer.weights) or 'no weights'}"
            )
        value = np.asarray(self._read_weight_tensor(layer.weights[part]), np.float32)
        if part == "weight":
            return np.moveaxis(value, -1, 0) if layer.is_transposed else value
        if part != "bias" or layer.kind not in LINEAR_KINDS:
            return value
        vector = value.reshape(-1)  # the bias of a Gemm may be (1, outputs), or one number for all outputs
        return np.repeat(vector, layer.shape[0] or 1) if vector.size == 1 else vector

    def _read_weight_tensor(self, name: str) -> npt.NDArray[Any]:
        """Return a weight.

        The first call reads all small weights at once, because every read runs the whole network.
        """
        if not self._cached_weights:
            names = [
                name
                for name, shape in self._weights.items()
                if 4 * _count_values(shape) <= _MAX_CACHED_WEIGHT_BYTES
            ]
            self._cached_weights = dict(zip(names, self._run_graph(names, self._black_image), strict=True))
        return (
            self._cached_weights[name]
            if name in self._cached_weights
            else self._run_graph([name], self._black_image)[0]
        )

    def _find_layer(self, tensor: str) -> LayerView:
        try:
            return self._layers_by_tensor[tensor]
        except KeyError:
            raise NotFound(f"there is no layer {tensor!r}") from None

    def _compute_outputs(self, batch: Pixels) -> Mapping[str, npt.NDArray[Any]]:
        """Return the values of all layers, or nothing if they are too large.

        One run costs the same for all layers as for one layer.
        """
        names = [*self._layers_by_tensor, *sorted(self._input_tensors)]
        if 4 * sum(_count_values(layer.shape) for layer in self.layers) > _MAX_CACHED_BYTES:
            return {}
        return dict(zip(names, self._run_graph(names, batch), strict=True))

    def _complete_shapes(self) -> Contract:
        """Return the contract with the shapes that are only known after a run."""
        layers = self._contract.layers
        unknown_tensors = [layer.outputs[0] for layer in layers if not layer.shape or None in layer.shape]
        values = self._run_graph(unknown_tensors, self._black_image)
        shapes = {name: np.shape(value)[1:] for name, value in zip(unknown_tensors, values, strict=True)}
        complete_layers = (
            replace(layer, shape=shapes.get(layer.outputs[0], layer.shape)) for layer in layers
        )
        return replace(self._contract, layers=tuple(complete_layers))

    def _run_graph(self, names: list[str], batch: Pixels) -> list[npt.NDArray[Any]]:
        if not names:
            return []
        computed_names = [name for name in names if name != self._contract.input_name]
        values = dict(zip(computed_names, run_outputs(self._session, computed_names, batch), strict=True))
        return [values.get(name, batch) for name in names]

    def _verify_golden(self) -> None:
        """Verify that the opened graph reproduces the golden set.

        Raises `ModelError` if it does not.
        """
        golden = self._contract.golden
        golden_image = golden.images[0]
        pixels = decode_golden_pixels(golden_image)[None]
        difference = float(
            np.abs(self._run_graph([self._contract.logits_name], pixels)[0][0] - golden_image.logits).max()
        )
        tolerance = golden.logit_tolerance.get("cpu/float32", 0.0)
        if not difference <= tolerance:
            raise ModelError(
                f"with all layers as outputs, the graph's logits are off by {difference:.3g}; "
                f"the tolerance is {tolerance:.3g}"
            )


_CARD_COLOURS: Final = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
"""Colours of the first pixels of the test card; the second to the fourth are the channels of the image."""

_CHANNEL_NAMES: Final = ("red", "green", "blue")


def _create_test_card(contract: Contract) -> Pixels:
    """Return a batch of one black image with pure colours in its first pixels."""
    image = np.zeros((contract.input.height * contract.input.width, 3), np.uint8)
    image[: len(_CARD_COLOURS)] = _CARD_COLOURS[: len(image)]
    return image.reshape(1, contract.input.height, contract.input.width, 3)


def _describe_colours(view: LayerView, value: npt.NDArray[Any], test_card: Pixels) -> dict[str, Any]:
    """Return which colour each map of the network's input shows, and its range; nothing if pixels are mixed.

    `value` is the input of the network for the test card.
    """
    _, height, width, _ = test_card.shape
    if view.layout is None or view.shape[1:] != (height, width) or height * width < len(_CARD_COLOURS):
        return {}
    colours = view.layout.to_maps(value)[0].reshape(view.layout.channels, -1)[:, : len(_CARD_COLOURS)]
    if not np.isfinite(colours).all():
        return {}
    # (maps, red, green, blue): what a pure colour adds to black
    responses = np.abs(colours[:, 1:4] - colours[:, :1])
    is_response = responses > 1e-4 * responses.max(initial=0)
    names = [
        _CHANNEL_NAMES[int(np.argmax(row))] if row.sum() == 1 else "grey" if row.all() else None
        for row in is_response
    ]
    colour_range = {"lowest": float(colours.min()), "highest": float(colours.max())}
    return {**colour_range, "channels": names} if None not in names else colour_range


def slice_rows(values: Floats, first: int, count: int) -> Floats:
    """Return `count` rows from `first` on, or all of them if `count` is 0.

    Raises `BadRequest`.
    """
    if first >= len(values):
        raise BadRequest(f"first is {first}; it must be less than {len(values)}, the number of rows")
    rows = values[first : first + count if count else None]
    _require_small(rows.nbytes, len(values))
    return rows


def select_rows(values: Floats, indices: Sequence[int]) -> Floats:
    """Return the rows with these indices, in their order.

    Raises `BadRequest`.
    """
    if max(indices) >= len(values):
        raise BadRequest(
            f"indices has {max(indices)}; it must be less than {len(values)}, the number of rows"
        )
    _require_small(values[0].nbytes * len(indices), len(values))  # an index may occur often
    return values[list(indices)]


def compute_strengths(values: Floats) -> Floats:
    """Return the mean absolute value of each map (channels, height, width), or of each value of a vector."""
    means = np.abs(values).reshape(len(values), -1).mean(axis=1, dtype=np.float64)
    return np.asarray(means, np.float32)


def _require_small(size: int, row_count: int) -> None:
    if size > _MAX_REPLY_BYTES:
        raise BadRequest(
            f"the reply would have {size} bytes; the limit is {_MAX_REPLY_BYTES}: "
            f"ask for fewer of the {row_count} with first and count"
        )


def _count_values(shape: Sequence[Any]) -> int:
    """Return the number of values in a tensor; if a size is unknown, a number that is too large to keep."""
    count = 1
    for size in shape:
        if not isinstance(size, int):
            return _MAX_CACHED_BYTES
        count *= size
    return count
