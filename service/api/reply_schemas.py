"""The types of JSON replies of the native protocol, for the OpenAPI document, and all protocols' errors."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, Field

from fovea.service.image_warnings import WarningCode


class ModelName(BaseModel):
    """The model that answered."""

    name: str
    version: str


class Label(BaseModel):
    """A label and its probability, 0 … 1; binary and multi-label models also have `selected`."""

    label: str
    index: int
    probability: float
    selected: bool | None = None


class ImageInfo(BaseModel):
    """The format of the image, and its size in pixels after the EXIF orientation was applied."""

    format: str
    width: int
    height: int


class WarningInfo(BaseModel):
    """A warning about an image's answer, for a program (`code`) and for a person (`message`)."""

    code: str = Field(json_schema_extra={"enum": [code.value for code in WarningCode]})
    message: str


_WARNINGS_DESCRIPTION: Final = (
    "Warnings about how the pixels were made from the image; left out if there are none."
)


_EMBEDDING_DESCRIPTION: Final = "Little-endian float32 values as base64, with `embedding=true`."

_KNOWN_DESCRIPTION: Final = (
    "Whether the image is like those that the model was trained on; left out if the model does not tell."
)


_BOXES_DESCRIPTION: Final = "The answers to the boxes, in order, in place of `predictions`, with `boxes`."


class LabelSet(BaseModel):
    """A set of labels, most probable first, that contains the true label in `level` of all cases."""

    level: float
    labels: list[str]
    abstain: bool = Field(description="The set is empty, or too large to be useful.")


class ErrorDetail(BaseModel):
    """An error, for a program (`code`) and for a person (`message`)."""

    code: str
    message: str
    request_id: str | None = None


class ErrorReply(BaseModel):
    """The reply to a request that failed."""

    error: ErrorDetail


class FlatError(BaseModel):
    """An error in protocols where `error` is the message; `code` and `request_id` are Fovea's own."""

    error: str
    code: str
    request_id: str


class BoxReply(BaseModel):
    """The answer to one box of an image, which is that to an image with the pixels of the box."""

    box: list[int] = Field(description="The box of the request: left, top, right and bottom.")
    predictions: list[Label]
    coverage: LabelSet | None = None
    embedding: str | None = Field(None, description=_EMBEDDING_DESCRIPTION)
    known: bool | None = Field(None, description=_KNOWN_DESCRIPTION)
    known_score: float | None = None
    warnings: list[WarningInfo] | None = Field(None, description=_WARNINGS_DESCRIPTION)


class ImageReply(BaseModel):
    """The answer to one of several images: its labels, or its own error."""

    predictions: list[Label] | None = None
    coverage: LabelSet | None = None
    embedding: str | None = Field(None, description=_EMBEDDING_DESCRIPTION)
    known: bool | None = Field(None, description=_KNOWN_DESCRIPTION)
    known_score: float | None = None
    boxes: list[BoxReply] | None = Field(None, description=_BOXES_DESCRIPTION)
    image: ImageInfo | None = None
    warnings: list[WarningInfo] | None = Field(None, description=_WARNINGS_DESCRIPTION)
    error: ErrorDetail | None = None


class ClassifyReply(BaseModel):
    """The answer: `predictions` and `image` for one image, `results` in order for several images."""

    model: ModelName
    predictions: list[Label] | None = None
    coverage: LabelSet | None = None
    embedding: str | None = Field(None, description=_EMBEDDING_DESCRIPTION)
    known: bool | None = Field(None, description=_KNOWN_DESCRIPTION)
    known_score: float | None = None
    boxes: list[BoxReply] | None = Field(None, description=_BOXES_DESCRIPTION)
    image: ImageInfo | None = None
    warnings: list[WarningInfo] | None = Field(None, description=_WARNINGS_DESCRIPTION)
    results: list[ImageReply] | None = None
    timing: dict[str, float] | None = Field(
        None, description="Milliseconds by stage; with several images, the longest of each stage."
    )


class EmbeddingInfo(BaseModel):
    """The vector that a model gives for an image; `dimension` is the number of its values."""

    dimension: int


class ModelSummary(BaseModel):
    """A served model; `labels` is the number of its labels."""

    name: str
    version: str
    task: str
    labels: int
    default: bool
    embedding: EmbeddingInfo | None = Field(description="Null if the model has no embedding.")


class RestingModel(BaseModel):
    """A model that is loaded by the first request for it."""

    name: str
    version: str


class RefusedVersion(BaseModel):
    """A version in the repository that is not served, because it did not pass its checks."""

    name: str
    version: str
    reason: str


class VersionStatus(BaseModel):
    """The state of a version."""

    name: str
    version: str
    state: Literal["found", "loading", "ready", "draining", "refused"] = Field(
        description="`found`: resting, or lost with all runners; `draining`: answers its last requests."
    )
    reason: str = Field(description="Reason for the state; empty if there is nothing to say.")
    since: str = Field(description="Time of the last change of state, ISO 8601 in UTC.")


class ModelList(BaseModel):
    """The models that are loaded, the resting models, the refused versions, and every version's state."""

    models: list[ModelSummary]
    resting: list[RestingModel]
    refused: list[RefusedVersion]
    versions: list[VersionStatus]


class Heatmap(BaseModel):
    """A heat map over the whole photo, after the EXIF orientation was applied: rows of 0 … 1."""

    height: int
    width: int
    values: list[list[float]]


class ReceiptStep(BaseModel):
    """A step of the preprocessing of the photo."""

    step: str
    text: str


class SeenInput(BaseModel):
    """The exact input of the model, and the steps that made it from the photo."""

    width: int
    height: int
    png: str = Field(description="The input as a PNG image, base64.")
    box: list[float] = Field(
        description="Left, top, right, bottom of the part that it shows, in the photo's pixels. "
        "The part is larger than the photo where the input has a border."
    )
    steps: list[ReceiptStep]


class ExplainReply(BaseModel):
    """The explanation of a label of an image."""

    model: ModelName
    label: str
    index: int
    probability: float
    method: str
    samples: int = Field(description="Number of masked images that were classified; 0 for `cam`.")
    note: str | None = Field(description="Reason why there is no class activation map; null if there is one.")
    heatmap: Heatmap
    predictions: list[Label]
    known: bool | None = Field(None, description=_KNOWN_DESCRIPTION)
    known_score: float | None = None
    image: ImageInfo
    warnings: list[WarningInfo] | None = Field(None, description=_WARNINGS_DESCRIPTION)
    what_the_model_saw: SeenInput


class ReceptiveField(BaseModel):
    """The part of the input that a value depends on: jump, low and high, for each axis.

    Value r depends on the input's places jump * r + low … jump * r + high.
    """

    rows: list[int]
    columns: list[int]


class LayerInfo(BaseModel):
    """A layer, identified by `tensor`; `sources` are the tensors of the layers that it reads."""

    tensor: str
    name: str
    kind: str
    sources: list[str]
    shape: list[int | None]
    left_out: int = Field(
        description="Number of leading tokens that stand for no place, such as the class token."
    )
    direct: bool = Field(
        description="The layer reads its sources as they are shown, neither cut nor rearranged."
    )
    block: str | None = Field(
        description="Name of the block, by the names of the layers or by the structure of the graph "
        "(`block 1`, `stage 1`); null for a layer by itself."
    )
    kernel: list[int] | None
    stride: list[int] | None
    padding: list[int] | None
    dilation: list[int] | None
    groups: int
    parameters: int
    constants: dict[str, float]
    attributes: dict[str, Any]
    weights: list[str]
    input: str | None = Field(
        description="Tensor of the vector that a linear layer multiplies with its weights, for `maps`; "
        "null for other layers."
    )
    order: str | None = Field(
        description="Order in which a flattening writes its source into one row: `CHW` or `HWC`; null if "
        "it is unknown, and for other layers."
    )
    field: ReceptiveField | None


class UploadReply(BaseModel):
    """An image that is kept for questions."""

    url: str = Field(description="URL of the image, for the JSON of other calls.")
    bytes: int
    seconds: int = Field(description="Time for which the image is kept after the last question about it.")


class InputSize(BaseModel):
    """The size of the model's input in pixels."""

    height: int
    width: int


class LayersReply(BaseModel):
    """The layers of a model."""

    model: ModelName
    task: str
    labels: list[str]
    input: InputSize
    temperature: float
    parameters: int
    layers: list[LayerInfo]
    cam: bool = Field(description="Exact class activation maps are available.")
    reason: str | None = Field(description="Reason why the graph cannot be opened; null if it can.")


_ERRORS: Final[dict[int, dict[str, Any]]] = {
    400: {"description": "Malformed request: bad JSON, bad base64, no file, or a bad parameter."},
    403: {"description": "The host of an image's URL is not in FOVEA_URL_HOSTS."},
    404: {"description": "There is no such model, or an image with an `upload:` URL is not kept here."},
    408: {"description": "The body arrived too slowly."},
    413: {"description": "Too many bytes, or too many pixels according to the image's header."},
    415: {"description": "The image format is not supported."},
    422: {
        "description": "The image is truncated, corrupt or of a mode that cannot be converted, or a box is "
        "empty or not inside the image."
    },
    424: {"description": "An image could not be fetched from its URL."},
    429: {"description": "The caller has reached one of its own limits; see `Retry-After`."},
    500: {"description": "Internal error; the log has the traceback under the request id."},
    503: {"description": "Too many images in flight, or the service is stopping; see `Retry-After`."},
    504: {"description": "The deadline (`X-Deadline-Ms`) passed before the request was answered."},
}


def build_error_responses(error_type: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the errors of a classification request by status, with `error_type` as the type of the error."""
    return {status: {**response, "model": error_type} for status, response in _ERRORS.items()}


CLASSIFY_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": ClassifyReply},
    **build_error_responses(ErrorReply),
}
