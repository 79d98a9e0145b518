"""TLS on the service's port: real clients, bad clients, and certificates that change."""

from __future__ import annotations

import pickle
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

import fovea
from fovea.errors import ConnectionFailed
from fovea.service.errors import CertificateRequired
from fovea.service.http.paths import HEALTH_PATHS
from tests.certificates import Authority
from tests.pictures import make_jpeg
from tests.raw import LIVE_REQUEST, Wire, classify_request
from tests.servers import ROOT, Server, run_service, wait_until

HEADER_TIMEOUT = 1.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls_server(authority: Authority, small_zoo: Path) -> Iterator[Server]:
    settings = authority.issue("service").settings
    limits = {"FOVEA_HEADER_TIMEOUT": str(HEADER_TIMEOUT), "FOVEA_BODY_BYTES": "2000000"}
    with Server(None, authority.trust(), FOVEA_MODELS=str(small_zoo), **settings, **limits) as server:
        yield server


@pytest.fixture(scope="module")
def mutual_server(authority: Authority, small_zoo: Path) -> Iterator[Server]:
    settings = {**authority.issue("mutual").settings, "FOVEA_TLS_CLIENT_CA": str(authority.file)}
    client_tls = authority.trust(authority.issue("client", "client.example.com"))
    with Server(None, client_tls, FOVEA_MODELS=str(small_zoo), **settings) as server:
        yield server


class TlsWire(Wire):
    """A TLS connection to a server."""

    def __init__(self, url: str, tls: ssl.SSLContext) -> None:
        super().__init__(url)
        self.socket = tls.wrap_socket(self.socket, server_hostname="127.0.0.1")


def count_failures(server: Server, reason: str) -> float:
    return server.read_metric("fovea_tls_handshake_failures_total", reason=reason)


# --- requests ------------------------------------------------------------------------------------


def test_service_speaks_https(tls_server: Server, authority: Authority) -> None:
    assert tls_server.greeting.count("https://127.0.0.1:") == 4
    image = make_jpeg(64, 64)
    answer = tls_server.client.post("/v1/classify", content=image)
    assert answer.status_code == 200, answer.text
    with TlsWire(tls_server.url, authority.trust()) as wire:
        assert isinstance(wire.socket, ssl.SSLSocket)
        assert wire.socket.version() == "TLSv1.3"
        for _ in range(3):  # on one connection, with ASGI and without
            wire.send(classify_request(image))
            assert wire.read_response().status == 200
            wire.send(LIVE_REQUEST)
            assert wire.read_response().status == 200


def test_large_bodies_and_answers_are_complete(tls_server: Server) -> None:
    image = make_jpeg(640, 480) + bytes(1_500_000)
    for headers in ({}, {"Content-Type": "image/jpeg"}):
        assert tls_server.client.post("/v1/classify", content=image, headers=headers).status_code == 200
    chunks = (image[start : start + 70_001] for start in range(0, len(image), 70_001))
    assert tls_server.client.post("/v1/classify", content=chunks).status_code == 200
    refused = tls_server.client.post("/v1/classify", content=image + bytes(1_000_000))
    assert refused.status_code == 413
    assert len(tls_server.client.get("/openapi.json").content) > 50_000


def test_pipelined_requests_are_answered_in_order(tls_server: Server, authority: Authority) -> None:
    image = make_jpeg(640, 480) + bytes(200_000)
    with TlsWire(tls_server.url, authority.trust()) as wire:
        wire.send(*(classify_request(image), LIVE_REQUEST) * 5)
        for _ in range(5):
            assert "predictions" in wire.read_response().json
            assert "status" in wire.read_response().json


def test_client_that_has_ended_its_side_gets_its_answer(tls_server: Server, authority: Authority) -> None:
    request = classify_request(make_jpeg(64, 64))
    for ends_tls, ends_tcp in ((True, False), (False, True), (True, True)):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = authority.trust().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with Wire(tls_server.url) as wire:
            exchange_until_done(client.do_handshake, incoming, outgoing, wire.socket)
            client.write(request)
            if ends_tls:
                with suppress(ssl.SSLWantReadError):
                    client.unwrap()
            wire.socket.sendall(outgoing.read())
            if ends_tcp:
                wire.socket.shutdown(socket.SHUT_WR)
            incoming.write(read_all(wire.socket))
            answer = b""
            with suppress(ssl.SSLZeroReturnError):  # the end, after the client has sent its own
                while part := client.read(1 << 16):
                    answer += part
            assert b"predictions" in answer


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def exchange_until_done(
    step: Callable[[], None], incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, connection: socket.socket
) -> None:
    while True:
        try:
            step()
        except ssl.SSLWantReadError:
            connection.sendall(outgoing.read())
            incoming.write(connection.recv(1 << 16))
        else:
            connection.sendall(outgoing.read())
            return


def test_client_that_leaves_is_noticed(tls_server: Server, authority: Authority) -> None:
    before = tls_server.read_metric("fovea_errors_total", reason="client_left")
    request = classify_request(make_jpeg(64, 64))
    with TlsWire(tls_server.url, authority.trust()) as wire:
        wire.send(request[:-10])
    tls_server.wait_for_metric(before + 1, "fovea_errors_total", reason="client_left")


def test_only_http_1_1_and_safe_protocols_are_negotiated(tls_server: Server, authority: Authority) -> None:
    context = authority.trust()
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with TlsWire(tls_server.url, context) as wire:
        assert isinstance(wire.socket, ssl.SSLSocket)
        assert wire.socket.selected_alpn_protocol() == "http/1.1"
        cipher = wire.socket.cipher()
        assert cipher
        assert cipher[0].startswith("ECDHE-")
        assert wire.socket.compression() is None


# --- bad clients ---------------------------------------------------------------------------------


def test_plain_http_gets_an_answer_that_says_https(tls_server: Server) -> None:
    before = count_failures(tls_server, "plain_http")
    with Wire(tls_server.url) as wire:
        wire.send(LIVE_REQUEST)
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (400, "bad_http", True)
        assert "use https://" in answer.json["error"]["message"]
        assert wire.is_closed()
    assert count_failures(tls_server, "plain_http") == before + 1


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_old_tls_and_garbage_are_refused(tls_server: Server, authority: Authority) -> None:
    before = count_failures(tls_server, "protocol")
    old = authority.trust()
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        pytest.raises(ssl.SSLError, match=r"(?i)alert protocol version|unsupported"),
        Wire(tls_server.url) as wire,
    ):
        old.wrap_socket(wire.socket, server_hostname="127.0.0.1")
    weak = authority.trust()
    weak.maximum_version = ssl.TLSVersion.TLSv1_2
    weak.set_ciphers("AES128-SHA:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match=r"(?i)handshake failure"), Wire(tls_server.url) as wire:
        weak.wrap_socket(wire.socket, server_hostname="127.0.0.1")
    for garbage in (
        bytes(100),
        b"\x16\x03\x01\xff\xff" + bytes(100),
        b"SSH-2.0-x\r\n",
        b"\x80" + bytes(100),
    ):
        with Wire(tls_server.url) as wire:
            wire.send(garbage)
            wire.socket.shutdown(socket.SHUT_WR)
            read_all(wire.socket)
    assert count_failures(tls_server, "protocol") >= before + 5
    assert tls_server.client.get("/health/live").status_code == 200


def test_renegotiation_is_refused(tls_server: Server, authority: Authority) -> None:
    """A client of TLS 1.2 asks for a new handshake; Python offers no way to, `openssl` does."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing: apt install openssl")
    parts = urlsplit(tls_server.url)
    result = subprocess.run(
        [
            "openssl",
            "s_client",
            "-connect",
            f"{parts.hostname}:{parts.port}",
            "-tls1_2",
            "-CAfile",
            authority.file,
        ],
        input=b"R\n",
        capture_output=True,
        timeout=30,
        check=False,
    )
    text = (result.stdout + result.stderr).decode()
    assert "RENEGOTIATING" in text
    assert re.search("no renegotiation|alert handshake failure|closed", text), text
    assert tls_server.client.get("/health/live").status_code == 200


@pytest.mark.long
def test_handshake_that_never_ends_is_cut_off(tls_server: Server) -> None:
    before = count_failures(tls_server, "timeout")
    hello = client_hello()
    with Wire(tls_server.url) as silent, Wire(tls_server.url) as slow:
        started = time.monotonic()
        slow.send(hello[:50])
        with suppress(ConnectionError):
            while time.monotonic() < started + 10 * HEADER_TIMEOUT:
                slow.send(b"\0")
                slow.socket.settimeout(0.1)
                with suppress(TimeoutError):
                    if not slow.socket.recv(1):
                        break
        assert time.monotonic() < started + 5 * HEADER_TIMEOUT
        with suppress(ConnectionError):
            assert silent.socket.recv(1) == b""
    assert count_failures(tls_server, "timeout") == before + 2


def client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@pytest.mark.long
def test_handshakes_count_as_connections(authority: Authority, small_zoo: Path) -> None:
    settings = authority.issue("few").settings
    limits = {"FOVEA_CONNECTIONS": "2", "FOVEA_HEADER_TIMEOUT": "30"}
    with Server(None, authority.trust(), FOVEA_MODELS=str(small_zoo), **settings, **limits) as server:
        hello = client_hello()
        with Wire(server.url) as first, Wire(server.url) as second, Wire(server.url) as third:
            for wire in (first, second, third):
                wire.send(hello)
            assert first.socket.recv(1)
            assert second.socket.recv(1)
            third.socket.settimeout(0.3)
            with pytest.raises(TimeoutError):
                third.socket.recv(1)
            first.socket.close()
            third.socket.settimeout(30)
            assert third.socket.recv(1)
            server.process.terminate()  # the end does not wait for handshakes
            assert server.process.wait(20) == 0


def test_damaged_record_ends_the_connection(tls_server: Server, authority: Authority) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = authority.trust().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with Wire(tls_server.url) as wire:
        exchange_until_done(client.do_handshake, incoming, outgoing, wire.socket)
        client.write(LIVE_REQUEST)
        record = bytearray(outgoing.read())
        record[-1] ^= 1
        wire.socket.sendall(record)
        incoming.write(read_all(wire.socket))
        with pytest.raises(ssl.SSLError, match=r"(?i)bad record mac"):
            client.read(1)


# --- certificates of clients ---------------------------------------------------------------------


def test_client_without_certificate_gets_health_alone(mutual_server: Server, authority: Authority) -> None:
    assert mutual_server.client.post("/v1/classify", content=make_jpeg(64, 64)).status_code == 200
    with httpx.Client(base_url=mutual_server.url, verify=authority.trust()) as client:
        for path in (*HEALTH_PATHS, "/health/ready?x=1"):
            assert client.get(path).status_code == 200
        for path in ("/", "/metrics", "/docs", "/v1/models", "/health/ready/", "/health/%72eady", "/pin"):
            refused = client.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "certificate_required")
        for path in ("/v1/classify", "/health/ready", "/v2/repository/models/small/unload"):
            assert client.post(path, content=make_jpeg(64, 64)).status_code == 403
    with TlsWire(mutual_server.url, authority.trust()) as wire:
        wire.send(LIVE_REQUEST, classify_request(make_jpeg(64, 64)))
        assert wire.read_response().status == 200
        assert wire.read_response().error_code == "certificate_required"
        assert wire.is_closed()


@pytest.mark.parametrize(("path", "starts"), [("/v1/models", False), ("/own", True), ("/ping", True)])
def test_health_route_opens_no_other_route(
    authority: Authority, small_zoo: Path, path: str, starts: bool
) -> None:
    settings = {
        **authority.issue("health").settings,
        "FOVEA_TLS_CLIENT_CA": str(authority.file),
        "FOVEA_MODELS": str(small_zoo),
        "FOVEA_HEALTH_ROUTE": path,
    }
    if starts:
        with Server(None, authority.trust(), **settings) as server:
            assert server.client.get(path).status_code == 200
    else:
        process = run_service(**settings)
        assert process.returncode != 0
        assert f"FOVEA_HEALTH_ROUTE is '{path}', which answers more than health" in process.stderr


def test_client_with_foreign_or_expired_certificate_is_refused(
    mutual_server: Server, authority: Authority, tmp_path: Path
) -> None:
    before = count_failures(mutual_server, "certificate")
    foreign = Authority(tmp_path).issue("foreign", "client.example.com")
    expired = authority.issue("expired", "client.example.com", expires_at=datetime(2021, 1, 1, tzinfo=UTC))
    for pair in (foreign, expired):
        with httpx.Client(base_url=mutual_server.url, verify=authority.trust(pair)) as client:
            for path in ("/health/live", "/v1/models"):
                with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
                    client.get(path)
    assert count_failures(mutual_server, "certificate") == before + 4


# --- renewal and several workers -----------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_new_connections_get_the_new_certificate(
    authority: Authority, small_zoo: Path, tmp_path: Path, workers: str
) -> None:
    issuer = Authority(tmp_path)
    pair, new = issuer.issue("used"), issuer.issue("new")
    with (
        Server(
            None, issuer.trust(), FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS=workers, **pair.settings
        ) as server,
        TlsWire(server.url, issuer.trust()) as old,
    ):
        first = get_certificate(server.url, issuer)
        pair.replace_with(new)
        wait_until(lambda: get_certificate(server.url, issuer) != first)
        if workers == "1":
            server.wait_for_metric(1, "fovea_tls_certificate_reloads_total", result="ok")
        old.send(LIVE_REQUEST)
        assert old.read_response().status == 200
        assert server.client.post("/v1/classify", content=make_jpeg(64, 64)).status_code == 200
        expiry = server.read_metric("fovea_tls_certificate_expiry_timestamp_seconds")
        assert expiry > time.time()


def get_certificate(url: str, authority: Authority) -> bytes:
    with TlsWire(url, authority.trust()) as wire:
        assert isinstance(wire.socket, ssl.SSLSocket)
        certificate = wire.socket.getpeercert(binary_form=True)
        assert certificate
        return certificate


# --- our own clients -----------------------------------------------------------------------------


def test_python_clients_speak_tls(tls_server: Server, mutual_server: Server, authority: Authority) -> None:
    image = make_jpeg(64, 64)
    with fovea.Client(tls_server.url, ca=authority.file) as client:
        assert client.classify(image).label
        with pickle.loads(pickle.dumps(client)) as copy:  # noqa: S301 - our own object
            assert copy.classify(image).label
    with fovea.Client(tls_server.url, retry_seconds=0) as client, pytest.raises(ConnectionFailed):
        client.classify(image)
    pair = authority.issue("python", "client.example.com")
    own = (pair.certificate, pair.key)
    with fovea.Client(mutual_server.url, ca=authority.file, certificate=own) as client:
        assert client.classify(image).label
    with (
        fovea.Client(mutual_server.url, ca=authority.file) as client,
        pytest.raises(CertificateRequired, match="FOVEA_TLS_CLIENT_CA"),
    ):
        client.classify(image)
    for options in ({"ca": "/absent.pem"}, {"certificate": ("/absent.crt", "/absent.key")}):
        with pytest.raises(ValueError, match="No such file"):
            fovea.Client(tls_server.url, **options)


@pytest.mark.long
def test_health_check_of_the_image_speaks_tls(tls_server: Server, mutual_server: Server) -> None:
    for server in (tls_server, mutual_server):
        port = str(urlsplit(server.url).port)
        for cert, code in (("/run/secrets/tls.crt", 0), ("", 1)):
            result = subprocess.run(
                [sys.executable, "-IS", ROOT / "deploy" / "image" / "healthy.py"],
                env={"FOVEA_PORT": port, "FOVEA_TLS_CERT": cert},
                capture_output=True,
                timeout=30,
                check=False,
            )
            assert result.returncode == code, result.stderr


@pytest.mark.slow
def test_no_request_fails_while_the_certificate_is_renewed(small_zoo: Path, tmp_path: Path) -> None:
    """20,000 requests, a new connection for every fifty, while three renewals and a wrong pair come."""
    issuer = Authority(tmp_path)
    pair, request = issuer.issue("used"), classify_request(make_jpeg(32, 32))
    client_tls = issuer.trust()
    is_renewed = threading.Event()
    certificates: set[bytes | None] = set()

    def send_requests(count: int) -> int:
        answered = 0
        while answered < count or not is_renewed.is_set():
            with TlsWire(server.url, client_tls) as wire:
                assert isinstance(wire.socket, ssl.SSLSocket)
                certificates.add(wire.socket.getpeercert(binary_form=True))
                for _ in range(50):
                    wire.send(request)
                    assert wire.read_response().status == 200
                    answered += 1
        return answered

    with (
        Server(None, client_tls, FOVEA_MODELS=str(small_zoo), **pair.settings) as server,
        ThreadPoolExecutor(4) as threads,
    ):
        senders = [threads.submit(send_requests, 5_000) for _ in range(4)]
        try:
            for number in range(1, 4):
                pair.replace_with(issuer.issue(f"renewed-{number}"))
                server.wait_for_metric(number, "fovea_tls_certificate_reloads_total", result="ok")
            pair.key.write_text("no key")
            server.wait_for_metric(1, "fovea_tls_certificate_reloads_total", result="failed")
        finally:
            is_renewed.set()
        assert sum(sender.result() for sender in senders) >= 20_000
        failures = server.read_metric("fovea_tls_handshake_failures_total")
        assert (failures, server.read_metric("fovea_errors_total")) == (0, 0)
    assert len(certificates) == 4
