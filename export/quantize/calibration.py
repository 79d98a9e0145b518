"""Ranges of activations from calibration images, in bounded memory.

ONNX Runtime's own calibrators keep every tensor of every image. This collector runs one image at a time and
keeps one histogram for each tensor: a first pass finds the extremes, and a second pass counts into bins
between them. All methods use the same histograms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from fovea.export.quantize.refusal import QuantizeRefused
from fovea.service.artifact.onnx_edit import add_outputs
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.session import open_session, run_outputs

_BIN_COUNT: Final = 2048
"""Number of bins of a histogram, as in TensorRT's and MXNet's calibration."""

_PERCENTILE: Final = 99.99
"""Share of the values, in percent, that a range of `percentile` keeps, half of the rest cut at each end."""

_LEVELS: Final = 256
"""Number of values of a quantized activation."""

_CANDIDATE_STEP: Final = 8
"""Number of bins by which the candidates of `entropy` differ."""

Counts = npt.NDArray[np.float64]


class CalibrationMethod(StrEnum):
    """The method that chooses the range of an activation."""

    MINMAX = "minmax"
    """The smallest and the largest value."""
    ENTROPY = "entropy"
    """The range with the least Kullback-Leibler divergence (Migacz, 2017, 8-bit Inference with TensorRT)."""
    PERCENTILE = "percentile"
    """The range without the most extreme values."""


@dataclass(frozen=True)
class Histogram:
    """The distribution of the values of a tensor between its extremes."""

    low: float
    high: float
    counts: Counts
    """Numbers of values, float64 (`_BIN_COUNT`,); empty while all values are equal."""

    def find_range(self, method: CalibrationMethod) -> tuple[float, float]:
        """Return the range that a method chooses."""
        if method is CalibrationMethod.MINMAX or not self.counts.any():
            return self.low, self.high
        first, last = (
            _cut_percentile(self.counts)
            if method is CalibrationMethod.PERCENTILE
            else _cut_by_entropy(self.counts, self._zero_bin)
        )
        width = (self.high - self.low) / len(self.counts)
        return self.low + first * width, self.low + last * width

    @property
    def _zero_bin(self) -> int:
        """Bin in which 0 lies, or the bin next to 0."""
        share = -self.low / (self.high - self.low)
        return int(np.clip(share * len(self.counts), 0, len(self.counts) - 1))


def collect_histograms(
    model: ModelProto, tensors: Sequence[str], images: Callable[[], Iterator[Pixels]], threads: int
) -> dict[str, Histogram]:
    """Return the histogram of each tensor.

    `images` returns the calibration images, each uint8 (height, width, 3), and is called twice. At any time
    the memory holds the tensors of one image, and one histogram for each tensor. Raises `QuantizeRefused` if
    a value is not finite, and `ModelError`.
    """
    outputs = {output.name for output in model.graph.output}
    content = add_outputs(model.SerializeToString(), [name for name in tensors if name not in outputs])
    session = open_session(content, "cpu", threads)

    def run_images() -> Iterator[dict[str, npt.NDArray[Any]]]:
        for pixels in images():
            yield dict(zip(tensors, run_outputs(session, tensors, pixels[None]), strict=True))

    lows, highs = dict.fromkeys(tensors, np.inf), dict.fromkeys(tensors, -np.inf)
    for values in run_images():
        for name, tensor in values.items():
            lows[name] = min(lows[name], float(tensor.min()))
            highs[name] = max(highs[name], float(tensor.max()))
    for name in tensors:
        if not np.isfinite([lows[name], highs[name]]).all():
            raise QuantizeRefused(
                f"the tensor {name!r} is not finite for some calibration images, so it has no range; "
                "serve the float model"
            )
    counts = {name: np.zeros(_BIN_COUNT, np.float64) for name in tensors}
    for values in run_images():
        for name, tensor in values.items():
            if lows[name] < highs[name]:
                counts[name] += np.histogram(tensor, _BIN_COUNT, (lows[name], highs[name]))[0]
    return {name: Histogram(lows[name], highs[name], counts[name]) for name in tensors}


def _cut_percentile(counts: Counts) -> tuple[int, int]:
    """Return the first bin and the end of the bins that hold `_PERCENTILE` of the values."""
    cut = counts.sum() * (100 - _PERCENTILE) / 200
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])
    first = int(np.searchsorted(below, cut, side="right"))
    last = len(counts) - int(np.searchsorted(above, cut, side="right"))
    return (first, last) if first < last else (0, len(counts))


def _cut_by_entropy(counts: Counts, zero_bin: int) -> tuple[int, int]:
    """Return the bins that lose the least information when `_LEVELS` values represent them.

    The candidates hold all values up to a distance from 0, as far as there are values on both sides. The bin
    of 0 counts as much as its neighbours, as in NVIDIA's calibration: zeros need no level of their own width,
    but the many zeros behind a ReLU would make every range look bad that gives a level several bins.
    """
    bin_count = len(counts)
    counts = counts.copy()
    neighbours = counts[max(zero_bin - 1, 0) : zero_bin + 2]
    counts[zero_bin] = (neighbours.sum() - counts[zero_bin]) / (len(neighbours) - 1)
    best, best_divergence = (0, bin_count), np.inf
    for distance in range(_LEVELS // 2, bin_count + _CANDIDATE_STEP, _CANDIDATE_STEP):
        first, last = max(0, zero_bin - distance), min(bin_count, zero_bin + distance)
        divergence = _compute_divergence(counts, first, last)
        if divergence < best_divergence:
            best, best_divergence = (first, last), divergence
        if (first, last) == (0, bin_count):
            break
    return best


def _compute_divergence(counts: Counts, first: int, last: int) -> float:
    """Return the Kullback-Leibler divergence of the quantized distribution from the clipped original."""
    inside = counts[first:last]
    original = inside.copy()
    original[0] += counts[:first].sum()
    original[-1] += counts[last:].sum()
    level = np.arange(len(inside)) * _LEVELS // len(inside)
    sums = np.bincount(level, inside, _LEVELS)
    filled_bins = np.bincount(level, inside > 0, _LEVELS)
    quantized = np.where(inside > 0, (sums / np.maximum(filled_bins, 1))[level], 0.0)
    if not quantized.any():
        return np.inf
    p, q = original / original.sum(), quantized / quantized.sum()
    # Clipped values fall on bins that the quantized distribution lacks; a small mass stands for them there.
    smallest_mass = 1e-9
    used_bins = p > 0
    return float(np.sum(p[used_bins] * np.log(p[used_bins] / np.maximum(q[used_bins], smallest_mass))))
