"""TensorFlow Serving's REST API, and KServe's V1 protocol, which has the same form.

    POST /v1/models/{name}[/versions/{version}]:predict    {"instances": [{"b64": "…"}]} → {"predictions": …}
                                                           {"inputs": …}                 → {"outputs": …}
                                                           {…, "parameters": {"labels": true, "top_k": 5}}
    POST /v1/models/{name}[/versions/{version}]:classify   {"examples": [{"image": {"b64": "…"}}]}
                                                           → {"result": [[[label, probability], …]]}
    GET  /v1/models/{name}[/versions/{version}]            → {"model_version_status": …}
    GET  /v1/models/{name}[/versions/{version}]/metadata   → {"model_spec": …, "metadata": …}

The signature `serving_default` takes encoded images. The signatures named after the model's tensors take
nested numbers. All of them return every label's probability.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Final, NamedTuple

from fastapi import FastAPI
from pydantic import BaseModel, Field

from fovea.service.api import bodies
from fovea.service.api.adapter import InferenceRequest, ParsedRequest, ProtocolAdapter, Reply
from fovea.service.api.base64_text import from_base64
from fovea.service.api.json_bodies import parse_json, validate_json
from fovea.service.api.protocol_routes import ProtocolRoutes
from fovea.service.api.reply_schemas import FlatError, build_error_responses
from fovea.service.api.request_schemas import StrictModel
from fovea.service.api.services import Services
from fovea.service.api.tensors import DATATYPES, NO_BINARY_DATA, InferInput, ModelInputs
from fovea.service.artifact.inputs import InputTensor
from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import BadRequest
from fovea.service.http.api_protocol import ApiProtocol, render_flat_error
from fovea.service.http.fast_path import Headers
from fovea.service.http.request_record import RequestRecord
from fovea.service.runners.batch_messages import ImageRequest, Item
from fovea.service.serving.classifier import Classification
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.ranking import rank_labels
from fovea.service.settings import MAX_REQUEST_IMAGES, Settings

PROTOCOL: Final = ApiProtocol("tensorflow", render_flat_error)

_DEFAULT_SIGNATURE: Final = "serving_default"

_INPUT_NAME: Final = "image_bytes"
"""Input name of the signature, the usual name for encoded images. Any other name is accepted too."""

_METHOD_NAME: Final = "tensorflow/serving/predict"

_TENSORFLOW_TYPES: Final = {
    "uint8": "DT_UINT8",
    "float16": "DT_HALF",
    "float32": "DT_FLOAT",
}

# --- requests and replies ------------------------------------------------------------------------


class PredictParameters(StrictModel):
    """Choose the content of the reply. Vertex AI's clients send parameters beside `instances`."""

    labels: bool = Field(
        False, description="Reply with labels and their probabilities, and not with bare probabilities."
    )
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Number of labels, highest probability first; all labels by default."
    )


class PredictRequest(StrictModel):
    """Rows (`instances`) or columns (`inputs`), but not both.

    An image is `{"b64": "…"}`, or nested numbers in the shape of one of the model's tensors. It may stand
    under the name of an input.
    """

    signature_name: str | None = None
    parameters: PredictParameters | None = None
    instances: list[Any] | None = Field(None, min_length=1, max_length=MAX_REQUEST_IMAGES)
    inputs: Any = None


class ClassificationRequest(StrictModel):
    """Examples with one feature of any name: an image, `{"b64": "…"}`.

    A feature in `context` belongs to all examples.
    """

    signature_name: str | None = None
    context: Annotated[dict[str, Any], Field(max_length=1)] | None = None
    examples: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_REQUEST_IMAGES)


class LabelledPrediction(BaseModel):
    """The prediction for one image with its labels, the highest probability first."""

    label: str
    probability: float
    labels: list[str]
    probabilities: list[float]


class PredictReply(BaseModel):
    """The probabilities of all labels for each image, in the model's order, or labels on request.

    Rows get `predictions`, and columns get `outputs`.
    """

    predictions: list[list[float] | LabelledPrediction] | None = None
    outputs: list[list[float] | LabelledPrediction] | None = None


class ClassificationReply(BaseModel):
    """The labels and their probabilities for each image, highest first."""

    result: list[list[Annotated[list[str | float], Field(min_length=2, max_length=2)]]]


class StatusDetail(BaseModel):
    """The error of a version; the code is always `OK`."""

    error_code: str
    error_message: str


class VersionStatus(BaseModel):
    """The status of one version of a model.

    A resting version is available, because the first request loads it.
    """

    version: str
    state: str
    status: StatusDetail


class ModelStatus(BaseModel):
    """The status of a model; `ready` is for KServe's clients."""

    name: str
    ready: bool = True
    model_version_status: list[VersionStatus]


class SignatureMetadata(BaseModel):
    """The signatures of a model, in TensorFlow's form."""

    model_spec: dict[str, str]
    metadata: dict[str, Any]


# --- routes --------------------------------------------------------------------------------------


def add_routes(app: FastAPI, services: Services) -> None:
    """Add the routes of this protocol."""
    routes = ProtocolRoutes(app, services, PROTOCOL, FlatError)
    for path in ("/v1/models/{name}", "/v1/models/{name}/versions/{version}"):
        routes.add_endpoint(
            f"{path}:predict",
            PredictAdapter(),
            summary="Every label's probability",
            reply_type=PredictReply,
            body_type=PredictRequest,
            make_example=lambda image: {"instances": [{"b64": image}]},
        )
        routes.add_endpoint(
            f"{path}:classify",
            _ClassifyAdapter(),
            summary="Labels and probabilities",
            reply_type=ClassificationReply,
            body_type=ClassificationRequest,
            make_example=lambda image: {"examples": [{"image": {"b64": image}}]},
        )
    catalog = services.classifier.catalog
    errors = build_error_responses(FlatError)
    error_responses = {404: errors[404], 503: errors[503]}
    route_options: dict[str, Any] = {"tags": [PROTOCOL.name], "responses": error_responses}

    @app.get("/v1/models/{name}", **route_options)
    async def status(name: str) -> ModelStatus:
        """Return the status of each version of a model."""
        statuses = [_render_status(one) for one in catalog.list_versions(name)]
        services.require_ready()
        return ModelStatus(name=name, model_version_status=statuses)

    @app.get("/v1/models/{name}/versions/{version}", **route_options)
    async def status_of_version(name: str, version: str) -> ModelStatus:
        """Return the status of one version of a model."""
        statuses = [_render_status(catalog.get(name, version))]
        services.require_ready()
        return ModelStatus(name=name, model_version_status=statuses)

    @app.get("/v1/models/{name}/metadata", **route_options)
    async def metadata(name: str) -> SignatureMetadata:
        """Return the signatures of the latest version of a model."""
        return _render_metadata(await services.get_model(name))

    @app.get("/v1/models/{name}/versions/{version}/metadata", **route_options)
    async def metadata_of_version(name: str, version: str) -> SignatureMetadata:
        """Return the signatures of one version of a model."""
        return _render_metadata(await services.get_model(name, version))


def _render_status(model: LiveModel | ModelVersion) -> VersionStatus:
    is_resting = isinstance(model, ModelVersion)
    message = "the version is not loaded; the first request loads it" if is_resting else ""
    detail = StatusDetail(error_code="OK", error_message=message)
    return VersionStatus(version=model.version or "", state="AVAILABLE", status=detail)


def _render_metadata(model: LiveModel) -> SignatureMetadata:
    """Return the signatures of a model.

    `serving_default` takes encoded images; each tensor that the model takes has a signature of its own name.
    """
    contract = model.contract
    output = {
        contract.probabilities_name: _render_tensor(
            "DT_FLOAT", contract.probabilities_name, -1, len(contract.labels)
        )
    }
    inputs = {_DEFAULT_SIGNATURE: (_INPUT_NAME, _render_tensor("DT_STRING", _INPUT_NAME, -1))}
    for one in model.tensors:
        inputs[one.name] = (one.name, _render_tensor(_TENSORFLOW_TYPES[one.dtype], one.name, -1, *one.shape))
    signatures = {
        signature: {"inputs": {name: tensor}, "outputs": output, "method_name": _METHOD_NAME}
        for signature, (name, tensor) in inputs.items()
    }
    return SignatureMetadata(
        model_spec={"name": model.name, "signature_name": "", "version": model.version},
        metadata={"signature_def": {"signature_def": signatures}},
    )


def _render_tensor(dtype: str, name: str, *sizes: int) -> dict[str, Any]:
    dimensions = [{"size": str(size), "name": ""} for size in sizes]
    return {
        "dtype": dtype,
        "tensor_shape": {"dim": dimensions, "unknown_rank": False},
        "name": f"{name}:0",
    }


# --- request bodies ------------------------------------------------------------------------------


class _JsonAdapter(ProtocolAdapter):
    """A parser of JSON bodies; the content type is ignored, because clients often send none."""

    def is_json_body(self, headers: Headers) -> bool:
        return True

    async def parse_request(self, request: InferenceRequest) -> ParsedRequest:
        return await parse_json(request.body, lambda value: self.convert_value(value, request))

    @abstractmethod
    def convert_value(self, value: Any, request: InferenceRequest) -> ParsedRequest:
        """Convert the parsed JSON to a request.

        Raises `BadRequest`.
        """


class PredictAdapter(_JsonAdapter):
    """A parser of `:predict`."""

    def convert_value(self, value: Any, request: InferenceRequest) -> ParsedRequest:
        predict_request = validate_json(PredictRequest, value)
        if (predict_request.instances is None) == (predict_request.inputs is None):
            raise BadRequest("send either `instances` (rows) or `inputs` (columns)")
        if predict_request.instances is not None:
            key, rows = "predictions", _parse_rows(predict_request.instances, "instances", request)
        else:
            key, rows = "outputs", _parse_columns(predict_request.inputs, request)
        items = _to_items(rows, predict_request.signature_name, request)
        parameters = predict_request.parameters or PredictParameters()
        label_count = len(request.model.contract.labels)
        if parameters.labels:
            count = min(parameters.top_k or label_count, label_count)
            return ParsedRequest(items, _LabelledFormat(count, key))
        if parameters.top_k is not None:
            raise BadRequest(
                "`parameters.top_k` needs `parameters.labels`: numbers alone are in the model's order"
            )
        return ParsedRequest(items, _ProbabilitiesFormat(label_count, key))


class _ClassifyAdapter(_JsonAdapter):
    def convert_value(self, value: Any, request: InferenceRequest) -> ParsedRequest:
        classification_request = validate_json(ClassificationRequest, value)
        bodies.check_image_count(len(classification_request.examples), request.settings)
        examples = [
            {**(classification_request.context or {}), **example}
            for example in classification_request.examples
        ]
        items = _to_items(
            _parse_rows(examples, "examples", request), classification_request.signature_name, request
        )
        return ParsedRequest(items, _LabelsFormat(len(request.model.contract.labels)))


class _ProbabilitiesFormat(NamedTuple):
    """The content of a reply: the probabilities of all labels of each image."""

    labels_per_image: int
    key: str
    """Name of the list of results."""

    def render(self, results: Sequence[Classification], model: LiveModel, record: RequestRecord) -> Reply:
        """Render the results (`service.api.adapter.ReplyFormat`)."""
        return Reply.from_value({self.key: [one.answer.probabilities.tolist() for one in results]})


class _LabelledFormat(NamedTuple):
    """The content of a reply: the best labels of each image with their probabilities."""

    labels_per_image: int
    key: str

    def render(self, results: Sequence[Classification], model: LiveModel, record: RequestRecord) -> Reply:
        """Render the results (`service.api.adapter.ReplyFormat`)."""
        rankings = [rank_labels(one, top_k=self.labels_per_image) for one in results]
        return Reply.from_value(
            {
                self.key: [
                    {
                        "label": labels[0].label,
                        "probability": labels[0].probability,
                        "labels": [one.label for one in labels],
                        "probabilities": [one.probability for one in labels],
                    }
                    for labels in rankings
                ]
            }
        )


class _LabelsFormat(NamedTuple):
    """The content of a reply: all labels of each image with their probabilities."""

    labels_per_image: int

    def render(self, results: Sequence[Classification], model: LiveModel, record: RequestRecord) -> Reply:
        """Render the results (`service.api.adapter.ReplyFormat`)."""
        rankings = [rank_labels(one, top_k=0) for one in results]
        return Reply.from_value(
            {"result": [[(one.label, one.probability) for one in labels] for labels in rankings]}
        )


class _Row(NamedTuple):
    """One element of a request, which should be an image."""

    location: str
    """Path of the element in the body."""
    name: str | None
    """Name of the input, if the request gives one."""
    value: Any


def _parse_rows(values: list[Any], location: str, request: InferenceRequest) -> list[_Row]:
    bodies.check_image_count(len(values), request.settings)
    return [_parse_row(value, f"{location}.{index}") for index, value in enumerate(values)]


def _parse_row(value: Any, location: str) -> _Row:
    """Parse an element: an image by itself, or an object with one input name and an image."""
    if not isinstance(value, dict) or "b64" in value:
        return _Row(location, None, value)
    if len(value) != 1:
        raise BadRequest(f"{location} has {len(value)} inputs; the model has one, {_INPUT_NAME!r}")
    ((name, value),) = value.items()
    return _Row(f"{location}.{name}", name, value)


def _parse_columns(inputs: Any, request: InferenceRequest) -> list[_Row]:
    """Parse columns: a list of images or one image, by itself or under the name of an input."""
    row = _parse_row(inputs, "inputs")
    if not isinstance(row.value, list):
        return [row]
    bodies.check_image_count(len(row.value), request.settings)
    return [_Row(f"{row.location}.{index}", row.name, value) for index, value in enumerate(row.value)]


def _to_items(rows: list[_Row], signature: str | None, request: InferenceRequest) -> list[Item]:
    """Convert rows to images or tensors.

    Raises `BadRequest`.
    """
    tensors = request.model.tensors
    signatures = (_DEFAULT_SIGNATURE, *(tensor.name for tensor in tensors))
    if signature and signature not in signatures:
        raise BadRequest(
            f"the model has no signature {signature!r}; its signatures are {', '.join(map(repr, signatures))}"
        )
    if not rows:
        raise BadRequest("the request has no images; send at least one")
    if isinstance(rows[0].value, list):
        return _to_tensor_items(rows, tensors, request.settings)
    return [_decode_image(*row) for row in rows]


def _decode_image(location: str, name: str | None, value: Any) -> bytes:
    """Decode an image `{"b64": "…"}`.

    TorchServe's variant of KServe's protocol, a string under `data`, is accepted too.
    """
    if name == "data" and isinstance(value, str):
        return from_base64(value, location)
    if isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str):
        return from_base64(value["b64"], f"{location}.b64")
    raise BadRequest(f'{location} is not an image; send base64, as {{"b64": "…"}}')


def _to_tensor_items(rows: list[_Row], tensors: Sequence[InputTensor], settings: Settings) -> list[Item]:
    """Convert nested lists of numbers to one of the model's tensors, which is found by name or by shape."""
    shape, name = _measure_shape(rows[0].value), rows[0].name
    named_tensors = [tensor for tensor in tensors if tensor.name == name]
    for tensor in named_tensors or [tensor for tensor in tensors if tensor.shape == shape]:
        sizes, datatype = [len(rows), *tensor.shape], DATATYPES[tensor.dtype]
        infer_input = InferInput(
            name=tensor.name, shape=sizes, datatype=datatype, data=[row.value for row in rows]
        )
        tensor_rows = ModelInputs(tensors).split_rows([infer_input], NO_BINARY_DATA, settings)
        return [ImageRequest(row.content, row.tensor_name) for row in tensor_rows]
    choices = " or ".join(f"{tensor.name!r} of shape {list(tensor.shape)}" for tensor in tensors)
    raise BadRequest(
        f"{rows[0].location} has shape {list(shape)}; the model takes {choices}, or encoded images"
    )


def _measure_shape(value: Any) -> tuple[int, ...]:
    """Return the shape of nested lists, measured along the first elements.

    Only the outer four levels count, because no model takes more.
    """
    sizes: list[int] = []
    while isinstance(value, list) and len(sizes) < 4:
        sizes.append(len(value))
        value = value[0] if value else None
    return tuple(sizes)
