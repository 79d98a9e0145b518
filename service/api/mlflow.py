"""The bodies of MLflow's scoring server, for `POST /invocations`.

    {"dataframe_split": {"columns": ["image"], "data": [["…"]]}}    → {"predictions": [{"label": …}]}
    {"dataframe_records": [{"image": "…"}]}
    {"instances": [{"b64": "…"}]}
    {"inputs": ["…"], "params": {"top_k": 3}}

MLflow writes binary values as base64. Its JSON has one key for the images, and Fovea's own JSON has another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import orjson
from pydantic import Field

from fovea.service.api import bodies
from fovea.service.api.adapter import InferenceRequest, ParsedRequest, Reply
from fovea.service.api.base64_text import from_base64
from fovea.service.api.json_bodies import parse_json, validate_json
from fovea.service.api.native.outcomes import render_known, render_warnings
from fovea.service.api.native.routes import ClassifyAdapter
from fovea.service.api.request_schemas import ClassifyOptions, StrictModel, TopK
from fovea.service.errors import BadRequest, RequestError
from fovea.service.http.request_record import RequestRecord
from fovea.service.serving.classifier import Classification
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.ranking import rank_labels
from fovea.service.settings import MAX_REQUEST_IMAGES

_FORMS: Final = ("dataframe_split", "dataframe_records", "instances", "inputs")
"""Keys under which the images may stand."""

_START: Final = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*\{\s*\"(?:" + "|".join((*_FORMS, "params")).encode() + rb')"'
)
"""Start of an MLflow body: its first key. The keys of Fovea's own JSON are others."""

_START_BYTES: Final = 256

_MAX_COLUMNS: Final = 64


class _Params(StrictModel):
    top_k: TopK | None = None


class _SplitFrame(StrictModel):
    """The form of `pandas.DataFrame.to_dict(orient="split")`."""

    columns: list[str] | None = Field(None, max_length=_MAX_COLUMNS)
    index: list[Any] | None = Field(None, max_length=MAX_REQUEST_IMAGES)
    data: list[Any] = Field(min_length=1, max_length=MAX_REQUEST_IMAGES)


class _MlflowRequest(StrictModel):
    dataframe_split: _SplitFrame | None = None
    dataframe_records: list[Any] | None = Field(None, min_length=1, max_length=MAX_REQUEST_IMAGES)
    instances: list[Any] | None = Field(None, min_length=1, max_length=MAX_REQUEST_IMAGES)
    inputs: Any = None
    params: _Params | None = None

    def list_forms(self) -> list[Any]:
        """Return what stands under the keys of images."""
        forms = (self.dataframe_split, self.dataframe_records, self.instances, self.inputs)
        return [one for one in forms if one is not None]


class InvocationsAdapter(ClassifyAdapter):
    """A parser of everything that `/v1/classify` takes, and of MLflow's JSON."""

    async def parse_request(self, request: InferenceRequest) -> ParsedRequest:
        is_json = bodies.parse_media_type(request.content_type) == b"application/json"
        if not is_json:
            return await super().parse_request(request)
        is_mlflow, body = _look_at_start(request.body)
        request = replace(request, body=body)
        if not is_mlflow:
            return await super().parse_request(request)
        bodies.json_limit(request.settings).check(body.size)
        return await parse_json(body, lambda value: _convert_value(value, request))


def _look_at_start(raw_body: bodies.RawBody) -> tuple[bool, bodies.RawBody]:
    """Return True if a body begins as MLflow's do, and the body, which can be taken once more."""
    content = raw_body.take_content()
    start = bodies.read_content(content, min(raw_body.size, _START_BYTES))[:_START_BYTES]
    return _START.match(start) is not None, bodies.RawBody(content, raw_body.size)


def _convert_value(value: Any, request: InferenceRequest) -> ParsedRequest:
    """Convert the parsed JSON to a request. Raises `BadRequest`."""
    mlflow_request = validate_json(_MlflowRequest, value)
    if len(mlflow_request.list_forms()) != 1:
        raise BadRequest(f"send exactly one of {', '.join(f'`{name}`' for name in _FORMS)}")
    options: ClassifyOptions = request.options
    if unsupported := options.model_fields_set - {"top_k"}:
        raise BadRequest(
            f"`{min(unsupported)}` is not for MLflow's bodies; send `images`, as to /v1/classify"
        )
    rows = _list_rows(mlflow_request)
    bodies.check_image_count(len(rows), request.settings)
    images = [_decode_image(row, location) for location, row in rows]
    params = mlflow_request.params or _Params()
    label_count = len(request.model.contract.labels)
    top_k = options.top_k if params.top_k is None else params.top_k
    return ParsedRequest(list(images), _MlflowFormat(min(top_k or label_count, label_count)))


def _list_rows(mlflow_request: _MlflowRequest) -> list[tuple[str, Any]]:
    """Return the place and the value of each image. Raises `BadRequest`."""
    if (split := mlflow_request.dataframe_split) is not None:
        values, location = split.data, "dataframe_split.data"
    elif mlflow_request.dataframe_records is not None:
        values, location = mlflow_request.dataframe_records, "dataframe_records"
    elif mlflow_request.instances is not None:
        values, location = mlflow_request.instances, "instances"
    else:
        values, location = mlflow_request.inputs, "inputs"
        if isinstance(values, dict) and "b64" not in values:  # columns
            values, location = _get_only(values, location)
        if not isinstance(values, list):
            values = [values]
        if not values:
            raise BadRequest(f"{location} has no images; send at least one")
    return [(f"{location}.{index}", value) for index, value in enumerate(values)]


def _decode_image(value: Any, location: str) -> bytes:
    """Decode one image: base64, `{"b64": …}`, or one of these in the only column of a row.

    Raises `BadRequest`.
    """
    if isinstance(value, list) and len(value) == 1:
        value, location = value[0], f"{location}.0"
    elif isinstance(value, dict) and "b64" not in value:
        value, location = _get_only(value, location)
    if isinstance(value, dict) and value.keys() == {"b64"}:
        value, location = value["b64"], f"{location}.b64"
    if not isinstance(value, str):
        raise BadRequest(f"{location} is not an image; send one encoded image in base64")
    return from_base64(value, location)


def _get_only(columns: dict[str, Any], location: str) -> tuple[Any, str]:
    """Return the value of the only column, and its place. Raises `BadRequest`."""
    if len(columns) != 1:
        raise BadRequest(f"{location} has {len(columns)} columns; send one, with the image")
    ((name, value),) = columns.items()
    return value, f"{location}.{name}"


class _MlflowFormat(NamedTuple):
    """The content of a reply: the best labels of each image, or its error."""

    labels_per_image: int

    def render(
        self, results: Sequence[Classification | RequestError], model: LiveModel, record: RequestRecord
    ) -> Reply:
        """Render the results (`service.api.adapter.ReplyFormat`)."""
        # One after the other: as plain values they take more memory.
        predictions = [orjson.Fragment(orjson.dumps(self._render_result(one))) for one in results]
        return Reply.from_value({"predictions": predictions})

    def _render_result(self, result: Classification | RequestError) -> dict[str, Any]:
        if isinstance(result, RequestError):
            return {"error": result.to_dict()}
        labels = rank_labels(result, top_k=self.labels_per_image)
        rendered: dict[str, Any] = {
            "label": labels[0].label,
            "probability": labels[0].probability,
            "labels": [one.label for one in labels],
            "probabilities": [one.probability for one in labels],
            **render_known(result),
        }
        if result.answer.warnings:
            rendered["warnings"] = render_warnings(result.answer.warnings)
        return rendered
