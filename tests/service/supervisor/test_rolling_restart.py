"""Two instances behind Debian's HAProxy are restarted in turn under load without a failed request."""

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

from tests.pictures import make_jpeg
from tests.servers import Server
from tests.tools import require_tool

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
    return require_tool("haproxy")


@contextmanager
def _run_haproxy(haproxy: str, first_port: int, second_port: int, folder: Path) -> Iterator[str]:
    """Run HAProxy in front of two ports and yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as public:
        config = folder / "haproxy.cfg"
        config.write_text(CONFIG.format(file=public.fileno(), one=first_port, two=second_port))
        process = subprocess.Popen([haproxy, "-db", "-f", str(config)], pass_fds=[public.fileno()])
        try:
            yield f"http://127.0.0.1:{public.getsockname()[1]}"
        finally:
            process.terminate()
            process.wait()


def _send_load(url: str, stop: threading.Event) -> Counter[str]:
    """Classify until the event is set; return the number of answers of each kind."""
    outcomes: Counter[str] = Counter()
    with httpx.Client(base_url=url, timeout=30) as client:
        while not stop.is_set():
            try:
                outcomes[str(client.post("/v1/classify", content=make_jpeg()).status_code)] += 1
            except httpx.HTTPError as error:
                outcomes[repr(error)] += 1
    return outcomes


def _wait_until_up(url: str, name: str) -> None:
    """Wait until HAProxy sends work to a server again."""
    while f"fovea,{name}," not in (text := httpx.get(f"{url}/stats;csv").text) or not any(
        line.startswith(f"fovea,{name},") and ",UP," in line for line in text.splitlines()
    ):
        pass


def _restart_server(server: Server, stack: ExitStack, settings: dict[str, str]) -> Server:
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 0
    return stack.enter_context(Server(**settings, FOVEA_PORT=str(_get_port(server))))


def _get_port(server: Server) -> int:
    return int(server.url.rsplit(":", 1)[1])


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_no_request_fails_in_a_rolling_restart(
    haproxy: str, small_zoo: Path, tmp_path: Path, workers: str
) -> None:
    settings = {"FOVEA_MODELS": str(small_zoo), "FOVEA_DRAIN_GRACE": "2", "FOVEA_WORKERS": workers}
    stop = threading.Event()
    with ExitStack() as stack:
        first_server, second_server = (stack.enter_context(Server(**settings)) for _ in range(2))
        url = stack.enter_context(
            _run_haproxy(haproxy, _get_port(first_server), _get_port(second_server), tmp_path)
        )
        pool = stack.enter_context(ThreadPoolExecutor(CLIENTS))
        stack.callback(stop.set)
        clients: list[Future[Counter[str]]] = [pool.submit(_send_load, url, stop) for _ in range(CLIENTS)]
        for name, server in (("one", first_server), ("two", second_server)):
            restarted_server = _restart_server(server, stack, settings)
            _wait_until_up(url, name)
            while (
                restarted_server.read_metric("fovea_requests_total", route="/v1/classify", status="200") < 20
            ):
                pass
        stop.set()
        outcomes = sum((client.result() for client in clients), Counter[str]())
    assert set(outcomes) == {"200"}, outcomes
    assert outcomes["200"] > 100
