"""The content of native classification replies: the options, and results as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import orjson

from fovea.service.api import bodies
from fovea.service.api.adapter import Reply
from fovea.service.api.request_schemas import ClassifyOptions
from fovea.service.artifact.contract import Coverage
from fovea.service.errors import RequestError
from fovea.service.http.request_record import RequestRecord
from fovea.service.image_warnings import ImageWarning
from fovea.service.serving.classifier import Classification
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.ranking import Prediction, compute_label_set, find_coverage, is_known, rank_labels

_SET_LABELS_PER_PREDICTION: Final = 16
"""Number of labels of a label set that take as long as one prediction. A label takes 0.13 us, and a set may
contain all labels."""


class ReplyOptions(NamedTuple):
    """The content of a reply: at most `top_k` labels of at least `threshold`, and a label set."""

    top_k: int
    threshold: float | None = None
    coverage: Coverage | None = None
    labels_per_image: int = 0
    """Time to render the reply to one image, in predictions; the label set counts too."""
    timing: bool = False
    """True if the reply contains the stage times."""

    def render(
        self, results: Sequence[Classification | RequestError], model: LiveModel, record: RequestRecord
    ) -> Reply:
        """Render the results (`service.api.adapter.ReplyFormat`).

        Several images get `results`, which may contain errors.
        """
        reply: dict[str, Any] = {"model": render_model_name(model)}
        if len(results) == 1:
            reply |= render_outcome(results[0], self)
        else:
            # Render the results one after the other: as plain values they take four times as much memory.
            reply["results"] = [orjson.Fragment(orjson.dumps(render_outcome(one, self))) for one in results]
        if self.timing:
            reply["timing"] = {name: 1000 * stage.seconds for name, stage in record.longest_stages().items()}
        return Reply(orjson.dumps(reply, option=orjson.OPT_APPEND_NEWLINE))


def resolve_options(options: ClassifyOptions, body: bodies.ParsedBody, model: LiveModel) -> ReplyOptions:
    """Resolve the options; those of the body take precedence over those of the query.

    Raises `BadRequest` for a coverage that the model does not have.
    """
    top_k = options.top_k if body.top_k is None else body.top_k
    threshold = options.threshold if body.threshold is None else body.threshold
    level = options.coverage if body.coverage is None else body.coverage
    label_count = len(model.contract.labels)
    top_k = min(top_k or label_count, label_count)
    if level is None:
        return ReplyOptions(top_k, threshold, None, top_k, options.timing)
    coverage = find_coverage(model.contract, level)
    cost = top_k + label_count // _SET_LABELS_PER_PREDICTION
    return ReplyOptions(top_k, threshold, coverage, cost, options.timing)


def render_model_name(model: LiveModel) -> dict[str, str]:
    """Return the name and version of a model, as plain values."""
    return {"name": model.name, "version": model.version}


def render_outcome(outcome: Classification | RequestError, reply_options: ReplyOptions) -> dict[str, Any]:
    """Return one image's part of a reply, its labels or its error, as plain values."""
    if isinstance(outcome, RequestError):
        return {"error": outcome.to_dict()}
    answer = outcome.answer
    predictions = rank_labels(outcome, top_k=reply_options.top_k, threshold=reply_options.threshold)
    result: dict[str, Any] = {"predictions": render_predictions(predictions)}
    if reply_options.coverage:
        result["coverage"] = compute_label_set(outcome, reply_options.coverage)._asdict()
    result |= render_known(outcome)
    result["image"] = {"format": answer.format, "width": answer.width, "height": answer.height}
    if answer.warnings:
        result["warnings"] = render_warnings(answer.warnings)
    return result


def render_known(classification: Classification) -> dict[str, Any]:
    """Return whether the image is like the training images, as plain values; empty if unknown."""
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
