"""The end of a service in order: ready → draining → refusing → closed."""

from __future__ import annotations

import logging
import os
import threading
import time
from enum import IntEnum
from typing import Final

from fovea.service.errors import Draining
from fovea.service.observability.process_metrics import kill_children

log = logging.getLogger(__name__)

OVERDUE: Final = 2.5
"""Seconds beyond grace and limit after which what is left of a service is ended."""

_LAST: Final = 0.4
"""Seconds from the end of its children to that of the process itself."""


class Phase(IntEnum):
    """Where a service stands. It only ever goes forward."""

    READY = 0
    DRAINING = 1
    """Not ready any more, and says so to load balancers; all work is still taken."""
    REFUSING = 2
    """What was accepted is finished; new work is refused."""
    CLOSED = 3


class Lifecycle:
    """The phase of one process. The server moves it, the routes ask."""

    def __init__(self) -> None:
        self.phase = Phase.READY

    def require_ready(self) -> None:
        """Raises `Draining` once the service is on its way out."""
        if self.phase > Phase.READY:
            raise Draining("the service is stopping", retry_after=1.0)

    def admit(self) -> None:
        """Let new work in. Raises `Draining` once none is taken."""
        if self.phase > Phase.DRAINING:
            raise Draining("the service is stopping and takes no more work", retry_after=1.0)


def end_within(seconds: float) -> None:
    """End this process after so many seconds, whatever holds it up; first its children."""

    def end() -> None:
        time.sleep(seconds - _LAST)
        log.error("the stop has taken %.1f s: what is left is killed", seconds - _LAST)
        kill_children(os.getpid())
        time.sleep(_LAST)
        os._exit(1)

    threading.Thread(target=end, name="end", daemon=True).start()
