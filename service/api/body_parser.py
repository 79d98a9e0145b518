"""Splitting of a body of any content type into encoded images and options."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from fovea.service.api.bodies import ParsedBody, RawBody, check_image_count, parse_media_type
from fovea.service.api.forms import parse_form
from fovea.service.api.json_bodies import parse_json_body
from fovea.service.runners.shared_memory import SharedBuffer
from fovea.service.settings import Settings


def needs_parsing(content_type: bytes) -> bool:
    """Return True if the body has to be parsed.

    A body of any other type, or without a type, is one raw image: `curl -T` sends no type, and `curl
    --data-binary` sends a wrong one.
    """
    return parse_media_type(content_type) in _PARSERS


async def parse_body(content_type: bytes, raw_body: RawBody, settings: Settings) -> ParsedBody:
    """Parse a body.

    `multipart/form-data` contains files, `application/json` a `ClassifyRequest`; any other body is one image.
    Raises `BadRequest`.
    """
    parser = _PARSERS.get(parse_media_type(content_type))
    if parser is None or not raw_body.size:
        return ParsedBody([raw_body.to_image()])
    # The lambda takes the body inside the thread, so that the thread releases the memory that is no longer
    # needed. Releasing 32 MB takes milliseconds.
    parsed_body = await asyncio.to_thread(
        lambda: parser(raw_body.take_content(), raw_body.size, content_type)
    )
    check_image_count(len(parsed_body.images), settings)
    return parsed_body


_PARSERS: Final[dict[bytes, Callable[[bytes | SharedBuffer, int, bytes], ParsedBody]]] = {
    b"multipart/form-data": parse_form,
    b"application/json": parse_json_body,
}
"""Parsers by media type, called with the body, its size and the content type. Any other body is an image."""
