"""Comparison of torch and ONNX Runtime on the same pixels, through the engine that will serve the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fovea.export.verification_error import VerificationError as VerificationError
from fovea.model.data.dataset import Examples
from fovea.model.evaluation import evaluate, metrics
from fovea.model.evaluation.scores import calibration_error
from fovea.model.networks.network import Net, to_probabilities
from fovea.service.artifact.contract import Accuracy
from fovea.service.inference.engine import Engine
from fovea.service.inference.pixels import Pixels

BATCHES: Final = (1, 2, 64)
"""Batch sizes for the comparison; a graph with a fixed batch size fails at another size."""

LOGIT_TOLERANCE: Final = 1e-3
"""Maximum absolute difference of a logit.

Both sides compute in float32, but sum in another order and fold batch normalisation into the convolutions. A
difference of 1e-5 is usual. An export error shows at 0.1 and above.
"""

PROBABILITY_TOLERANCE: Final = LOGIT_TOLERANCE / 4
"""Maximum absolute difference of a probability; the slope of softmax and sigmoid is at most 1/4."""


@dataclass(frozen=True)
class Agreement:
    """The largest absolute differences at one batch size."""

    batch: int
    logits: float
    probabilities: float


def compare_outputs(net: Net, engine: Engine, pixels: Tensor) -> tuple[Agreement, ...]:
    """Compare at each of `BATCHES` on real images, uint8 (N, H, W, 3), with N at least 64.

    Raises `VerificationError` beyond a tolerance.
    """
    agreements = tuple(_compare_batch(net, engine, pixels[:batch]) for batch in BATCHES)
    for agreement in agreements:
        for value_name, worst, limit in (
            ("logit", agreement.logits, LOGIT_TOLERANCE),
            ("probability", agreement.probabilities, PROBABILITY_TOLERANCE),
        ):
            if not worst <= limit:  # a NaN is a disagreement too
                batch = agreement.batch
                raise VerificationError(
                    f"at batch {batch} a {value_name} of the graph is off by {worst:.3g}; at most {limit:g}"
                )
    return agreements


def _compare_batch(net: Net, engine: Engine, pixels: Tensor) -> Agreement:
    expected_logits = evaluate.compute_logits(net, pixels)
    expected_probabilities = to_probabilities(
        expected_logits, net.config.task, engine.contract.temperature
    ).numpy()
    batch: Pixels = pixels.numpy()
    try:
        logits, graph_probabilities = engine.compute_logits(batch), engine.run(batch)
    except Exception as error:  # ONNX Runtime raises a dozen classes without a common base class
        raise VerificationError(f"the graph does not run at batch {len(batch)}: {error}") from None
    return Agreement(
        batch=len(batch),
        logits=float(np.abs(logits - expected_logits.numpy()).max()),
        probabilities=float(np.abs(graph_probabilities - expected_probabilities).max()),
    )


def measure_accuracy(engine: Engine, examples: Examples, name: str) -> Accuracy:
    """Return the accuracy of the exported graph on labelled images that are called `name`."""
    contract, parts = engine.contract, torch.split(torch.arange(len(examples)), evaluate.BATCH_SIZE)
    predictions = torch.cat([torch.from_numpy(engine.run(examples.pixels[part].numpy())) for part in parts])
    decisions = metrics.choose_labels(predictions, contract.task, contract.thresholds)
    bins = metrics.reliability_bins(predictions, examples.targets, contract.task)
    correct_share = metrics.compute_accuracy(decisions, examples.targets)
    return Accuracy(name, len(examples), correct_share, calibration_error(bins))
