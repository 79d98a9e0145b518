"""Request bodies: read within limits, and taken apart into encoded images."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import ValidationError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from service.api.schemas import ClassifyRequest
from service.errors import BadRequest, BodyTimeout, BodyTooLarge
from service.settings import Settings

Image: TypeAlias = bytes | memoryview


@dataclass(frozen=True)
class Body:
    """What a request carries, whatever its content type."""

    images: Sequence[Image]
    top_k: int | None = None
    threshold: float | None = None


async def read(request: Request, settings: Settings) -> bytes:
    """The whole body. Raises `BodyTooLarge`, from the declared length where there is one, or `BodyTimeout`.

    What is left of a refused body is read and thrown away by uvicorn, so that the answer arrives.
    """
    limit = settings.body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
    except TimeoutError:
        raise BodyTimeout(
            f"the body did not arrive within {settings.body_timeout:g} s (FOVEA_BODY_TIMEOUT)"
        ) from None
    return b"".join(chunks)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has more than {limit} bytes (FOVEA_BODY_BYTES)")


def parse(content_type: str, body: bytes, settings: Settings) -> Body:
    """Take a body apart. Raises `BadRequest`.

    `multipart/form-data` gives its files, `application/json` a `ClassifyRequest`; every other type, or
    none, is one raw image: `curl -T` sends no type, and `curl --data-binary` a wrong one.
    """
    kind, options = parse_options_header(content_type)
    if not body:
        raise BadRequest("the body is empty; send an image")
    if kind == b"multipart/form-data":
        parsed = Body(_files(body, options.get(b"boundary", b"")))
    elif kind == b"application/json":
        parsed = _json(body)
    else:
        parsed = Body([body])
    if len(parsed.images) > settings.request_images:
        raise BadRequest(
            f"the request has {len(parsed.images)} images; "
            f"at most {settings.request_images} (FOVEA_REQUEST_IMAGES)"
        )
    return parsed


# --- multipart -----------------------------------------------------------------------------------


def _files(body: bytes, boundary: bytes) -> list[Image]:
    """The contents of all parts that have a file name, as views into `body` where they can be."""
    if not boundary:
        raise BadRequest("the multipart content type names no boundary")
    collector = _Collector()
    try:
        parser = MultipartParser(boundary, collector.callbacks())
        parser.write(body)
        parser.finalize()
    except ValueError as error:  # the parser's own errors derive from it
        raise BadRequest(f"the multipart body is malformed: {error}") from None
    if not collector.complete:
        raise BadRequest("the multipart body ends before its last boundary")
    if not collector.files:
        raise BadRequest("the multipart body has no file; send one as `-F file=@photo.jpg`")
    return collector.files


class _Collector:
    """Receives the parser's events and keeps the parts that are files."""

    def __init__(self) -> None:
        self.files: list[Image] = []
        self.complete = False
        self._name = b""
        self._value = b""
        self._filename: bytes | None = None
        self._pieces: list[memoryview] = []

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._filename, self._pieces = None, []

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            extended = b"*" if b"filename*=" in self._value else None  # RFC 5987; any name will do
            self._filename = parse_options_header(self._value)[1].get(b"filename", extended)
        self._name = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(memoryview(data)[start:end])

    def _end(self) -> None:
        content = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        if self._filename or (self._filename is not None and content):  # neither: no file was chosen
            self.files.append(content)

    def _finish(self) -> None:
        self.complete = True


# --- JSON ----------------------------------------------------------------------------------------


def _json(body: bytes) -> Body:
    try:
        request = ClassifyRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{place or 'the body'}: {first['msg']}") from None
    images = [_base64(image.b64, index) for index, image in enumerate(request.images)]
    return Body(images, request.top_k, request.threshold)


def _base64(text: str, index: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"images.{index}.b64 is not base64: {error}") from None
