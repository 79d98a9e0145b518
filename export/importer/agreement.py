"""Comparison of an imported model with the original file in plain ONNX Runtime."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from fovea.export.importer.batch_check import BATCHES
from fovea.export.importer.foreign_model import Arithmetic, Array
from fovea.export.importer.inspect import TOLERANCE, ForeignModel, draw_noise
from fovea.export.verification_error import VerificationError
from fovea.service.inference.engine import Engine
from fovea.service.inference.pixels import Pixels

LOGIT_TOLERANCE: Final = {Arithmetic.FLOAT32: 5e-5, Arithmetic.FLOAT16: 1e-2, Arithmetic.INT8: 1e-2}
"""Maximum difference of a logit as a share of the largest logit, by the graph's arithmetic.

A probability changes by up to a quarter of a logit, so a network with large logits exceeds `TOLERANCE` by
rounding alone: 1.16e-05 was seen for one of four exports of the same float32 network, and 0.015 for float16.
Half a level of 255, the smallest error of a normalisation, is 2e-3 of its range.
"""

_MAX_ROUNDING: Final = 0.05
"""Difference of a probability above which no arithmetic is the reason, and no tolerance is suggested."""


@dataclass(frozen=True)
class Agreement:
    """The largest differences from the original file, at one batch size."""

    batch: int
    probabilities: float
    logits: float | None
    """Difference of a logit as a share of the largest logit, at least 1; None if the file has no logits."""


@dataclass(frozen=True)
class FileAnswers:
    """The answers of the original file to images, for the comparison."""

    pixels: Pixels
    probabilities: Array
    logits: Array | None
    """Logits (n, logits); None if the file has only probabilities."""
    arithmetic: Arithmetic


def run_file(foreign: ForeignModel) -> FileAnswers:
    """Run the original file in plain ONNX Runtime. Raises `VerificationError`."""
    pixels = draw_noise(4 * max(BATCHES), foreign.graph_input)
    return FileAnswers(
        pixels, foreign.compute_probabilities(pixels), foreign.compute_logits(pixels), foreign.arithmetic
    )


def compare_with_file(answers: FileAnswers, engine: Engine, tolerance: float | None) -> tuple[Agreement, ...]:
    """Compare the engine with the original file at each of `BATCHES`.

    The probabilities must agree to `tolerance`, or, without one, the probabilities or the logits to their
    usual tolerances. Raises `VerificationError`.
    """
    pixels, expected, expected_logits = answers.pixels, answers.probabilities, answers.logits
    largest_logit = 1.0 if expected_logits is None else max(1.0, float(np.abs(expected_logits).max()))
    agreements = []
    for batch in BATCHES:
        parts = [pixels[start : start + batch] for start in range(0, len(pixels), batch)]
        worst = float(np.abs(np.concatenate([engine.run(part) for part in parts]) - expected).max())
        worst_logit = None
        if expected_logits is not None:
            logits = np.concatenate([engine.compute_logits(part) for part in parts])
            worst_logit = float(np.abs(logits - expected_logits).max()) / largest_logit
        agreement = Agreement(batch, worst, worst_logit)
        _require_agreement(agreement, largest_logit, answers.arithmetic, tolerance)
        agreements.append(agreement)
    return tuple(agreements)


def _require_agreement(
    agreement: Agreement, largest_logit: float, arithmetic: Arithmetic, tolerance: float | None
) -> None:
    limit, logit_limit = tolerance or TOLERANCE[arithmetic], LOGIT_TOLERANCE[arithmetic]
    if agreement.probabilities <= limit:
        return
    logits = ""
    if agreement.logits is not None and tolerance is None:
        # A softmax turns a change of the logits into at most half of it; more is an error after the logits.
        explained = agreement.logits * largest_logit / 2 + limit
        if agreement.logits <= logit_limit and agreement.probabilities <= explained:
            return
        logits = (
            f", and a logit by {agreement.logits:.2g} of the largest logit, {largest_logit:.3g}; at most "
            f"{logit_limit:g} for {arithmetic}"
        )
    raise VerificationError(
        f"at batch {agreement.batch} a probability of the imported graph is off by "
        f"{agreement.probabilities:.3g}; at most {limit:g}{logits}{_advise(agreement.probabilities)}"
    )


def _advise(difference: float) -> str:
    if not difference <= _MAX_ROUNDING:
        return "; that is more than rounding: export the model again, in float32 and for inference"
    return (
        ". If the network is that sensitive to rounding, accept the difference with --tolerance "
        f"{_round_up(1.5 * difference):g}, which the model then records"
    )


def _round_up(value: float) -> float:
    """Return the next number with one significant digit."""
    unit = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / unit) * unit
