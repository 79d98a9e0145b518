"""TensorFlow Serving's REST API, and KServe's V1 protocol, which has the same form.

    POST /v1/models/{name}[/versions/{version}]:predict    {"instances": [{"b64": "…"}]} → {"predictions": …}
                                                           {"inputs": …}                 → {"outputs": …}
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

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, Field

from fovea.service.api import bodies
from fovea.service.api.endpoint import Asked, Heard, Reply, Routes, Translation
from fovea.service.api.schemas import Closed, FlatError, failures
from fovea.service.api.services import Desk
from fovea.service.api.tensors import DATATYPES, NOTHING_BEHIND, InferInput, Inputs
from fovea.service.artifact.inputs import InputTensor
from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import BadRequest
from fovea.service.http.api_protocol import ApiProtocol, render_flat_error
from fovea.service.http.fast_path import Headers
from fovea.service.runners.messages import ImageRequest, Item
from fovea.service.serving.classifier import Classification, rank_labels
from fovea.service.serving.registry import LiveModel
from fovea.service.settings import MAX_REQUEST_IMAGES, Settings

DIALECT: Final = ApiProtocol("tensorflow", render_flat_error)

_SIGNATURE: Final = "serving_default"

_INPUT: Final = "image_bytes"
"""Input name of the signature, the usual name for encoded images. Any other name is accepted too."""

_METHOD: Final = "tensorflow/serving/predict"

_TYPES: Final = {
    np.dtype(np.uint8): "DT_UINT8",
    np.dtype(np.float16): "DT_HALF",
    np.dtype(np.float32): "DT_FLOAT",
}

# --- requests and replies ------------------------------------------------------------------------


class Predict(Closed):
    """Rows (`instances`) or columns (`inputs`), one or the other. An image is `{"b64": "…"}`, or nested
    numbers of the shape of one of the model's tensors, and may be under the name of an input."""

    signature_name: str | None = None
    instances: list[Any] | None = Field(None, min_length=1, max_length=MAX_REQUEST_IMAGES)
    inputs: Any = None


class Classify(Closed):
    """An example has one feature, whatever its name: an image, `{"b64": "…"}`. That of `context` all have."""

    signature_name: str | None = None
    context: Annotated[dict[str, Any], Field(max_length=1)] | None = None
    examples: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_REQUEST_IMAGES)


class Predicted(BaseModel):
    """Of each image every label's probability, in the model's order: as `predictions` of rows, as `outputs`
    of columns."""

    predictions: list[list[float]] | None = None
    outputs: list[list[float]] | None = None


class Classified(BaseModel):
    """Of each image every label and its probability, highest first."""

    result: list[list[Annotated[list[str | float], Field(min_length=2, max_length=2)]]]


class Condition(BaseModel):
    """Of a version."""

    error_code: str
    error_message: str


class VersionStatus(BaseModel):
    """Of one version of a model. One that rests is loaded when it is asked for: it is available."""

    version: str
    state: str
    status: Condition


class Status(BaseModel):
    """Of a model. KServe's clients look at `ready`."""

    name: str
    ready: bool = True
    model_version_status: list[VersionStatus]


class Metadata(BaseModel):
    """Of a model: its signature, as TensorFlow writes it."""

    model_spec: dict[str, str]
    metadata: dict[str, Any]


# --- routes --------------------------------------------------------------------------------------


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Add the routes of this protocol."""
    routes = Routes(app, desk, DIALECT, FlatError)
    for path in ("/v1/models/{name}", "/v1/models/{name}/versions/{version}"):
        routes.ask(
            f"{path}:predict",
            _Prediction(),
            summary="Every label's probability",
            reply=Predicted,
            body=Predict,
            example=lambda image: {"instances": [{"b64": image}]},
        )
        routes.ask(
            f"{path}:classify",
            _Classification(),
            summary="Labels and probabilities",
            reply=Classified,
            body=Classify,
            example=lambda image: {"examples": [{"image": {"b64": image}}]},
        )
    repository = desk.classifier.registry
    errors = failures(FlatError)
    said = {404: errors[404], 503: errors[503]}
    documented: dict[str, Any] = {"tags": [DIALECT.name], "responses": said}

    @app.get("/v1/models/{name}", **documented)
    async def status(name: str) -> Status:
        """Whether each version of a model answers."""
        found = [_status(one) for one in repository.list_versions(name)]
        desk.require_ready()
        return Status(name=name, model_version_status=found)

    @app.get("/v1/models/{name}/versions/{version}", **documented)
    async def status_of_version(name: str, version: str) -> Status:
        """Whether one version of a model answers."""
        found = [_status(repository.get(name, version))]
        desk.require_ready()
        return Status(name=name, model_version_status=found)

    @app.get("/v1/models/{name}/metadata", **documented)
    async def metadata(name: str) -> Metadata:
        """What the latest version of a model takes and gives."""
        return _metadata(await desk.model(name))

    @app.get("/v1/models/{name}/versions/{version}/metadata", **documented)
    async def metadata_of_version(name: str, version: str) -> Metadata:
        """What one version of a model takes and gives."""
        return _metadata(await desk.model(name, version))


def _status(model: LiveModel | ModelVersion) -> VersionStatus:
    rests = isinstance(model, ModelVersion)
    message = "it rests, and is loaded when it is asked for" if rests else ""
    condition = Condition(error_code="OK", error_message=message)
    return VersionStatus(version=model.version or "", state="AVAILABLE", status=condition)


def _metadata(model: LiveModel) -> Metadata:
    """Return the signatures of a model.

    `serving_default` takes encoded images; each tensor that the model takes has a signature of its own name.
    """
    contract = model.contract
    output = {
        contract.probabilities_name: _tensor(
            "DT_FLOAT", contract.probabilities_name, -1, len(contract.labels)
        )
    }
    inputs = {_SIGNATURE: (_INPUT, _tensor("DT_STRING", _INPUT, -1))}
    for one in model.tensors:
        inputs[one.name] = (one.name, _tensor(_TYPES[one.dtype], one.name, -1, *one.shape))
    signatures = {
        signature: {"inputs": {name: tensor}, "outputs": output, "method_name": _METHOD}
        for signature, (name, tensor) in inputs.items()
    }
    return Metadata(
        model_spec={"name": model.name, "signature_name": "", "version": model.version},
        metadata={"signature_def": {"signature_def": signatures}},
    )


def _tensor(dtype: str, name: str, *sizes: int) -> dict[str, Any]:
    dimensions = [{"size": str(size), "name": ""} for size in sizes]
    return {
        "dtype": dtype,
        "tensor_shape": {"dim": dimensions, "unknown_rank": False},
        "name": f"{name}:0",
    }


# --- request bodies ------------------------------------------------------------------------------


class _Json(Translation):
    """A parser of JSON bodies; the content type is ignored, because clients often send none."""

    def limit(self, headers: Headers, settings: Settings) -> bodies.Limit:
        return bodies.json_limit(settings)

    async def read(self, heard: Heard) -> Asked:
        return await bodies.parse_json(heard.body, lambda value: self.take_apart(value, heard))

    @abstractmethod
    def take_apart(self, value: Any, heard: Heard) -> Asked:
        """Convert the parsed JSON to a request.

        Raises `BadRequest`.
        """


class _Prediction(_Json):
    def take_apart(self, value: Any, heard: Heard) -> Asked:
        wanted = bodies.validate(Predict, value)
        if (wanted.instances is None) == (wanted.inputs is None):
            raise BadRequest("send either `instances` (rows) or `inputs` (columns)")
        if wanted.instances is not None:
            key, rows = "predictions", _rows(wanted.instances, "instances", heard)
        else:
            key, rows = "outputs", _columns(wanted.inputs, heard)
        items = _items(rows, wanted.signature_name, heard)

        def reply(found: Sequence[Classification]) -> Reply:
            return Reply.json({key: [one.answer.probabilities.tolist() for one in found]})

        return Asked(items, reply, len(heard.model.contract.labels))


class _Classification(_Json):
    def take_apart(self, value: Any, heard: Heard) -> Asked:
        wanted = bodies.validate(Classify, value)
        bodies.check_count(wanted.examples, heard.settings)
        examples = [{**(wanted.context or {}), **example} for example in wanted.examples]
        items = _items(_rows(examples, "examples", heard), wanted.signature_name, heard)

        def reply(found: Sequence[Classification]) -> Reply:
            return Reply.json({"result": [_labels(one) for one in found]})

        return Asked(items, reply, len(heard.model.contract.labels))


def _labels(image: Classification) -> list[tuple[str, float]]:
    return [(one.label, one.probability) for one in rank_labels(image, top_k=0)]


class _Row(NamedTuple):
    """One element of a request, which should be an image."""

    place: str
    """Path of the element in the body."""
    name: str | None
    """Name of the input, if the request gives one."""
    value: Any


def _rows(values: list[Any], place: str, heard: Heard) -> list[_Row]:
    bodies.check_count(values, heard.settings)
    return [_row(value, f"{place}.{index}") for index, value in enumerate(values)]


def _row(value: Any, place: str) -> _Row:
    """Parse an element: an image by itself, or an object with one input name and an image."""
    if not isinstance(value, dict) or "b64" in value:
        return _Row(place, None, value)
    if len(value) != 1:
        raise BadRequest(f"{place} has {len(value)} inputs; the model has one, {_INPUT!r}")
    ((name, value),) = value.items()
    return _Row(f"{place}.{name}", name, value)


def _columns(inputs: Any, heard: Heard) -> list[_Row]:
    """Parse columns: a list of images or one image, by itself or under the name of an input."""
    whole = _row(inputs, "inputs")
    if not isinstance(whole.value, list):
        return [whole]
    bodies.check_count(whole.value, heard.settings)
    return [_Row(f"{whole.place}.{index}", whole.name, value) for index, value in enumerate(whole.value)]


def _items(rows: list[_Row], signature: str | None, heard: Heard) -> list[Item]:
    """Convert rows to images or tensors.

    Raises `BadRequest`.
    """
    tensors = heard.model.tensors
    if signature not in (None, "", _SIGNATURE, *(tensor.name for tensor in tensors)):
        raise BadRequest(f"there is no signature {signature!r}; there is {_SIGNATURE!r}")
    if not rows:
        raise BadRequest("there are no images")
    if isinstance(rows[0].value, list):
        return _numbers(rows, tensors, heard.settings)
    return [_image(*row) for row in rows]


def _image(place: str, name: str | None, value: Any) -> bytes:
    """Decode an image `{"b64": "…"}`.

    TorchServe's variant of KServe's protocol, a string under `data`, is accepted too.
    """
    if name == "data" and isinstance(value, str):
        return bodies.from_base64(value, place)
    if isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str):
        return bodies.from_base64(value["b64"], f"{place}.b64")
    raise BadRequest(f'{place} is no image; send one as {{"b64": "…"}}')


def _numbers(rows: list[_Row], tensors: Sequence[InputTensor], settings: Settings) -> list[Item]:
    """Convert nested lists of numbers to one of the model's tensors, which is found by name or by shape."""
    shape, name = _shape(rows[0].value), rows[0].name
    by_name = [tensor for tensor in tensors if tensor.name == name]
    for tensor in by_name or [tensor for tensor in tensors if tensor.shape == shape]:
        sizes, kind = [len(rows), *tensor.shape], DATATYPES[tensor.dtype]
        given = InferInput(name=tensor.name, shape=sizes, datatype=kind, data=[row.value for row in rows])
        found = Inputs(tensors).rows([given], NOTHING_BEHIND, settings)
        return [ImageRequest(row.content, row.tensor) for row in found]
    known = " or ".join(f"{tensor.name!r} of shape {list(tensor.shape)}" for tensor in tensors)
    raise BadRequest(f"{rows[0].place} has shape {list(shape)}; the model takes {known}, or images")


def _shape(value: Any) -> tuple[int, ...]:
    """Return the shape of nested lists, measured along the first elements.

    Only the outer four levels count, because no model takes more.
    """
    sizes: list[int] = []
    while isinstance(value, list) and len(sizes) < 4:
        sizes.append(len(value))
        value = value[0] if value else None
    return tuple(sizes)
