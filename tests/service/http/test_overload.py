"""Callers who ask again at once after a refusal: they cost the others little."""

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
"""Refusals a second, and how many come at once before."""


def test_refusals_are_spread_out_and_others_are_not_kept_waiting(small_zoo: Path) -> None:
    settings = {"FOVEA_QUEUE_IMAGES": "1", "FOVEA_REQUEST_IMAGES": "1", "FOVEA_LOG_LEVEL": "error"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running, ExitStack() as stack:
        for pid in running.runner_pids:
            os.kill(pid, signal.SIGSTOP)
            stack.callback(os.kill, pid, signal.SIGCONT)
        stack.enter_context(Wire(running.url)).send(classify_request(make_jpeg()))
        running.wait_for_metric(1, "fovea_images_in_flight")
        refusals = _count_refusals(running, stack)
        assert CALLERS <= refusals <= RATE * (1 + SECONDS) + CALLERS
        leaver = stack.enter_context(Wire(running.url))
        leaver.send(classify_request(make_jpeg()))
        leaver.socket.close()  # its refusal may still wait
        with Wire(running.url) as wire:
            wire.send(LIVE_REQUEST)
            assert wire.read_response().status == 200
            wire.send(classify_request(b""))
            assert wire.read_response().error_code == "overloaded"
        running.wait_for_metric(2, "fovea_requests_in_flight")
    assert "Traceback" not in running.log


def _count_refusals(server: Server, stack: ExitStack) -> int:
    """Return how many refusals all callers have got."""
    request, refusals = classify_request(make_jpeg()), 0
    selector = stack.enter_context(selectors.DefaultSelector())
    for _ in range(CALLERS):
        wire = stack.enter_context(Wire(server.url))
        wire.send(request)
        selector.register(wire.socket, selectors.EVENT_READ, wire)
    end = time.monotonic() + SECONDS
    while (seconds_left := end - time.monotonic()) > 0:
        for key, _ in selector.select(seconds_left):
            response = key.data.read_response()
            assert (response.status, response.error_code, response.is_closing) == (503, "overloaded", False)
            refusals += 1
            key.data.send(request)
    return refusals
