"""TLS of a connection: a transport that encrypts, between asyncio's transport and the HTTP connection.

asyncio's own TLS keeps a buffer of 256 KB for each connection, and offers no place to look at the first bytes
or to account for handshakes. This one receives all connections into one buffer, as the plain connections do.
It is a state machine around OpenSSL's memory buffers:

| state | meaning | time limit |
|---|---|---|
| `HANDSHAKE` | the client has not proven that it speaks TLS | FOVEA_HEADER_TIMEOUT, then close |
| `OPEN` | data is decrypted for the connection | those of the connection |
| `ENDED` | the end is sent; what still arrives is counted and discarded | that of the connection |
| `CLOSED` | the connection is closing or closed | |

A `Connection` exists from the end of the handshake. Before, the listener counts the client as a connection
already, and the `Server` aborts it at its end.

**Memory.** Ciphertext goes into OpenSSL in pieces of a record, because its buffers grow to the largest piece
and never shrink. A connection holds one incomplete record (16 KB) at most: everything that is complete is
passed on before the next read.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final, cast

from fovea.service.errors import BadHttp
from fovea.service.http.certificates import Certificates
from fovea.service.http.connection import Connection
from fovea.service.observability.metrics import Metrics

log = logging.getLogger(__name__)

_BUFFER_BYTES: Final = 256 << 10
"""Size of the receive buffer in bytes, as for plain connections."""

_PIECE_BYTES: Final = 17 << 10
"""Bytes that OpenSSL gets at once: a record of TLS has 16 KB and a head."""

_WRITE_BYTES: Final = 64 << 10
"""Bytes that are encrypted at once, for the same reason."""

_MAX_REPLY_BYTES: Final = 16 << 10
"""Bytes that OpenSSL itself may send while the client does not read, such as replies to updates of keys (27
bytes each). No limit of the connection counts them, so a client could fill our memory by them."""

_CERTIFICATE_REASONS: Final = ("CERTIFICATE", "CERT_", "UNKNOWN_CA", "BAD_SIGNATURE", "UNSUITABLE")
"""Parts of OpenSSL's reasons that concern the client's certificate, or what the client says of ours."""


class TlsState(Enum):
    """State of the encryption of a connection; the module's docstring has the table."""

    HANDSHAKE = auto()
    OPEN = auto()
    ENDED = auto()
    CLOSED = auto()


@dataclass
class TlsServer:
    """The settings and the receive buffer that all encrypted connections of a server share."""

    certificates: Certificates
    metrics: Metrics
    handshake_timeout: float
    """Time limit of a handshake in seconds."""
    streams: set[TlsStream] = field(default_factory=set)
    """Connections whose handshake has not ended."""
    buffer: memoryview = field(default_factory=lambda: memoryview(bytearray(_BUFFER_BYTES)))
    """Buffer for one read of ciphertext. Its content is valid only until the callback of the read returns."""

    def create_stream(
        self, create_connection: Callable[[], Connection], on_lost: Callable[[], None]
    ) -> TlsStream:
        """Return the protocol of an accepted socket.

        `create_connection` is called after the handshake, for a connection that reports its own end. If there
        is no connection, `on_lost` is called at the end.
        """
        return TlsStream(self, create_connection, on_lost)

    def abort_handshakes(self) -> None:
        """Abort all handshakes that have not ended."""
        for stream in list(self.streams):
            stream.abort()

    def count_failure(self, reason: str) -> None:
        """Count a handshake that has failed."""
        self.metrics.tls_handshake_failures.labels(reason).inc()


class TlsStream(asyncio.BufferedProtocol):
    """The encryption of one connection, as asyncio's transport sees it."""

    def __init__(
        self, server: TlsServer, create_connection: Callable[[], Connection], on_lost: Callable[[], None]
    ) -> None:
        self._server = server
        self._create_connection = create_connection
        self._on_lost = on_lost
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = server.certificates.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._state = TlsState.HANDSHAKE
        self._has_received = False
        self._is_paused = False
        """True while the connection does not want data."""
        self._is_input_over = False
        """True when the client has sent the end of its stream."""
        self._is_client_slow = False
        """True while the client has not read everything."""
        self._reply_bytes = 0
        """Bytes that OpenSSL itself has sent meanwhile."""
        self._connection: Connection | None = None

    # --- asyncio's calls ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the client to begin the handshake."""
        self._transport = transport
        self._server.streams.add(self)
        self._timer = asyncio.get_running_loop().call_later(
            self._server.handshake_timeout, self._fail, "timeout"
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end, to the connection or else to the server."""
        if self._state is TlsState.HANDSHAKE:
            self._server.count_failure("client_left")
        self._state = TlsState.CLOSED
        self._end_handshake()
        connection, self._connection = self._connection, None
        if connection:
            connection.connection_lost(exc)
        else:
            self._on_lost()

    def eof_received(self) -> bool:
        """Return whether the client, which has closed its sending side, still gets something."""
        if self._state is TlsState.OPEN and self._connection:
            if self._is_input_over:
                return True
            self._is_input_over = True
            # The end of a stream without TLS's own end may be an attack. It harms nobody here: a request says
            # how long it is, and one that is cut short is not answered.
            return self._connection.eof_received()
        return False

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the buffer that all connections share."""
        return self._server.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Process ciphertext that asyncio has received into the buffer."""
        data = self._server.buffer[:nbytes]
        if self._state is TlsState.HANDSHAKE:
            self._shake_hands(data)
        elif self._state is TlsState.OPEN:
            self._decrypt(data)
        elif self._state is TlsState.ENDED and self._connection:
            self._connection.get_buffer(-1)
            self._connection.buffer_updated(nbytes)  # it discards, and limits what it discards

    def pause_writing(self) -> None:
        """Pass on that the client has not read everything."""
        self._is_client_slow = True
        if self._connection:
            self._connection.pause_writing()

    def resume_writing(self) -> None:
        """Pass on that the client has read everything."""
        self._is_client_slow = False
        self._reply_bytes = 0
        if self._connection:
            self._connection.resume_writing()

    # --- handshake ---

    def _shake_hands(self, data: memoryview) -> None:
        if not self._has_received:
            self._has_received = True
            if 0x41 <= data[0] <= 0x5A:  # a capital letter begins every request of HTTP
                self._refuse_plain_http()
                return
        rest = data
        while True:
            self._incoming.write(rest[:_PIECE_BYTES])
            rest = rest[_PIECE_BYTES:]
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                if not rest:
                    return
            except ssl.SSLError as error:
                self._fail(_classify(error))
                return
        self._flush()
        self._end_handshake()
        if self._transport.is_closing():  # the system has reported an error while the last flight was sent
            return
        self._state = TlsState.OPEN
        self._connection = self._create_connection()
        has_certificate = self._tls.getpeercert(binary_form=True) is not None
        self._connection.is_health_only = (
            self._server.certificates.wants_client_certificate and not has_certificate
        )
        self._connection.connection_made(TlsTransport(self, self._transport))
        # A client may send its first request right behind the handshake. OpenSSL keeps the part of it that is
        # in the last piece.
        self._decrypt(rest)

    def _end_handshake(self) -> None:
        self._timer.cancel()
        self._server.streams.discard(self)

    def _refuse_plain_http(self) -> None:
        """Answer without encryption, because the client cannot read anything else."""
        self._server.count_failure("plain_http")
        self._end_handshake()
        self._state = TlsState.CLOSED
        connection = self._create_connection()
        self._transport.set_protocol(connection)
        connection.connection_made(self._transport)
        connection.refuse_input(BadHttp("this port speaks HTTP over TLS; use https://"))

    def _fail(self, reason: str) -> None:
        """End the connection, because the handshake has failed. The client gets OpenSSL's alert."""
        self._server.count_failure(reason)
        self._flush()
        self._state = TlsState.CLOSED
        self._end_handshake()
        if reason == "timeout" or self._transport.get_write_buffer_size():
            self._transport.abort()  # it does not read, and nothing else would end the connection
        else:
            self._transport.close()

    # --- data ---

    def _decrypt(self, data: memoryview) -> None:
        """Pass the plaintext of `data`, and of what OpenSSL has kept, to the connection.

        The plaintext is never longer than its ciphertext. It usually fits into one buffer of the connection,
        which gets it by one call.
        """
        connection = self._connection
        position = 0
        if self._is_input_over:
            return
        while self._state is TlsState.OPEN and connection and not self._is_paused:
            target = connection.get_buffer(-1)
            filled = 0
            is_over = False
            try:
                while filled < len(target):
                    try:
                        count = _read_into(self._tls, target[filled:])
                    except ssl.SSLWantReadError:
                        if position == len(data) or not self._send_replies():
                            break
                        end = min(position + _PIECE_BYTES, len(data))
                        self._incoming.write(data[position:end])
                        position = end
                        continue
                    if not count:
                        is_over = True
                        break
                    filled += count
            except ssl.SSLError as error:
                log.debug("a connection is closed: %s", error)
                self._flush()
                self._state = TlsState.CLOSED
                self._transport.close()
                return
            if not self._send_replies():
                return
            if filled:
                connection.buffer_updated(filled)
            if is_over:
                self._is_input_over = True
                if self._state is TlsState.OPEN and not connection.eof_received():
                    self.close()
                return
            if filled < len(target):
                return
        if position < len(data) and self._state is TlsState.OPEN:
            self._incoming.write(data[position:])  # read when the connection resumes

    def _send_replies(self) -> bool:
        """Send what OpenSSL itself has to send. Abort, and return False, if the client reads too little."""
        if self._outgoing.pending:
            if self._is_client_slow:
                self._reply_bytes += self._outgoing.pending
                if self._reply_bytes > _MAX_REPLY_BYTES:
                    log.debug("a connection is closed: the client does not read")
                    self.abort()
                    return False
            self._flush()
        return True

    def _flush(self) -> None:
        """Send what OpenSSL has to send."""
        if self._outgoing.pending and not self._transport.is_closing():
            self._transport.write(self._outgoing.read())

    # --- the transport's calls ---

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send data."""
        if self._state is not TlsState.OPEN:
            return
        view = memoryview(data)
        position = 0
        try:
            while position < len(view):
                position += self._tls.write(view[position : position + _WRITE_BYTES])
                self._flush()
        except ssl.SSLError as error:
            log.debug("a connection is closed: %s", error)
            self.abort()

    def write_end(self) -> None:
        """Send the end of the stream, first TLS's own and then TCP's. Raises `OSError`."""
        if self._state is TlsState.OPEN:
            self._send_end()
            self._state = TlsState.ENDED
            self._transport.write_eof()

    def close(self) -> None:
        """Close the connection after everything is sent."""
        if self._state is TlsState.OPEN:
            self._send_end()
        self._state = TlsState.CLOSED
        self._transport.close()

    def abort(self) -> None:
        """Close the connection at once."""
        if self._state is TlsState.HANDSHAKE:
            self._server.count_failure("stopped")
            self._end_handshake()
        self._state = TlsState.CLOSED
        self._transport.abort()

    def _send_end(self) -> None:
        with suppress(ssl.SSLError):  # the client has not sent its own end yet
            self._tls.unwrap()
        self._flush()

    def pause(self) -> None:
        """Read no more, and pass on no more."""
        self._is_paused = True
        self._transport.pause_reading()

    def resume(self) -> None:
        """Pass on what was kept in a new round of the event loop, and read again."""
        self._is_paused = False
        self._transport.resume_reading()
        asyncio.get_running_loop().call_soon(self._pass_rest)

    def _pass_rest(self) -> None:
        """Pass on what OpenSSL has kept during a pause."""
        try:
            self._decrypt(self._server.buffer[:0])
        except BaseException:  # asyncio closes a connection for an error in its own calls alone
            self.abort()
            raise

    @property
    def is_closing(self) -> bool:
        """True if the connection is closing or closed."""
        return self._state is TlsState.CLOSED or self._transport.is_closing()


class TlsTransport(asyncio.Transport):
    """The transport of an encrypted connection, as the HTTP connection sees it."""

    def __init__(self, stream: TlsStream, transport: asyncio.Transport) -> None:
        """Create the transport of `stream`, whose ciphertext goes through `transport`."""
        super().__init__()
        self._stream = stream
        self._transport = transport

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return a fact about the socket."""
        return self._transport.get_extra_info(name, default)

    def is_closing(self) -> bool:
        """Return whether the connection is closing or closed."""
        return self._stream.is_closing

    def is_reading(self) -> bool:
        """Return whether data is received."""
        return self._transport.is_reading()

    def pause_reading(self) -> None:
        """Receive no more data."""
        self._stream.pause()

    def resume_reading(self) -> None:
        """Receive data again."""
        self._stream.resume()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the number of bytes above which the client counts as slow."""
        self._transport.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        """Return the number of encrypted bytes that the client has not read."""
        return self._transport.get_write_buffer_size()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send data."""
        self._stream.write(data)

    def can_write_eof(self) -> bool:
        """Return True: TLS has an end of its own."""
        return True

    def write_eof(self) -> None:
        """Send the end of the stream; data still arrives. Raises `OSError`."""
        self._stream.write_end()

    def close(self) -> None:
        """Close the connection after everything is sent."""
        self._stream.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self._stream.abort()


def _read_into(tls: ssl.SSLObject, target: memoryview) -> int:
    """Decrypt into `target`, at most one record, and return the number of bytes; 0 at the end of the stream.

    Raises `ssl.SSLWantReadError` if the next record is incomplete.
    """
    # Any writable buffer will do (documentation of `ssl.SSLSocket.read`); the types know `bytearray` alone.
    return cast(int, tls.read(len(target), cast(bytearray, target)))


def _classify(error: ssl.SSLError) -> str:
    """Return the reason for which a handshake has failed, as the metric has it."""
    is_certificate = isinstance(error, ssl.SSLCertVerificationError) or any(
        one in (error.reason or "") for one in _CERTIFICATE_REASONS
    )
    return "certificate" if is_certificate else "protocol"
