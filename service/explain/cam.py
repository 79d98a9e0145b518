"""Class activation maps: the evidence for a label at each place of the last feature maps (Zhou et al., 2016).

If a network ends in global average pooling of its last feature maps and a linear layer, a logit is an average
over all places. The number at each place is the label's row of weights times the feature maps there. This is
exact. Grad-CAM (Selvaraju et al., 2017) gives the same maps for such networks, but needs gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from fovea.service.artifact.contract import Contract, Layer, Task
from fovea.service.explain.layers import is_transposed
from fovea.service.explain.tensor_layout import Arrangement, arrangements, made_of_image
from fovea.service.inference.engine import Floats, decode_golden_pixels
from fovea.service.inference.preprocess import Pixels

_ALIKE: Final = frozenset({"Identity", "Cast", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Operators that change only the shape."""

_TOLERANCE: Final = 1e-3
"""Tolerance relative to the difference between the logits of two images."""

_ROUNDING: Final = 1e-5
"""Tolerance relative to the logits themselves. The rounding error of float32 sums in another order is
smaller."""


class NoCam(Exception):
    """This network has no class activation map; the message is a sentence that says why."""


@dataclass(frozen=True)
class Head:
    """The final layers of a network, by the names of their tensors."""

    maps: str
    """Tensor that is averaged over its places."""
    arrangement: Arrangement
    """Layout of the maps in that tensor."""
    weight: str | None
    """Weight tensor (labels, channels); None if the maps belong to the labels directly."""
    transposed: bool = False
    """True if the weight is (channels, labels)."""
    factor: float = 1.0
    """Factor by which the products are multiplied."""


def head_of(contract: Contract) -> Head:
    """Find the head of a network in its layer table.

    Raises `NoCam`. The result is a guess until `proven` has verified it.
    """
    makers = {tensor: layer for layer in contract.layers for tensor in layer.outputs}
    made = made_of_image(contract)
    arranged = arrangements(contract)

    def behind(tensor: str) -> Layer | None:
        """Return the layer that computed the values of a tensor."""
        layer = makers.get(tensor)
        while layer and layer.kind in _ALIKE:
            layer = makers.get(layer.inputs[0])
        return layer

    def averaged(layer: Layer | None) -> Arrangement | None:
        """Return the layout of the maps that a layer seems to average; `proven` verifies the guess."""
        given = arranged.get(layer.inputs[0]) if layer else None
        return given if layer and given and _averages(layer, given) else None

    last = behind(contract.logits_name)
    if last and last.kind == "Add":  # the bias
        last = behind(next((name for name in last.inputs if name in made), ""))
    if last and (arrangement := averaged(last)):
        return Head(last.inputs[0], arrangement, None)
    if last is None or last.kind not in ("Gemm", "MatMul", "Conv") or last.inputs[1] in made:
        raise NoCam(_WHY)
    pooled = behind(last.inputs[0])
    arrangement = averaged(pooled)
    if pooled is None or arrangement is None:
        raise NoCam(_WHY)
    # ONNX defines `alpha` of a Gemm as a float.
    factor = float(last.attributes.get("alpha", 1.0))  # type: ignore[arg-type]
    return Head(pooled.inputs[0], arrangement, last.inputs[1], is_transposed(last), factor)


_WHY: Final = "the network does not end in an average over its last maps and one linear layer"


def _averages(layer: Layer, given: Arrangement) -> bool:
    """Return True if the layer averages over the whole height and width."""
    if layer.kind == "AveragePool":
        return tuple(layer.attributes.get("kernel_shape", ())) == given.shape[1:]  # type: ignore[arg-type]
    alone = [size for size in layer.shape if size != 1]
    return layer.kind == "GlobalAveragePool" or (layer.kind == "ReduceMean" and alone == [given.channels])


Run: TypeAlias = Callable[[list[str], Pixels], Sequence[Floats]]
"""Function that returns the values of the named tensors, each (n, ...), for a uint8 batch (n, height, width,
3)."""


@dataclass(frozen=True)
class Cam:
    """The class activation maps of all labels."""

    head: Head
    weights: Floats | None
    """float32 (logits, channels); None if the maps are those of the logits themselves."""
    binary: bool
    """True if the only logit is for the second label, and its negative for the first."""

    def map(self, values: Floats, label: int) -> Floats:
        """Return the evidence for a label at each place, float32 (height, width).

        `values` are those of `head.maps` for one image, (1, …).
        """
        (maps,) = self.head.arrangement.maps(values)
        logit, sign = (0, 1 if label else -1) if self.binary else (label, 1)
        if self.weights is None:
            return np.asarray(np.float32(sign) * maps[logit], np.float32)
        return np.asarray(np.tensordot(np.float32(sign) * self.weights[logit], maps, axes=1), np.float32)


def proven(head: Head, contract: Contract, run: Run) -> Cam:
    """Verify that the class activation maps are exact, and return them.

    The head may be a misreading of the layer table. Therefore the averages must reproduce the logits of two
    images, up to the bias. `run` must know the tensors of `head`. Raises `NoCam`.
    """
    images = np.stack([decode_golden_pixels(contract.golden.images[0]), _grey(contract)])
    values, logits = run([head.maps, contract.logits_name], images)
    maps = head.arrangement.maps(values)  # (2, channels, height, width)
    weights = None
    if head.weight:
        (weights,) = run([head.weight], images[:1])
        rows = (maps.shape[1], logits.shape[1]) if head.transposed else (logits.shape[1], maps.shape[1])
        if weights.size != rows[0] * rows[1]:
            raise NoCam(_WHY)
        weights = np.float32(head.factor) * weights.reshape(rows)  # the weights may be kernels of 1 x 1
        weights = weights.T if head.transposed else weights
    averages = maps.mean(axis=(2, 3), dtype=np.float64)  # (2, channels)
    computed = averages if weights is None else averages @ weights.T.astype(np.float64)
    if computed.shape != logits.shape:
        raise NoCam(_WHY)
    # The difference between the two images removes the bias.
    moved, wanted = (np.diff(values.astype(np.float64), axis=0) for values in (computed, logits))
    allowed = _TOLERANCE * float(np.abs(wanted).max()) + _ROUNDING * float(np.abs(logits).max())
    if not float(np.abs(moved - wanted).max()) <= allowed:
        raise NoCam("the averages of the last maps and the linear layer do not give the logits")
    return Cam(head, weights, contract.task is Task.BINARY)


def _grey(contract: Contract) -> Pixels:
    return np.full((contract.input.height, contract.input.width, 3), 128, np.uint8)
