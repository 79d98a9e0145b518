"""Images at https URLs, behind the guard against private addresses."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field
from functools import lru_cache

from fovea.bulk.inputs.basic_entries import to_text
from fovea.service.errors import FileError
from fovea.service.remote.guarded_https import Connector, GuardedHttps, Resolver, UrlError, UrlLimits


@dataclass(frozen=True, slots=True)
class HttpsAccess:
    """The hosts that may be asked, and how. Picklable if the functions are, and without `tls`."""

    allowed_hosts: tuple[str, ...] = ()
    resolve: Resolver | None = field(default=None, repr=False)
    connect: Connector | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    def check(self, url: str | None = None) -> None:
        """Raise `UrlError` if the allowed hosts are malformed, or a URL is not allowed. Asks nobody."""
        https = _create_client(self, UrlLimits().max_bytes, os.getpid())
        if url is not None:
            https.check(url)


@dataclass(frozen=True, slots=True)
class UrlEntry:
    """An image at an https URL."""

    url: str
    access: HttpsAccess
    is_named: bool = True

    @property
    def name(self) -> str:
        """The URL."""
        return to_text(self.url)

    def read(self, max_bytes: int) -> bytes:
        """Return the content. Raises `FileError` and `BodyTooLarge`."""
        try:
            return _create_client(self.access, max_bytes, os.getpid()).fetch(self.url)
        except UrlError as error:
            raise FileError(str(error)) from None


@lru_cache(maxsize=8)
def _create_client(access: HttpsAccess, max_bytes: int, _: int) -> GuardedHttps:
    """Return the client of this process: reading the system's certificates takes 20 ms."""
    return GuardedHttps(
        access.allowed_hosts,
        UrlLimits(max_bytes=max_bytes),
        resolve=access.resolve,
        connect=access.connect,
        tls=access.tls,
    )
