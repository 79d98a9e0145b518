"""TensorFlow Serving's REST API. KServe's first protocol has the same form.

    POST /v1/models/{name}[/versions/{version}]:predict    {"instances": [{"b64": "…"}]} → {"predictions": …}
                                                           {"inputs": …}                 → {"outputs": …}
    POST /v1/models/{name}[/versions/{version}]:classify   {"examples": [{"image": {"b64": "…"}}]}
                                                           → {"result": [[[label, probability], …]]}
    GET  /v1/models/{name}[/versions/{version}]            → {"model_version_status": …}
    GET  /v1/models/{name}[/versions/{version}]/metadata   → {"model_spec": …, "metadata": …}

The model has one signature, `serving_default`: encoded images in, every label's probability out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from service.api import bodies
from service.api.desk import Desk
from service.api.schemas import FlatError, failures
from service.api.translation import Asked, Heard, Reply, Routes, Translation
from service.classifier import Classification, rank
from service.dialect import Dialect, write_flat
from service.direct import Headers
from service.errors import BadRequest
from service.layout import Found
from service.messages import Image
from service.repository import LiveModel
from service.settings import Settings

DIALECT: Final = Dialect("tensorflow", write_flat)

_SIGNATURE: Final = "serving_default"

_INPUT: Final = "image_bytes"
"""What the signature calls its input: the usual name for encoded images. Any other is taken too."""

# --- the shapes ----------------------------------------------------------------------------------


class Predict(BaseModel):
    """Rows (`instances`) or columns (`inputs`), one or the other; an image is `{"b64": "…"}`, and may be
    under the name of an input."""

    model_config = ConfigDict(extra="forbid", strict=True)

    signature_name: str | None = None
    instances: list[Any] | None = Field(None, min_length=1)
    inputs: Any = None


class Classify(BaseModel):
    """An example has one feature, whatever its name, with an image: `{"b64": "…"}`. What `context` has, all
    examples have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    signature_name: str | None = None
    context: dict[str, Any] | None = None
    examples: list[dict[str, Any]] = Field(min_length=1)


class Predicted(BaseModel):
    """Of each image every label's probability, in the model's order: as `predictions` of rows, as `outputs`
    of columns."""

    predictions: list[list[float]] | None = None
    outputs: list[list[float]] | None = None


class Classified(BaseModel):
    """Of each image every label and its probability, highest first."""

    result: list[list[tuple[str, float]]]


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
    """Of a model."""

    model_version_status: list[VersionStatus]


class Metadata(BaseModel):
    """Of a model: its signature, as TensorFlow writes it."""

    model_spec: dict[str, str]
    metadata: dict[str, Any]


# --- the routes ----------------------------------------------------------------------------------


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Add the routes of this dialect."""
    routes = Routes(app, desk, DIALECT, FlatError)
    for path in ("/v1/models/{name}", "/v1/models/{name}/versions/{version}"):
        routes.ask(
            f"{path}:predict",
            _Prediction(),
            summary="Every label's probability",
            reply=Predicted,
            body=Predict,
        )
        routes.ask(
            f"{path}:classify",
            _Classification(),
            summary="Labels and probabilities",
            reply=Classified,
            body=Classify,
        )
    repository = desk.classifier.repository
    documented: dict[str, Any] = {"tags": [DIALECT.name], "responses": {404: failures(FlatError)[404]}}

    @app.get("/v1/models/{name}", **documented)
    async def status(name: str) -> Status:
        """Whether each version of a model answers."""
        return Status(model_version_status=[_status(one) for one in repository.versions(name)])

    @app.get("/v1/models/{name}/versions/{version}", **documented)
    async def status_of_version(name: str, version: str) -> Status:
        """Whether one version of a model answers."""
        return Status(model_version_status=[_status(repository.get(name, version))])

    errors = failures(FlatError)
    documented["responses"] = {404: errors[404], 503: errors[503]}

    @app.get("/v1/models/{name}/metadata", **documented)
    async def metadata(name: str) -> Metadata:
        """What the latest version of a model takes and gives."""
        return _metadata(await desk.model(name))

    @app.get("/v1/models/{name}/versions/{version}/metadata", **documented)
    async def metadata_of_version(name: str, version: str) -> Metadata:
        """What one version of a model takes and gives."""
        return _metadata(await desk.model(name, version))


def _status(model: LiveModel | Found) -> VersionStatus:
    rests = isinstance(model, Found)
    message = "it rests, and is loaded when it is asked for" if rests else ""
    condition = Condition(error_code="OK", error_message=message)
    return VersionStatus(version=model.version or "", state="AVAILABLE", status=condition)


def _metadata(model: LiveModel) -> Metadata:
    contract = model.contract
    signature = {
        "inputs": {_INPUT: _tensor("DT_STRING", _INPUT, -1)},
        "outputs": {
            contract.probabilities_name: _tensor(
                "DT_FLOAT", contract.probabilities_name, -1, len(contract.labels)
            )
        },
        "method_name": "tensorflow/serving/predict",
    }
    return Metadata(
        model_spec={"name": model.name, "signature_name": "", "version": model.version},
        metadata={"signature_def": {"signature_def": {_SIGNATURE: signature}}},
    )


def _tensor(dtype: str, name: str, *sizes: int) -> dict[str, Any]:
    dimensions = [{"size": str(size), "name": ""} for size in sizes]
    return {
        "dtype": dtype,
        "tensor_shape": {"dim": dimensions, "unknown_rank": False},
        "name": f"{name}:0",
    }


# --- the bodies ----------------------------------------------------------------------------------


class _Json(Translation):
    """A body is JSON, whatever its type says: its clients often say none."""

    def limit(self, headers: Headers, settings: Settings) -> bodies.Limit:
        return bodies.json_limit(settings)

    async def read(self, heard: Heard) -> Asked:
        return await bodies.parse_json(heard.body, lambda value: self.take_apart(value, heard))

    @abstractmethod
    def take_apart(self, value: Any, heard: Heard) -> Asked:
        """Raises `BadRequest`."""


class _Prediction(_Json):
    def take_apart(self, value: Any, heard: Heard) -> Asked:
        wanted = bodies.validate(Predict, value)
        _check_signature(wanted.signature_name)
        if (wanted.instances is None) == (wanted.inputs is None):
            raise BadRequest("send either `instances` (rows) or `inputs` (columns)")
        if wanted.instances is not None:
            images = _images(wanted.instances, "instances", heard.settings)
            return _asked(images, "predictions", heard.model)
        return _asked(_columns(wanted.inputs, heard.settings), "outputs", heard.model)


def _asked(images: list[Image], key: str, model: LiveModel) -> Asked:
    def reply(found: Sequence[Classification]) -> Reply:
        return Reply.json({key: [one.answer.probabilities.tolist() for one in found]})

    return Asked(images, reply, len(model.contract.labels))


class _Classification(_Json):
    def take_apart(self, value: Any, heard: Heard) -> Asked:
        wanted = bodies.validate(Classify, value)
        _check_signature(wanted.signature_name)
        examples = [{**(wanted.context or {}), **example} for example in wanted.examples]
        images = _images(examples, "examples", heard.settings)

        def reply(found: Sequence[Classification]) -> Reply:
            return Reply.json({"result": [_labels(one) for one in found]})

        return Asked(images, reply, len(heard.model.contract.labels))


def _labels(image: Classification) -> list[tuple[str, float]]:
    return [(one.label, one.probability) for one in rank(image, top_k=0)]


def _check_signature(name: str | None) -> None:
    if name not in (None, "", _SIGNATURE):
        raise BadRequest(f"there is no signature {name!r}; there is {_SIGNATURE!r}")


def _columns(inputs: Any, settings: Settings) -> list[Image]:
    """`{"b64"}`, a list of them, or either under the name of an input."""
    place = "inputs"
    if isinstance(inputs, dict) and "b64" not in inputs:
        name, inputs = _only(inputs, place)
        place = f"{place}.{name}"
    if isinstance(inputs, list):
        return _images(inputs, place, settings)
    return [_image(inputs, place)]


def _images(values: Sequence[Any], place: str, settings: Settings) -> list[Image]:
    if not values:
        raise BadRequest(f"{place} is empty")
    bodies.check_count(values, settings)
    return [_image(value, f"{place}.{index}") for index, value in enumerate(values)]


def _image(value: Any, place: str) -> bytes:
    """`{"b64": "…"}`, which may be under the name of an input. TorchServe's way of KServe's protocol, a
    string under `data`, is understood as well."""
    if isinstance(value, dict) and "b64" not in value:
        name, value = _only(value, place)
        place = f"{place}.{name}"
        if name == "data" and isinstance(value, str):
            return bodies.from_base64(value, place)
    if isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str):
        return bodies.from_base64(value["b64"], f"{place}.b64")
    raise BadRequest(f'{place} is no image; send one as {{"b64": "…"}}')


def _only(named: dict[str, Any], place: str) -> tuple[str, Any]:
    if len(named) != 1:
        raise BadRequest(f"{place} has {len(named)} inputs; the model has one, {_INPUT!r}")
    return next(iter(named.items()))
