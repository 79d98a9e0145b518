"""Checks of a foreign model on labelled images: accuracy, other recipes and the `fast` pixel path."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fovea.export.drift_reference import reference_of
from fovea.export.importer.foreign_model import ImportRefused, Plain
from fovea.export.importer.inspect import Foreign, Request
from fovea.export.importer.label_file import Labels
from fovea.export.importer.labelled_images import (
    Labelled,
    Run,
    Scores,
    best_of,
    labelled,
    loses_nothing,
    readable,
    scaled_by_fast,
    scores,
)
from fovea.export.importer.preprocessing import PRESETS, Normalization, Wishes
from fovea.export.importer.wrap import Wrapped
from fovea.model.data.pixels import get_thread_count
from fovea.model.evaluation import metrics
from fovea.service.artifact.contract import Accuracy, DriftReference, Geometry, PixelPath, Task
from fovea.service.inference.engine import Floats
from fovea.service.inference.preprocess import Pixels


@dataclass(frozen=True)
class Checked:
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
class Outcome:
    """The results of the check for the contract."""

    path: PixelPath
    accuracy: Accuracy
    reference: DriftReference
    checked: Checked


def try_on(folder: Path, request: Request, foreign: Foreign, geometry: Geometry, labels: Labels) -> Outcome:
    """Measure the model, compare it with other recipes, and choose the pixel path.

    Raises `ImportRefused`.
    """
    images, unreadable = readable(labelled(folder, labels), geometry)
    run = _runner(foreign.wrapped(foreign.normalization))
    own = scores(run, images, geometry)
    others = _others(request, foreign, geometry, images, own)
    fast = scores(run, images, replace(geometry, pixel_path=PixelPath.FAST))
    scaled = scaled_by_fast(images, geometry)
    path = PixelPath.FAST if loses_nothing(fast, own, scaled) else PixelPath.EXACT
    kept = fast if path is PixelPath.FAST else own
    checked = Checked(
        data=images.name,
        images=len(images),
        top1=own.top1,
        top5=own.top5,
        unreadable=unreadable,
        tried=len(images.spread),
        others=others,
        fast_scaled=scaled,
        fast_changed=int((fast.best != own.best).sum()),
        fast_difference=float(np.abs(fast.probabilities - own.probabilities).max()),
    )
    return Outcome(
        path=path,
        accuracy=Accuracy(
            images.name, len(images), kept.top1, _calibration_error(kept, images, foreign.task)
        ),
        reference=reference_of(labels.names, kept.best, kept.confidence, kept.brightness),
        checked=checked,
    )


def _runner(wrapped: Wrapped) -> Run:
    plain = Plain(wrapped.model, threads=get_thread_count())

    def run(pixels: Pixels) -> Floats:
        return plain(pixels)[wrapped.probabilities].astype(np.float32)

    return run


def _others(
    request: Request, foreign: Foreign, geometry: Geometry, images: Labelled, own: Scores
) -> dict[str, tuple[float, float]]:
    """Return the results of other recipes on some of the images.

    Raises `ImportRefused` if another recipe does clearly better.
    """
    rows = images.spread
    some, here = images.take(rows), own.take(rows)
    tried: dict[str, Scores] = {}
    for name, (normalization, other) in _recipes(request.wishes, foreign, geometry).items():
        tried[name] = scores(_runner(foreign.wrapped(normalization)), some, other)
    better = best_of(tried, here)
    if better and not request.force:
        own_name = request.wishes.preset.name if request.wishes.preset else "what was given"
        raise ImportRefused(
            f"{own_name} looks wrong: of {len(some)} images {_shown(here)}, "
            f"with {better} {_shown(tried[better])}; import it with {better}, or with --force as it is"
        )
    return {name: (one.top1, float(one.true.mean())) for name, one in {"own": here, **tried}.items()}


def _shown(one: Scores) -> str:
    return f"{one.top1:.1%} are right and the true label has {one.true.mean():.3f}"


def _recipes(
    wishes: Wishes, foreign: Foreign, geometry: Geometry
) -> dict[str, tuple[Normalization | None, Geometry]]:
    """Return the other presets and the other channel order, by the option that selects them."""
    own = foreign.normalization
    found: dict[str, tuple[Normalization | None, Geometry]] = {}
    if own is None:
        return found
    for name, preset in PRESETS.items():
        recipe = preset.normalization, Wishes(preset=preset).geometry(geometry.height, geometry.width)
        if recipe != (own, geometry):
            found[f"--preset {name}"] = recipe
    found["--rgb" if own.bgr else "--bgr"] = own.turned, geometry
    return found


def _calibration_error(said: Scores, images: Labelled, task: Task) -> float | None:
    if task is Task.MULTILABEL:
        return None  # the calibration error is known only for one label per image
    probabilities, targets = torch.from_numpy(said.probabilities), torch.from_numpy(images.targets)
    return metrics.calibration_error(metrics.reliability_bins(probabilities, targets, task))
