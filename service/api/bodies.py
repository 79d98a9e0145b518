"""Reading request bodies within limits, and splitting them into encoded images."""

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
from fovea.service.runners.messages import Image, ImageRequest
from fovea.service.runners.shared_memory import SharedBuffer, SharedRef
from fovea.service.settings import MAX_REQUEST_IMAGES, Settings
from fovea.service.validation import describe_error

Take: TypeAlias = Callable[[int], None]

_T = TypeVar("_T")

_M = TypeVar("_M", bound=BaseModel)

_SMALL: Final = 1 << 20
"""Maximum number of bytes that the event loop may copy; copying more takes over a millisecond."""


_PIECE: Final = 256 << 10
"""Number of base64 characters or compressed bytes that are decoded at once, in 1 ms. It is a multiple of
four, so that no base64 group is split."""


@dataclass(frozen=True)
class Body:
    """The content of a request, independent of its content type."""

    images: list[Image]
    top_k: int | None = None
    threshold: float | None = None
    coverage: float | None = None

    @property
    def options(self) -> dict[str, float]:
        """Options that the body sets, by name."""
        options = {"top_k": self.top_k, "threshold": self.threshold, "coverage": self.coverage}
        return {name: value for name, value in options.items() if value is not None}


def release(images: list[Any]) -> None:
    """Release the memory of the images, in a thread if they are large.

    Releasing large images takes milliseconds.
    """
    contents = [image.content if isinstance(image, ImageRequest) else image for image in images]
    if sum(len(content) for content in contents if not isinstance(content, SharedRef)) > _SMALL:
        images.clear()
        asyncio.get_running_loop().run_in_executor(None, contents.clear)


class Limit(NamedTuple):
    """The maximum size of a body in bytes, and the setting that defines it."""

    size: int
    setting: str

    def check(self, size: int) -> None:
        """Raise `BodyTooLarge` if `size` bytes exceed the limit."""
        if size > self.size:
            raise BodyTooLarge(f"the body has more than {self.size} bytes ({self.setting})")


def body_limit(settings: Settings) -> Limit:
    """Return the limit for any body."""
    return Limit(settings.body_bytes, "FOVEA_BODY_BYTES")


def json_limit(settings: Settings) -> Limit:
    """Return the limit for a body that orjson parses, because orjson blocks all other threads."""
    return Limit(settings.json_bytes, "FOVEA_JSON_BYTES")


def check_length(headers: Headers, limit: Limit) -> None:
    """Raise `BodyTooLarge` if the declared length exceeds the limit."""
    declared = headers.get(b"content-length", b"")
    if declared.isdigit():
        limit.check(int(declared))


async def read(receive: Receive, settings: Settings, take: Take, limit: Limit) -> Received:
    """Read the whole body; `take` is called with the size of each piece to count it.

    Raises `BodyTooLarge`, `BodyTimeout`, `Overloaded`, or `ClientDisconnect`. The server reads and discards
    the rest of a refused body, so that the client gets the answer.
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
            # The limit comes first: a body that is too large gets 413 even when `take` would refuse it.
            limit.check(size)
            take(len(chunk))
            chunks.append(chunk)
    except (RequestError, ClientDisconnect):
        if size > _SMALL:  # releasing much memory takes milliseconds
            asyncio.get_running_loop().run_in_executor(None, chunks.clear)
        raise
    if len(chunks) == 1:
        return Received(chunks.pop(), size)
    return Received(_join(chunks) if size <= _SMALL else await asyncio.to_thread(_join, chunks), size)


def _join(chunks: list[bytes]) -> bytes:
    content = b"".join(chunks)
    chunks.clear()  # releasing 32 MB takes milliseconds, so release here and not later on the event loop
    return content


async def inflate(received: Received, encoding: bytes, limit: Limit, take: Take) -> Received:
    """Decompress a body piece by piece.

    The size of the result is limited and counted as if the client had sent it uncompressed. Raises
    `BadRequest`, `BodyTooLarge`, or `Overloaded`.
    """
    encoding = encoding.strip().lower()
    if encoding == b"identity":
        return received
    if encoding not in _PACKED:
        name = encoding.decode("latin-1")
        raise BadRequest(f"the body is compressed by {name!r}; send it as it is, or by gzip or deflate")
    body = bytearray()  # one block; hundreds of small blocks would fragment the heap
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
    body.clear()  # release here and not later on the event loop, as in `_join`
    return content


_PACKED: Final = (b"gzip", b"x-gzip", b"deflate")

_ANY_HEADER: Final = 32 + zlib.MAX_WBITS
"""Window size that makes zlib detect gzip and deflate by itself."""


def is_json(content_type: bytes) -> bool:
    """Return True if the content type is JSON."""
    return media_type(content_type) == b"application/json"


def is_form(content_type: bytes) -> bool:
    """Return True if the content type is a form, which may have files."""
    return media_type(content_type) == b"multipart/form-data"


def is_wrapped(content_type: bytes) -> bool:
    """Return True if the body has to be parsed.

    A body of any other type, or without a type, is one raw image: `curl -T` sends no type, and `curl
    --data-binary` sends a wrong one.
    """
    return media_type(content_type) in _PARSERS


class Received:
    """A whole body that can be taken once.

    The caller of `take` becomes the only owner, and decides where the memory is released.
    """

    def __init__(self, body: bytes | SharedBuffer, size: int) -> None:
        """Hold all of the bytes, or the first `size` bytes of a slot."""
        self._body: bytes | SharedBuffer | None = body
        self.size = size

    def take(self) -> bytes | SharedBuffer:
        """Return the body; a second call returns nothing."""
        body, self._body = self._body, None
        return body or b""

    def image(self) -> Image:
        """Return the body as one raw image.

        Raises `BadRequest` if the body is empty.
        """
        if not self.size:
            raise BadRequest("the body is empty; send an image")
        body = self.take()
        return body.to_ref(0, self.size) if isinstance(body, SharedBuffer) else body


async def parse(content_type: bytes, received: Received, settings: Settings) -> Body:
    """Parse a body.

    `multipart/form-data` contains files, `application/json` a `ClassifyRequest`; any other body is one image.
    Raises `BadRequest`.
    """
    take_apart = _PARSERS.get(media_type(content_type))
    if take_apart is None or not received.size:
        return Body([received.image()])
    # The lambda takes the body inside the thread, so that the thread releases the memory that is no longer
    # needed. Releasing 32 MB takes milliseconds.
    parsed = await asyncio.to_thread(lambda: take_apart(received.take(), received.size, content_type))
    check_count(parsed.images, settings)
    return parsed


def check_count(images: Sequence[object], settings: Settings) -> None:
    """Raise `BadRequest` if a request has too many images."""
    check_number(len(images), settings)


def check_number(count: int, settings: Settings) -> None:
    """Raise `BadRequest` if `count` images are too many for one request."""
    if count > (most := settings.request_images):
        raise BadRequest(f"the request has {count} images; at most {most} (FOVEA_REQUEST_IMAGES)")


async def parse_json(received: Received, take_apart: Callable[[Any], _T]) -> _T:
    """Parse a JSON body and return the result of `take_apart`, in a thread if the body is large.

    The thread helps `take_apart` only, because orjson itself blocks all other threads. Raises `BadRequest`.
    """

    def parse() -> _T:
        try:
            value = orjson.loads(in_utf8(_content(received.take(), received.size)))
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"the body is not JSON: {error}") from None
        return take_apart(value)

    return parse() if received.size <= _FEW else await asyncio.to_thread(parse)


_FEW: Final = 4 << 10
"""Size of JSON in bytes that is parsed faster than a thread switch, which takes 50 us."""


def media_type(content_type: bytes) -> bytes:
    """Return the media type without parameters, and any JSON type as `application/json` (RFC 6839)."""
    media_type = content_type.partition(b";")[0].strip().lower()
    is_json = media_type == b"text/json" or media_type.endswith(b"+json")
    return b"application/json" if is_json else media_type


def _content(body: bytes | SharedBuffer, size: int) -> bytes:
    return body.read_bytes(size) if isinstance(body, SharedBuffer) else body


# --- multipart -----------------------------------------------------------------------------------


def _files(body: bytes | SharedBuffer, size: int, content_type: bytes) -> Body:
    """Parse a form into its images and options.

    The images are not copied; they refer to their places in the body.
    """
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
    except ValueError as error:  # the base class of the parser's own errors
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
                body.to_ref(start, stop) if isinstance(body, SharedBuffer) else memoryview(body)[start:stop]
            )
    return Body(images, options.top_k, options.threshold, options.coverage)


def _without_preamble(content: bytes, boundary: bytes) -> tuple[bytes, int]:
    """Return the body from its first delimiter on, and the number of bytes that were removed.

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
"""Maximum number of blanks after the first delimiter."""


def _form_options(fields: dict[str, str]) -> FormOptions:
    """Return the options among a form's text fields; other fields are ignored.

    Raises `BadRequest`.
    """
    known = list(FormOptions.model_fields)
    check_spelling(fields, known, "the form's field")
    return validate(FormOptions, {name: value for name, value in fields.items() if name in known})


_PARTS: Final = 2 * MAX_REQUEST_IMAGES
"""Maximum number of parts in a form; each part takes 10 us."""

_FIELDS: Final = 100
"""Maximum number of text fields in a form, of query parameters, or of JSON names that are examined."""

_FIELD: Final = 100
"""Maximum size in bytes of a text field's name or value; no option can be longer."""


class _Collector:
    """A handler of the parser's events that collects the positions of the files, and the text fields."""

    def __init__(self, body: bytes, offset: int = 0) -> None:
        """Collect the parts of `body`; stored positions are `offset` bytes greater than in `body`."""
        self.files: list[tuple[int, int]] = []
        """Start and end of each file, in bytes; the end is exclusive."""
        self.encoded: set[int] = set()
        """Indices of the `files` that are base64."""
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
        """Record the position of a piece; the pieces of a part come without gaps.

        Some pieces are copies, of bytes that first looked like a boundary. The position of a part that
        consists only of such copies is unknown, but it is too short for an image.
        """
        if data is self._body:
            self._start = start - self._size
        self._size += end - start

    def _end(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        options = parse_options_header(disposition)[1]
        # RFC 7578 forbids RFC 5987's `filename*` in forms, but some clients send it. The name itself is not
        # used.
        extended = b"*" if b"filename*" in disposition.lower() else None
        filename = options.get(b"filename", extended)
        if filename is not None:
            # A part with neither name nor content means that no file was chosen.
            is_file = bool(filename or self._size)
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
        """Return True if a part without a file name is an image.

        RFC 7578 makes the file name optional.
        """
        kind = media_type(self._headers.get(b"content-type", b""))
        if kind:
            return kind.startswith(b"image/") or kind == b"application/octet-stream"
        head = self._body[self._start : self._start + min(self._size, _HEAD)]
        # 32 is the first printable character.
        return any(byte < 32 and byte not in b"\t\r\n" for byte in head)

    def _finish(self) -> None:
        self.complete = True


_NOT_ENCODED: Final = (b"", b"binary", b"8bit", b"7bit")
"""Transfer encodings that leave a part unchanged."""

_HEAD: Final = 16
"""Number of bytes that are examined in a part without a type. Within these bytes every image format has
control characters that no text has, whatever its character set."""


# --- JSON ----------------------------------------------------------------------------------------


_COMMAS: Final = 2 * MAX_REQUEST_IMAGES
"""Maximum number of commas in our own JSON, more than a valid request needs: base64 has no commas. The limit
also bounds the number of values, each of which takes 100 bytes and blocks all other threads for 300 ns."""


def _json(body: bytes | SharedBuffer, size: int, _content_type: bytes) -> Body:
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
    """Raise `BadRequest` if the JSON has too many commas.

    The count goes piece by piece, because counting a huge number of commas would itself take long.
    """
    count = 0
    for start in range(0, len(content), _SMALL):
        count += content.count(b",", start, start + _SMALL)
        if count > _COMMAS:
            raise BadRequest(f"the JSON has more than {_COMMAS} values; send `images`, each with its `b64`")


def validate(kind: type[_M], value: Any) -> _M:
    """Validate the value of a JSON body as an instance of `kind`.

    Raises `BadRequest`.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise malformed(error) from None


def in_utf8(content: bytes) -> bytes:
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
        for start in range(0, len(content), _PIECE):
            is_last = start + _PIECE >= len(content)
            pieces.append(decoder.decode(content[start : start + _PIECE], is_last).encode())
    except UnicodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    return b"".join(pieces)


def read_query(kind: type[_M], query: bytes) -> _M:
    """Validate the query of a URL as an instance of `kind`.

    Raises `BadRequest`. If `kind` forbids extra fields, unknown and repeated parameters are errors too.
    """
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
    """Raise `BadRequest` for the first unknown name, with the nearest known name."""
    known = list(known)
    for name in names:
        if name not in known:
            nearest = _nearest(name, known)
            advice = f"did you mean {nearest}?" if nearest else f"there are {', '.join(known)}"
            raise BadRequest(f"{what} {name[:_FIELD]!r} is not known; {advice}")


def refuse_options(options: Iterable[str], known: Container[str] = ()) -> None:
    """Raise `BadRequest` for an option of the native classification unless it is in `known`."""
    for name in options:
        if name not in known:
            raise BadRequest(f"{name} counts for /v1/classify alone; leave it out here")


def check_foreign_query(query: QueryParams) -> None:
    """Raise `BadRequest` for a native option in the query of another protocol, which would ignore it.

    Other parameters are accepted, because gateways add their own parameters, such as keys.
    """
    refuse_options(name for name in islice(query, _FIELDS) if name in Options.model_fields)


def check_spelling(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise `BadRequest` for an unknown name that resembles a known name.

    Such a name would be silently ignored. Other names are accepted, because they belong to other software.
    """
    known = list(known)
    others = (name for name in islice(names, _FIELDS) if name not in known)
    check_names((name for name in others if _nearest(name, known)), known, what)


def _nearest(name: str, known: list[str]) -> str | None:
    """Return the known name that was most likely meant, independent of case, hyphens and underscores."""
    plain = {one.replace("_", "").lower(): one for one in known}
    written = name[:_FIELD].replace("_", "").replace("-", "").lower()
    close = difflib.get_close_matches(written, plain, n=1, cutoff=_CLOSE)
    return plain[close[0]] if close else None


_CLOSE: Final = 0.8
"""Minimum similarity (`difflib`) of a name to a known name to count as a misspelling."""


def malformed(error: ValidationError) -> BadRequest:
    """Return an error that names the invalid field of a JSON body and the reason."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return BadRequest(f"{place or 'the body'}: {describe_error(first)}")


def from_base64(text: str, place: str) -> bytes:
    """Decode the base64 text at this place of a body.

    The text may be broken into lines, lack its padding, use the URL-safe alphabet (RFC 4648, section 5), or
    be a `data:` URI. Decoding goes piece by piece, because decoding 32 MB at once blocks all other threads
    for 90 ms. Raises `BadRequest`.
    """
    text = _without_scheme(text, place)
    for blank in " \t\r\n":  # line breaks of `base64`, Python's `encodebytes` and YAML
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
"""Maximum number of padding characters."""


def _without_scheme(text: str, place: str) -> str:
    """Return the base64 part of a `data:` URI (RFC 2397), in which some characters may be percent-encoded."""
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
"""Maximum number of characters of a data URI before its data."""

_PERCENT: Final = {"%2B": "+", "%2F": "/", "%3D": "=", "%0D": "", "%0A": "", "%20": ""}
"""Characters of base64 text that URLs write percent-encoded."""


_PARSERS: Final[dict[bytes, Callable[[bytes | SharedBuffer, int, bytes], Body]]] = {
    b"multipart/form-data": _files,
    b"application/json": _json,
}
"""Parsers by media type, called with the body, its size and the content type. Any other body is an image."""
