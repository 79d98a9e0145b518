"""Reading request bodies within limits."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from fovea.service.errors import BadRequest, BodyTimeout, BodyTooLarge, RequestError
from fovea.service.http.fast_path import Headers
from fovea.service.inference.boxes import Boxes
from fovea.service.runners.batch_messages import Image, ImageRequest
from fovea.service.runners.shared_memory import SharedBuffer, SharedRef
from fovea.service.settings import Settings

Allocate: TypeAlias = Callable[[int], None]

MAX_INLINE_BYTES: Final = 1 << 20
"""Maximum number of bytes that the event loop may copy; copying more takes over a millisecond."""

CHUNK_SIZE: Final = 256 << 10
"""Number of base64 characters or compressed bytes that are decoded at once, in 1 ms. It is a multiple of
four, so that no base64 group is split."""


@dataclass(frozen=True)
class ParsedBody:
    """The content of a request, independent of its content type."""

    images: list[Image]
    top_k: int | None = None
    threshold: float | None = None
    coverage: float | None = None
    embedding: bool | None = None
    boxes: Sequence[Boxes | None] = ()
    """Boxes of each image; empty if no image has any."""
    urls: Mapping[int, str] = field(default_factory=dict)
    """URLs of the images that must be fetched, by index; their place in `images` is empty until then."""

    @property
    def options(self) -> dict[str, Any]:
        """Options that the body sets, by name."""
        options = {
            "top_k": self.top_k,
            "threshold": self.threshold,
            "coverage": self.coverage,
            "embedding": self.embedding,
            "boxes": self.boxes or None,
        }
        return {name: value for name, value in options.items() if value is not None}


def release_images(images: list[Any]) -> None:
    """Release the memory of the images, in a thread if they are large.

    Releasing large images takes milliseconds.
    """
    contents = [image.content if isinstance(image, ImageRequest) else image for image in images]
    if sum(len(content) for content in contents if not isinstance(content, SharedRef)) > MAX_INLINE_BYTES:
        images.clear()
        # `contents` holds the last references now, so that the thread frees the memory.
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
        if size > MAX_INLINE_BYTES:  # releasing much memory takes milliseconds
            message, chunk = {}, b""
            asyncio.get_running_loop().run_in_executor(None, chunks.clear)
        raise
    # The newest chunk lies at the end of the heap, and its release returns the heap to the system: the thread
    # that joins the chunks must hold the last reference.
    message, chunk = {}, b""
    if len(chunks) == 1:
        return RawBody(chunks.pop(), size)
    return RawBody(
        _join_chunks(chunks) if size <= MAX_INLINE_BYTES else await asyncio.to_thread(_join_chunks, chunks),
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
        raise BadRequest(f"the content encoding {name!r} is not supported; use gzip, deflate or none")
    body = bytearray()  # one block; hundreds of small blocks would fragment the heap
    view = memoryview(read_content(raw_body.take_content(), raw_body.size))
    decompressor = zlib.decompressobj(_AUTO_DETECT_WBITS)
    try:
        for start in range(0, len(view), CHUNK_SIZE):
            chunk: bytes | memoryview = view[start : start + CHUNK_SIZE]
            while chunk and not decompressor.eof:
                piece = await asyncio.to_thread(decompressor.decompress, chunk, MAX_INLINE_BYTES)
                chunk = decompressor.unconsumed_tail
                limit.check(len(body) + len(piece))
                allocate(len(piece))
                body += piece
            if chunk or decompressor.unused_data:
                raise BadRequest("the compressed body has more data after its end")
        body += decompressor.flush()
    except zlib.error as error:
        raise BadRequest(f"the compressed body is malformed: {error}") from None
    if not decompressor.eof:
        raise BadRequest("the compressed body ends too early")
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


class RawBody:
    """A whole body that can be taken once.

    The caller of `take_content` becomes the only owner, and decides where the memory is released.
    """

    def __init__(self, body: bytes | SharedBuffer, size: int) -> None:
        """Hold all bytes, or the first `size` bytes of a shared buffer."""
        self._body: bytes | SharedBuffer | None = body
        self.size = size

    def take_content(self) -> bytes | SharedBuffer:
        """Return the body; a second call returns nothing."""
        body, self._body = self._body, None
        return body or b""

    def to_image(self) -> Image:
        """Return the body as one raw image. Raises `BadRequest` if the body is empty."""
        return to_image(self.take_content(), self.size)


def to_image(body: bytes | SharedBuffer, size: int) -> Image:
    """Return a body of `size` bytes as one raw image. Raises `BadRequest` if the body is empty."""
    if not size:
        raise BadRequest("the body is empty; send an image")
    return body.to_ref(0, size) if isinstance(body, SharedBuffer) else body


def check_image_count(count: int, settings: Settings, noun: str = "images") -> None:
    """Raise `BadRequest` if `count` images are too many for one request. `noun` names what was counted."""
    if count > (max_images := settings.request_images):
        raise BadRequest(f"the request has {count} {noun}; at most {max_images} (FOVEA_REQUEST_IMAGES)")


@lru_cache(maxsize=64)
def parse_media_type(content_type: bytes) -> bytes:
    """Return the media type without parameters, and any JSON type as `application/json` (RFC 6839)."""
    media_type = content_type.partition(b";")[0].strip().lower()
    is_json_type = media_type == b"text/json" or media_type.endswith(b"+json")
    return b"application/json" if is_json_type else media_type


def read_content(body: bytes | SharedBuffer, size: int) -> bytes:
    """Return the bytes, or a copy of the first `size` bytes of the shared buffer."""
    return body.read_bytes(size) if isinstance(body, SharedBuffer) else body
