"""The certificate of the service: it is loaded, checked, and loaded again when its files change.

A pair of files is checked by a handshake in memory: a client that trusts this certificate alone must accept
it. The handshake finds an expired certificate and a key of another certificate, without a parser of our own.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from fovea.service.errors import StartError, to_one_line
from fovea.service.settings import Settings

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 2.0
"""Seconds between two looks at the files. Files are loaded once they have not changed for as long, because
the certificate and its key are written one after the other."""

_MAX_FILE_BYTES: Final = 1 << 20
"""Largest file of certificates or of a key, in bytes. A chain has some 10 KB, the CAs of all browsers 250 KB.
"""

_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Ciphers of TLS 1.2: those with forward secrecy and authenticated encryption (RFC 9325). TLS 1.3 has no
others."""

_EXPIRY_WARNING_SECONDS: Final = 24 * 3600.0
"""Seconds between two warnings that the certificate in use has expired."""

_Stamp = tuple[tuple[int, int, int], ...]
"""Inode, size and time of change in nanoseconds of each file."""


class CertificateError(StartError):
    """The certificate, its key or the clients' authorities cannot be used."""


class CertificateFiles(NamedTuple):
    """The files that the settings name."""

    certificate: Path
    """PEM file with the certificate of the service, followed by the intermediate certificates."""
    key: Path
    """PEM file with the private key, without a pass phrase."""
    client_authorities: Path | None = None
    """PEM file with the authorities that sign the certificates of clients; None if clients need none."""

    @classmethod
    def from_settings(cls, settings: Settings) -> CertificateFiles | None:
        """Return the files, or None if the service does not use TLS."""
        if settings.tls_cert is None or settings.tls_key is None:
            return None
        return cls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)

    def read_stamp(self) -> _Stamp:
        """Return a value that changes with the files. Raises `CertificateError`."""
        stats = []
        for path in filter(None, self):
            try:
                stat = path.stat()
            except OSError as error:
                raise _unreadable(path, error) from None
            if stat.st_size > _MAX_FILE_BYTES:
                raise CertificateError(
                    f"{path} has {stat.st_size} bytes; at most {_MAX_FILE_BYTES} are expected"
                )
            stats.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return tuple(stats)


class Certificates:
    """The TLS context of new connections, which changes with its files. Open connections keep theirs."""

    def __init__(
        self,
        files: CertificateFiles,
        *,
        on_reload: Callable[[bool], None] = lambda _: None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """Load the files. Raises `CertificateError`.

        `on_reload` is called on the event loop after each attempt to load changed files, with True for
        success.
        """
        self._files: Final = files
        self._on_reload: Final = on_reload
        self._poll_seconds: Final = poll_seconds
        self._stamp = files.read_stamp()
        self.context, self.expires_at = load_context(files)
        self._last_stamp: _Stamp | None = self._stamp
        """State of the files at the last look; None if they could not be used."""
        self._last_message = ""
        """Problem that was reported last."""
        self._next_warning = 0.0

    context: ssl.SSLContext
    """Context for the next handshake."""
    expires_at: float
    """End of the certificate's validity, in seconds since 1970."""

    @property
    def wants_client_certificate(self) -> bool:
        """True if a client needs a certificate for anything but health routes."""
        return self._files.client_authorities is not None

    async def watch(self) -> None:
        """Load the files again whenever they have changed, until the task is cancelled."""
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                self._warn_if_expired()
                await self._poll()
            except Exception:  # such as no room for a thread: the next look may succeed
                log.exception("the certificate could not be watched")

    async def _poll(self) -> None:
        """Look at the files, and load them if they have changed and have not changed since the last look."""
        stamp: _Stamp | None = None
        try:
            stamp = await asyncio.to_thread(self._files.read_stamp)
            if stamp == self._stamp or stamp != self._last_stamp:
                self._last_stamp = stamp
                return
            context, expires_at = await asyncio.to_thread(load_context, self._files)
        except CertificateError as error:
            self._last_stamp = None
            # A file that cannot be read may be readable at the next look, so it is tried again; a file
            # that is wrong stays wrong until it changes. The same problem is reported once.
            if stamp is not None and not isinstance(error, UnreadableFile):
                self._stamp = stamp
            if str(error) != self._last_message:
                self._last_message = str(error)
                log.error("the changed certificate is not used, and the old one stays: %s", error)
                self._on_reload(False)
            return
        self._stamp, self.context, self.expires_at, self._last_message = stamp, context, expires_at, ""
        log.info("new connections use the certificate that is valid until %s", format_time(expires_at))
        self._on_reload(True)

    def _warn_if_expired(self) -> None:
        now = time.time()
        if now > self.expires_at and time.monotonic() >= self._next_warning:
            self._next_warning = time.monotonic() + _EXPIRY_WARNING_SECONDS
            log.error("the certificate in %s expired at %s", self._files.certificate,
                      format_time(self.expires_at))  # fmt: skip


class UnreadableFile(CertificateError):
    """A file cannot be read now."""


def load_context(files: CertificateFiles) -> tuple[ssl.SSLContext, float]:
    """Return a context with the content of the files, and the end of validity in seconds since 1970.

    Raises `CertificateError` for files that are unreadable, malformed or expired, and for a key of another
    certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client could have the service compute a handshake after the other on one connection (CVE-2011-1473).
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, files)
    if files.client_authorities:
        _load_authorities(context, files.client_authorities)
    return context, _check_certificate(context, files)


def _load_pair(context: ssl.SSLContext, files: CertificateFiles) -> None:
    for path in (files.certificate, files.key):
        try:
            with path.open("rb") as file:
                content = file.read(_MAX_FILE_BYTES)
        except OSError as error:
            raise _unreadable(path, error) from None
        if b"-----BEGIN " not in content:
            raise CertificateError(f"{path} is not a PEM file: it has no line '-----BEGIN ...'")
    try:
        context.load_cert_chain(files.certificate, files.key, password=_refuse_pass_phrase)
    except _PassPhrase:
        raise CertificateError(
            f"the key in {files.key} has a pass phrase; remove it with `openssl pkey -in KEY -out NEW`"
        ) from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CertificateError(
                f"the key in {files.key} does not belong to the certificate in {files.certificate}"
            ) from None
        raise CertificateError(
            f"{files.certificate} and {files.key} are no certificate and its key: {_describe(error)}"
        ) from None
    except OSError as error:  # replaced since the look above
        raise _unreadable(files.certificate, error) from None


def _load_authorities(context: ssl.SSLContext, path: Path) -> None:
    """Ask every client for a certificate that one of these authorities has signed.

    A client without a certificate may connect, because the probes of Kubernetes have none; `Connection`
    answers only its questions for health. A client with a certificate of anybody else may not connect.
    """
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise CertificateError(f"{path} has no certificates of authorities: {_describe(error)}") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if not context.get_ca_certs():
        raise CertificateError(f"{path} has no certificate of an authority (CA:TRUE)")
    context.verify_mode = ssl.CERT_OPTIONAL


def _check_certificate(context: ssl.SSLContext, files: CertificateFiles) -> float:
    """Make a handshake in memory, and return the end of the certificate's validity."""
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    try:
        client_context.load_verify_locations(files.certificate)
    except (ssl.SSLError, OSError) as error:
        raise CertificateError(f"{files.certificate} cannot be read: {to_one_line(error)}") from None
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    try:
        for _ in range(2):  # each side speaks twice
            for side in (client, server):
                with suppress(ssl.SSLWantReadError):
                    side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        raise CertificateError(
            f"the certificate in {files.certificate} is not valid: {error.verify_message}"
        ) from None
    except ssl.SSLError as error:
        raise CertificateError(f"{files.certificate} cannot be used: {_describe(error)}") from None
    details = client.getpeercert()
    if not details:
        raise CertificateError(f"{files.certificate} cannot be used: the handshake did not end")
    return float(ssl.cert_time_to_seconds(str(details["notAfter"])))


class _PassPhrase(Exception):
    """OpenSSL has asked for a pass phrase."""


def _refuse_pass_phrase() -> NoReturn:
    """Stand in for the prompt on the terminal, which would block the start."""
    raise _PassPhrase


def _unreadable(path: Path, error: OSError) -> UnreadableFile:
    return UnreadableFile(f"cannot read {path}: {error.strerror or to_one_line(error)}")


def _describe(error: ssl.SSLError) -> str:
    return (error.reason or to_one_line(error)).replace("_", " ").lower()


def format_time(seconds: float) -> str:
    """Format a time in seconds since 1970 in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
