"""Two instances behind Debian's HAProxy, restarted one after the other under load: nobody notices."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.pictures import jpeg
from tests.servers import Server
from tests.tools import need

CLIENTS = 8
CONFIG = """
global
    maxconn 200
defaults
    mode http
    timeout connect 2s
    timeout client 30s
    timeout server 30s
    timeout check 1s
frontend public
    bind fd@{file}
    stats enable
    stats uri /stats
    default_backend fovea
backend fovea
    option httpchk GET /health/ready
    server one 127.0.0.1:{one} check inter 200ms fall 3 rise 1
    server two 127.0.0.1:{two} check inter 200ms fall 3 rise 1
"""


@pytest.fixture
def haproxy() -> str:
    return need("haproxy")


@contextmanager
def _balanced(haproxy: str, one: int, two: int, folder: Path) -> Iterator[str]:
    """HAProxy before two ports; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as public:
        config = folder / "haproxy.cfg"
        config.write_text(CONFIG.format(file=public.fileno(), one=one, two=two))
        process = subprocess.Popen([haproxy, "-db", "-f", str(config)], pass_fds=[public.fileno()])
        try:
            yield f"http://127.0.0.1:{public.getsockname()[1]}"
        finally:
            process.terminate()
            process.wait()


def _load(url: str, enough: threading.Event) -> Counter[str]:
    """Classify until told to stop; how often came what."""
    seen: Counter[str] = Counter()
    with httpx.Client(base_url=url, timeout=30) as client:
        while not enough.is_set():
            try:
                seen[str(client.post("/v1/classify", content=jpeg()).status_code)] += 1
            except httpx.HTTPError as error:
                seen[repr(error)] += 1
    return seen


def _until_up(url: str, name: str) -> None:
    """Wait until HAProxy sends work to a server again."""
    while f"fovea,{name}," not in (text := httpx.get(f"{url}/stats;csv").text) or not any(
        line.startswith(f"fovea,{name},") and ",UP," in line for line in text.splitlines()
    ):
        pass


def _restart(running: Server, stack: ExitStack, settings: dict[str, str]) -> Server:
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(timeout=30) == 0
    return stack.enter_context(Server(**settings, FOVEA_PORT=str(_port(running))))


def _port(running: Server) -> int:
    return int(running.url.rsplit(":", 1)[1])


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_no_request_fails_in_a_rolling_restart(
    haproxy: str, small_zoo: Path, tmp_path: Path, workers: str
) -> None:
    settings = {"FOVEA_MODELS": str(small_zoo), "FOVEA_DRAIN_GRACE": "2", "FOVEA_WORKERS": workers}
    enough = threading.Event()
    with ExitStack() as stack:
        one, two = (stack.enter_context(Server(**settings)) for _ in range(2))
        url = stack.enter_context(_balanced(haproxy, _port(one), _port(two), tmp_path))
        pool = stack.enter_context(ThreadPoolExecutor(CLIENTS))
        stack.callback(enough.set)
        clients: list[Future[Counter[str]]] = [pool.submit(_load, url, enough) for _ in range(CLIENTS)]
        for name, running in (("one", one), ("two", two)):
            again = _restart(running, stack, settings)
            _until_up(url, name)
            while again.metric("fovea_requests_total", route="/v1/classify", status="200") < 20:
                pass
        enough.set()
        seen = sum((client.result() for client in clients), Counter[str]())
    assert set(seen) == {"200"}, seen
    assert seen["200"] > 100
