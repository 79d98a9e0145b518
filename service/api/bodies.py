"""Request bodies: read within limits, and taken apart into encoded images."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from pydantic import ValidationError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from service.api.schemas import ClassifyRequest
from service.errors import BadRequest, BodyTimeout, BodyTooLarge, RequestError
from service.messages import Image
from service.settings import Settings

Headers: TypeAlias = Mapping[bytes, bytes]
Take: TypeAlias = Callable[[int], None]

_SMALL: Final = 1 << 20
"""Bytes that the event loop may copy: more than that takes over a millisecond."""


_PIECE: Final = 256 << 10
"""Characters of base64 that are decoded at once; in 1 ms. Whole groups of four."""


@dataclass(frozen=True)
class Body:
    """What a request carries, whatever its content type."""

    images: list[Image]
    top_k: int | None = None
    threshold: float | None = None

    def release(self) -> None:
        """Give the images' memory back: of large ones in a thread, since it takes milliseconds."""
        if sum(map(len, self.images)) > _SMALL:
            asyncio.get_running_loop().run_in_executor(None, self.images.clear)


async def read(scope: Scope, receive: Receive, headers: Headers, settings: Settings, take: Take) -> bytes:
    """The whole body, each piece of it counted by `take`.

    Raises `BodyTooLarge`, from the declared length where there is one, `BodyTimeout`, `Overloaded`, or
    `ClientDisconnect`. What is left of a refused body is read and thrown away by uvicorn, so that the
    answer arrives.
    """
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > settings.body_bytes:
        raise _too_large(settings.body_bytes)
    if scope["state"].get("is_whole"):  # it came in one piece with the headers
        return await _receive(receive, settings, take)
    try:
        async with asyncio.timeout(settings.body_timeout):
            return await _receive(receive, settings, take)
    except TimeoutError:
        raise BodyTimeout(
            f"the body did not arrive within {settings.body_timeout:g} s (FOVEA_BODY_TIMEOUT)"
        ) from None


async def _receive(receive: Receive, settings: Settings, take: Take) -> bytes:
    chunks: list[bytes] = []
    size = 0
    more = True
    try:
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size > settings.body_bytes:
                raise _too_large(settings.body_bytes)
            take(len(chunk))
            chunks.append(chunk)
    except (RequestError, ClientDisconnect):
        if size > _SMALL:  # giving much memory back takes milliseconds
            asyncio.get_running_loop().run_in_executor(None, chunks.clear)
        raise
    if len(chunks) == 1:
        return chunks[0]
    return _join(chunks) if size <= _SMALL else await asyncio.to_thread(_join, chunks)


def _join(chunks: list[bytes]) -> bytes:
    content = b"".join(chunks)
    chunks.clear()  # here and not later on the event loop: giving 32 MB back takes milliseconds too
    return content


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has more than {limit} bytes (FOVEA_BODY_BYTES)")


async def parse(content_type: bytes, body: bytes, settings: Settings) -> Body:
    """Take a body apart. Raises `BadRequest`.

    `multipart/form-data` gives its files, `application/json` a `ClassifyRequest`; every other type, or
    none, is one raw image: `curl -T` sends no type, and `curl --data-binary` a wrong one.
    """
    if not body:
        raise BadRequest("the body is empty; send an image")
    take_apart = _PARSERS.get(content_type.partition(b";")[0].strip().lower())
    if take_apart is None:
        return Body([body])
    only = [body]
    del body  # what is not needed any more is given back in the thread: 32 MB take milliseconds
    parsed = await asyncio.to_thread(lambda: take_apart(only.pop(), content_type))
    if len(parsed.images) > (most := settings.request_images):
        raise BadRequest(
            f"the request has {len(parsed.images)} images; at most {most} (FOVEA_REQUEST_IMAGES)"
        )
    return parsed


# --- multipart -----------------------------------------------------------------------------------


def _files(body: bytes, content_type: bytes) -> Body:
    """The contents of all parts that have a file name, as views into `body` where they can be."""
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
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
    return Body(collector.files)


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


def _json(body: bytes, _content_type: bytes) -> Body:
    try:
        request = ClassifyRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{place or 'the body'}: {first['msg']}") from None
    images: list[Image] = [_base64(image.b64, index) for index, image in enumerate(request.images)]
    return Body(images, request.top_k, request.threshold)


def _base64(text: str, index: int) -> bytes:
    """In pieces: while 32 MB are decoded at once no other thread runs, for 90 ms."""
    pieces = []
    try:
        for start in range(0, len(text), _PIECE):
            piece = base64.b64decode(text[start : start + _PIECE], validate=True)
            if len(piece) < _PIECE // 4 * 3 and start + _PIECE < len(text):
                raise binascii.Error("Excess data after padding")
            pieces.append(piece)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"images.{index}.b64 is not base64: {error}") from None
    return b"".join(pieces)


_PARSERS: Final[dict[bytes, Callable[[bytes, bytes], Body]]] = {
    b"multipart/form-data": _files,
    b"application/json": _json,
}
"""What takes a body apart, given it and the whole content type. Everything else is an image."""
