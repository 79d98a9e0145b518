"""The reference for drift detection: the exported graph's predictions on the held-out images."""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from fovea.model.data.examples import Examples
from fovea.model.evaluation.evaluate import BATCH_SIZE
from fovea.service.artifact.contract import DriftReference, Histogram
from fovea.service.inference.drift import brightness_of
from fovea.service.inference.engine import Engine, Floats
from fovea.service.inference.preprocess import Pixels

_LABELS: Final = 9
"""Number of labels that are counted separately; all others are counted together."""

_BINS: Final = 10
"""Number of bins of equal mass, as far as equal values allow."""


def reference(engine: Engine, *held_out: Examples) -> DriftReference:
    """Return the reference from the predictions of `engine` on the held-out images."""
    seen = [
        _seen(engine, part.pixels[rows].numpy())
        for part in held_out
        for rows in torch.split(torch.arange(len(part)), BATCH_SIZE)
        if len(rows)
    ]
    labels, confidence, brightness = (np.concatenate(values) for values in zip(*seen, strict=True))
    return reference_of(engine.contract.labels, labels, confidence, brightness)


def reference_of(
    names: tuple[str, ...], labels: npt.NDArray[np.int64], confidence: Floats, brightness: Floats
) -> DriftReference:
    """Return the reference from each image's top label index, its probability and the brightness.

    All three arrays have shape (n,).
    """
    best = Counter(labels.tolist()).most_common(_LABELS)
    return DriftReference(
        images=len(labels),
        labels={names[label]: count for label, count in best},
        confidence=_spread(confidence),
        brightness=_spread(brightness),
    )


def _seen(engine: Engine, pixels: Pixels) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """Return the top label index, its probability and the brightness of each image, each (n,)."""
    said = engine.run(pixels)
    return said.argmax(axis=1), said.max(axis=1), brightness_of(pixels)


def _spread(values: Floats) -> Histogram:
    shares = np.arange(1, _BINS) / _BINS
    edges = np.unique(np.quantile(values.astype(np.float64), shares))
    bins = np.searchsorted(edges, values, side="right")  # the same convention as `bisect_right`
    return Histogram(tuple(edges.tolist()), tuple(np.bincount(bins, minlength=len(edges) + 1).tolist()))
