"""TLS between asyncio's transport and the HTTP connection: memory, and clients that do not read."""

from __future__ import annotations

import asyncio
import ctypes
import ctypes.util
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from fovea.service.http.certificates import CertificateFiles, Certificates
from fovea.service.http.connection import Connection
from fovea.service.http.server_context import ServerContext
from fovea.service.http.tls import TlsServer, TlsStream
from tests.certificates import Authority
from tests.service.http.connection_harness import create_context, create_observer


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


class TlsClient:
    """The client of one stream. What it sends is given to the stream directly, in one piece."""

    def __init__(self, server: TlsServer, context: ServerContext, tls: ssl.SSLContext) -> None:
        self.server = server
        self.socket, self.service_socket = socket.socketpair()
        self.socket.setblocking(False)
        self.lost_event = asyncio.Event()
        self.stream: TlsStream = server.create_stream(
            lambda: Connection(context, self.lost_event.set), self.lost_event.set
        )
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = tls.wrap_bio(self.incoming, self.outgoing, server_hostname="127.0.0.1")

    def encrypt(self, data: bytes) -> bytes:
        """Return what the client has not delivered yet, and `data`. The client's own buffers stay small."""
        parts = [self.outgoing.read()]
        for start in range(0, len(data), 1 << 14):
            self.tls.write(data[start : start + (1 << 14)])
            parts.append(self.outgoing.read())
        return b"".join(parts)

    def deliver(self, data: bytes) -> None:
        """Give the stream `data` as one read."""
        self.server.buffer[: len(data)] = data
        self.stream.buffer_updated(len(data))

    async def shake_hands(self) -> None:
        """Go as far as the client's last flight, which is not delivered yet."""
        await asyncio.get_running_loop().connect_accepted_socket(lambda: self.stream, self.service_socket)
        with suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        self.deliver(self.outgoing.read())
        while True:
            self.incoming.write(await asyncio.get_running_loop().sock_recv(self.socket, 1 << 16))
            with suppress(ssl.SSLWantReadError):
                self.tls.do_handshake()
                return


@asynccontextmanager
async def open_server(authority: Authority) -> AsyncIterator[tuple[TlsServer, ServerContext]]:
    pair = authority.issue("stream")
    certificates = Certificates(CertificateFiles(pair.certificate, pair.key))
    context = create_context(asyncio.get_running_loop())
    yield TlsServer(certificates, create_observer().metrics, 10.0), context
    context.hangups.close()


def read_resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) << 12


def test_request_behind_the_handshake_takes_no_memory_for_ever(authority: Authority) -> None:
    """OpenSSL's buffers keep their largest size: 250 KB for each of these connections."""
    request = b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 190000\r\n\r\n" + bytes(190_000)

    async def scenario() -> None:
        async with open_server(authority) as (server, context):
            clients = []
            tls = authority.trust()
            for number in range(220):
                if number == 20:
                    before = read_resident_bytes()
                client = TlsClient(server, context, tls)
                await client.shake_hands()
                client.deliver(client.encrypt(request))
                while b"HTTP/1.1 200" not in await read_plain(client):
                    pass
                del client.tls, client.incoming, client.outgoing  # the memory of the service alone counts
                clients.append(client)
            used = read_resident_bytes() - before
            for client in clients:
                client.socket.close()
                await client.lost_event.wait()
            assert used < 30_000_000

    asyncio.run(scenario())


async def read_plain(client: TlsClient) -> bytes:
    client.incoming.write(await asyncio.get_running_loop().sock_recv(client.socket, 1 << 16))
    with suppress(ssl.SSLWantReadError):
        return client.tls.read(1 << 16)
    return b""


class KeyUpdater:
    """A client that can update its keys and ask for new keys, which Python's `ssl` cannot."""

    _READ, _WRITE = 0, 1

    def __init__(self) -> None:
        name = ctypes.util.find_library("ssl")
        if name is None:
            pytest.skip("OpenSSL's library is missing: apt install libssl3")
        self._library = ctypes.CDLL(name)
        for function in ("TLS_client_method", "SSL_CTX_new", "SSL_new", "BIO_s_mem", "BIO_new"):
            getattr(self._library, function).restype = ctypes.c_void_p
        call = self._call
        self._context = call("SSL_CTX_new", call("TLS_client_method"))
        self._ssl = call("SSL_new", self._context)
        self._bios = [call("BIO_new", call("BIO_s_mem")) for _ in range(2)]
        call("SSL_set_bio", self._ssl, *self._bios)
        call("SSL_set_connect_state", self._ssl)

    def _call(self, function: str, *arguments: int) -> int:
        pointers = (ctypes.c_void_p(one) for one in arguments)
        return int(getattr(self._library, function)(*pointers) or 0)

    def shake_hands(self) -> bool:
        return self._call("SSL_do_handshake", self._ssl) == 1

    def receive(self, data: bytes) -> None:
        self._library.BIO_write(ctypes.c_void_p(self._bios[self._READ]), data, len(data))

    def ask_for_keys(self) -> None:
        assert self._library.SSL_key_update(ctypes.c_void_p(self._ssl), 1) == 1
        assert self.shake_hands()

    def take(self) -> bytes:
        buffer = ctypes.create_string_buffer(1 << 18)
        size = self._library.BIO_read(ctypes.c_void_p(self._bios[self._WRITE]), buffer, len(buffer))
        return buffer.raw[: max(size, 0)]

    def close(self) -> None:
        self._call("SSL_free", self._ssl)
        self._call("SSL_CTX_free", self._context)


@pytest.mark.parametrize("reads", [True, False])
def test_client_that_asks_for_keys_and_does_not_read_is_cut_off(authority: Authority, reads: bool) -> None:
    async def scenario() -> None:
        async with open_server(authority) as (server, context):
            loop = asyncio.get_running_loop()
            updater, client = KeyUpdater(), TlsClient(server, context, authority.trust())
            client.service_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            transport, _ = await loop.connect_accepted_socket(lambda: client.stream, client.service_socket)
            while not updater.shake_hands():
                client.deliver(updater.take())
                updater.receive(await loop.sock_recv(client.socket, 1 << 16))
            client.deliver(updater.take())
            largest = 0
            for _ in range(200):
                for _ in range(50):
                    updater.ask_for_keys()
                client.deliver(updater.take())
                await asyncio.sleep(0)
                largest = max(largest, transport.get_write_buffer_size())
                if reads:
                    with suppress(BlockingIOError):
                        while client.socket.recv(1 << 16):
                            pass
                elif transport.is_closing():
                    break
            assert transport.is_closing() is not reads
            assert largest < 40_000
            client.socket.close()
            await client.lost_event.wait()
            updater.close()

    asyncio.run(scenario())


def test_handshake_that_fails_unread_is_cut_off(authority: Authority) -> None:
    """A chain that does not fit into the socket's buffer waits for a client that never reads."""

    async def scenario() -> None:
        async with open_server(authority) as (server, context):
            pair = authority.issue("long")
            pair.certificate.write_bytes(pair.certificate.read_bytes() + authority.file.read_bytes() * 60)
            server.certificates = Certificates(CertificateFiles(pair.certificate, pair.key))
            client = TlsClient(server, context, authority.trust())
            client.service_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                lambda: client.stream, client.service_socket
            )
            with suppress(ssl.SSLWantReadError):
                client.tls.do_handshake()
            client.deliver(client.outgoing.read())
            assert transport.get_write_buffer_size()
            client.deliver(bytes(100))
            await asyncio.wait_for(client.lost_event.wait(), 30)
            client.socket.close()

    asyncio.run(scenario())
