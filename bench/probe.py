"""Waiting times of other clients, measured with repeated requests for `/health/live`."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def probing(host: str, port: int) -> Iterator[list[float]]:
    """Yield a growing list of answer times, in seconds, until the block ends."""
    waits: list[float] = []
    over = threading.Event()

    def probe() -> None:
        connection = http.client.HTTPConnection(host, port, timeout=60)
        while not over.is_set():
            started = time.perf_counter()
            connection.request("GET", "/health/live")
            connection.getresponse().read()
            waits.append(time.perf_counter() - started)

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        yield waits
    finally:
        over.set()
        prober.join()
