"""The types of JSON replies of the native protocol, for the OpenAPI document, and all protocols' errors."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, Field

from fovea.service.image_warnings import WarningCode


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


class WarningInfo(BaseModel):
    """What may surprise about an image's answer, for a program (`code`) and for a person (`message`)."""

    code: str = Field(json_schema_extra={"enum": [code.value for code in WarningCode]})
    message: str


_WARNINGS_DESCRIPTION: Final = (
    "How the pixels came about, where that may surprise; left out where nothing does."
)


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
    warnings: list[WarningInfo] | None = Field(None, description=_WARNINGS_DESCRIPTION)
    error: ErrorDetail | None = None


class ClassifyReply(BaseModel):
    """One image gives `predictions` and `image`; several give `results`, in order."""

    model: ModelName
    predictions: list[Label] | None = None
    coverage: LabelSet | None = None
    image: ImageInfo | None = None
    warnings: list[WarningInfo] | None = Field(None, description=_WARNINGS_DESCRIPTION)
    results: list[ImageReply] | None = None
    timing: dict[str, float] | None = Field(
        None, description="Milliseconds by stage; of several images the longest."
    )


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


class RefusedVersion(BaseModel):
    """A version in the repository that did not pass its checks, and is not served."""

    name: str
    version: str
    reason: str


class ModelList(BaseModel):
    """All served models, and what is not served."""

    models: list[ModelSummary]
    resting: list[RestingModel]
    refused: list[RefusedVersion]


class Heatmap(BaseModel):
    """Over the whole photo as it is seen: rows of 0 … 1."""

    height: int
    width: int
    values: list[list[float]]


class ReceiptStep(BaseModel):
    """What was done to the photo."""

    step: str
    text: str


class SeenInput(BaseModel):
    """The model's exact input, and how it came about."""

    width: int
    height: int
    png: str = Field(description="Base64.")
    box: list[float] = Field(description="Left, top, right, bottom of what it shows, in the photo's pixels.")
    steps: list[ReceiptStep]


class ExplainReply(BaseModel):
    """Why an image has a label."""

    model: ModelName
    label: str
    index: int
    probability: float
    method: str
    samples: int = Field(description="Masked images that were classified; 0 for `cam`.")
    note: str | None = Field(description="Why there is no class activation map, where there is none.")
    heatmap: Heatmap
    predictions: list[Label]
    image: ImageInfo
    warnings: list[WarningInfo] | None = Field(None, description=_WARNINGS_DESCRIPTION)
    what_the_model_saw: SeenInput


class ReceptiveField(BaseModel):
    """Value r sees the input's places jump * r + low … jump * r + high: three numbers for each axis."""

    rows: list[int]
    columns: list[int]


class LayerInfo(BaseModel):
    """One layer. `tensor` is its identity; `sources` are those of the layers that it reads."""

    tensor: str
    name: str
    kind: str
    sources: list[str]
    shape: list[int | None]
    left_out: int = Field(description="Leading tokens that are no place, such as the class token.")
    direct: bool = Field(description="Its sources are read as they are shown, neither cut nor rearranged.")
    block: str | None
    kernel: list[int] | None
    stride: list[int] | None
    padding: list[int] | None
    dilation: list[int] | None
    groups: int
    parameters: int
    constants: dict[str, float]
    attributes: dict[str, Any]
    weights: list[str]
    field: ReceptiveField | None


class InputSize(BaseModel):
    """Of the model's input, in pixels."""

    height: int
    width: int


class LayersReply(BaseModel):
    """What a model consists of."""

    model: ModelName
    task: str
    labels: list[str]
    input: InputSize
    temperature: float
    parameters: int
    layers: list[LayerInfo]
    cam: bool = Field(description="There are exact class activation maps.")
    reason: str | None = Field(description="Why the graph cannot be opened, where it cannot.")


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


def build_error_responses(error_type: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the errors of a classification request by status, with `error_type` as the type of the error."""
    return {status: {**said, "model": error_type} for status, said in _ERRORS.items()}


CLASSIFY_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": ClassifyReply},
    **build_error_responses(ErrorReply),
}
