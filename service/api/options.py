"""The options of a request: parsing the query, and refusing names that would be ignored silently."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable
from itertools import islice
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import QueryParams

from fovea.service.api.json_bodies import to_bad_request
from fovea.service.api.request_schemas import ClassifyOptions
from fovea.service.errors import BadRequest

_M = TypeVar("_M", bound=BaseModel)

SEVERAL_IMAGES_WITH_BOXES: Final = (
    "boxes: in the query or in a form they are for one image; for several images, send JSON with `boxes` in "
    "each image"
)
"""Message about boxes that do not belong to one image."""

MAX_FIELDS: Final = 100
"""Maximum number of text fields in a form, of query parameters, or of JSON names that are examined."""

MAX_FIELD_BYTES: Final = 100
"""Maximum size in bytes of a text field's name or value; no option but `boxes` can be longer."""


def parse_query(schema: type[_M], query: bytes) -> _M:
    """Validate the query of a URL as an instance of `schema`.

    Raises `BadRequest`. If `schema` forbids extra fields, unknown and repeated parameters are errors too.
    """
    parameters: dict[str, str] = {}
    if schema.model_config.get("extra") == "forbid":
        for name, value in QueryParams(query).multi_items():
            if name in parameters:
                raise BadRequest(f"the query has {name[:MAX_FIELD_BYTES]!r} twice; send it once")
            parameters[name] = value
        check_names(parameters, schema.model_fields, "the query's parameter")
    else:
        refuse_native_options(QueryParams(query))
    try:
        return schema.model_validate(parameters)
    except ValidationError as error:
        raise to_bad_request(error) from None


def check_names(names: Iterable[str], known_names: Iterable[str], subject: str) -> None:
    """Raise `BadRequest` for the first unknown name, with the nearest known name."""
    known_names = list(known_names)
    for name in names:
        if name not in known_names:
            nearest = _find_nearest(name, known_names)
            advice = f"did you mean {nearest}?" if nearest else f"there are {', '.join(known_names)}"
            raise BadRequest(f"{subject} {name[:MAX_FIELD_BYTES]!r} is not known; {advice}")


def refuse_options(options: Iterable[str], allowed_names: Container[str] = ()) -> None:
    """Raise `BadRequest` for an option of the native classification unless it is in `allowed_names`."""
    for name in options:
        if name not in allowed_names:
            raise BadRequest(f"{name} is an option of /v1/classify; leave it out here")


def refuse_native_options(query: QueryParams) -> None:
    """Raise `BadRequest` for a native option in the query of another protocol, which would ignore it.

    Other parameters are accepted, because gateways add their own parameters, such as keys.
    """
    refuse_options(name for name in islice(query, MAX_FIELDS) if name in ClassifyOptions.model_fields)


def check_spelling(names: Iterable[str], known_names: Iterable[str], subject: str) -> None:
    """Raise `BadRequest` for an unknown name that resembles a known name.

    Such a name would be silently ignored. Other names are accepted, because they belong to other software.
    """
    known_names = list(known_names)
    others = (name for name in islice(names, MAX_FIELDS) if name not in known_names)
    check_names((name for name in others if _find_nearest(name, known_names)), known_names, subject)


def _find_nearest(name: str, known_names: list[str]) -> str | None:
    """Return the known name that was most likely meant, independent of case, hyphens and underscores."""
    names_by_plain = {one.replace("_", "").lower(): one for one in known_names}
    plain_name = name[:MAX_FIELD_BYTES].replace("_", "").replace("-", "").lower()
    if f"{plain_name}es" in names_by_plain:  # `box` is too short to resemble `boxes`
        return names_by_plain[f"{plain_name}es"]
    matches = difflib.get_close_matches(plain_name, names_by_plain, n=1, cutoff=_MIN_SIMILARITY)
    return names_by_plain[matches[0]] if matches else None


_MIN_SIMILARITY: Final = 0.8
"""Minimum similarity (`difflib`) of a name to a known name to count as a misspelling."""
