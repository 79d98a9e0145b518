"""The JSON types of Open Inference Protocol."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fovea.service.api.tensors import MAX_PARTS, InferInput


class InferOutput(BaseModel):
    """A requested output.

    The parameter `classification` requests this number of labels instead of the values, each as
    `value:index:label`. The parameter `binary_data` sends the output as binary data after the JSON.
    """

    model_config = ConfigDict(strict=True)

    name: str
    parameters: dict[str, Any] | None = None


class InferRequest(BaseModel):
    """Images as one tensor.

    The supported parameters are `binary_data_output`, and `timeout` in microseconds.
    """

    model_config = ConfigDict(strict=True)

    id: str | None = None
    parameters: dict[str, Any] | None = None
    inputs: list[InferInput] = Field(min_length=1, max_length=MAX_PARTS)
    outputs: list[InferOutput] | None = Field(
        None, max_length=MAX_PARTS, description="The outputs to return; by default the probabilities."
    )


class ServerLive(BaseModel):
    """The liveness of the service."""

    live: bool


class ServerReady(BaseModel):
    """The readiness of the service."""

    ready: bool


class ModelReady(BaseModel):
    """The readiness of a model."""

    name: str
    ready: bool


class ServerMetadata(BaseModel):
    """The name and version of the service, and the extensions of the protocol that it supports."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """A tensor; the size -1 stands for any number of images."""

    name: str
    datatype: str
    shape: list[int]


class Alternatives(BaseModel):
    """Other inputs that a request may send, and other outputs that it may request."""

    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelMetadata(BaseModel):
    """A model.

    A request has one input; encoded images may use the name of any input.
    """

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    alternatives: Alternatives


class InferTensor(BaseModel):
    """A tensor of a reply; its values are in `data`, or in the binary data after the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[float] | list[str] | None = None


class InferReply(BaseModel):
    """The outputs of the model for all images."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, str] | None = Field(
        None, description="`warnings`: warnings about how the pixels were made from each image, by code."
    )
    outputs: list[InferTensor]
