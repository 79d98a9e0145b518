"""The check of API keys: who sends a request, and whether the sender may do this.

Both paths of HTTP and gRPC use one `AccessControl`. `identify` finds the key of a request by its headers,
before the request is routed. `authorize` is called with the scope of the route.

Comparison in constant time: the service compares the SHA-256 of a key, not the key. A dictionary finds the
digest, and Python's hash of `bytes` mixes in a random secret of this process, so the time of a search says
nothing about the digests in the file. Headers whose key was found once are found again in the same way,
without the digest: a search compares bytes only if their hashes are equal.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from fovea.service.access.caller import Caller, Scope
from fovea.service.access.keys_file import MAX_KEY_LENGTH, VALID_KEY, ApiKey, hash_key
from fovea.service.access.refusal_pace import RefusalPace
from fovea.service.errors import MissingScope, Unauthorized

log = logging.getLogger(__name__)

KEY_HEADERS: Final = (b"authorization", b"x-api-key")
"""Headers that carry a key, in lower case: `Authorization: Bearer KEY`, and `X-API-Key: KEY`."""

_BEARER: Final = b"bearer"

_KeyValues = tuple[bytes | None, bytes | None]
"""Values of `KEY_HEADERS` in a request, None for a header that it lacks."""

_MAX_REMEMBERED_KEYS: Final = 1000
_MAX_REMEMBERED_BYTES: Final = 1024
"""Limits of the remembered headers: their number, and the length of one."""

_HOW_TO_SEND: Final = "send `Authorization: Bearer KEY` or `X-API-Key: KEY`"


class Credential(NamedTuple):
    """The key of a request, or the reason why the request has none."""

    key: ApiKey | None
    problem: str = ""
    """Sentence for the caller if a key was sent and cannot be accepted."""

    @property
    def name(self) -> str:
        """Name of the key; empty without a key."""
        return self.key.name if self.key else ""


NO_CREDENTIAL: Final = Credential(None)
"""Credential of a request without a key."""


class AccessControl:
    """The keys of the service, and the checks against them. Call every method on the event loop."""

    def __init__(
        self,
        keys: Iterable[ApiKey],
        read_clock: Callable[[], float] = time.time,
        pace: RefusalPace | None = None,
    ) -> None:
        """Start with these keys.

        `read_clock` returns seconds since 1970. `pace` delays the refusals of callers that try again and
        again.
        """
        self._pace = pace
        self._read_clock = read_clock
        self.replace_keys(keys)

    def replace_keys(self, keys: Iterable[ApiKey]) -> None:
        """Accept these keys from now on. Requests that were identified before go on."""
        self._keys = {key.digest: key for key in keys}
        self._keys_by_values: dict[_KeyValues, ApiKey] = {}
        self._guards_metrics = any(Scope.METRICS in key.scopes for key in self._keys.values())

    @property
    def names(self) -> Sequence[str]:
        """Names of the keys."""
        return [key.name for key in self._keys.values()]

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Credential:
        """Return the credential in the headers of a request; names are in lower case."""
        sent: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in KEY_HEADERS:
                if name in sent:
                    return Credential(None, f"the request has several {_format_name(name)} headers; send one")
                sent[name] = value
        if not sent:
            return NO_CREDENTIAL
        values = sent.get(KEY_HEADERS[0]), sent.get(KEY_HEADERS[1])
        key = self._keys_by_values.get(values)
        if key is None:
            found = self._find_key(*values)
            if isinstance(found, str):
                return Credential(None, found)
            key = found
            self._remember_key(values, key)
        if self._read_clock() >= key.expires_at:
            return Credential(None, f"the API key {key.name!r} has expired; its last day was {key.last_day}")
        return Credential(key)

    def _find_key(self, bearer_header: bytes | None, key: bytes | None) -> ApiKey | str:
        """Return the key in the values of `KEY_HEADERS`, or a sentence that says why there is none."""
        if bearer_header is not None:
            scheme, _, token = bearer_header.partition(b" ")
            if scheme.lower() == _BEARER:
                token = token.strip(b" \t")
                if key is not None and not hmac.compare_digest(token, key):
                    return "Authorization and X-API-Key have different keys; send one"
                key = token
            elif key is None:  # the header of another scheme may be for a proxy, beside our own header
                return f"the Authorization header is not of the scheme Bearer; {_HOW_TO_SEND}"
        if key is None or not VALID_KEY.fullmatch(key):
            return f"the API key is not one to {MAX_KEY_LENGTH} visible ASCII characters; {_HOW_TO_SEND}"
        return self._keys.get(hash_key(key)) or "the API key is not known; it is wrong, or it was removed"

    def _remember_key(self, values: _KeyValues, key: ApiKey) -> None:
        """Find this key without its digest from now on."""
        if sum(len(value) for value in values if value) <= _MAX_REMEMBERED_BYTES:
            if len(self._keys_by_values) >= _MAX_REMEMBERED_KEYS:
                self._keys_by_values.clear()
            self._keys_by_values[values] = key

    def authorize(self, scope: Scope | None, credential: Credential, address: str) -> None:
        """Raise `Unauthorized` or `MissingScope` unless a caller may use the routes of a scope.

        None is the scope of routes that are always open. `address` is that of the client, as in `Caller`.
        """
        try:
            self._check(scope, credential)
        except (Unauthorized, MissingScope) as error:
            if self._pace:
                error.delay = self._pace.count_refusal(Caller(credential.name, address))
            raise

    def _check(self, scope: Scope | None, credential: Credential) -> None:
        if scope is None or (scope is Scope.METRICS and not self._guards_metrics):
            return
        key = credential.key
        if key is None:
            problem = credential.problem or f"the request has no API key; {_HOW_TO_SEND}"
            raise Unauthorized(problem, has_key=bool(credential.problem))
        if scope not in key.scopes:
            raise MissingScope(
                f"the API key {key.name!r} lacks the scope {scope.value!r}; "
                f"it has {', '.join(one for one in Scope if one in key.scopes)}",
                scope=scope.value,
            )


def _format_name(name: bytes) -> str:
    return {KEY_HEADERS[0]: "Authorization", KEY_HEADERS[1]: "X-API-Key"}[name]
