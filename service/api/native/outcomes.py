"""Answers and errors of images as the plain values of the native protocol.

The module imports nothing of HTTP, because `fovea.load` uses it without a server.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from fovea.service.artifact.contract import Coverage
from fovea.service.errors import RequestError
from fovea.service.image_warnings import ImageWarning
from fovea.service.serving.classifier import Classification
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.ranking import Prediction, compute_label_set, is_known, rank_labels


def render_model_name(model: LiveModel) -> dict[str, str]:
    """Return the name and version of a model, as plain values."""
    return {"name": model.name, "version": model.version}


def render_outcome(
    outcome: Classification | RequestError,
    *,
    top_k: int,
    threshold: float | None = None,
    coverage: Coverage | None = None,
) -> dict[str, Any]:
    """Return one image's part of a reply, its labels or its error, as plain values.

    The labels are the `top_k` most probable (0: all) of at least `threshold`. `coverage` adds a label set.
    """
    if isinstance(outcome, RequestError):
        return {"error": outcome.to_dict()}
    answer = outcome.answer
    predictions = rank_labels(outcome, top_k=top_k, threshold=threshold)
    result: dict[str, Any] = {"predictions": render_predictions(predictions)}
    if coverage:
        result["coverage"] = compute_label_set(outcome, coverage)._asdict()
    if answer.embedding is not None:
        result["embedding"] = base64.b64encode(answer.embedding).decode()
    result |= render_known(outcome)
    result["image"] = {"format": answer.format, "width": answer.width, "height": answer.height}
    if answer.warnings:
        result["warnings"] = render_warnings(answer.warnings)
    return result


def render_known(classification: Classification) -> dict[str, Any]:
    """Return whether the image is like the training images, as plain values; none if the model is silent."""
    known = is_known(classification)
    return {} if known is None else {"known": known, "known_score": classification.answer.known_score}


def render_warnings(warnings: Sequence[ImageWarning]) -> list[dict[str, str]]:
    """Return the warnings about an image, as plain values."""
    return [{"code": warning.code, "message": warning.text} for warning in warnings]


def render_predictions(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Return labels as plain values."""
    results: list[dict[str, Any]] = [
        {"label": one.label, "index": one.index, "probability": one.probability} for one in predictions
    ]
    for prediction, result in zip(predictions, results, strict=True):
        if prediction.selected is not None:
            result["selected"] = prediction.selected
    return results
