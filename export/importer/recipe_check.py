"""Checks of a foreign model on labelled images: accuracy, other recipes and the `fast` pixel path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from fovea.export.drift_reference import build_reference
from fovea.export.importer.check_result import CheckReport, CheckResult
from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.inspect import ForeignModel, ImportRequest
from fovea.export.importer.label_file import Labels
from fovea.export.importer.labelled_images import (
    LabelledImages,
    PredictPixels,
    Scores,
    choose_best_recipe,
    count_scaled_by_fast,
    filter_readable,
    is_lossless,
    load_labelled_images,
    score_images,
)
from fovea.export.importer.preprocessing import PRESETS, Normalization, PreprocessingOptions
from fovea.export.known_threshold import choose_threshold
from fovea.model.evaluation import metrics
from fovea.model.evaluation.scores import calibration_error
from fovea.service.artifact.contract import Accuracy, Geometry, KnownScore, PixelPath, Task
from fovea.service.inference.engine import Floats
from fovea.service.inference.known import compute_known_scores
from fovea.service.inference.pixels import Pixels

_MUCH_WIDER: Final = 8.0
"""Factor from which a range of values is much wider; those of the presets for 0 … 1 differ by 4.5."""


def check_recipe(
    folder: Path, request: ImportRequest, foreign: ForeignModel, geometry: Geometry, labels: Labels
) -> CheckResult:
    """Measure the model, compare it with other recipes, and choose the pixel path.

    Raises `ImportRefused`.
    """
    images, unreadable = filter_readable(load_labelled_images(folder, labels), geometry)
    predict = _build_predictor(foreign, foreign.normalization)
    own_scores = score_images(predict, images, geometry)
    others = _try_other_recipes(request, foreign, geometry, images, own_scores)
    fast = score_images(predict, images, replace(geometry, pixel_path=PixelPath.FAST))
    scaled_count = count_scaled_by_fast(images, geometry)
    pixel_path = PixelPath.FAST if is_lossless(fast, own_scores, scaled_count) else PixelPath.EXACT
    chosen_scores = fast if pixel_path is PixelPath.FAST else own_scores
    report = CheckReport(
        data=images.name,
        images=len(images),
        top1=own_scores.top1,
        top5=own_scores.top5,
        unreadable=unreadable,
        tried=len(images.sample_rows),
        others=others,
        fast_scaled=scaled_count,
        fast_changed=int((fast.top_label != own_scores.top_label).sum()),
        fast_difference=float(np.abs(fast.probabilities - own_scores.probabilities).max()),
    )
    return CheckResult(
        pixel_path=pixel_path,
        accuracy=Accuracy(
            images.name,
            len(images),
            chosen_scores.top1,
            _compute_calibration_error(chosen_scores, images, foreign.task),
        ),
        reference=build_reference(
            labels.names, chosen_scores.top_label, chosen_scores.confidence, chosen_scores.brightness
        ),
        known=_choose_known_score(foreign, chosen_scores),
        report=report,
    )


def _choose_known_score(foreign: ForeignModel, scores: Scores) -> KnownScore | None:
    """Return the threshold of the score; None for a graph that does not yield what the score needs.

    The logarithms of probabilities are no logits: their score is the rounding of a sum that is always 1.
    """
    if foreign.task is Task.BINARY or not foreign.graph_output.has_logits:
        return None
    return choose_threshold(scores.known_scores)


def _build_predictor(foreign: ForeignModel, normalization: Normalization | None) -> PredictPixels:
    wrapped_model = foreign.wrap(normalization)
    reference = foreign.open_wrapped(wrapped_model)

    def predict(pixels: Pixels) -> tuple[Floats, Floats]:
        outputs = reference(pixels)
        logits = outputs[wrapped_model.logits].astype(np.float32)
        known_scores = compute_known_scores(logits, foreign.task)
        return outputs[wrapped_model.probabilities].astype(np.float32), known_scores

    return predict


def _try_other_recipes(
    request: ImportRequest,
    foreign: ForeignModel,
    geometry: Geometry,
    images: LabelledImages,
    all_scores: Scores,
) -> dict[str, tuple[float, float]]:
    """Return the results of other recipes on some of the images.

    Raises `ImportRefused` if another recipe does clearly better.
    """
    rows = images.sample_rows
    sample, own_scores = images.select(rows), all_scores.select(rows)
    scores_by_recipe: dict[str, Scores] = {}
    wider_recipes: set[str] = set()
    for name, (normalization, recipe_geometry) in _list_other_recipes(
        request.preprocessing, foreign, geometry
    ).items():
        scores_by_recipe[name] = score_images(
            _build_predictor(foreign, normalization), sample, recipe_geometry
        )
        if _measure_range(normalization) > _MUCH_WIDER * _measure_range(foreign.normalization):
            wider_recipes.add(name)
    better_recipe = choose_best_recipe(scores_by_recipe, own_scores, wider_recipes)
    if better_recipe and not request.force:
        own_name = request.preprocessing.preset.name if request.preprocessing.preset else "the given recipe"
        raise ImportRefused(
            f"{own_name} looks wrong: of {len(sample)} images {_format_scores(own_scores)}, "
            f"with {better_recipe} {_format_scores(scores_by_recipe[better_recipe])}; "
            f"import it with {better_recipe}, or keep this recipe with --force"
        )
    return {
        name: (one.top1, float(one.true_probability.mean()))
        for name, one in {"own": own_scores, **scores_by_recipe}.items()
    }


def _measure_range(normalization: Normalization | None) -> float:
    """Return the difference between the values of a white and a black pixel, in the widest channel."""
    return 255 * abs(normalization.scale) / min(normalization.std) if normalization else 255.0


def _format_scores(scores: Scores) -> str:
    probability = scores.true_probability.mean()
    return f"{scores.top1:.1%} are right and the true label has the mean probability {probability:.3f}"


def _list_other_recipes(
    preprocessing: PreprocessingOptions, foreign: ForeignModel, geometry: Geometry
) -> dict[str, tuple[Normalization | None, Geometry]]:
    """Return the other presets and the other channel order, by the option that selects them."""
    own_normalization = foreign.normalization
    recipes: dict[str, tuple[Normalization | None, Geometry]] = {}
    if own_normalization is None:
        return recipes
    for name, preset in PRESETS.items():
        recipe = (
            preset.normalization,
            PreprocessingOptions(preset=preset).build_geometry(geometry.height, geometry.width),
        )
        is_possible = foreign.graph_input.channels == 3 or preset.normalization.is_uniform
        if is_possible and recipe != (own_normalization, geometry):
            recipes[f"--preset {name}"] = recipe
    if foreign.graph_input.channels == 1:
        return recipes
    recipes["--rgb" if own_normalization.bgr else "--bgr"] = (
        own_normalization.with_reversed_channels,
        geometry,
    )
    return recipes


def _compute_calibration_error(scores: Scores, images: LabelledImages, task: Task) -> float | None:
    if task is Task.MULTILABEL:
        return None  # the calibration error is known only for one label per image
    probabilities, targets = torch.from_numpy(scores.probabilities), torch.from_numpy(images.targets)
    return calibration_error(metrics.reliability_bins(probabilities, targets, task))
