"""Class activation maps: which places of the last maps speak for a label (Zhou et al., 2016).

Where a network ends in an average over its last maps and a linear layer, a logit is the average over all
places of one number for each place: the label's row of weights times the maps there. This is exact; Grad-CAM
(Selvaraju et al., 2017) gives the same for such networks, by gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from fovea.service.artifact.contract import Contract, Layer, Task
from fovea.service.explain.layers import is_transposed
from fovea.service.explain.tensor_layout import Arrangement, arrangements, made_of_image
from fovea.service.inference.engine import Floats, golden_pixels
from fovea.service.inference.preprocess import Pixels

_ALIKE: Final = frozenset({"Identity", "Cast", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Operators that change the shape alone."""

_TOLERANCE: Final = 1e-3
"""Of the difference between two images' logits."""

_ROUNDING: Final = 1e-5
"""Of the logits themselves: what float32 makes of sums in another order is less."""


class NoCam(Exception):
    """There is no class activation map for this network; the message says why, in a sentence."""


@dataclass(frozen=True)
class Head:
    """How a network ends, in names of tensors."""

    maps: str
    """What is averaged over its places."""
    arrangement: Arrangement
    """How they lie in it."""
    weight: str | None
    """(labels, channels); None where the maps are the labels' own."""
    transposed: bool = False
    """The weight is (channels, labels)."""
    factor: float = 1.0
    """What the products are multiplied by."""


def head_of(contract: Contract) -> Head:
    """What the layer table says. Raises `NoCam`."""
    makers = {tensor: layer for layer in contract.layers for tensor in layer.outputs}
    made = made_of_image(contract)
    arranged = arrangements(contract)

    def behind(tensor: str) -> Layer | None:
        """The layer that made the values of a tensor."""
        layer = makers.get(tensor)
        while layer and layer.kind in _ALIKE:
            layer = makers.get(layer.inputs[0])
        return layer

    def averaged(layer: Layer | None) -> Arrangement | None:
        """How the maps lie whose averages a layer gives, as it seems; `proven` makes sure."""
        given = arranged.get(layer.inputs[0]) if layer else None
        return given if layer and given and _averages(layer, given) else None

    last = behind(contract.logits_name)
    if last and last.kind == "Add":  # a bias
        last = behind(next((name for name in last.inputs if name in made), ""))
    if last and (arrangement := averaged(last)):
        return Head(last.inputs[0], arrangement, None)
    if last is None or last.kind not in ("Gemm", "MatMul", "Conv") or last.inputs[1] in made:
        raise NoCam(_WHY)
    pooled = behind(last.inputs[0])
    arrangement = averaged(pooled)
    if pooled is None or arrangement is None:
        raise NoCam(_WHY)
    factor = float(last.attributes.get("alpha", 1.0))  # type: ignore[arg-type]  # a Gemm's own type
    return Head(pooled.inputs[0], arrangement, last.inputs[1], is_transposed(last), factor)


_WHY: Final = "the network does not end in an average over its last maps and one linear layer"


def _averages(layer: Layer, given: Arrangement) -> bool:
    """Whether it does so over the whole height and width."""
    if layer.kind == "AveragePool":
        return tuple(layer.attributes.get("kernel_shape", ())) == given.shape[1:]  # type: ignore[arg-type]
    alone = [size for size in layer.shape if size != 1]
    return layer.kind == "GlobalAveragePool" or (layer.kind == "ReduceMean" and alone == [given.channels])


Run: TypeAlias = Callable[[list[str], Pixels], Sequence[Floats]]
"""Gives the values of these tensors, each (n, ...), for a batch of uint8 (n, height, width, 3)."""


@dataclass(frozen=True)
class Cam:
    """The maps of every label."""

    head: Head
    weights: Floats | None
    """float32 (logits, channels); None where the maps are the logits' own."""
    binary: bool
    """The one logit speaks for the second label, and against the first."""

    def map(self, values: Floats, label: int) -> Floats:
        """How each place speaks for a label, float32 (height, width), by what `head.maps` has for one image,
        (1, …)."""
        (maps,) = self.head.arrangement.maps(values)
        logit, sign = (0, 1 if label else -1) if self.binary else (label, 1)
        if self.weights is None:
            return np.asarray(np.float32(sign) * maps[logit], np.float32)
        return np.asarray(np.tensordot(np.float32(sign) * self.weights[logit], maps, axes=1), np.float32)


def proven(head: Head, contract: Contract, run: Run) -> Cam:
    """The maps, once it is sure that they are exact. `run` must know the tensors of `head`. Raises `NoCam`.

    The table may be read wrongly: on two images the averages must give the logits, up to the bias.
    """
    images = np.stack([golden_pixels(contract.golden.images[0]), _grey(contract)])
    values, logits = run([head.maps, contract.logits_name], images)
    maps = head.arrangement.maps(values)
    weights = None
    if head.weight:
        (weights,) = run([head.weight], images[:1])
        rows = (maps.shape[1], logits.shape[1]) if head.transposed else (logits.shape[1], maps.shape[1])
        if weights.size != rows[0] * rows[1]:
            raise NoCam(_WHY)
        weights = np.float32(head.factor) * weights.reshape(rows)  # or kernels of 1 x 1
        weights = weights.T if head.transposed else weights
    averages = maps.mean(axis=(2, 3), dtype=np.float64)
    computed = averages if weights is None else averages @ weights.T.astype(np.float64)
    if computed.shape != logits.shape:
        raise NoCam(_WHY)
    moved, wanted = (np.diff(values.astype(np.float64), axis=0) for values in (computed, logits))
    allowed = _TOLERANCE * float(np.abs(wanted).max()) + _ROUNDING * float(np.abs(logits).max())
    if not float(np.abs(moved - wanted).max()) <= allowed:
        raise NoCam("the averages of the last maps and the linear layer do not give the logits")
    return Cam(head, weights, contract.task is Task.BINARY)


def _grey(contract: Contract) -> Pixels:
    return np.full((contract.input.height, contract.input.width, 3), 128, np.uint8)
