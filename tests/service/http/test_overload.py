"""Clients that ask again at once after a refusal cost the others little."""

from __future__ import annotations

import os
import selectors
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.pictures import make_jpeg
from tests.raw import LIVE_REQUEST, Wire, classify_request
from tests.servers import Server

pytestmark = pytest.mark.long

CALLERS = 40
SECONDS = 3.0
RATE = 200
"""Refusals a second, and the number of refusals that are sent at once before."""


def test_refusals_are_rate_limited_and_others_are_answered(small_zoo: Path) -> None:
    settings = {"FOVEA_QUEUE_IMAGES": "1", "FOVEA_REQUEST_IMAGES": "1", "FOVEA_LOG_LEVEL": "error"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server, ExitStack() as stack:
        for pid in server.runner_pids:
            os.kill(pid, signal.SIGSTOP)
            stack.callback(os.kill, pid, signal.SIGCONT)
        stack.enter_context(Wire(server.url)).send(classify_request(make_jpeg()))
        server.wait_for_metric(1, "fovea_images_in_flight")
        refusals = _count_refusals(server, stack)
        assert CALLERS <= refusals <= RATE * (1 + SECONDS) + CALLERS
        closed_wire = stack.enter_context(Wire(server.url))
        closed_wire.send(classify_request(make_jpeg()))
        closed_wire.socket.close()  # its refusal may still be delayed
        with Wire(server.url) as wire:
            wire.send(LIVE_REQUEST)
            assert wire.read_response().status == 200
            wire.send(classify_request(b""))
            assert wire.read_response().error_code == "overloaded"
        server.wait_for_metric(2, "fovea_requests_in_flight")
    assert "Traceback" not in server.log


def _count_refusals(server: Server, stack: ExitStack) -> int:
    """Return the number of refusals that all clients together have received."""
    request, refusals = classify_request(make_jpeg()), 0
    selector = stack.enter_context(selectors.DefaultSelector())
    end = time.monotonic() + SECONDS
    for _ in range(CALLERS):
        wire = stack.enter_context(Wire(server.url))
        wire.send(request)
        selector.register(wire.socket, selectors.EVENT_READ, wire)
    while (seconds_left := end - time.monotonic()) > 0:
        for key, _ in selector.select(seconds_left):
            response = key.data.read_response()
            assert (response.status, response.error_code, response.is_closing) == (503, "overloaded", False)
            refusals += 1
            key.data.send(request)
    return refusals
