"""The types of queries and JSON bodies of the native protocol, and types that all protocols share."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.json_schema import models_json_schema
from pydantic_core import PydanticCustomError

from fovea.service.settings import MAX_REQUEST_IMAGES

TopK = Annotated[int, Field(ge=0, description="How many labels, best first; 0 gives all.")]

Threshold = Annotated[float, Field(ge=0, le=1, description="Leave out labels less probable than this.")]

Level = Annotated[
    float, Field(gt=0, lt=1, description="Also answer the label set that holds the true label this often.")
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
