"""The result of checking a model on labelled images; without torch, which only the check needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fovea.service.artifact.contract import Accuracy, DriftReference, KnownScore, PixelPath

MIN_FAST_IMAGES: Final = 100
"""Minimum number of images, decoded by `fast` at a smaller scale, for showing that `fast` is lossless.

If no answer of 100 changes, fewer than 3 % of all answers change, in 19 of 20 cases (rule of three).
"""


@dataclass(frozen=True)
class CheckReport:
    """The model's results on labelled images."""

    data: str
    images: int
    top1: float
    top5: float
    unreadable: dict[str, str]
    tried: int
    """Number of images on which other recipes were tried."""
    others: dict[str, tuple[float, float]]
    """(top-1, mean probability of the true label) by recipe on these images; `own` is the chosen recipe."""
    fast_scaled: int
    """Number of images that `fast` decodes at a smaller scale."""
    fast_changed: int
    """Number of answers that `fast` pixels change."""
    fast_difference: float
    """Largest difference of a probability between `fast` and `exact` pixels."""


@dataclass(frozen=True)
class CheckResult:
    """The results of the check for the contract."""

    pixel_path: PixelPath
    accuracy: Accuracy
    reference: DriftReference
    known: KnownScore | None
    report: CheckReport
