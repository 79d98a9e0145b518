"""Request bodies: read within limits, and taken apart into encoded images."""

from __future__ import annotations

import asyncio
import base64
import binascii
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from service.api.schemas import ClassifyRequest
from service.direct import Headers
from service.errors import BadRequest, BodyTimeout, BodyTooLarge, RequestError
from service.messages import Image, Query
from service.settings import MOST_IMAGES, Settings
from service.slots import Slot, Stored

Take: TypeAlias = Callable[[int], None]

_T = TypeVar("_T")

_M = TypeVar("_M", bound=BaseModel)

_SMALL: Final = 1 << 20
"""Bytes that the event loop may copy: more than that takes over a millisecond."""


_PIECE: Final = 256 << 10
"""Characters of base64, or compressed bytes, that are decoded at once; in 1 ms. Whole groups of four."""


@dataclass(frozen=True)
class Body:
    """What a request carries, whatever its content type."""

    images: list[Image]
    top_k: int | None = None
    threshold: float | None = None
    coverage: float | None = None


def release(images: list[Any]) -> None:
    """Give their memory back: of large ones in a thread, since it takes milliseconds."""
    contents = [image.content if isinstance(image, Query) else image for image in images]
    if sum(len(content) for content in contents if not isinstance(content, Stored)) > _SMALL:
        images.clear()
        asyncio.get_running_loop().run_in_executor(None, contents.clear)


class Limit(NamedTuple):
    """Most bytes of a body, and the setting that says so."""

    size: int
    setting: str

    def check(self, size: int) -> None:
        """Raise `BodyTooLarge` where `size` bytes are too many."""
        if size > self.size:
            raise BodyTooLarge(f"the body has more than {self.size} bytes ({self.setting})")


def body_limit(settings: Settings) -> Limit:
    """For any body."""
    return Limit(settings.body_bytes, "FOVEA_BODY_BYTES")


def json_limit(settings: Settings) -> Limit:
    """For one that orjson reads: it lets nothing else run meanwhile."""
    return Limit(settings.json_bytes, "FOVEA_JSON_BYTES")


def check_length(headers: Headers, limit: Limit) -> None:
    """Raise `BodyTooLarge` where the declared length is too much."""
    declared = headers.get(b"content-length", b"")
    if declared.isdigit():
        limit.check(int(declared))


async def read(receive: Receive, settings: Settings, take: Take, limit: Limit) -> Received:
    """The whole body, each piece of it counted by `take`.

    Raises `BodyTooLarge`, `BodyTimeout`, `Overloaded`, or `ClientDisconnect`. What is left of a refused
    body is read and thrown away by uvicorn, so that the answer arrives.
    """
    try:
        async with asyncio.timeout(settings.body_timeout):
            return await _receive(receive, limit, take)
    except TimeoutError:
        raise BodyTimeout(settings.body_timeout) from None


async def _receive(receive: Receive, limit: Limit, take: Take) -> Received:
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
            limit.check(size)
            take(len(chunk))
            chunks.append(chunk)
    except (RequestError, ClientDisconnect):
        if size > _SMALL:  # giving much memory back takes milliseconds
            asyncio.get_running_loop().run_in_executor(None, chunks.clear)
        raise
    if len(chunks) == 1:
        return Received(chunks.pop(), size)
    return Received(_join(chunks) if size <= _SMALL else await asyncio.to_thread(_join, chunks), size)


def _join(chunks: list[bytes]) -> bytes:
    content = b"".join(chunks)
    chunks.clear()  # here and not later on the event loop: giving 32 MB back takes milliseconds too
    return content


async def inflate(received: Received, encoding: bytes, limit: Limit, take: Take) -> Received:
    """What a compressed body holds. It is limited and counted as if it had been sent, a piece at a time.

    Raises `BadRequest`, `BodyTooLarge`, or `Overloaded`.
    """
    encoding = encoding.strip().lower()
    if encoding == b"identity":
        return received
    if encoding not in _PACKED:
        name = encoding.decode("latin-1")
        raise BadRequest(f"the body is compressed by {name!r}; send it as it is, or by gzip or deflate")
    chunks, size = [], 0
    view = memoryview(_content(received.take(), received.size))
    unpack = zlib.decompressobj(_ANY_HEADER)
    try:
        for start in range(0, len(view), _PIECE):
            packed: bytes | memoryview = view[start : start + _PIECE]
            while packed and not unpack.eof:
                chunks.append(await asyncio.to_thread(unpack.decompress, packed, _SMALL))
                packed = unpack.unconsumed_tail
                size += len(chunks[-1])
                limit.check(size)
                take(len(chunks[-1]))
            if packed or unpack.unused_data:
                raise BadRequest("the compressed body goes on behind its end")
        chunks.append(unpack.flush())
        size += len(chunks[-1])
    except zlib.error as error:
        raise BadRequest(f"the compressed body is malformed: {error}") from None
    if not unpack.eof:
        raise BadRequest("the compressed body stops before its end")
    return Received(await asyncio.to_thread(_join, chunks), size)


_PACKED: Final = (b"gzip", b"x-gzip", b"deflate")

_ANY_HEADER: Final = 32 + zlib.MAX_WBITS
"""zlib finds out itself which of both it is."""


def is_json(content_type: bytes) -> bool:
    """Whether a body says that it is JSON."""
    return _media_type(content_type) == b"application/json"


def is_form(content_type: bytes) -> bool:
    """Whether a body says that it is a form, which may have files."""
    return _media_type(content_type) == b"multipart/form-data"


def is_wrapped(content_type: bytes) -> bool:
    """Whether a body must be taken apart. Every type that is not known, or none, is one raw image:
    `curl -T` sends no type, and `curl --data-binary` a wrong one."""
    return _media_type(content_type) in _PARSERS


class Received:
    """A whole body, until it is taken: whoever does alone keeps it, and gives it back where it wants to."""

    def __init__(self, body: bytes | Slot, size: int) -> None:
        """All of the bytes, or the first `size` of a slot."""
        self._body: bytes | Slot | None = body
        self.size = size

    def take(self) -> bytes | Slot:
        """Once."""
        body, self._body = self._body, None
        return body or b""

    def image(self) -> Image:
        """It is one raw image. Raises `BadRequest`."""
        if not self.size:
            raise BadRequest("the body is empty; send an image")
        body = self.take()
        return body.stored(0, self.size) if isinstance(body, Slot) else body


async def parse(content_type: bytes, received: Received, settings: Settings) -> Body:
    """Take a body apart. Raises `BadRequest`.

    `multipart/form-data` gives its files, `application/json` a `ClassifyRequest`, the rest is one image.
    """
    take_apart = _PARSERS.get(_media_type(content_type))
    if take_apart is None or not received.size:
        return Body([received.image()])
    # What is not needed any more is given back in the thread: 32 MB take milliseconds.
    parsed = await asyncio.to_thread(lambda: take_apart(received.take(), received.size, content_type))
    check_count(parsed.images, settings)
    return parsed


def check_count(images: Sequence[object], settings: Settings) -> None:
    """Raise `BadRequest` where there are too many."""
    check_number(len(images), settings)


def check_number(count: int, settings: Settings) -> None:
    """The same of a number."""
    if count > (most := settings.request_images):
        raise BadRequest(f"the request has {count} images; at most {most} (FOVEA_REQUEST_IMAGES)")


async def parse_json(received: Received, take_apart: Callable[[Any], _T]) -> _T:
    """What `take_apart` makes of a JSON body; of a large one in a thread. Raises `BadRequest`.

    The thread is for what comes after: orjson lets nothing else run.
    """

    def parse() -> _T:
        try:
            value = orjson.loads(_content(received.take(), received.size))
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"the body is not JSON: {error}") from None
        return take_apart(value)

    return parse() if received.size <= _FEW else await asyncio.to_thread(parse)


_FEW: Final = 4 << 10
"""Bytes of JSON that are taken apart in less time than a thread takes: 50 us."""


def _media_type(content_type: bytes) -> bytes:
    return content_type.partition(b";")[0].strip().lower()


def _content(body: bytes | Slot, size: int) -> bytes:
    return body.read(size) if isinstance(body, Slot) else body


# --- multipart -----------------------------------------------------------------------------------


def _files(body: bytes | Slot, size: int, content_type: bytes) -> Body:
    """The contents of all parts that have a file name, left where they are in the body."""
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise BadRequest("the multipart content type names no boundary")
    content = _content(body, size)
    collector = _Collector(content)
    try:
        parser = MultipartParser(boundary, collector.callbacks())
        parser.write(content)
        parser.finalize()
    except ValueError as error:  # the parser's own errors derive from it
        raise BadRequest(f"the multipart body is malformed: {error}") from None
    if not collector.complete:
        raise BadRequest("the multipart body ends before its last boundary")
    if not collector.files:
        raise BadRequest("the multipart body has no file; send one as `-F file=@photo.jpg`")
    if isinstance(body, Slot):
        return Body([body.stored(*place) for place in collector.files])
    return Body([memoryview(body)[start:stop] for start, stop in collector.files])


_PARTS: Final = 2 * MOST_IMAGES
"""Of a form: each takes 10 us."""


class _Collector:
    """Receives the parser's events and keeps where the parts are that are files."""

    def __init__(self, body: bytes) -> None:
        self.files: list[tuple[int, int]] = []
        """The first byte of each, and the first behind it."""
        self.complete = False
        self._body = body
        self._name = b""
        self._value = b""
        self._filename: bytes | None = None
        self._parts = 0
        self._start = 0
        self._size = 0

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
        self._parts += 1
        if self._parts > _PARTS:
            raise BadRequest(f"the multipart body has more than {_PARTS} parts")
        self._filename, self._start, self._size = None, 0, 0

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
        """A part comes in pieces without gaps. Some are copies, of what looked like a boundary at first; a
        part of nothing else is too short for an image, wherever it is."""
        if data is self._body:
            self._start = start - self._size
        self._size += end - start

    def _end(self) -> None:
        if self._filename or (self._filename is not None and self._size):  # neither: no file was chosen
            self.files.append((self._start, self._start + self._size))

    def _finish(self) -> None:
        self.complete = True


# --- JSON ----------------------------------------------------------------------------------------


_COMMAS: Final = 2 * MOST_IMAGES
"""More than JSON of our own can need, whose images have none: without them there are not many values either,
each of which would take 100 bytes and let nothing else run for 300 ns."""


def _json(body: bytes | Slot, size: int, _content_type: bytes) -> Body:
    content = _content(body, size)
    _check_commas(content)
    try:
        request = ClassifyRequest.model_validate_json(content)
    except ValidationError as error:
        raise malformed(error) from None
    images: list[Image] = [
        from_base64(image.b64, f"images.{index}.b64") for index, image in enumerate(request.images)
    ]
    return Body(images, request.top_k, request.threshold, request.coverage)


def _check_commas(content: bytes) -> None:
    """In pieces: of many the count alone would take long."""
    count = 0
    for start in range(0, len(content), _SMALL):
        count += content.count(b",", start, start + _SMALL)
        if count > _COMMAS:
            raise BadRequest(f"the JSON has more than {_COMMAS} values; send `images`, each with its `b64`")


def validate(kind: type[_M], value: Any) -> _M:
    """What a JSON body says, as this. Raises `BadRequest`."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise malformed(error) from None


def read_query(kind: type[_M], query: bytes) -> _M:
    """The parameters of a URL. Raises `BadRequest`."""
    try:
        return kind.model_validate(dict(QueryParams(query)))
    except ValidationError as error:
        raise malformed(error) from None


def malformed(error: ValidationError) -> BadRequest:
    """Which field of a JSON body is wrong, and what is wrong with it."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return BadRequest(f"{place or 'the body'}: {first['msg']}")


def from_base64(text: str, place: str) -> bytes:
    """The bytes of what stands at this place of a body, in lines or not. Raises `BadRequest`.

    In pieces: while 32 MB are decoded at once no other thread runs, for 90 ms."""
    if "\n" in text:  # as `base64` and Python's `encodebytes` break it
        text = text.replace("\r", "").replace("\n", "")
    pieces = []
    try:
        for start in range(0, len(text), _PIECE):
            piece = base64.b64decode(text[start : start + _PIECE], validate=True)
            if len(piece) < _PIECE // 4 * 3 and start + _PIECE < len(text):
                raise binascii.Error("Excess data after padding")
            pieces.append(piece)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{place} is not base64: {error}") from None
    return b"".join(pieces)


_PARSERS: Final[dict[bytes, Callable[[bytes | Slot, int, bytes], Body]]] = {
    b"multipart/form-data": _files,
    b"application/json": _json,
}
"""What takes a body apart, given it, its size and the whole content type. Everything else is an image."""
