"""Native classification replies: their options, and their JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import orjson

from fovea.service.api import bodies
from fovea.service.api.adapter import Reply
from fovea.service.api.native.outcomes import render_model_name, render_outcome
from fovea.service.api.request_schemas import ClassifyOptions
from fovea.service.artifact.contract import Coverage
from fovea.service.errors import RequestError
from fovea.service.http.request_record import RequestRecord
from fovea.service.serving.classifier import BoxClassification, Classification
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.ranking import find_coverage

_SET_LABELS_PER_PREDICTION: Final = 16
"""Number of labels of a label set that take as long as one prediction. A label takes 0.13 us, and a set may
contain all labels."""

_EMBEDDING_VALUES_PER_PREDICTION: Final = 16
"""Number of values of an embedding that take as much memory as one prediction, about 90 bytes."""


class ReplyOptions(NamedTuple):
    """The content of a reply: at most `top_k` labels of at least `threshold`, and a label set."""

    top_k: int
    threshold: float | None = None
    coverage: Coverage | None = None
    labels_per_image: int = 0
    """Time to render the reply to one image, in predictions; the label set counts too."""
    timing: bool = False
    """True if the reply contains the stage times."""
    embedding: bool = False
    """True if the reply contains the embeddings."""

    def render(
        self,
        results: Sequence[Classification | BoxClassification | RequestError],
        model: LiveModel,
        record: RequestRecord,
    ) -> Reply:
        """Render the results (`service.api.adapter.ReplyFormat`).

        Several images get `results`, which may contain errors.
        """
        reply: dict[str, Any] = {"model": render_model_name(model)}
        if len(results) == 1:
            reply |= self._render_outcome(results[0])
        else:
            # Render the results one after the other, because of the memory.
            reply["results"] = [_pack(self._render_outcome(one)) for one in results]
        if self.timing:
            reply["timing"] = {name: 1000 * stage.seconds for name, stage in record.longest_stages().items()}
        return Reply(orjson.dumps(reply, option=orjson.OPT_APPEND_NEWLINE))

    def _render_outcome(self, outcome: Classification | BoxClassification | RequestError) -> dict[str, Any]:
        return render_outcome(
            outcome, top_k=self.top_k, threshold=self.threshold, coverage=self.coverage, pack_box=_pack
        )


def _pack(values: dict[str, Any]) -> orjson.Fragment:
    """Return a part of a reply as JSON, which takes a quarter of the memory of plain values."""
    return orjson.Fragment(orjson.dumps(values))


def resolve_options(options: ClassifyOptions, body: bodies.ParsedBody, model: LiveModel) -> ReplyOptions:
    """Resolve the options; those of the body take precedence over those of the query.

    Raises `BadRequest` for a coverage that the model does not have, and `NoEmbedding`.
    """
    top_k = options.top_k if body.top_k is None else body.top_k
    threshold = options.threshold if body.threshold is None else body.threshold
    level = options.coverage if body.coverage is None else body.coverage
    label_count = len(model.contract.labels)
    top_k = min(top_k or label_count, label_count)
    with_embedding = options.embedding if body.embedding is None else body.embedding
    coverage, cost = None, top_k
    if level is not None:
        coverage = find_coverage(model.contract, level)
        cost += label_count // _SET_LABELS_PER_PREDICTION
    if with_embedding:
        cost += model.require_embedding().dimension // _EMBEDDING_VALUES_PER_PREDICTION
    return ReplyOptions(top_k, threshold, coverage, cost, options.timing, with_embedding)
