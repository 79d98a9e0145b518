"""How long others wait meanwhile: `/health/live`, asked again and again."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def probing(host: str, port: int) -> Iterator[list[float]]:
    """The seconds that each answer took; more come as long as the `with` lasts."""
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
