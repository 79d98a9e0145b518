"""The guard of https URLs, against a real server with a certificate of its own."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fovea.service.errors import BodyTooLarge
from fovea.service.remote.guarded_https import (
    GuardedHttps,
    UrlFailed,
    UrlLimits,
    UrlRefused,
    is_public_address,
)
from tests.pictures import make_jpeg

PUBLIC_ADDRESS = "93.184.216.34"

HOSTS = ["photos.example.com", "other.example.com"]


class Handler(BaseHTTPRequestHandler):
    """Answers each path in one way, good or bad."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        kind, _, argument = self.path.partition("?")[0].lstrip("/").partition("/")
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", argument.replace("~", "/"))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif kind == "slow-headers":
            self.drip(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1000)
        elif kind == "slow-body":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            self.drip(b"a" * 1000)
        elif kind == "cut":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")
            self.close_connection = True
        elif kind == "endless":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while not self.server.stopping.is_set():  # type: ignore[attr-defined]
                self.wfile.write(b"1000\r\n" + b"a" * 0x1000 + b"\r\n")
        elif kind == "declared":
            self.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Length: {argument}\r\n\r\n".encode())
        elif kind == "status":
            self.send_error(int(argument))
        elif kind == "gzip":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\na")
        else:
            content = self.headers["Host"].encode() if kind == "host" else make_jpeg()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def drip(self, content: bytes) -> None:
        """Send a byte at a time, always before a time limit of a single read ends."""
        for byte in content:
            if self.server.stopping.wait(0.1):  # type: ignore[attr-defined]
                break
            self.wfile.write(bytes([byte]))
            self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


class Web:
    """A server, and what stands between it and the guard: names, addresses, certificates."""

    def __init__(self, folder: Path) -> None:
        key, certificate = folder / "key.pem", folder / "certificate.pem"
        names = ",".join(f"DNS:{host}" for host in HOSTS)
        subprocess.run(
            f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=test "
            f"-addext subjectAltName={names} -keyout {key} -out {certificate}".split(),
            check=True,
            capture_output=True,
        )
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate, key)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            stopping = threading.Event()

            def handle_error(self, *_: object) -> None:
                """Say nothing: the guard hangs up on purpose."""

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.server.socket = tls.wrap_socket(
            self.server.socket, server_side=True, do_handshake_on_connect=False
        )
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.trust = ssl.create_default_context(cafile=str(certificate))
        self.questions: list[str] = []
        self.connections: list[tuple[str, int]] = []
        self.addresses: dict[str, list[list[str]]] = {}

    def resolve(self, host: str, port: int) -> list[str]:
        """Answer with the next of the host's addresses; the last answer stays."""
        self.questions.append(host)
        answers = self.addresses.get(host, [[PUBLIC_ADDRESS]])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def connect(self, address: tuple[str, int], seconds: float) -> socket.socket:
        """Connect to the server, whatever the address, as the real internet would."""
        self.connections.append(address)
        return socket.create_connection(self.server.server_address[:2], timeout=seconds)  # type: ignore[arg-type]

    def guard(self, *hosts: str, **limits: float) -> GuardedHttps:
        return GuardedHttps(
            hosts or ("photos.example.com",),
            UrlLimits(**{"seconds": 10.0, **limits}),  # type: ignore[arg-type]
            resolve=self.resolve,
            connect=self.connect,
            tls=self.trust,
        )

    def close(self) -> None:
        Handler.close_connection = True
        self.server.stopping.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def _web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    web = Web(tmp_path_factory.mktemp("web"))
    yield web
    web.close()


@pytest.fixture
def web(_web: Web) -> Web:
    _web.questions.clear()
    _web.connections.clear()
    _web.addresses.clear()
    return _web


def test_image_of_allowed_host_is_fetched(web: Web) -> None:
    assert web.guard().fetch("https://photos.example.com/a.jpg?size=2") == make_jpeg()
    assert web.questions == ["photos.example.com"]
    assert web.connections == [(PUBLIC_ADDRESS, 443)]  # the checked address, and no name


def test_host_header_and_certificate_are_of_the_name(web: Web) -> None:
    assert web.guard().fetch("https://PHOTOS.example.com/host") == b"PHOTOS.example.com"
    web.addresses["stranger.example.com"] = [[PUBLIC_ADDRESS]]
    with pytest.raises(UrlFailed, match="certificate is not valid"):
        web.guard("stranger.example.com").fetch("https://stranger.example.com/a.jpg")


def test_own_certificate_is_not_trusted_by_default(web: Web) -> None:
    guard = GuardedHttps(HOSTS, resolve=web.resolve, connect=web.connect)
    with pytest.raises(UrlFailed, match="certificate is not valid"):
        guard.fetch("https://photos.example.com/a.jpg")


@pytest.mark.parametrize(
    "url",
    [
        "http://photos.example.com/a.jpg",
        "ftp://photos.example.com/a.jpg",
        "file:///etc/passwd",
        "//photos.example.com/a.jpg",
        "https://evil.example.org/a.jpg",
        "https://photos.example.com.evil.org/a.jpg",
        "https://notphotos.example.com/a.jpg",
        "https://photos.example.com@evil.example.org/",
        "https://photos.example.com:80/a.jpg",
        "https://user:secret@photos.example.com/a.jpg",
        "https://127.0.0.1/a.jpg",
        "https://2130706433/a.jpg",
        "https://[::1]/a.jpg",
        "https://[::1/a.jpg",
        "https://photos.example.com:99999/a.jpg",
        "https://photos.example.com\\@evil.example.org/",
        "https://photos.example.com/a b.jpg",
        "https://photos.example.com/a\r\nHost: evil",
        "https:///a.jpg",
        "https://" + "a" * 70 + ".ü.example.com/",
        "https://photos.example.com/" + "a" * 5000,
        "",
    ],
)
def test_other_urls_are_refused_before_anybody_is_asked(web: Web, url: str) -> None:
    with pytest.raises(UrlRefused) as caught:
        web.guard().fetch(url)
    assert (web.questions, web.connections) == ([], [])
    assert "secret" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_empty_list_allows_no_host(web: Web) -> None:
    guard = GuardedHttps((), resolve=web.resolve, connect=web.connect)
    with pytest.raises(UrlRefused, match="it is empty"):
        guard.fetch("https://photos.example.com/a.jpg")


def test_wildcards_ports_and_case_in_the_list(web: Web) -> None:
    guard = web.guard("*.Example.com.", "odd.example.org:8443")
    for url in ("https://photos.example.com./", "https://a.b.example.com/", "https://odd.example.org:8443/"):
        guard.check(url)
    for url in ("https://example.com/", "https://badexample.com/", "https://odd.example.org/"):
        with pytest.raises(UrlRefused):
            guard.check(url)
    with pytest.raises(UrlRefused, match="not an allowed host"):
        web.guard("https://photos.example.com")


@pytest.mark.parametrize(
    "address",
    [
        "fec0::1",
        "3fff::1",
        "192.88.99.1",
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.100.100.200",
        "0.0.0.0",  # noqa: S104 - no socket is bound
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "168.63.129.16",
        "192.0.0.1",
        "198.18.0.1",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2001:0:1::1",
        "::127.0.0.1",
        "no-address",
    ],
)
def test_private_address_is_refused_without_a_connection(web: Web, address: str) -> None:
    assert not is_public_address(address)
    web.addresses["photos.example.com"] = [[PUBLIC_ADDRESS, address]]
    with pytest.raises(UrlRefused, match="private or reserved"):
        web.guard().fetch("https://photos.example.com/a.jpg")
    assert web.connections == []


def test_public_addresses_are_allowed() -> None:
    assert all(map(is_public_address, [PUBLIC_ADDRESS, "1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1"]))


def test_address_that_changes_after_the_check_changes_nothing(web: Web) -> None:
    """A name that answers with a private address from its second question on is asked once."""
    web.addresses["photos.example.com"] = [[PUBLIC_ADDRESS], ["127.0.0.1"]]
    assert web.guard().fetch("https://photos.example.com/a.jpg") == make_jpeg()
    assert web.connections == [(PUBLIC_ADDRESS, 443)]
    with pytest.raises(UrlRefused):
        web.guard().fetch("https://photos.example.com/a.jpg")


def test_redirects_are_followed_to_allowed_hosts(web: Web) -> None:
    guard = web.guard(*HOSTS)
    url = "https://photos.example.com/redirect/https:~~other.example.com~a.jpg"
    assert guard.fetch(url) == make_jpeg()
    assert web.questions == ["photos.example.com", "other.example.com"]
    assert guard.fetch("https://photos.example.com/redirect/~a.jpg") == make_jpeg()  # relative


@pytest.mark.parametrize(
    "target",
    [
        "https:~~[::1",
        "http:~~other.example.com~",
        "https:~~evil.example.org~",
        "https:~~127.0.0.1~",
        "file:~~~etc",
    ],
)
def test_redirect_passes_the_same_checks(web: Web, target: str) -> None:
    with pytest.raises(UrlRefused):
        web.guard(*HOSTS).fetch(f"https://photos.example.com/redirect/{target}")
    assert len(web.connections) == 1


def test_redirect_to_private_address_is_refused(web: Web) -> None:
    web.addresses["other.example.com"] = [["192.168.0.1"]]
    with pytest.raises(UrlRefused, match=r"other\.example\.com.*private"):
        web.guard(*HOSTS).fetch("https://photos.example.com/redirect/https:~~other.example.com~a.jpg")
    # The same host may get another address between two hops: each hop is checked by itself.
    web.addresses["photos.example.com"] = [[PUBLIC_ADDRESS], ["10.0.0.1"]]
    with pytest.raises(UrlRefused, match=r"photos\.example\.com.*private"):
        web.guard(*HOSTS).fetch("https://photos.example.com/redirect/~a.jpg")


def test_endless_redirects_end(web: Web) -> None:
    web.addresses["photos.example.com"] = [[PUBLIC_ADDRESS]]
    loop = "https://photos.example.com/redirect/" + "redirect~" * 10
    with pytest.raises(UrlFailed, match="more than 3 redirects"):
        web.guard().fetch(loop)
    assert len(web.connections) == 4


@pytest.mark.parametrize("path", ["endless", "declared/100000000", "a.jpg"])
def test_large_body_is_refused(web: Web, path: str) -> None:
    with pytest.raises(BodyTooLarge, match="more than 100 bytes"):
        web.guard(max_bytes=100).fetch(f"https://photos.example.com/{path}")


@pytest.mark.parametrize("path", ["slow-headers", "slow-body"])
def test_slow_host_is_left_at_the_deadline(web: Web, path: str) -> None:
    """Each byte arrives in time, but all together do not."""
    start = time.monotonic()
    with pytest.raises(UrlFailed, match="did not answer in time"):
        web.guard(seconds=0.5).fetch(f"https://photos.example.com/{path}")
    assert time.monotonic() - start < 5


def test_slow_resolver_and_silent_port_are_left_at_the_deadline(web: Web) -> None:
    never = threading.Event()

    def sleep(host: str, port: int) -> list[str]:
        never.wait(20)
        return []

    def check(resolve: Callable[[str, int], list[str]], port: int) -> None:
        guard = GuardedHttps(
            HOSTS,
            UrlLimits(seconds=0.3),
            resolve=resolve,
            connect=lambda _, seconds: socket.create_connection(("127.0.0.1", port), timeout=seconds),
        )
        with pytest.raises(UrlFailed, match="did not answer in time"):
            guard.fetch("https://photos.example.com/a.jpg")

    with socket.create_server(("127.0.0.1", 0)) as silent:
        check(sleep, 0)
        check(web.resolve, silent.getsockname()[1])  # the handshake never ends
    never.set()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("status/404", "answered 404"),
        ("status/500", "answered 500"),
        ("gzip", "'gzip'"),
        ("cut", "3 of 1000"),
    ],
)
def test_answer_without_image_is_one_sentence(web: Web, path: str, reason: str) -> None:
    with pytest.raises(UrlFailed, match=reason):
        web.guard().fetch(f"https://photos.example.com/{path}?signature=secret")


def test_unknown_host_is_one_sentence(web: Web) -> None:
    def fail(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    guard = GuardedHttps(HOSTS, resolve=fail, connect=web.connect)
    with pytest.raises(UrlFailed, match="cannot be resolved"):
        guard.fetch("https://photos.example.com/a.jpg?signature=secret")
