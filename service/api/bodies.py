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

from fovea.service.api.schemas import ClassifyOptions, ClassifyRequest, FormOptions
from fovea.service.errors import BadRequest, BodyTimeout, BodyTooLarge, RequestError
from fovea.service.http.fast_path import Headers
from fovea.service.runners.batch_messages import Image, ImageRequest
from fovea.service.runners.shared_memory import SharedBuffer, SharedRef
from fovea.service.settings import MAX_REQUEST_IMAGES, Settings
from fovea.service.validation import describe_error

Allocate: TypeAlias = Callable[[int], None]

_T = TypeVar("_T")

_M = TypeVar("_M", bound=BaseModel)

_MAX_INLINE_BYTES: Final = 1 << 20
"""Maximum number of bytes that the event loop may copy; copying more takes over a millisecond."""


_CHUNK_SIZE: Final = 256 << 10
"""Number of base64 characters or compressed bytes that are decoded at once, in 1 ms. It is a multiple of
four, so that no base64 group is split."""


@dataclass(frozen=True)
class ParsedBody:
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


def release_images(images: list[Any]) -> None:
    """Release the memory of the images, in a thread if they are large.

    Releasing large images takes milliseconds.
    """
    contents = [image.content if isinstance(image, ImageRequest) else image for image in images]
    if sum(len(content) for content in contents if not isinstance(content, SharedRef)) > _MAX_INLINE_BYTES:
        images.clear()
        asyncio.get_running_loop().run_in_executor(None, contents.clear)


class BodyLimit(NamedTuple):
    """The maximum size of a body in bytes, and the setting that defines it."""

    max_bytes: int
    setting: str

    def check(self, size: int) -> None:
        """Raise `BodyTooLarge` if `size` bytes exceed the limit."""
        if size > self.max_bytes:
            raise BodyTooLarge(f"the body has more than {self.max_bytes} bytes ({self.setting})")


def body_limit(settings: Settings) -> BodyLimit:
    """Return the limit for any body."""
    return BodyLimit(settings.body_bytes, "FOVEA_BODY_BYTES")


def json_limit(settings: Settings) -> BodyLimit:
    """Return the limit for a body that orjson parses, because orjson blocks all other threads."""
    return BodyLimit(settings.json_bytes, "FOVEA_JSON_BYTES")


def check_length(headers: Headers, limit: BodyLimit) -> None:
    """Raise `BodyTooLarge` if the declared length exceeds the limit."""
    content_length = headers.get(b"content-length", b"")
    if content_length.isdigit():
        limit.check(int(content_length))


async def read_body(receive: Receive, settings: Settings, allocate: Allocate, limit: BodyLimit) -> RawBody:
    """Read the whole body; `allocate` is called with the size of each piece to count it.

    Raises `BodyTooLarge`, `BodyTimeout`, `Overloaded`, or `ClientDisconnect`. The server reads and discards
    the rest of a refused body, so that the client gets the answer.
    """
    try:
        async with asyncio.timeout(settings.body_timeout):
            return await _receive_body(receive, limit, allocate)
    except TimeoutError:
        raise BodyTimeout(settings.body_timeout) from None


async def _receive_body(receive: Receive, limit: BodyLimit, allocate: Allocate) -> RawBody:
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
            # The limit comes first: a body that is too large gets 413 even when `allocate` would refuse it.
            limit.check(size)
            allocate(len(chunk))
            chunks.append(chunk)
    except (RequestError, ClientDisconnect):
        if size > _MAX_INLINE_BYTES:  # releasing much memory takes milliseconds
            asyncio.get_running_loop().run_in_executor(None, chunks.clear)
        raise
    if len(chunks) == 1:
        return RawBody(chunks.pop(), size)
    return RawBody(
        _join_chunks(chunks) if size <= _MAX_INLINE_BYTES else await asyncio.to_thread(_join_chunks, chunks),
        size,
    )


def _join_chunks(chunks: list[bytes]) -> bytes:
    content = b"".join(chunks)
    chunks.clear()  # releasing 32 MB takes milliseconds, so release here and not later on the event loop
    return content


async def decompress_body(
    raw_body: RawBody, encoding: bytes, limit: BodyLimit, allocate: Allocate
) -> RawBody:
    """Decompress a body piece by piece.

    The size of the result is limited and counted as if the client had sent it uncompressed. Raises
    `BadRequest`, `BodyTooLarge`, or `Overloaded`.
    """
    encoding = encoding.strip().lower()
    if encoding == b"identity":
        return raw_body
    if encoding not in _CONTENT_ENCODINGS:
        name = encoding.decode("latin-1")
        raise BadRequest(f"the body is compressed by {name!r}; send it as it is, or by gzip or deflate")
    body = bytearray()  # one block; hundreds of small blocks would fragment the heap
    view = memoryview(_read_content(raw_body.take_content(), raw_body.size))
    decompressor = zlib.decompressobj(_AUTO_DETECT_WBITS)
    try:
        for start in range(0, len(view), _CHUNK_SIZE):
            chunk: bytes | memoryview = view[start : start + _CHUNK_SIZE]
            while chunk and not decompressor.eof:
                piece = await asyncio.to_thread(decompressor.decompress, chunk, _MAX_INLINE_BYTES)
                chunk = decompressor.unconsumed_tail
                limit.check(len(body) + len(piece))
                allocate(len(piece))
                body += piece
            if chunk or decompressor.unused_data:
                raise BadRequest("the compressed body goes on behind its end")
        body += decompressor.flush()
    except zlib.error as error:
        raise BadRequest(f"the compressed body is malformed: {error}") from None
    if not decompressor.eof:
        raise BadRequest("the compressed body stops before its end")
    size = len(body)
    return RawBody(await asyncio.to_thread(_copy_bytes, body), size)


def _copy_bytes(body: bytearray) -> bytes:
    content = bytes(body)
    body.clear()  # release here and not later on the event loop, as in `_join_chunks`
    return content


_CONTENT_ENCODINGS: Final = (b"gzip", b"x-gzip", b"deflate")

_AUTO_DETECT_WBITS: Final = 32 + zlib.MAX_WBITS
"""Window size that makes zlib detect gzip and deflate by itself."""


def is_json(content_type: bytes) -> bool:
    """Return True if the content type is JSON."""
    return parse_media_type(content_type) == b"application/json"


def is_form(content_type: bytes) -> bool:
    """Return True if the content type is a form, which may have files."""
    return parse_media_type(content_type) == b"multipart/form-data"


def is_structured(content_type: bytes) -> bool:
    """Return True if the body has to be parsed.

    A body of any other type, or without a type, is one raw image: `curl -T` sends no type, and `curl
    --data-binary` sends a wrong one.
    """
    return parse_media_type(content_type) in _PARSERS


class RawBody:
    """A whole body that can be taken once.

    The caller of `take_content` becomes the only owner, and decides where the memory is released.
    """

    def __init__(self, body: bytes | SharedBuffer, size: int) -> None:
        """Hold all of the bytes, or the first `size` bytes of a slot."""
        self._body: bytes | SharedBuffer | None = body
        self.size = size

    def take_content(self) -> bytes | SharedBuffer:
        """Return the body; a second call returns nothing."""
        body, self._body = self._body, None
        return body or b""

    def to_image(self) -> Image:
        """Return the body as one raw image.

        Raises `BadRequest` if the body is empty.
        """
        if not self.size:
            raise BadRequest("the body is empty; send an image")
        body = self.take_content()
        return body.to_ref(0, self.size) if isinstance(body, SharedBuffer) else body


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
    check_images(parsed_body.images, settings)
    return parsed_body


def check_images(images: Sequence[object], settings: Settings) -> None:
    """Raise `BadRequest` if a request has too many images."""
    check_image_count(len(images), settings)


def check_image_count(count: int, settings: Settings) -> None:
    """Raise `BadRequest` if `count` images are too many for one request."""
    if count > (max_images := settings.request_images):
        raise BadRequest(f"the request has {count} images; at most {max_images} (FOVEA_REQUEST_IMAGES)")


async def parse_json(raw_body: RawBody, convert: Callable[[Any], _T]) -> _T:
    """Parse a JSON body and return the result of `convert`, in a thread if the body is large.

    The thread helps `convert` only, because orjson itself blocks all other threads. Raises `BadRequest`.
    """

    def load_and_convert() -> _T:
        try:
            value = orjson.loads(to_utf8(_read_content(raw_body.take_content(), raw_body.size)))
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


def parse_media_type(content_type: bytes) -> bytes:
    """Return the media type without parameters, and any JSON type as `application/json` (RFC 6839)."""
    media_type = content_type.partition(b";")[0].strip().lower()
    is_json_type = media_type == b"text/json" or media_type.endswith(b"+json")
    return b"application/json" if is_json_type else media_type


def _read_content(body: bytes | SharedBuffer, size: int) -> bytes:
    return body.read_bytes(size) if isinstance(body, SharedBuffer) else body


# --- multipart -----------------------------------------------------------------------------------


def _parse_form(body: bytes | SharedBuffer, size: int, content_type: bytes) -> ParsedBody:
    """Parse a form into its images and options.

    The images are not copied; they refer to their places in the body.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise BadRequest("the multipart content type names no boundary")
    content = _read_content(body, size)
    parts, offset = _strip_preamble(content, boundary)
    collector = _FormCollector(parts, offset)
    try:
        parser = MultipartParser(boundary, collector.callbacks())
        parser.write(parts)
        parser.finalize()
    except ValueError as error:  # the base class of the parser's own errors
        raise BadRequest(f"the multipart body is malformed: {error}") from None
    if not collector.is_complete:
        raise BadRequest("the multipart body ends before its last boundary")
    if not collector.file_ranges:
        raise BadRequest("the multipart body has no file; send one as `-F file=@photo.jpg`")
    options = _parse_form_options(collector.fields)
    images: list[Image] = []
    for index, (start, stop) in enumerate(collector.file_ranges):
        if index in collector.base64_files:
            text = content[start:stop].decode("ascii", "replace")
            images.append(from_base64(text, f"file {index}"))
        else:
            images.append(
                body.to_ref(start, stop) if isinstance(body, SharedBuffer) else memoryview(body)[start:stop]
            )
    return ParsedBody(images, options.top_k, options.threshold, options.coverage)


def _strip_preamble(content: bytes, boundary: bytes) -> tuple[bytes, int]:
    """Return the body from its first delimiter on, and the number of bytes that were removed.

    RFC 2046, section 5.1.1, allows text before the first delimiter, and blanks at the end of its line.
    """
    delimiter = b"--" + boundary
    start = 0 if content.startswith(delimiter) else content.find(b"\n" + delimiter) + 1
    end = start + len(delimiter)
    line = content[end : end + _MAX_BLANKS]
    blanks = len(line) - len(line.lstrip(b" \t"))
    if not start and not blanks:
        return content, 0
    return delimiter + content[end + blanks :], start + blanks


_MAX_BLANKS: Final = 1000
"""Maximum number of blanks after the first delimiter."""


def _parse_form_options(fields: dict[str, str]) -> FormOptions:
    """Return the options among a form's text fields; other fields are ignored.

    Raises `BadRequest`.
    """
    known_names = list(FormOptions.model_fields)
    check_spelling(fields, known_names, "the form's field")
    return validate_json(FormOptions, {name: value for name, value in fields.items() if name in known_names})


_MAX_PARTS: Final = 2 * MAX_REQUEST_IMAGES
"""Maximum number of parts in a form; each part takes 10 us."""

_MAX_FIELDS: Final = 100
"""Maximum number of text fields in a form, of query parameters, or of JSON names that are examined."""

_MAX_FIELD_BYTES: Final = 100
"""Maximum size in bytes of a text field's name or value; no option can be longer."""


class _FormCollector:
    """A handler of the parser's events that collects the positions of the files, and the text fields."""

    def __init__(self, body: bytes, offset: int = 0) -> None:
        """Collect the parts of `body`; stored positions are `offset` bytes greater than in `body`."""
        self.file_ranges: list[tuple[int, int]] = []
        """Start and end of each file, in bytes; the end is exclusive."""
        self.base64_files: set[int] = set()
        """Indices of the `file_ranges` that are base64."""
        self.fields: dict[str, str] = {}
        """Small text fields, by name."""
        self.is_complete = False
        self._body = body
        self._offset = offset
        self._name = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._part_count = 0
        self._start = 0
        self._size = 0

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header_name,
            "on_header_value": self._add_header_value,
            "on_header_end": self._end_header,
            "on_part_data": self._add_part_data,
            "on_part_end": self._end_part,
            "on_end": self._end_form,
        }

    def _begin_part(self) -> None:
        self._part_count += 1
        if self._part_count > _MAX_PARTS:
            raise BadRequest(f"the multipart body has more than {_MAX_PARTS} parts")
        self._headers, self._start, self._size = {}, 0, 0

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _add_part_data(self, data: bytes, start: int, end: int) -> None:
        """Record the position of a piece; the pieces of a part come without gaps.

        Some pieces are copies, of bytes that first looked like a boundary. The position of a part that
        consists only of such copies is unknown, but it is too short for an image.
        """
        if data is self._body:
            self._start = start - self._size
        self._size += end - start

    def _end_part(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        options = parse_options_header(disposition)[1]
        # RFC 7578 forbids RFC 5987's `filename*` in forms, but some clients send it. The name itself is not
        # used.
        extended_name = b"*" if b"filename*" in disposition.lower() else None
        filename = options.get(b"filename", extended_name)
        if filename is not None:
            # A part with neither name nor content means that no file was chosen.
            is_file = bool(filename or self._size)
        else:
            is_file = self._is_image_part()
        if is_file:
            encoding = self._headers.get(b"content-transfer-encoding", b"").strip().lower()
            if encoding not in _PLAIN_ENCODINGS and encoding != b"base64":
                name = encoding.decode("latin-1")
                raise BadRequest(f"a file is sent with the transfer encoding {name!r}; send it as it is")
            if encoding == b"base64":
                self.base64_files.add(len(self.file_ranges))
            start = self._start + self._offset
            self.file_ranges.append((start, start + self._size))
        elif filename is None and self._size <= _MAX_FIELD_BYTES and len(self.fields) < _MAX_FIELDS:
            name = options.get(b"name", b"")[:_MAX_FIELD_BYTES].decode(errors="replace")
            value = self._body[self._start : self._start + self._size].decode(errors="replace")
            if name in FormOptions.model_fields and name in self.fields:
                raise BadRequest(f"the form has {name} twice")
            self.fields[name] = value

    def _is_image_part(self) -> bool:
        """Return True if a part without a file name is an image.

        RFC 7578 makes the file name optional.
        """
        content_type = parse_media_type(self._headers.get(b"content-type", b""))
        if content_type:
            return content_type.startswith(b"image/") or content_type == b"application/octet-stream"
        head = self._body[self._start : self._start + min(self._size, _SNIFF_BYTES)]
        # 32 is the first printable character.
        return any(byte < 32 and byte not in b"\t\r\n" for byte in head)

    def _end_form(self) -> None:
        self.is_complete = True


_PLAIN_ENCODINGS: Final = (b"", b"binary", b"8bit", b"7bit")
"""Transfer encodings that leave a part unchanged."""

_SNIFF_BYTES: Final = 16
"""Number of bytes that are examined in a part without a type. Within these bytes every image format has
control characters that no text has, whatever its character set."""


# --- JSON ----------------------------------------------------------------------------------------


_MAX_COMMAS: Final = 2 * MAX_REQUEST_IMAGES
"""Maximum number of commas in our own JSON, more than a valid request needs: base64 has no commas. The limit
also bounds the number of values, each of which takes 100 bytes and blocks all other threads for 300 ns."""


def _parse_json_body(body: bytes | SharedBuffer, size: int, _content_type: bytes) -> ParsedBody:
    content = to_utf8(_read_content(body, size))
    _check_commas(content)
    try:
        request = ClassifyRequest.model_validate_json(content)
    except ValidationError as error:
        raise to_bad_request(error) from None
    images: list[Image] = [
        from_base64(image.b64, f"images.{index}.b64") for index, image in enumerate(request.images)
    ]
    return ParsedBody(images, request.top_k, request.threshold, request.coverage)


def _check_commas(content: bytes) -> None:
    """Raise `BadRequest` if the JSON has too many commas.

    The count goes piece by piece, because counting a huge number of commas would itself take long.
    """
    count = 0
    for start in range(0, len(content), _MAX_INLINE_BYTES):
        count += content.count(b",", start, start + _MAX_INLINE_BYTES)
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
        for start in range(0, len(content), _CHUNK_SIZE):
            is_last = start + _CHUNK_SIZE >= len(content)
            pieces.append(decoder.decode(content[start : start + _CHUNK_SIZE], is_last).encode())
    except UnicodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    return b"".join(pieces)


def parse_query(schema: type[_M], query: bytes) -> _M:
    """Validate the query of a URL as an instance of `schema`.

    Raises `BadRequest`. If `schema` forbids extra fields, unknown and repeated parameters are errors too.
    """
    parameters: dict[str, str] = {}
    if schema.model_config.get("extra") == "forbid":
        for name, value in QueryParams(query).multi_items():
            if name in parameters:
                raise BadRequest(f"the query has {name[:_MAX_FIELD_BYTES]!r} twice; send it once")
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
            raise BadRequest(f"{subject} {name[:_MAX_FIELD_BYTES]!r} is not known; {advice}")


def refuse_options(options: Iterable[str], allowed_names: Container[str] = ()) -> None:
    """Raise `BadRequest` for an option of the native classification unless it is in `allowed_names`."""
    for name in options:
        if name not in allowed_names:
            raise BadRequest(f"{name} counts for /v1/classify alone; leave it out here")


def refuse_native_options(query: QueryParams) -> None:
    """Raise `BadRequest` for a native option in the query of another protocol, which would ignore it.

    Other parameters are accepted, because gateways add their own parameters, such as keys.
    """
    refuse_options(name for name in islice(query, _MAX_FIELDS) if name in ClassifyOptions.model_fields)


def check_spelling(names: Iterable[str], known_names: Iterable[str], subject: str) -> None:
    """Raise `BadRequest` for an unknown name that resembles a known name.

    Such a name would be silently ignored. Other names are accepted, because they belong to other software.
    """
    known_names = list(known_names)
    others = (name for name in islice(names, _MAX_FIELDS) if name not in known_names)
    check_names((name for name in others if _find_nearest(name, known_names)), known_names, subject)


def _find_nearest(name: str, known_names: list[str]) -> str | None:
    """Return the known name that was most likely meant, independent of case, hyphens and underscores."""
    names_by_plain = {one.replace("_", "").lower(): one for one in known_names}
    plain_name = name[:_MAX_FIELD_BYTES].replace("_", "").replace("-", "").lower()
    matches = difflib.get_close_matches(plain_name, names_by_plain, n=1, cutoff=_MIN_SIMILARITY)
    return names_by_plain[matches[0]] if matches else None


_MIN_SIMILARITY: Final = 0.8
"""Minimum similarity (`difflib`) of a name to a known name to count as a misspelling."""


def to_bad_request(error: ValidationError) -> BadRequest:
    """Return an error that names the invalid field of a JSON body and the reason."""
    first = error.errors(include_url=False, include_input=False)[0]
    location = ".".join(str(part) for part in first["loc"])
    return BadRequest(f"{location or 'the body'}: {describe_error(first)}")


def from_base64(text: str, location: str) -> bytes:
    """Decode the base64 text at this place of a body.

    The text may be broken into lines, lack its padding, use the URL-safe alphabet (RFC 4648, section 5), or
    be a `data:` URI. Decoding goes piece by piece, because decoding 32 MB at once blocks all other threads
    for 90 ms. Raises `BadRequest`.
    """
    text = _strip_data_scheme(text, location)
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
        if padding > _MAX_PADDING:
            raise binascii.Error("Excess data after padding")
        text += "=" * (-len(text) % 4)
        for start in range(0, len(text), _CHUNK_SIZE):
            piece = base64.b64decode(text[start : start + _CHUNK_SIZE], validate=True)
            if len(piece) < _CHUNK_SIZE // 4 * 3 and start + _CHUNK_SIZE < len(text):
                raise binascii.Error("Excess data after padding")
            pieces.append(piece)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{location} is not base64: {error}") from None
    return b"".join(pieces)


_MAX_PADDING: Final = 2
"""Maximum number of padding characters."""


def _strip_data_scheme(text: str, location: str) -> str:
    """Return the base64 part of a `data:` URI (RFC 2397), in which some characters may be percent-encoded."""
    text = text.lstrip()
    if text[: len(_DATA_SCHEME)].lower() != _DATA_SCHEME:
        return text
    comma = text.find(",", 0, _MAX_URI_HEADER)
    if comma < 0 or not text[:comma].rstrip().lower().endswith(";base64"):
        raise BadRequest(f"{location} is a data URI without base64; send `data:image/jpeg;base64,…`")
    text = text[comma + 1 :]
    if "%" in text:
        for code, character in _PERCENT_CODES.items():
            text = text.replace(code, character).replace(code.lower(), character)
    return text


_DATA_SCHEME: Final = "data:"

_MAX_URI_HEADER: Final = 1000
"""Maximum number of characters of a data URI before its data."""

_PERCENT_CODES: Final = {"%2B": "+", "%2F": "/", "%3D": "=", "%0D": "", "%0A": "", "%20": ""}
"""Characters of base64 text that URLs write percent-encoded."""


_PARSERS: Final[dict[bytes, Callable[[bytes | SharedBuffer, int, bytes], ParsedBody]]] = {
    b"multipart/form-data": _parse_form,
    b"application/json": _parse_json_body,
}
"""Parsers by media type, called with the body, its size and the content type. Any other body is an image."""
