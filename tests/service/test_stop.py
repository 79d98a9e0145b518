"""How the service stops: what it still takes, what it refuses, what it finishes."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.pictures import jpeg
from tests.raw import CLASSIFY, LIVE, Wire, post
from tests.servers import Server


def _until_not_ready(running: Server) -> httpx.Response:
    while (reply := httpx.get(f"{running.url}/health/ready")).status_code == 200:
        pass
    return reply


def _until_refused(running: Server) -> httpx.Response:
    while (reply := httpx.post(f"{running.url}/v1/classify", content=jpeg())).status_code == 200:
        pass
    return reply


def _begun(running: Server, wire: Wire) -> bytes:
    """Begin a request and have it accepted; what is still to be sent of it."""
    picture = jpeg()
    wire.send(CLASSIFY, b"Content-Length: %d\r\n\r\n" % len(picture), picture[:10])
    while running.metric("fovea_requests_in_flight") != 2:  # this one and the scrape
        pass
    return picture[10:]


def test_in_the_grace_time_it_is_not_ready_and_takes_everything(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_GRACE="600") as running, Wire(running.url) as idle:
        idle.send(LIVE)
        assert not idle.answer().closes
        running.process.send_signal(signal.SIGTERM)
        reply = _until_not_ready(running)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
        assert (reply.headers["Retry-After"], reply.headers["Connection"]) == ("1", "close")
        assert httpx.head(f"{running.url}/health/ready").status_code == 503
        assert httpx.get(f"{running.url}/health/live").status_code == 200
        idle.send(post(jpeg()))
        answer = idle.answer()
        assert (answer.status, answer.closes) == (200, True)
        running.process.send_signal(signal.SIGTERM)  # hurries
        assert running.process.wait(timeout=20) == 0


def test_after_it_new_work_is_refused_and_old_work_finished(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo)) as running, Wire(running.url) as wire:
        rest = _begun(running, wire)
        running.process.send_signal(signal.SIGTERM)
        reply = _until_refused(running)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
        assert (reply.headers["Retry-After"], reply.headers["Connection"]) == ("1", "close")
        assert httpx.get(f"{running.url}/health/live").status_code == 200
        wire.send(rest)
        answer = wire.answer()
        assert (answer.status, answer.closes) == (200, True)
        assert wire.ended()
        assert running.process.wait(timeout=20) == 0
    assert "cancelled" not in running.log


def test_a_large_body_that_is_refused_gets_its_answer(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo)) as running, Wire(running.url) as wire:
        rest = _begun(running, wire)
        running.process.send_signal(signal.SIGTERM)
        _until_refused(running)
        with Wire(running.url) as late:
            late.send(post(b"x" * 20_000_000))
            answer = late.answer()
            assert (answer.status, answer.code, answer.closes) == (503, "draining", True)
        wire.send(rest)
        assert wire.answer().status == 200


def test_what_is_not_finished_in_time_is_told_so_and_counted_in_the_log(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_LIMIT="0.2") as running, Wire(running.url) as wire:
        _begun(running, wire)
        running.process.send_signal(signal.SIGTERM)
        answer = wire.answer()
        assert (answer.status, answer.code, answer.closes) == (503, "draining", True)
        assert answer.headers["retry-after"] == "1"
        assert running.process.wait(timeout=20) == 0
    assert "cancelled 1 requests that were not finished in time" in running.log
    assert "Traceback" not in running.log


def test_a_signal_too_many_cuts(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_LIMIT="600") as running, Wire(running.url) as wire:
        _begun(running, wire)
        running.process.send_signal(signal.SIGTERM)
        _until_refused(running)
        running.process.send_signal(signal.SIGTERM)
        assert wire.answer().code == "draining"
        assert running.process.wait(timeout=20) == 0
    assert "cancelled 1 requests" in running.log


def test_three_signals_cut_from_the_grace_time_on(small_zoo: Path) -> None:
    settings = {"FOVEA_DRAIN_GRACE": "600", "FOVEA_DRAIN_LIMIT": "600"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running, Wire(running.url) as wire:
        _begun(running, wire)
        running.process.send_signal(signal.SIGTERM)
        _until_not_ready(running)
        running.process.send_signal(signal.SIGTERM)
        _until_refused(running)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=20) == 0


def test_ctrl_c_has_no_grace_time_and_finishes_what_was_accepted(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_GRACE="600") as running, Wire(running.url) as wire:
        rest = _begun(running, wire)
        running.process.send_signal(signal.SIGINT)
        _until_refused(running)
        wire.send(rest)
        assert wire.answer().status == 200
        assert running.process.wait(timeout=20) == 0


def test_idle_connections_do_not_hold_it_up(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo)) as running, Wire(running.url) as idle, Wire(running.url):
        idle.send(LIVE)
        assert idle.answer().status == 200
        started = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert idle.ended()
        assert running.process.wait(timeout=20) == 0
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("clients", [8])
def test_nothing_is_reset_while_it_stops(small_zoo: Path, clients: int) -> None:
    """Every request gets an answer until the connection is refused: none is reset, none ends unanswered."""

    def ask(url: str) -> set[int]:
        seen = set()
        with httpx.Client(base_url=url, timeout=30) as client:
            while True:
                try:
                    seen.add(client.post("/v1/classify", content=jpeg()).status_code)
                except httpx.ConnectError:
                    return seen

    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_GRACE="0.5") as running:
        with ThreadPoolExecutor(clients) as pool:
            asking = [pool.submit(ask, running.url) for _ in range(clients)]
            while running.metric("fovea_requests_total", route="/v1/classify", status="200") < 100:
                pass
            running.process.send_signal(signal.SIGTERM)
            assert set().union(*(one.result() for one in asking)) <= {200, 503}
        assert running.process.wait(timeout=20) == 0
