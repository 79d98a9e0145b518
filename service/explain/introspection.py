"""A model whose inner values can be read: every tensor of the graph is one of its outputs.

The model computes the same results as the served one, but more slowly, because no operators are fused. Only
explanations run it.
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
from fovea.service.explain.cam import NoCam, head_of, proven
from fovea.service.explain.layers import Shown, describe
from fovea.service.explain.tensor_layout import made_of_image
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.engine import Floats, decode_golden_pixels, open_session, run_outputs
from fovea.service.inference.preprocess import Pixels, decode_image, identity_geometry
from fovea.service.runners.messages import ProcessPlan

_SMALL: Final = 16
"""Maximum number of values of a constant of the arithmetic, such as an exponent or paddings."""

_KEPT_BYTES: Final = 512 << 20
"""Maximum size in bytes of all values for one image that are kept. A ResNet-50 has 109 MB, a VGG-16 120
MB."""

_KEPT_WEIGHT: Final = 1 << 18
"""Maximum size in bytes of a weight that is kept, such as weights of first layers, biases and norms."""

_REPLY_BYTES: Final = 16 << 20
"""Maximum size in bytes of the values in one reply, because they pass through the service."""


class Opened:
    """A graph, and the values of its tensors for the last image. Only one thread at a time may use it."""

    def __init__(self, model: bytes, contract: Contract, plan: ProcessPlan) -> None:
        """Open the graph from the content of the model file.

        Raises `ModelError`, with a sentence as its message, if the graph cannot be opened.
        """
        made = {tensor for layer in contract.layers for tensor in layer.outputs if tensor}
        read = {tensor for layer in contract.layers for tensor in layer.inputs if tensor}
        own = {contract.input_name, contract.logits_name, contract.probabilities_name}
        self._contract = contract
        self._session = open_session(
            add_outputs(model, sorted((made | read) - own)),
            "cpu",
            plan.max_threads,
            unoptimized=True,
        )
        shapes = {one.name: one.shape for one in self._session.get_outputs()}
        self._nothing = np.zeros((1, contract.input.height, contract.input.width, 3), np.uint8)
        fixed = read - made_of_image(contract)
        self._weights = {name: shapes[name] for name in fixed if name in shapes}
        small = [name for name, shape in self._weights.items() if _count(shape) <= _SMALL]
        constants = dict(zip(small, self._run(small, self._nothing), strict=True))
        self.layers: list[Shown] = describe(self._measured(), self._weights, constants)
        self._by_tensor = {layer.tensor: layer for layer in self.layers}
        self._image_pixels = plan.image_pixels
        self._memory = DecodeMemory(plan.decode_bytes)
        self._last: tuple[bytes, Mapping[str, npt.NDArray[Any]]] = (b"", {})
        self._kept: Mapping[str, npt.NDArray[Any]] = {}
        """Weights by their tensors."""
        self._prove()

    @cached_property
    def has_cam(self) -> bool:
        """True if the network has class activation maps."""
        try:
            proven(head_of(self._contract), self._contract, self._run)
        except NoCam:
            return False
        return True

    def see(self, image: bytes, *, prepared: bool) -> Pixels:
        """Decode an image; a `prepared` image is the model's input itself.

        Raises the errors of `preprocess.decode`, and `BadRequest` if a prepared image has another size.
        """
        geometry = self._contract.input
        if prepared:
            geometry = identity_geometry(geometry.height, geometry.width)
        decoded = decode_image(image, geometry, max_pixels=self._image_pixels, memory=self._memory)
        if prepared and (decoded.width, decoded.height) != (geometry.width, geometry.height):
            raise BadRequest(
                f"a prepared image has {geometry.width} x {geometry.height} pixels, "
                f"not {decoded.width} x {decoded.height}"
            )
        return decoded.pixels

    def values(self, tensor: str, pixels: Pixels) -> Floats:
        """Return the output of a layer for an image, uint8 (height, width, 3).

        The result is float32, maps are (channels, height, width). Raises `NotFound` if no layer has this
        tensor.
        """
        layer = self._layer(tensor)
        key = pixels.tobytes()
        if self._last[0] != key:
            self._last = (key, self._all(pixels[None]))
        kept = self._last[1]
        value = kept[tensor] if tensor in kept else self._run([tensor], pixels[None])[0]
        arrangement = layer.arrangement
        maps = arrangement.maps(value) if arrangement else value
        return np.atleast_1d(np.asarray(maps[0], np.float32))

    def weight(self, tensor: str, part: str) -> Floats:
        """Return a part of a layer's weights (`Shown.weights`): float32, one row for each output.

        Raises `NotFound` if the layer does not exist or has no such part.
        """
        layer = self._layer(tensor)
        if part not in layer.weights:
            raise NotFound(
                f"layer {tensor!r} has no {part!r}; it has {', '.join(layer.weights) or 'no weights'}"
            )
        value = np.asarray(self._weight(layer.weights[part]), np.float32)
        return np.moveaxis(value, -1, 0) if part == "weight" and layer.transposed else value

    def _weight(self, name: str) -> npt.NDArray[Any]:
        """Return a weight.

        The first call reads all small weights at once, because every read runs the whole network.
        """
        if not self._kept:
            names = [name for name, shape in self._weights.items() if 4 * _count(shape) <= _KEPT_WEIGHT]
            self._kept = dict(zip(names, self._run(names, self._nothing), strict=True))
        return self._kept[name] if name in self._kept else self._run([name], self._nothing)[0]

    def _layer(self, tensor: str) -> Shown:
        try:
            return self._by_tensor[tensor]
        except KeyError:
            raise NotFound(f"there is no layer {tensor!r}") from None

    def _all(self, batch: Pixels) -> Mapping[str, npt.NDArray[Any]]:
        """Return the values of all layers, or nothing if they are too large.

        One run costs the same for all layers as for one layer.
        """
        names = list(self._by_tensor)
        if 4 * sum(_count(layer.shape) for layer in self.layers) > _KEPT_BYTES:
            return {}
        return dict(zip(names, self._run(names, batch), strict=True))

    def _measured(self) -> Contract:
        """Return the contract with the shapes that are only known after a run."""
        layers = self._contract.layers
        unknown = [layer.outputs[0] for layer in layers if not layer.shape or None in layer.shape]
        values = self._run(unknown, self._nothing)
        shapes = {name: np.shape(value)[1:] for name, value in zip(unknown, values, strict=True)}
        measured = (replace(layer, shape=shapes.get(layer.outputs[0], layer.shape)) for layer in layers)
        return replace(self._contract, layers=tuple(measured))

    def _run(self, names: list[str], batch: Pixels) -> list[npt.NDArray[Any]]:
        if not names:
            return []
        own = [name for name in names if name != self._contract.input_name]
        values = dict(zip(own, run_outputs(self._session, own, batch), strict=True))
        return [values.get(name, batch) for name in names]

    def _prove(self) -> None:
        """Verify that the opened graph reproduces the golden set.

        Raises `ModelError` if it does not.
        """
        golden = self._contract.golden
        first = golden.images[0]
        pixels = decode_golden_pixels(first)[None]
        difference = float(np.abs(self._run([self._contract.logits_name], pixels)[0][0] - first.logits).max())
        tolerance = golden.logit_tolerance.get("cpu/float32", 0.0)
        if not difference <= tolerance:
            raise ModelError(f"with all its layers as outputs the graph's logits are off by {difference:.3g}")


def part_of(values: Floats, first: int, count: int) -> Floats:
    """Return `count` rows from `first` on, or all of them if `count` is 0.

    Raises `BadRequest`.
    """
    if first >= len(values):
        raise BadRequest(f"first is {first}; there are {len(values)}")
    part = values[first : first + count if count else None]
    if part.nbytes > _REPLY_BYTES:
        raise BadRequest(
            f"these are {part.nbytes} bytes, and at most {_REPLY_BYTES} are given at once: "
            f"ask for fewer of the {len(values)} with first and count"
        )
    return part


def _count(shape: Sequence[Any]) -> int:
    """Return the number of values in a tensor; if a size is unknown, a number that is too large to keep."""
    count = 1
    for size in shape:
        if not isinstance(size, int):
            return _KEPT_BYTES
        count *= size
    return count
