"""Waiting times of other clients, measured with repeated requests for `/health/live`."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def probe_service(host: str, port: int) -> Iterator[list[float]]:
    """Yield a growing list of answer times, in seconds, until the block ends."""
    waits: list[float] = []
    stop_event = threading.Event()

    def send_probes() -> None:
        connection = http.client.HTTPConnection(host, port, timeout=60)
        while not stop_event.is_set():
            started_at = time.perf_counter()
            connection.request("GET", "/health/live")
            connection.getresponse().read()
            waits.append(time.perf_counter() - started_at)

    prober = threading.Thread(target=send_probes)
    prober.start()
    try:
        yield waits
    finally:
        stop_event.set()
        prober.join()
