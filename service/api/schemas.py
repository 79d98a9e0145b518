"""The shapes of the native dialect on the wire, as the OpenAPI document shows them."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from service.dialect import NATIVE, Dialect

TopK = Annotated[int, Field(ge=0, description="How many labels, best first; 0 gives all.")]
Threshold = Annotated[float, Field(ge=0, le=1, description="Leave out labels less probable than this.")]

Level = Annotated[
    float, Field(gt=0, lt=1, description="Also answer the label set that holds the true label this often.")
]

# --- requests ------------------------------------------------------------------------------------


class Options(BaseModel):
    """The query of a classification."""

    model_config = ConfigDict(extra="forbid")

    top_k: TopK = 5
    threshold: Threshold | None = None
    coverage: Level | None = None


class EncodedImage(BaseModel):
    """One image in JSON."""

    model_config = ConfigDict(extra="forbid")

    b64: str = Field(description="The encoded image, base64.")


class ClassifyRequest(BaseModel):
    """The JSON form of a request; `top_k`, `threshold` and `coverage` come before those of the query."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: list[EncodedImage] = Field(min_length=1)
    top_k: TopK | None = None
    threshold: Threshold | None = None
    coverage: Level | None = None


class IndexRequest(BaseModel):
    """Which models to list; the body may be left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ready: bool = Field(False, description="Those alone that are loaded.")


class LoadParameters(BaseModel):
    """How a model is to be loaded."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: str | None = Field(None, description="Serve this one and go on with it, such as an earlier one.")


class LoadRequest(BaseModel):
    """What to load; all of it may be left out, and so may the body."""

    model_config = ConfigDict(extra="forbid", strict=True)

    parameters: LoadParameters = LoadParameters()


def request_body(example: str) -> dict[str, Any]:
    """The three forms of a request; `example` is a base64 image with which the JSON one runs.

    It comes first, because Swagger UI shows the first, and forgets examples when another is chosen.
    """
    binary = {"type": "string", "format": "binary"}
    return {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": _COMPONENT.format(model="ClassifyRequest")},
                "example": {"images": [{"b64": example}], "top_k": 3},
            },
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": binary}, "required": ["file"]}
            },
            "application/octet-stream": {"schema": binary},
        },
    }


def request_schemas() -> dict[str, Any]:
    """The schemas of bodies that our routes read by themselves, by name."""
    _, document = models_json_schema(
        [(ClassifyRequest, "validation"), (IndexRequest, "validation"), (LoadRequest, "validation")],
        ref_template=_COMPONENT,
    )
    schemas: dict[str, Any] = document["$defs"]
    return schemas


LOAD_BODY: Final[dict[str, Any]] = {
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/LoadRequest"}}}
}

INDEX_BODY: Final[dict[str, Any]] = {
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/IndexRequest"}}}
}

_COMPONENT: Final = "#/components/schemas/{model}"

# --- replies -------------------------------------------------------------------------------------


class ModelName(BaseModel):
    """Which model answered."""

    name: str
    version: str


class Label(BaseModel):
    """One label and its probability, 0 … 1. `selected` is there for binary and multi-label models."""

    label: str
    index: int
    probability: float
    selected: bool | None = None


class ImageInfo(BaseModel):
    """The image as it is seen: EXIF orientation applied, sizes in pixels."""

    format: str
    width: int
    height: int


class LabelSet(BaseModel):
    """The labels among which the true one is in `level` of all cases, most probable first."""

    level: float
    labels: list[str]
    abstain: bool = Field(description="The set is empty, or too wide to say much.")


class ErrorDetail(BaseModel):
    """What was wrong, for a program (`code`) and for a person (`message`)."""

    code: str
    message: str
    request_id: str | None = None


class ErrorReply(BaseModel):
    """The answer to a request that could not be answered."""

    error: ErrorDetail


class FlatError(BaseModel):
    """The same where the protocol wants the message alone; ours is beside it."""

    error: str
    code: str
    request_id: str


class ImageReply(BaseModel):
    """The answer to one image among several: its labels, or its own error."""

    predictions: list[Label] | None = None
    coverage: LabelSet | None = None
    image: ImageInfo | None = None
    error: ErrorDetail | None = None


class ClassifyReply(BaseModel):
    """One image gives `predictions` and `image`; several give `results`, in order."""

    model: ModelName
    predictions: list[Label] | None = None
    coverage: LabelSet | None = None
    image: ImageInfo | None = None
    results: list[ImageReply] | None = None


class ModelSummary(BaseModel):
    """One served model. `labels` is their number."""

    name: str
    version: str
    task: str
    labels: int
    default: bool


class RestingModel(BaseModel):
    """A model that loads when somebody asks for it."""

    name: str
    version: str


class ModelList(BaseModel):
    """All served models."""

    models: list[ModelSummary]
    resting: list[RestingModel]


_ERRORS: Final[dict[int, dict[str, Any]]] = {
    400: {"description": "Malformed request: bad JSON, bad base64, no file, a bad parameter."},
    404: {"description": "No such model."},
    408: {"description": "The body arrived too slowly."},
    413: {"description": "Too many bytes, or too many pixels by the image's header."},
    415: {"description": "Not an image format that is served."},
    422: {"description": "An image, but truncated, corrupt, or of a mode that cannot be converted."},
    500: {"description": "Our own bug; the log has the trace under the request id."},
    503: {"description": "Too many images in flight, or the service is stopping; see `Retry-After`."},
    504: {"description": "The deadline (`X-Deadline-Ms`) passed before the answer was there."},
}


def failures(model: type[BaseModel], dialect: Dialect = NATIVE) -> dict[int | str, dict[str, Any]]:
    """The errors of a request for answers, by the status that they have in a dialect, written as `model`."""
    return {
        dialect.statuses.get(status, status): {**said, "model": model} for status, said in _ERRORS.items()
    }


REPLIES: Final[dict[int | str, dict[str, Any]]] = {200: {"model": ClassifyReply}, **failures(ErrorReply)}
