"""A cache of replies about models and of pages.

Such a reply takes half a millisecond on the event loop, and does not change until a model changes. Without
the cache fifty clients that requested a contract in a loop took three quarters of the image throughput. A
cached reply bypasses ASGI (`service.http.fast_path`).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Final, NamedTuple, TypeAlias

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fovea.service.access.access_control import AccessControl
from fovea.service.access.caller import Scope as KeyScope
from fovea.service.http.api_protocol import ApiProtocol
from fovea.service.http.compression import accepts_gzip, request_accepts_gzip
from fovea.service.http.fast_path import Exchange, Headers
from fovea.service.http.observer import Observer
from fovea.service.http.request_context import get_context
from fovea.service.serving.catalog import ModelCatalog

_CACHEABLE_ROUTES: Final = frozenset(
    {
        "/",
        "/docs",
        "/docs/swagger",
        "/models",
        "/models/{name}",
        "/models/{name}/all",
        "/models/{name}/{version}",
        "/openapi.json",
        "/page",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/models/{name}/contract",
        "/v1/models/{name}/metadata",
        "/v1/models/{name}/versions/{version}",
        "/v1/models/{name}/versions/{version}/contract",
        "/v1/models/{name}/versions/{version}/metadata",
        "/v2",
        "/v2/",
        "/v2/models/{name}",
        "/v2/models/{name}/config",
        "/v2/models/{name}/versions/{version}",
        "/v2/models/{name}/versions/{version}/config",
    }
)
"""Templates of the routes whose replies depend only on the models."""

_MAX_AGE: Final = 0.2
"""Maximum age of a reply in seconds, for changes that `ModelCatalog.change_count` does not count."""

_MAX_REPLIES: Final = 512
_MAX_TOTAL_BYTES: Final = 16 << 20
"""Maximum number of cached replies, and the maximum of their total size in bytes."""

_MAX_REPLY_BYTES: Final = 2 << 20
"""Maximum size in bytes of a reply that is cached."""

_CONDITIONAL_HEADERS: Final = frozenset(
    {b"if-none-match", b"if-modified-since", b"if-match", b"if-unmodified-since", b"range", b"forwarded"}
)
"""Request headers that can change the reply. All headers with the prefix `x-forwarded` can change it too."""


class _CachedReply(NamedTuple):
    content: bytes
    media_type: str
    headers: Mapping[str, str]
    """Headers except the content type and length."""
    route: str
    protocol: ApiProtocol
    key_scope: KeyScope | None
    """Scope that the route needs of an API key."""
    catalog_changes: int
    """State of the repository (`ModelCatalog.change_count`) that the reply describes."""


_Key: TypeAlias = tuple[bytes, bool]
"""URL of a reply, and True if it is the reply to requests that take gzip."""


class CachedReplies:
    """A cache of replies by their URLs, and by whether a request takes gzip."""

    def __init__(
        self, catalog: ModelCatalog, observer: Observer, access: AccessControl | None = None
    ) -> None:
        self._catalog = catalog
        self._access = access
        self._observer = observer
        self._replies: dict[_Key, _CachedReply] = {}
        self._refresh_times: dict[_Key, float] = {}
        """Time at which each reply must be made again, on the monotonic clock."""
        self._total_bytes = 0

    def has_reply(self, url: bytes) -> bool:
        """Return True if there may be a cached reply for this URL."""
        return (url, True) in self._replies or (url, False) in self._replies

    def open_request(self, exchange: Exchange, url: bytes, headers: Headers) -> CachedReplyHandler | None:
        """Accept a GET request whose reply is cached and fresh (`service.http.fast_path.FastApp`).

        Raises `RequestError` for a missing API key.
        """
        key = url, accepts_gzip(headers.get(b"accept-encoding", b""))
        reply = self._replies.get(key)
        if reply is None or reply.catalog_changes != self._catalog.change_count:
            return None
        if not _is_unconditional(headers):
            return None
        now = time.monotonic()
        if now > self._refresh_times[key]:
            # Only this request makes the reply again; others get the cached one.
            self._refresh_times[key] = now + _MAX_AGE
            return None
        record = exchange.record
        record.route, record.protocol = reply.route, reply.protocol
        if self._access:
            self._access.authorize(reply.key_scope, record.credential, record.client)
        return CachedReplyHandler(exchange, reply)

    async def capture_reply(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a GET request by `app`, and cache the reply if its route allows it."""
        changes = self._catalog.change_count
        start: Message = {}
        pieces: list[bytes] = []
        size = 0

        async def capture_and_send(message: Message) -> None:
            nonlocal start, size
            if message["type"] == "http.response.start":
                start = {**message, "headers": list(message.get("headers", ()))}
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
                if size <= _MAX_REPLY_BYTES:
                    pieces.append(message.get("body", b""))
                if not message.get("more_body", False):
                    self._store_reply(scope, start, pieces if size <= _MAX_REPLY_BYTES else None, changes)
            await send(message)

        await app(scope, receive, capture_and_send)

    def _store_reply(self, scope: Scope, start: Message, pieces: list[bytes] | None, changes: int) -> None:
        if pieces is None or start.get("status") != 200 or scope.get("query_string"):
            return
        if not _is_unconditional({name.lower() for name, _ in scope["headers"]}):
            return
        record = self._observer.resolve_record(scope)
        if record.route not in _CACHEABLE_ROUTES or changes != self._catalog.change_count:
            return
        key = scope.get("raw_path") or scope["path"].encode(), request_accepts_gzip(scope)
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start["headers"]
        }
        headers.pop("content-length", None)
        media_type = headers.pop("content-type", "application/octet-stream")
        content = b"".join(pieces)
        self._drop_reply(key)
        if len(self._replies) >= _MAX_REPLIES or self._total_bytes + len(content) > _MAX_TOTAL_BYTES:
            self._replies.clear()
            self._refresh_times.clear()
            self._total_bytes = 0
        self._replies[key] = _CachedReply(
            content,
            media_type,
            headers,
            record.route,
            record.protocol,
            get_context(scope).key_scope,
            changes,
        )
        self._refresh_times[key] = time.monotonic() + _MAX_AGE
        self._total_bytes += len(content)

    def _drop_reply(self, key: _Key) -> None:
        if (old := self._replies.pop(key, None)) is not None:
            self._total_bytes -= len(old.content)


def _is_unconditional(header_names: Collection[bytes]) -> bool:
    """Return True if no header of a request can change the reply."""
    return _CONDITIONAL_HEADERS.isdisjoint(header_names) and not any(
        name.startswith(b"x-forwarded") for name in header_names
    )


class CachedReplyHandler:
    """A request with a cached reply (`service.http.fast_path.RequestHandler`)."""

    __slots__ = ("_exchange", "_reply")

    def __init__(self, exchange: Exchange, reply: _CachedReply) -> None:
        self._exchange = exchange
        self._reply = reply

    def count_bytes(self, size: int) -> None:
        """Ignore the body; a GET request has none."""

    def handle_body(self, body: object, size: int) -> None:
        """Send the cached reply."""
        reply = self._reply
        self._exchange.answer(reply.content, reply.headers, reply.media_type)

    def close(self) -> None:
        """Do nothing.

        The invariant of `RequestHandler.close`, that a request's jobs are over before its memory is given
        back, holds at once: a cached reply has no job and no admission.
        """
