"""Class activation maps: which places of the last maps speak for a label (Zhou et al., 2016).

Where a network ends in an average over its last maps and a linear layer, a logit is the average over all
places of one number for each place: the label's row of weights times the maps there. This is exact; Grad-CAM
(Selvaraju et al., 2017) gives the same for such networks, by gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from service.contract import Contract, Layer
from service.engine import Floats

_ALIKE: Final = frozenset({"Identity", "Cast", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Operators that change the shape alone."""

_TOLERANCE: Final = 1e-3
"""Of a logit's difference, by the largest: what float32 makes of sums in another order is below 1e-5."""


class NoCam(Exception):
    """There is no class activation map for this network; the message says why, in a sentence."""


@dataclass(frozen=True)
class Head:
    """How a network ends, in names of tensors."""

    maps: str
    """(channels, height, width) that are averaged."""
    weight: str | None
    """(labels, channels); None where the maps are the labels' own."""
    transposed: bool = False
    """The weight is (channels, labels)."""


def head_of(contract: Contract) -> Head:
    """What the layer table says. Raises `NoCam`."""
    makers = {tensor: layer for layer in contract.layers for tensor in layer.outputs}
    known = makers.keys() | {contract.input_name}

    def behind(tensor: str) -> Layer | None:
        """The layer that made the values of a tensor."""
        layer = makers.get(tensor)
        while layer and layer.kind in _ALIKE:
            layer = makers.get(layer.inputs[0])
        return layer

    last = behind(contract.logits_name)
    if last and last.kind == "Add":  # a bias
        last = behind(next((name for name in last.inputs if name in known), ""))
    if last and _averages(last, makers):
        return Head(last.inputs[0], None)
    if last is None or last.kind not in ("Gemm", "MatMul", "Conv") or last.inputs[1] in known:
        raise NoCam(_WHY)
    pooled = behind(last.inputs[0])
    if pooled is None or not _averages(pooled, makers):
        raise NoCam(_WHY)
    transposed = last.kind == "MatMul" or (last.kind == "Gemm" and not last.attributes.get("transB"))
    return Head(pooled.inputs[0], last.inputs[1], transposed)


_WHY: Final = "the network does not end in an average over its last maps and one linear layer"


def _averages(layer: Layer, makers: dict[str, Layer]) -> bool:
    """Over the whole height and width of maps, as it seems; `Cam` makes sure."""
    given = makers.get(layer.inputs[0])
    if given is None or len(given.shape) != 3:
        return False
    if layer.kind == "AveragePool":
        return tuple(layer.attributes.get("kernel_shape", ())) == given.shape[1:]  # type: ignore[arg-type]
    channels = given.shape[0]
    return layer.kind == "GlobalAveragePool" or (
        layer.kind == "ReduceMean" and layer.shape[:1] == (channels,)
    )


class Cam:
    """The maps of every label."""

    def __init__(self, weights: Floats | None, *, binary: bool) -> None:
        """`weights` are float32 (logits, channels); None where the maps are the logits' own. A `binary`
        network's one logit speaks for the second label, and against the first."""
        self._weights = weights
        self._binary = binary

    @classmethod
    def proven(cls, head: Head, weights: Floats | None, maps: Floats, logits: Floats, *, binary: bool) -> Cam:
        """From what the graph has made of two images: maps, float32 (2, channels, height, width), and logits.

        The table may be read wrongly: the averages must give the logits, up to the bias. Raises `NoCam`.
        """
        if weights is not None:
            weights = weights.reshape(weights.shape[:2])  # a convolution's kernels of 1 x 1
            weights = weights.T if head.transposed else weights
        cam = cls(weights, binary=binary)
        averages = maps.mean(axis=(2, 3), dtype=np.float64)
        computed = averages if weights is None else averages @ weights.T.astype(np.float64)
        if computed.shape != logits.shape:
            raise NoCam(_WHY)
        apart = np.diff(computed - logits, axis=0)
        if not float(np.abs(apart).max()) <= _TOLERANCE * max(1.0, float(np.abs(logits).max())):
            raise NoCam("the averages of the last maps and the linear layer do not give the logits")
        return cam

    def map(self, maps: Floats, label: int) -> Floats:
        """How each place speaks for a label, float32 (height, width), by maps (channels, height, width)."""
        logit, sign = (0, 1 if label else -1) if self._binary else (label, 1)
        if self._weights is None:
            return np.asarray(np.float32(sign) * maps[logit], np.float32)
        return np.asarray(np.tensordot(np.float32(sign) * self._weights[logit], maps, axes=1), np.float32)
