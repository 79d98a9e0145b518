"""Request bodies: read within limits, and taken apart into encoded images."""

from __future__ import annotations

import asyncio
import base64
import binascii
import codecs
import difflib
import json
import zlib
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from fovea.service.api.schemas import ClassifyRequest, FormOptions, Options
from fovea.service.errors import BadRequest, BodyTimeout, BodyTooLarge, RequestError
from fovea.service.http.fast_path import Headers
from fovea.service.runners.messages import Image, Query
from fovea.service.runners.shared_memory import Slot, Stored
from fovea.service.settings import MOST_IMAGES, Settings
from fovea.service.validation import reason_of

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

    @property
    def options(self) -> dict[str, float]:
        """The options that the body sets, by name."""
        options = {"top_k": self.top_k, "threshold": self.threshold, "coverage": self.coverage}
        return {name: value for name, value in options.items() if value is not None}


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
    body = bytearray()  # one block, as hundreds of small ones would leave gaps in the heap
    view = memoryview(_content(received.take(), received.size))
    unpack = zlib.decompressobj(_ANY_HEADER)
    try:
        for start in range(0, len(view), _PIECE):
            packed: bytes | memoryview = view[start : start + _PIECE]
            while packed and not unpack.eof:
                piece = await asyncio.to_thread(unpack.decompress, packed, _SMALL)
                packed = unpack.unconsumed_tail
                limit.check(len(body) + len(piece))
                take(len(piece))
                body += piece
            if packed or unpack.unused_data:
                raise BadRequest("the compressed body goes on behind its end")
        body += unpack.flush()
    except zlib.error as error:
        raise BadRequest(f"the compressed body is malformed: {error}") from None
    if not unpack.eof:
        raise BadRequest("the compressed body stops before its end")
    size = len(body)
    return Received(await asyncio.to_thread(_copy, body), size)


def _copy(body: bytearray) -> bytes:
    content = bytes(body)
    body.clear()  # here and not later on the event loop, as in `_join`
    return content


_PACKED: Final = (b"gzip", b"x-gzip", b"deflate")

_ANY_HEADER: Final = 32 + zlib.MAX_WBITS
"""zlib finds out itself which of both it is."""


def is_json(content_type: bytes) -> bool:
    """Whether a body says that it is JSON."""
    return media_type(content_type) == b"application/json"


def is_form(content_type: bytes) -> bool:
    """Whether a body says that it is a form, which may have files."""
    return media_type(content_type) == b"multipart/form-data"


def is_wrapped(content_type: bytes) -> bool:
    """Whether a body must be taken apart. Every type that is not known, or none, is one raw image:
    `curl -T` sends no type, and `curl --data-binary` a wrong one."""
    return media_type(content_type) in _PARSERS


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
    take_apart = _PARSERS.get(media_type(content_type))
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
            value = orjson.loads(in_utf8(_content(received.take(), received.size)))
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"the body is not JSON: {error}") from None
        return take_apart(value)

    return parse() if received.size <= _FEW else await asyncio.to_thread(parse)


_FEW: Final = 4 << 10
"""Bytes of JSON that are taken apart in less time than a thread takes: 50 us."""


def media_type(content_type: bytes) -> bytes:
    """Without parameters; JSON's by its usual name, whatever structure is inside (RFC 6839)."""
    media_type = content_type.partition(b";")[0].strip().lower()
    is_json = media_type == b"text/json" or media_type.endswith(b"+json")
    return b"application/json" if is_json else media_type


def _content(body: bytes | Slot, size: int) -> bytes:
    return body.read(size) if isinstance(body, Slot) else body


# --- multipart -----------------------------------------------------------------------------------


def _files(body: bytes | Slot, size: int, content_type: bytes) -> Body:
    """The images of all parts, left where they are in the body, and the options among its fields."""
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise BadRequest("the multipart content type names no boundary")
    content = _content(body, size)
    parts, offset = _without_preamble(content, boundary)
    collector = _Collector(parts, offset)
    try:
        parser = MultipartParser(boundary, collector.callbacks())
        parser.write(parts)
        parser.finalize()
    except ValueError as error:  # the parser's own errors derive from it
        raise BadRequest(f"the multipart body is malformed: {error}") from None
    if not collector.complete:
        raise BadRequest("the multipart body ends before its last boundary")
    if not collector.files:
        raise BadRequest("the multipart body has no file; send one as `-F file=@photo.jpg`")
    options = _form_options(collector.fields)
    images: list[Image] = []
    for place, (start, stop) in enumerate(collector.files):
        if place in collector.encoded:
            text = content[start:stop].decode("ascii", "replace")
            images.append(from_base64(text, f"file {place}"))
        else:
            images.append(
                body.stored(start, stop) if isinstance(body, Slot) else memoryview(body)[start:stop]
            )
    return Body(images, options.top_k, options.threshold, options.coverage)


def _without_preamble(content: bytes, boundary: bytes) -> tuple[bytes, int]:
    """The body from its first delimiter on, and how far its places lie before those of `content`.

    RFC 2046, section 5.1.1, allows text before the first delimiter, and blanks at the end of its line.
    """
    delimiter = b"--" + boundary
    start = 0 if content.startswith(delimiter) else content.find(b"\n" + delimiter) + 1
    end = start + len(delimiter)
    line = content[end : end + _BLANKS]
    blanks = len(line) - len(line.lstrip(b" \t"))
    if not start and not blanks:
        return content, 0
    return delimiter + content[end + blanks :], start + blanks


_BLANKS: Final = 1000
"""Most bytes of blanks behind the first delimiter."""


def _form_options(fields: dict[str, str]) -> FormOptions:
    """The options among a form's text fields; others are the caller's own. Raises `BadRequest`."""
    known = list(FormOptions.model_fields)
    check_spelling(fields, known, "the form's field")
    return validate(FormOptions, {name: value for name, value in fields.items() if name in known})


_PARTS: Final = 2 * MOST_IMAGES
"""Of a form: each takes 10 us."""

_FIELDS: Final = 100
"""Most text fields of a form, parameters of a query or names in JSON that are looked at."""

_FIELD: Final = 100
"""Bytes of a text field's name or value that are looked at: more than an option can have."""


class _Collector:
    """Receives the parser's events and keeps where the parts are that are files, and the text fields."""

    def __init__(self, body: bytes, offset: int = 0) -> None:
        """The places that are kept are `offset` bytes behind those in `body`."""
        self.files: list[tuple[int, int]] = []
        """The first byte of each, and the first behind it."""
        self.encoded: set[int] = set()
        """Which of `files` are base64."""
        self.fields: dict[str, str] = {}
        """Small text fields, by name."""
        self.complete = False
        self._body = body
        self._offset = offset
        self._name = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
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
        self._headers, self._start, self._size = {}, 0, 0

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        """A part comes in pieces without gaps. Some are copies, of what looked like a boundary at first; a
        part of nothing else is too short for an image, wherever it is."""
        if data is self._body:
            self._start = start - self._size
        self._size += end - start

    def _end(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        options = parse_options_header(disposition)[1]
        # RFC 5987's `filename*` is forbidden in forms (RFC 7578), and sent all the same; any name will do.
        extended = b"*" if b"filename*" in disposition.lower() else None
        filename = options.get(b"filename", extended)
        if filename is not None:
            is_file = bool(filename or self._size)  # neither: no file was chosen
        else:
            is_file = self._is_binary()
        if is_file:
            encoding = self._headers.get(b"content-transfer-encoding", b"").strip().lower()
            if encoding not in _NOT_ENCODED and encoding != b"base64":
                name = encoding.decode("latin-1")
                raise BadRequest(f"a file is sent with the transfer encoding {name!r}; send it as it is")
            if encoding == b"base64":
                self.encoded.add(len(self.files))
            start = self._start + self._offset
            self.files.append((start, start + self._size))
        elif filename is None and self._size <= _FIELD and len(self.fields) < _FIELDS:
            name = options.get(b"name", b"")[:_FIELD].decode(errors="replace")
            value = self._body[self._start : self._start + self._size].decode(errors="replace")
            if name in FormOptions.model_fields and name in self.fields:
                raise BadRequest(f"the form has {name} twice")
            self.fields[name] = value

    def _is_binary(self) -> bool:
        """Whether a part without a file name is an image all the same: RFC 7578 makes the name optional."""
        kind = media_type(self._headers.get(b"content-type", b""))
        if kind:
            return kind.startswith(b"image/") or kind == b"application/octet-stream"
        head = self._body[self._start : self._start + min(self._size, _HEAD)]
        return any(byte < 32 and byte not in b"\t\r\n" for byte in head)  # 32: the first character to print

    def _finish(self) -> None:
        self.complete = True


_NOT_ENCODED: Final = (b"", b"binary", b"8bit", b"7bit")
"""Transfer encodings of a part that leave it as it is."""

_HEAD: Final = 16
"""First bytes of a part without a type that are looked at: in these every image format has some that no text
has, whatever its character set."""


# --- JSON ----------------------------------------------------------------------------------------


_COMMAS: Final = 2 * MOST_IMAGES
"""More than JSON of our own can need, whose images have none: without them there are not many values either,
each of which would take 100 bytes and let nothing else run for 300 ns."""


def _json(body: bytes | Slot, size: int, _content_type: bytes) -> Body:
    content = in_utf8(_content(body, size))
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


def in_utf8(content: bytes) -> bytes:
    """JSON as UTF-8 without a byte order mark, as it should be sent (RFC 8259, section 8.1).

    A mark is allowed to be ignored, and Windows' tools write one, some of them with UTF-16. Raises
    `BadRequest`.
    """
    encoding = json.detect_encoding(content[:4])
    if encoding == "utf-8":
        return content
    if encoding == "utf-8-sig":
        return content[len(codecs.BOM_UTF8) :]
    decoder = codecs.getincrementaldecoder(encoding)()
    pieces = []
    try:
        for start in range(0, len(content), _PIECE):  # in pieces: while one is decoded no other thread runs
            is_last = start + _PIECE >= len(content)
            pieces.append(decoder.decode(content[start : start + _PIECE], is_last).encode())
    except UnicodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    return b"".join(pieces)


def read_query(kind: type[_M], query: bytes) -> _M:
    """The parameters of a URL. Raises `BadRequest`, where `kind` is closed also for one that is not known or
    is there twice."""
    parameters: dict[str, str] = {}
    if kind.model_config.get("extra") == "forbid":
        for name, value in QueryParams(query).multi_items():
            if name in parameters:
                raise BadRequest(f"the query has {name[:_FIELD]!r} twice; send it once")
            parameters[name] = value
        check_names(parameters, kind.model_fields, "the query's parameter")
    else:
        check_foreign_query(QueryParams(query))
    try:
        return kind.model_validate(parameters)
    except ValidationError as error:
        raise malformed(error) from None


def check_names(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise `BadRequest` for the first name that is not known, with the nearest one that is."""
    known = list(known)
    for name in names:
        if name not in known:
            nearest = _nearest(name, known)
            advice = f"did you mean {nearest}?" if nearest else f"there are {', '.join(known)}"
            raise BadRequest(f"{what} {name[:_FIELD]!r} is not known; {advice}")


def refuse_options(options: Iterable[str], known: Container[str] = ()) -> None:
    """Raise `BadRequest` for an option of our own classification where only `known` ones count."""
    for name in options:
        if name not in known:
            raise BadRequest(f"{name} counts for /v1/classify alone; leave it out here")


def check_foreign_query(query: QueryParams) -> None:
    """Raise `BadRequest` for an option of ours in the query of another protocol, where it would be ignored.

    Other parameters are passed over: gateways add their own, such as keys.
    """
    refuse_options(name for name in islice(query, _FIELDS) if name in Options.model_fields)


def check_spelling(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise `BadRequest` for a name that is not known and looks like one that is: it would be ignored without
    a word. Other names belong to somebody else."""
    known = list(known)
    others = (name for name in islice(names, _FIELDS) if name not in known)
    check_names((name for name in others if _nearest(name, known)), known, what)


def _nearest(name: str, known: list[str]) -> str | None:
    """The known name that this one is most likely meant to be, whatever its case and hyphens."""
    plain = {one.replace("_", "").lower(): one for one in known}
    written = name[:_FIELD].replace("_", "").replace("-", "").lower()
    close = difflib.get_close_matches(written, plain, n=1, cutoff=_CLOSE)
    return plain[close[0]] if close else None


_CLOSE: Final = 0.8
"""Share of letters in common (`difflib`) from which on a name is taken for a misspelt one."""


def malformed(error: ValidationError) -> BadRequest:
    """Which field of a JSON body is wrong, and what is wrong with it."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return BadRequest(f"{place or 'the body'}: {reason_of(first)}")


def from_base64(text: str, place: str) -> bytes:
    """The bytes of what stands at this place of a body. Raises `BadRequest`.

    It may be in lines, without its padding, in the alphabet of URLs (RFC 4648, section 5), or a `data:` URI.
    In pieces: while 32 MB are decoded at once no other thread runs, for 90 ms.
    """
    text = _without_scheme(text, place)
    for blank in " \t\r\n":  # as `base64`, Python's `encodebytes` and YAML break it
        if blank in text:
            text = text.replace(blank, "")
    for ours, in_urls in ("+-", "/_"):
        if in_urls in text:
            text = text.replace(in_urls, ours)
    padding = len(text) - len(text.rstrip("="))
    text = text.rstrip("=")
    pieces = []
    try:
        if padding > _PADDING:
            raise binascii.Error("Excess data after padding")
        text += "=" * (-len(text) % 4)
        for start in range(0, len(text), _PIECE):
            piece = base64.b64decode(text[start : start + _PIECE], validate=True)
            if len(piece) < _PIECE // 4 * 3 and start + _PIECE < len(text):
                raise binascii.Error("Excess data after padding")
            pieces.append(piece)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{place} is not base64: {error}") from None
    return b"".join(pieces)


_PADDING: Final = 2
"""Most characters of padding."""


def _without_scheme(text: str, place: str) -> str:
    """The base64 of a `data:` URI (RFC 2397), in which some characters may be percent-encoded."""
    text = text.lstrip()
    if text[: len(_DATA)].lower() != _DATA:
        return text
    comma = text.find(",", 0, _URI_HEAD)
    if comma < 0 or not text[:comma].rstrip().lower().endswith(";base64"):
        raise BadRequest(f"{place} is a data URI without base64; send `data:image/jpeg;base64,…`")
    text = text[comma + 1 :]
    if "%" in text:
        for code, character in _PERCENT.items():
            text = text.replace(code, character).replace(code.lower(), character)
    return text


_DATA: Final = "data:"

_URI_HEAD: Final = 1000
"""Most characters of a data URI before its data."""

_PERCENT: Final = {"%2B": "+", "%2F": "/", "%3D": "=", "%0D": "", "%0A": "", "%20": ""}
"""What base64 may have that URLs write in another way."""


_PARSERS: Final[dict[bytes, Callable[[bytes | Slot, int, bytes], Body]]] = {
    b"multipart/form-data": _files,
    b"application/json": _json,
}
"""What takes a body apart, given it, its size and the whole content type. Everything else is an image."""
