"""The JSON types of Open Inference Protocol."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fovea.service.api.tensors import MAX_PARTS, InferInput


class InferOutput(BaseModel):
    """One tensor that is asked for. `classification` in its `parameters` gives so many labels instead, each
    as `value:index:label`; `binary_data` sends it behind the JSON."""

    model_config = ConfigDict(strict=True)

    name: str
    parameters: dict[str, Any] | None = None


class InferRequest(BaseModel):
    """Images as one tensor. Of `parameters`, `binary_data_output` and `timeout`, in microseconds, count."""

    model_config = ConfigDict(strict=True)

    id: str | None = None
    parameters: dict[str, Any] | None = None
    inputs: list[InferInput] = Field(min_length=1, max_length=MAX_PARTS)
    outputs: list[InferOutput] | None = Field(
        None, max_length=MAX_PARTS, description="The probabilities unless given."
    )


class ServerLive(BaseModel):
    """The service answers."""

    live: bool


class ServerReady(BaseModel):
    """Answers are given."""

    ready: bool


class ModelReady(BaseModel):
    """Answers of this model are given."""

    name: str
    ready: bool


class ServerMetadata(BaseModel):
    """What answers, and the protocol's extensions that it speaks."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """A tensor; -1 is any number of images."""

    name: str
    datatype: str
    shape: list[int]


class Alternatives(BaseModel):
    """What may be sent, and asked for, in place of the rest or beside it."""

    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelMetadata(BaseModel):
    """A model. A request has one input; encoded images may have any input's name."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    alternatives: Alternatives


class InferTensor(BaseModel):
    """One tensor of an answer; its values are `data`, or behind the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[float] | list[str] | None = None


class InferReply(BaseModel):
    """What the model says of all images."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, str] | None = Field(
        None, description="`warnings`: what may surprise about how the pixels came about, by code."
    )
    outputs: list[InferTensor]
