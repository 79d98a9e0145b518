"""Answers and errors of images as the plain values of the native protocol.

The module imports nothing of HTTP, because `fovea.load` uses it without a server.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

from fovea.service.artifact.contract import Coverage
from fovea.service.errors import RequestError
from fovea.service.image_warnings import ImageWarning
from fovea.service.runners.batch_messages import Answer, BoxAnswers
from fovea.service.serving.classifier import BoxClassification, Classification
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.ranking import Prediction, compute_label_set, is_known, rank_labels


def render_model_name(model: LiveModel) -> dict[str, str]:
    """Return the name and version of a model, as plain values."""
    return {"name": model.name, "version": model.version}


def render_outcome(
    outcome: Classification | BoxClassification | RequestError,
    *,
    top_k: int,
    threshold: float | None = None,
    coverage: Coverage | None = None,
    pack_box: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """Return one image's part of a reply, its labels, those of its boxes, or its error, as plain values.

    The labels are the `top_k` most probable (0: all) of at least `threshold`. `coverage` adds a label set.
    The part of each box is what `pack_box` returns for its values.
    """
    if isinstance(outcome, RequestError):
        return {"error": outcome.to_dict()}
    if isinstance(outcome, BoxClassification):
        image = outcome.outcome
        boxes = []
        for box, answer in zip(outcome.boxes, image.answers, strict=True):
            classification = Classification(outcome.model, answer)
            part = render_outcome(classification, top_k=top_k, threshold=threshold, coverage=coverage)
            del part["image"]  # the box has no file of its own
            part = {"box": list(box), **part}
            boxes.append(pack_box(part) if pack_box else part)
        result: dict[str, Any] = {"boxes": boxes, "image": _render_image(image)}
        return result | ({"warnings": render_warnings(image.warnings)} if image.warnings else {})
    answer = outcome.answer
    predictions = rank_labels(outcome, top_k=top_k, threshold=threshold)
    result = {"predictions": render_predictions(predictions)}
    if coverage:
        result["coverage"] = compute_label_set(outcome, coverage)._asdict()
    if answer.embedding is not None:
        result["embedding"] = base64.b64encode(answer.embedding).decode()
    result |= render_known(outcome)
    result["image"] = _render_image(answer)
    if answer.warnings:
        result["warnings"] = render_warnings(answer.warnings)
    return result


def _render_image(image: Answer | BoxAnswers) -> dict[str, Any]:
    return {"format": image.format, "width": image.width, "height": image.height}


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
