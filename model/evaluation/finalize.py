"""Completion of a training run: calibration, measurement on held-out images and the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from fovea.model.data.dataset import Data, Examples
from fovea.model.evaluation import evaluate, metrics
from fovea.model.evaluation.calibration import Calibration, calibrate
from fovea.model.evaluation.report import REPORT, write_report
from fovea.model.networks import checkpoint
from fovea.model.networks.checkpoint import WEIGHTS, Checkpoint
from fovea.model.networks.network import probabilities
from fovea.service.artifact.contract import Task


def finish(trained: Checkpoint, data: Data, out: Path, console: Console) -> Checkpoint:
    """Calibrate, measure once and write the results to `out`.

    The measurement uses the test images or, without test images, the validation images.
    """
    net = trained.net().to(evaluate.device())
    task = data.task
    said = {
        part: evaluate.logits(net, getattr(data, part).pixels) for part in ("validation", "conformal", "test")
    }
    calibration = calibrate(
        said["validation"], data.validation.targets, said["conformal"], data.conformal.targets, task
    )
    part = "test" if len(data.test) else "validation"
    measured = measure_part(said[part], getattr(data, part), task, calibration)
    figures = {"part": part, "images": len(getattr(data, part)), **measured}
    done = replace(
        trained, about={**trained.about, "calibration": calibration.to_dict(), "measured": figures}
    )
    checkpoint.save(out, WEIGHTS, done)
    write_report(out / REPORT, done.about, data, part, said[part], calibration)
    console.print(
        f"{part} accuracy {measured['accuracy']:.2%} of {data.counted(figures['images'])}, calibration error "
        f"{measured['ece_before']:.4f}, with temperature {calibration.temperature:.3f} {measured['ece']:.4f}"
    )
    console.print(f"wrote {out}, with {REPORT}", soft_wrap=True)
    return done


def measure_part(logits: Tensor, examples: Examples, task: Task, calibration: Calibration) -> dict[str, Any]:
    """Return the figures of logits, float32 (N, n), against the true labels, as plain values."""
    before, after = probabilities(logits, task), probabilities(logits, task, calibration.temperature)
    bins = [metrics.reliability(one, examples.targets, task) for one in (before, after)]
    chosen = metrics.choose(after, task, calibration.thresholds)
    return {
        "accuracy": metrics.accuracy(chosen, examples.targets),
        "ece_before": metrics.calibration_error(bins[0]),
        "ece": metrics.calibration_error(bins[1]),
        "coverage": [
            [level, *metrics.covered(after, examples.targets, quantile)]
            for level, quantile in calibration.coverage
        ],
    }
