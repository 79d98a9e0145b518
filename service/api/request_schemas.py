"""The types of queries and JSON bodies of the native protocol, and types that all protocols share."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic.json_schema import models_json_schema
from pydantic_core import PydanticCustomError

from fovea.service.inference.boxes import MAX_BOXES, Boxes, check_boxes, parse_boxes
from fovea.service.settings import MAX_REQUEST_IMAGES

MAX_URL_LENGTH: Final = 4096
"""Largest length of a URL in characters: presigned URLs have some 1,000."""

TopK = Annotated[
    int, Field(ge=0, description="Maximum number of labels, most probable first; 0 returns all.")
]

Threshold = Annotated[float, Field(ge=0, le=1, description="Leave out labels that are less probable.")]

Level = Annotated[
    float, Field(gt=0, lt=1, description="Also return a label set that contains the true label this often.")
]

WithEmbedding = Annotated[
    bool,
    Field(description="Also return the vector that the last layer reads: little-endian float32, base64."),
]


_BOX_SCHEMA: Final = {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4}

_BOXES_DESCRIPTION: Final = (
    "Classify these regions instead of the whole image: left, top, right and bottom of each, in pixels of "
    "the upright image; right and bottom do not belong to the region."
)

_TEXT_BOXES_DESCRIPTION: Final = f"{_BOXES_DESCRIPTION} A list of lists, as JSON; for one image."

ImageBoxes = Annotated[
    Boxes,
    PlainValidator(check_boxes),
    WithJsonSchema({"type": "array", "items": _BOX_SCHEMA, "maxItems": MAX_BOXES}),
    Field(description=_BOXES_DESCRIPTION),
]

TextBoxes = Annotated[
    Boxes,
    PlainValidator(parse_boxes),
    WithJsonSchema(
        {"type": "string", "example": "[[0, 0, 100, 100]]", "description": _TEXT_BOXES_DESCRIPTION}
    ),
]


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
                "too_many_fields", "there are {count} fields; the known fields are {known}", context
            )
        return value


_MAX_FIELDS: Final = 100
"""Maximum number of fields in a `StrictModel`."""


class ClassifyOptions(BaseModel):
    """The query of a classification request."""

    model_config = ConfigDict(extra="forbid")

    top_k: TopK = 5
    threshold: Threshold | None = None
    coverage: Level | None = None
    embedding: WithEmbedding = False
    boxes: TextBoxes | None = None
    timing: bool = Field(False, description="Also return the milliseconds that each stage took.")


class ExplainOptions(BaseModel):
    """The query of an explanation request."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["auto", "cam", "occlusion"] = Field(
        "auto", description="`cam`: exact, for networks that allow it; `occlusion`: for every network."
    )
    label: str | None = Field(None, description="The label to explain; by default the most probable one.")
    format: Literal["json", "png"] = Field(
        "json", description="Numbers, or the photo with the heat map over it."
    )
    top_k: TopK = 5
    seed: int = Field(
        0,
        ge=0,
        le=2**32 - 1,
        description="Seed of an occlusion; the same seed and samples give the same map.",
    )
    samples: int = Field(
        0,
        ge=0,
        le=8000,
        description=(
            "Masked images of an occlusion, rounded up to whole batches of 16, for at most a minute; "
            "0: as many as the time allows."
        ),
    )
    progress: bool = Field(False, description="Stream partial results as lines of JSON.")


class MapsOptions(BaseModel):
    """The query for the output of a layer for an image."""

    model_config = ConfigDict(extra="forbid")

    tensor: str = Field(description="The layer, by its `tensor` in the reply of `layers`.")
    first: int = Field(
        0, ge=0, le=2**31, description="Index of the first map, or of the first value of a vector."
    )
    count: int = Field(0, ge=0, le=2**31, description="Number of maps or values; 0: all from `first` on.")
    indices: str = Field(
        "",
        max_length=1000,
        pattern=r"^([0-9]{1,9}(,[0-9]{1,9})*)?$",
        description="Indices of single maps or values, separated by commas; instead of `first` and `count`.",
    )
    strength: bool = Field(
        False, description="Answer one number for each map instead: the mean of its absolute values."
    )
    prepared: bool = Field(False, description="The image is the model's input itself, and has its size.")


class WeightsOptions(BaseModel):
    """The query for the weights of a layer."""

    model_config = ConfigDict(extra="forbid")

    tensor: str = Field(description="The layer, by its `tensor` in the reply of `layers`.")
    part: str = Field("weight", description="One of the layer's `weights`.")
    first: int = Field(0, ge=0, le=2**31, description="Index of the first output.")
    count: int = Field(
        0,
        ge=0,
        le=2**31,
        description="Number of outputs; 0: all from `first` on. More than 1 of `weight` needs FOVEA_WEIGHTS.",
        json_schema_extra={"example": 1},
    )


class EncodedImage(BaseModel):
    """An image in JSON."""

    model_config = ConfigDict(extra="forbid")

    b64: str | None = Field(None, description="The encoded image, as base64. Give this or `url`.")
    url: str | None = Field(
        None,
        max_length=MAX_URL_LENGTH,
        description="https URL of the image, at a host in FOVEA_URL_HOSTS, or the URL of an image that was "
        "sent before (`/v1/images`). Give this or `b64`.",
    )
    boxes: ImageBoxes | None = None

    @model_validator(mode="after")
    def _check_source(self) -> EncodedImage:
        if (self.b64 is None) == (self.url is None):
            raise PydanticCustomError("one_source", "give `b64` or `url`")
        return self


class UploadRequest(BaseModel):
    """An image that the service fetches and keeps for questions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: str = Field(
        max_length=MAX_URL_LENGTH, description="https URL of the image, at a host in FOVEA_URL_HOSTS."
    )


class ClassifyRequest(BaseModel):
    """The JSON form of a request; its options take precedence over those of the query."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: list[EncodedImage] = Field(min_length=1, max_length=MAX_REQUEST_IMAGES)
    top_k: TopK | None = None
    threshold: Threshold | None = None
    coverage: Level | None = None
    embedding: WithEmbedding | None = None


class FormOptions(BaseModel):
    """The options in the text fields of a form; they take precedence over those of the query."""

    top_k: TopK | None = None
    threshold: Threshold | None = None
    coverage: Level | None = None
    embedding: WithEmbedding | None = None
    boxes: TextBoxes | None = None


class IndexRequest(BaseModel):
    """A request for the list of models; the body may be left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ready: bool = Field(False, description="List only the models that are loaded.")


class LoadParameters(BaseModel):
    """The parameters of a load request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: str | None = Field(
        None,
        description="Version to serve from now on; by default the repository selects it.",
    )


class LoadRequest(BaseModel):
    """A request to load a model; the body may be left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    parameters: LoadParameters = LoadParameters()


def build_request_content(example_image: str) -> dict[str, Any]:
    """Return the three forms of a request body; `example_image` is a base64 image for the example request."""
    binary = {"type": "string", "format": "binary"}
    return {
        "application/json": {
            "schema": {"$ref": _COMPONENT_REF.format(model="ClassifyRequest")},
            "example": {"images": [{"b64": example_image}], "top_k": 3},
        },
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"file": binary}, "required": ["file"]}
        },
        "application/octet-stream": {"schema": binary},
    }


def build_request_schemas() -> dict[str, Any]:
    """Return the schemas of the bodies that routes read without FastAPI, by name."""
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
