"""A cache of replies about models and of pages.

Such a reply takes half a millisecond on the event loop, and does not change until a model changes. Without
the cache fifty clients that requested a contract in a loop took three quarters of the image throughput. A
cached reply bypasses ASGI (`service.http.fast_path`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final, NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fovea.service.http.api_protocol import ApiProtocol
from fovea.service.http.fast_path import Exchange, Headers
from fovea.service.http.observer import Observer
from fovea.service.serving.registry import ModelRegistry

_ROUTES: Final = frozenset(
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

_FRESH: Final = 0.2
"""Maximum age of a reply in seconds, for changes that `ModelRegistry.change_count` does not count."""

_ANSWERS: Final = 512
_BYTES: Final = 16 << 20
"""Maximum number of cached replies, and the maximum of their total size in bytes."""

_LARGEST: Final = 2 << 20
"""Maximum size in bytes of a reply that is cached."""

_CONDITIONS: Final = frozenset(
    {b"if-none-match", b"if-modified-since", b"if-match", b"if-unmodified-since", b"range", b"forwarded"}
)
"""Request headers that can change the reply. All headers with the prefix `x-forwarded` can change it too."""


class _Answer(NamedTuple):
    content: bytes
    media_type: str
    headers: Mapping[str, str]
    """Headers except the content type and length."""
    route: str
    dialect: ApiProtocol
    changes: int
    """State of the repository (`ModelRegistry.change_count`) that the reply describes."""


class Rendered:
    """A cache of replies by their URLs."""

    def __init__(self, repository: ModelRegistry, observer: Observer) -> None:
        self._repository = repository
        self._observer = observer
        self._answers: dict[bytes, _Answer] = {}
        self._due: dict[bytes, float] = {}
        """Time at which each reply must be made again, on the monotonic clock."""
        self._bytes = 0

    def has(self, url: bytes) -> bool:
        """Return True if there may be a cached reply for this URL."""
        return url in self._answers

    def open(self, turn: Exchange, url: bytes, headers: Headers) -> Call | None:
        """Accept a GET request whose reply is cached and fresh (`service.http.fast_path.FastApp`)."""
        answer = self._answers.get(url)
        if answer is None or answer.changes != self._repository.change_count:
            return None
        if not _CONDITIONS.isdisjoint(headers) or any(name.startswith(b"x-forwarded") for name in headers):
            return None
        now = time.monotonic()
        if now > self._due[url]:
            # Only this request makes the reply again; others get the cached one.
            self._due[url] = now + _FRESH
            return None
        turn.record.route, turn.record.protocol = answer.route, answer.dialect
        return Call(turn, answer)

    async def record(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a GET request by `app`, and cache the reply if its route allows it."""
        changes = self._repository.change_count
        start: Message = {}
        pieces: list[bytes] = []
        size = 0

        async def keep(message: Message) -> None:
            nonlocal start, size
            if message["type"] == "http.response.start":
                start = {**message, "headers": list(message.get("headers", ()))}
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
                if size <= _LARGEST:
                    pieces.append(message.get("body", b""))
                if not message.get("more_body", False):
                    self._keep(scope, start, pieces if size <= _LARGEST else None, changes)
            await send(message)

        await app(scope, receive, keep)

    def _keep(self, scope: Scope, start: Message, pieces: list[bytes] | None, changes: int) -> None:
        names = {name.lower() for name, _ in scope["headers"]}
        is_usual = names.isdisjoint(_CONDITIONS) and not any(
            name.startswith(b"x-forwarded") for name in names
        )
        if pieces is None or start.get("status") != 200 or scope.get("query_string") or not is_usual:
            return
        record = self._observer.resolve_record(scope)
        if record.route not in _ROUTES or changes != self._repository.change_count:
            return
        url = scope.get("raw_path") or scope["path"].encode()
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start["headers"]
        }
        headers.pop("content-length", None)
        media_type = headers.pop("content-type", "application/octet-stream")
        content = b"".join(pieces)
        self._drop(url)
        if len(self._answers) >= _ANSWERS or self._bytes + len(content) > _BYTES:
            self._answers.clear()
            self._due.clear()
            self._bytes = 0
        self._answers[url] = _Answer(content, media_type, headers, record.route, record.protocol, changes)
        self._due[url] = time.monotonic() + _FRESH
        self._bytes += len(content)

    def _drop(self, url: bytes) -> None:
        if (old := self._answers.pop(url, None)) is not None:
            self._bytes -= len(old.content)


class Call:
    """A request with a cached reply (`service.http.fast_path.RequestHandler`)."""

    __slots__ = ("_answer", "_turn")

    def __init__(self, turn: Exchange, answer: _Answer) -> None:
        self._turn = turn
        self._answer = answer

    def count(self, size: int) -> None:
        """Ignore the body; a GET request has none."""

    def begin(self, body: object, size: int) -> None:
        """Send the cached reply."""
        answer = self._answer
        self._turn.answer(answer.content, answer.headers, answer.media_type)

    def close(self) -> None:
        """Do nothing; the call holds no resources."""
