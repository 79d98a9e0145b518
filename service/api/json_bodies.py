"""Parsing and validation of JSON bodies."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Callable
from typing import Any, Final, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from fovea.service.api.base64_text import from_base64
from fovea.service.api.bodies import CHUNK_SIZE, MAX_INLINE_BYTES, ParsedBody, RawBody, read_content
from fovea.service.api.request_schemas import ClassifyRequest
from fovea.service.errors import BadRequest
from fovea.service.runners.batch_messages import Image
from fovea.service.runners.shared_memory import SharedBuffer
from fovea.service.settings import MAX_REQUEST_IMAGES
from fovea.service.validation import describe_error

_T = TypeVar("_T")

_M = TypeVar("_M", bound=BaseModel)


async def parse_json(raw_body: RawBody, convert: Callable[[Any], _T]) -> _T:
    """Parse a JSON body and return the result of `convert`, in a thread if the body is large.

    The thread helps `convert` only, because orjson itself blocks all other threads. Raises `BadRequest`.
    """

    def load_and_convert() -> _T:
        try:
            value = orjson.loads(to_utf8(read_content(raw_body.take_content(), raw_body.size)))
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"the body is not JSON: {error}") from None
        return convert(value)

    return (
        load_and_convert()
        if raw_body.size <= _MAX_INLINE_JSON_BYTES
        else await asyncio.to_thread(load_and_convert)
    )


_MAX_INLINE_JSON_BYTES: Final = 4 << 10
"""Size of JSON in bytes that is parsed faster than a thread switch, which takes 50 us."""

_MAX_COMMAS: Final = 6 * MAX_REQUEST_IMAGES
"""Maximum number of commas in the native JSON, more than a valid request needs: base64 has no commas.

Each image has at most two commas and each box four, and both are at most `MAX_REQUEST_IMAGES`.

The limit also bounds the number of values, each of which takes 100 bytes and blocks all other threads for
300 ns."""


def parse_json_body(body: bytes | SharedBuffer, size: int, _content_type: bytes) -> ParsedBody:
    """Parse a `ClassifyRequest` into its images and options.

    Raises `BadRequest`.
    """
    content = to_utf8(read_content(body, size))
    _check_commas(content)
    try:
        request = ClassifyRequest.model_validate_json(content)
    except ValidationError as error:
        raise to_bad_request(error) from None
    images: list[Image] = [
        b"" if image.b64 is None else from_base64(image.b64, f"images.{index}.b64")
        for index, image in enumerate(request.images)
    ]
    boxes = [image.boxes for image in request.images]
    return ParsedBody(
        images,
        request.top_k,
        request.threshold,
        request.coverage,
        request.embedding,
        boxes if any(one is not None for one in boxes) else (),
        {index: image.url for index, image in enumerate(request.images) if image.url is not None},
    )


def _check_commas(content: bytes) -> None:
    """Raise `BadRequest` if the JSON has too many commas.

    The count goes piece by piece, because counting a huge number of commas would itself take long.
    """
    count = 0
    for start in range(0, len(content), MAX_INLINE_BYTES):
        count += content.count(b",", start, start + MAX_INLINE_BYTES)
        if count > _MAX_COMMAS:
            raise BadRequest(
                f"the JSON has more than {_MAX_COMMAS} values; send `images`, each with its `b64`"
            )


def validate_json(schema: type[_M], value: Any) -> _M:
    """Validate the value of a JSON body as an instance of `schema`.

    Raises `BadRequest`.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise to_bad_request(error) from None


def to_utf8(content: bytes) -> bytes:
    """Return JSON as UTF-8 without a byte order mark, the form that RFC 8259, section 8.1, requires.

    The RFC allows parsers to ignore a byte order mark. Windows' tools write one, some of them with UTF-16.
    Raises `BadRequest`.
    """
    encoding = json.detect_encoding(content[:4])
    if encoding == "utf-8":
        return content
    if encoding == "utf-8-sig":
        return content[len(codecs.BOM_UTF8) :]
    decoder = codecs.getincrementaldecoder(encoding)()
    pieces = []
    try:
        # Piece by piece, because decoding a piece blocks all other threads.
        for start in range(0, len(content), CHUNK_SIZE):
            is_last = start + CHUNK_SIZE >= len(content)
            pieces.append(decoder.decode(content[start : start + CHUNK_SIZE], is_last).encode())
    except UnicodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    return b"".join(pieces)


def to_bad_request(error: ValidationError) -> BadRequest:
    """Return an error that names the invalid field of a JSON body and the reason."""
    first = error.errors(include_url=False, include_input=False)[0]
    location = ".".join(str(part) for part in first["loc"])
    return BadRequest(f"{location or 'the body'}: {describe_error(first)}")
