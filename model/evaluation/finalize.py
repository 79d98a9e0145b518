"""Completion of a training run: calibration, measurement on held-out images and the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fovea.model.data.dataset import Dataset, Examples
from fovea.model.evaluation import evaluate, metrics
from fovea.model.evaluation.calibration import Calibration, fit_calibration
from fovea.model.evaluation.report import write_report
from fovea.model.evaluation.report_page import REPORT_FILE
from fovea.model.evaluation.scores import calibration_error, compute_auroc
from fovea.model.networks import checkpoint
from fovea.model.networks.checkpoint import WEIGHTS_FILE, Checkpoint
from fovea.model.networks.network import to_probabilities
from fovea.service.artifact.contract import Task
from fovea.service.inference.known import ACCEPTED_SHARE, compute_known_scores


def finalize_run(trained_checkpoint: Checkpoint, data: Dataset, out: Path, console: Console) -> Checkpoint:
    """Calibrate, measure once and write the results to `out`.

    The measurement uses the test images or, without test images, the validation images.
    """
    net = trained_checkpoint.build_net().to(evaluate.choose_device())
    task = data.task
    logits_by_part = {
        part: evaluate.compute_logits(net, getattr(data, part).pixels)
        for part in ("validation", "conformal", "test")
    }
    calibration = fit_calibration(
        logits_by_part["validation"],
        data.validation.targets,
        logits_by_part["conformal"],
        data.conformal.targets,
        task,
        has_temperature=net.has_temperature,
    )
    part = "test" if len(data.test) else "validation"
    measurements = measure_part(logits_by_part[part], getattr(data, part), task, calibration)
    figures = {"part": part, "images": len(getattr(data, part)), **measurements}
    if data.held_out_other:
        figures["other"] = _measure_other(
            torch.cat([logits_by_part["validation"], logits_by_part["conformal"]]),
            evaluate.compute_logits(net, data.held_out_other.pixels),
        )
    final_checkpoint = replace(
        trained_checkpoint,
        metadata={**trained_checkpoint.metadata, "calibration": calibration.to_dict(), "measured": figures},
    )
    # The weights first: export needs them, and a failure to write the report must not cost them.
    checkpoint.save_checkpoint(out, WEIGHTS_FILE, final_checkpoint)
    write_report(out / REPORT_FILE, final_checkpoint.metadata, data, part, logits_by_part[part], calibration)
    image_count = data.format_image_count(figures["images"])
    console.print(
        f"{part} accuracy {measurements['accuracy']:.2%} of {image_count}, calibration error "
        f"{measurements['ece_before']:.4f} before and {measurements['ece']:.4f} after scaling with "
        f"temperature {calibration.temperature:.3f}"
    )
    if "other" in figures:
        other = figures["other"]
        console.print(
            f"where {ACCEPTED_SHARE:.0%} of the held-out images count as known, so do "
            f"{other['accepted']:.1%} of {other['images']} images of other things "
            f"(AUROC {other['auroc']:.3f})",
            soft_wrap=True,
        )
    console.print(f"wrote {out}, with {REPORT_FILE}", soft_wrap=True)
    return final_checkpoint


def _measure_other(known_logits: Tensor, other_logits: Tensor) -> dict[str, float]:
    """Return how well the score of `known` tells images of other things from held-out ones, as plain values.

    Both arguments are logits, float32 (N, n).
    """
    known_scores, other_scores = (
        compute_known_scores(logits.numpy(), Task.MULTICLASS) for logits in (known_logits, other_logits)
    )
    threshold = np.quantile(known_scores, 1 - ACCEPTED_SHARE)
    return {
        "images": len(other_scores),
        "accepted": float((other_scores >= threshold).mean()),
        "auroc": compute_auroc(known_scores, other_scores),
    }


def measure_part(logits: Tensor, examples: Examples, task: Task, calibration: Calibration) -> dict[str, Any]:
    """Return the figures of logits, float32 (N, n), against the true labels, as plain values."""
    raw_probabilities, calibrated_probabilities = (
        to_probabilities(logits, task),
        to_probabilities(logits, task, calibration.temperature),
    )
    bins = [
        metrics.reliability_bins(one, examples.targets, task)
        for one in (raw_probabilities, calibrated_probabilities)
    ]
    predictions = metrics.choose_labels(calibrated_probabilities, task, calibration.thresholds)
    return {
        "accuracy": metrics.compute_accuracy(predictions, examples.targets),
        "ece_before": calibration_error(bins[0]),
        "ece": calibration_error(bins[1]),
        "coverage": [
            [level, *metrics.measure_coverage(calibrated_probabilities, examples.targets, quantile)]
            for level, quantile in calibration.coverage
        ],
    }
