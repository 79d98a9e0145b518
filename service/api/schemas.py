"""The JSON types of the native protocol for the OpenAPI document, and types that all protocols share."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.json_schema import models_json_schema
from pydantic_core import PydanticCustomError

from fovea.service.image_warnings import WarningCode
from fovea.service.settings import MAX_REQUEST_IMAGES

TopK = Annotated[int, Field(ge=0, description="How many labels, best first; 0 gives all.")]
Threshold = Annotated[float, Field(ge=0, le=1, description="Leave out labels less probable than this.")]

Level = Annotated[
    float, Field(gt=0, lt=1, description="Also answer the label set that holds the true label this often.")
]

# --- requests ------------------------------------------------------------------------------------


class StrictModel(BaseModel):
    """A part of a JSON body that has known fields and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _limit_fields(cls, value: Any) -> Any:
        """Limit the number of fields, because pydantic reports every unknown field."""
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            context = {"count": len(value), "known": ", ".join(cls.model_fields)}
            raise PydanticCustomError(
                "too_many_fields", "{count} fields, where there may be {known}", context
            )
        return value


_MAX_FIELDS: Final = 100
"""Maximum number of fields in a closed part."""


class ClassifyOptions(BaseModel):
    """The query of a classification."""

    model_config = ConfigDict(extra="forbid")

    top_k: TopK = 5
    threshold: Threshold | None = None
    coverage: Level | None = None
    timing: bool = Field(False, description="Also answer where the milliseconds went.")


class ExplainOptions(BaseModel):
    """The query of an explanation."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["auto", "cam", "occlusion"] = Field(
        "auto", description="`cam`: exact, where the network allows it; `occlusion`: for every network."
    )
    label: str | None = Field(None, description="Of which label; by default of the most probable.")
    format: Literal["json", "png"] = Field("json", description="Numbers, or the photo with the map over it.")
    top_k: TopK = 5
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Of an occlusion: same seed and samples, same map.")
    samples: int = Field(
        0,
        ge=0,
        le=8000,
        description="Masked images of an occlusion, by 16, for a minute at most; 0: what there is time for.",
    )
    progress: bool = Field(False, description="Tell how it goes, in lines of JSON.")


class MapsOptions(BaseModel):
    """The query for what a layer makes of an image."""

    model_config = ConfigDict(extra="forbid")

    tensor: str = Field(description="Of which layer, as `layers` calls it.")
    first: int = Field(0, ge=0, le=2**31, description="The first map, or value of a vector.")
    count: int = Field(0, ge=0, le=2**31, description="How many; 0: all from there on.")
    prepared: bool = Field(False, description="The image is the model's input itself, of its size.")


class WeightsOptions(BaseModel):
    """The query for the weights of a layer."""

    model_config = ConfigDict(extra="forbid")

    tensor: str = Field(description="Of which layer, as `layers` calls it.")
    part: str = Field("weight", description="Which of its `weights`.")
    first: int = Field(0, ge=0, le=2**31, description="The first output.")
    count: int = Field(
        0,
        ge=0,
        le=2**31,
        description="How many; 0: all from there on. More than 1 of `weight` needs FOVEA_WEIGHTS.",
        json_schema_extra={"example": 1},
    )


class EncodedImage(BaseModel):
    """One image in JSON."""

    model_config = ConfigDict(extra="forbid")

    b64: str = Field(description="The encoded image, base64.")


class ClassifyRequest(BaseModel):
    """The JSON form of a request; `top_k`, `threshold` and `coverage` come before those of the query."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: list[EncodedImage] = Field(min_length=1, max_length=MAX_REQUEST_IMAGES)
    top_k: TopK | None = None
    threshold: Threshold | None = None
    coverage: Level | None = None


class FormOptions(BaseModel):
    """The text fields of a form that are options; they come before those of the query."""

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


def build_request_body(example_image: str) -> dict[str, Any]:
    """Return the three forms of a request body; `example_image` is a base64 image for the example request."""
    binary = {"type": "string", "format": "binary"}
    return {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": _COMPONENT_REF.format(model="ClassifyRequest")},
                "example": {"images": [{"b64": example_image}], "top_k": 3},
            },
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": binary}, "required": ["file"]}
            },
            "application/octet-stream": {"schema": binary},
        },
    }


def build_request_schemas() -> dict[str, Any]:
    """Return the schemas of the bodies that our routes read themselves, by name."""
    _, document = models_json_schema(
        [(ClassifyRequest, "validation"), (IndexRequest, "validation"), (LoadRequest, "validation")],
        ref_template=_COMPONENT_REF,
    )
    schemas: dict[str, Any] = document["$defs"]
    return schemas


LOAD_BODY: Final[dict[str, Any]] = {
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/LoadRequest"}}}
}

INDEX_BODY: Final[dict[str, Any]] = {
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/IndexRequest"}}}
}

_COMPONENT_REF: Final = "#/components/schemas/{model}"

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
