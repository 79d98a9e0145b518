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
from fovea.service.inference.engine import Engine, Floats
from fovea.service.inference.pixels import Pixels, brightness_of

_MAX_LABELS: Final = 9
"""Number of labels that are counted separately; all others are counted together."""

_BIN_COUNT: Final = 10
"""Number of bins of equal mass, as far as equal values allow."""


def measure_reference(engine: Engine, *example_sets: Examples) -> DriftReference:
    """Return the reference from the predictions of `engine` on the held-out images."""
    observations = [
        _predict_examples(engine, part.pixels[rows].numpy())
        for part in example_sets
        for rows in torch.split(torch.arange(len(part)), BATCH_SIZE)
        if len(rows)
    ]
    labels, confidence, brightness = (np.concatenate(values) for values in zip(*observations, strict=True))
    return build_reference(engine.contract.labels, labels, confidence, brightness)


def build_reference(
    label_names: tuple[str, ...], labels: npt.NDArray[np.int64], confidence: Floats, brightness: Floats
) -> DriftReference:
    """Return the reference from each image's top label index, its probability and the brightness.

    All three arrays have shape (n,).
    """
    best = Counter(labels.tolist()).most_common(_MAX_LABELS)
    return DriftReference(
        images=len(labels),
        labels={label_names[label]: count for label, count in best},
        confidence=_measure_spread(confidence),
        brightness=_measure_spread(brightness),
    )


def _predict_examples(engine: Engine, pixels: Pixels) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """Return the top label index, its probability and the brightness of each image, each (n,)."""
    probabilities = engine.run(pixels)
    return probabilities.argmax(axis=1), probabilities.max(axis=1), brightness_of(pixels)


def _measure_spread(values: Floats) -> Histogram:
    shares = np.arange(1, _BIN_COUNT) / _BIN_COUNT
    edges = np.unique(np.quantile(values.astype(np.float64), shares))
    bins = np.searchsorted(edges, values, side="right")  # the same convention as `bisect_right`
    return Histogram(tuple(edges.tolist()), tuple(np.bincount(bins, minlength=len(edges) + 1).tolist()))
