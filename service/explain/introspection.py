"""A model that can be looked into: every tensor of the graph is one of its outputs.

It computes the same as what serves, and slower, since nothing is fused: only explanations run it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fovea.service.artifact.contract import Contract
from fovea.service.artifact.onnx_edit import with_outputs
from fovea.service.errors import BadRequest, ModelError, NotFound
from fovea.service.explain.cam import NoCam, head_of, proven
from fovea.service.explain.layers import Shown, describe
from fovea.service.explain.tensor_layout import made_of_image
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.engine import Floats, golden_pixels, open_session, run_outputs
from fovea.service.inference.preprocess import Pixels, as_it_is, decode
from fovea.service.runners.messages import Plan

_SMALL: Final = 16
"""Most values of a constant of the arithmetic, such as an exponent or paddings."""

_KEPT_BYTES: Final = 512 << 20
"""Most of all values for one image that are kept: a ResNet-50's have 109 MB, a VGG-16's 120."""

_KEPT_WEIGHT: Final = 1 << 18
"""Most bytes of a weight that is kept: of first layers, biases, norms."""

_REPLY_BYTES: Final = 16 << 20
"""Most bytes of values that are given at once: they pass through the service."""


class Opened:
    """One graph, and what it has made of the last image. To be used by one thread at a time."""

    def __init__(self, model: bytes, contract: Contract, plan: Plan) -> None:
        """`model` is the file's content. Raises `ModelError`, a sentence, where it cannot be opened."""
        made = {tensor for layer in contract.layers for tensor in layer.outputs if tensor}
        read = {tensor for layer in contract.layers for tensor in layer.inputs if tensor}
        own = {contract.input_name, contract.logits_name, contract.probabilities_name}
        self._contract = contract
        self._session = open_session(
            with_outputs(model, sorted((made | read) - own)),
            "cpu",
            plan.most_threads,
            as_written=True,
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
        """Weights, by the tensor."""
        self._prove()

    @cached_property
    def has_cam(self) -> bool:
        """There are class activation maps."""
        try:
            proven(head_of(self._contract), self._contract, self._run)
        except NoCam:
            return False
        return True

    def see(self, image: bytes, *, prepared: bool) -> Pixels:
        """Decode an image; a `prepared` one is the model's input itself. Raises what `images.decode` does."""
        geometry = self._contract.input
        if prepared:
            geometry = as_it_is(geometry.height, geometry.width)
        decoded = decode(image, geometry, max_pixels=self._image_pixels, memory=self._memory)
        if prepared and (decoded.width, decoded.height) != (geometry.width, geometry.height):
            raise BadRequest(
                f"a prepared image has {geometry.width} x {geometry.height} pixels, "
                f"not {decoded.width} x {decoded.height}"
            )
        return decoded.pixels

    def values(self, tensor: str, pixels: Pixels) -> Floats:
        """What a layer makes of an image, uint8 (height, width, 3): float32, maps (channels, height, width).

        Raises `NotFound` for a tensor that is no layer's.
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
        """The weights of a layer, by their part (`Shown.weights`): float32, one row for each output.

        Raises `NotFound` for what has none.
        """
        layer = self._layer(tensor)
        if part not in layer.weights:
            raise NotFound(
                f"layer {tensor!r} has no {part!r}; it has {', '.join(layer.weights) or 'no weights'}"
            )
        value = np.asarray(self._weight(layer.weights[part]), np.float32)
        return np.moveaxis(value, -1, 0) if part == "weight" and layer.transposed else value

    def _weight(self, name: str) -> npt.NDArray[Any]:
        """Weights that are not large are had all at once: a run of the whole network gives any."""
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
        """All layers' values at once, where that is not too much: one run costs the same as one layer."""
        names = list(self._by_tensor)
        if 4 * sum(_count(layer.shape) for layer in self.layers) > _KEPT_BYTES:
            return {}
        return dict(zip(names, self._run(names, batch), strict=True))

    def _measured(self) -> Contract:
        """With the shapes that only a run can tell."""
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
        """Raise `ModelError` unless it computes what the golden set says."""
        golden = self._contract.golden
        first = golden.images[0]
        pixels = golden_pixels(first)[None]
        difference = float(np.abs(self._run([self._contract.logits_name], pixels)[0][0] - first.logits).max())
        tolerance = golden.logit_tolerance.get("cpu/float32", 0.0)
        if not difference <= tolerance:
            raise ModelError(f"with all its layers as outputs the graph's logits are off by {difference:.3g}")


def part_of(values: Floats, first: int, count: int) -> Floats:
    """Rows from `first` on, `count` of them or all that there are, where it is 0. Raises `BadRequest`."""
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
    """Values in a tensor; more than are kept where a size is not known."""
    count = 1
    for size in shape:
        if not isinstance(size, int):
            return _KEPT_BYTES
        count *= size
    return count
