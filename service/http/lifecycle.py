"""Lifecycle of a service during its shutdown: ready → draining → refusing → closed."""

from __future__ import annotations

import logging
import os
import threading
import time
from enum import IntEnum
from typing import Final, NoReturn

from fovea.service.errors import Draining
from fovea.service.observability.process_metrics import kill_descendants

log = logging.getLogger(__name__)

KILL_DELAY: Final = 2.5
"""Time in seconds beyond the grace time and the drain limit after which the remaining processes are
killed."""

_EXIT_DELAY: Final = 0.4
"""Time in seconds between killing the children and ending the process itself."""


class Phase(IntEnum):
    """Phase of a service. A service only moves to a later phase."""

    READY = 0
    DRAINING = 1
    """Readiness probes fail, so that load balancers stop sending. All work is still accepted."""
    REFUSING = 2
    """Accepted work is finished. New work is refused."""
    CLOSED = 3


class Lifecycle:
    """Phase of one process. The server changes the phase and the routes read it."""

    def __init__(self) -> None:
        self.phase = Phase.READY

    def require_ready(self) -> None:
        """Raise `Draining` if the service has begun to stop."""
        if self.phase > Phase.READY:
            raise Draining("the service is stopping", retry_after=1.0)

    def require_accepting(self) -> None:
        """Raise `Draining` if the service no longer accepts new work."""
        if self.phase > Phase.DRAINING:
            raise Draining("the service is stopping and accepts no more requests", retry_after=1.0)


def exit_after_internal_error() -> NoReturn:
    """End this process at once, after the last lines of its log."""
    logging.shutdown()
    os._exit(70)  # sysexits.h: an internal error


def force_exit_after(seconds: float) -> None:
    """End this process after `seconds`, whatever blocks it. The children are killed first."""

    def force_exit() -> None:
        time.sleep(seconds - _EXIT_DELAY)
        log.error("the shutdown has taken %.1f s; the remaining processes are killed", seconds - _EXIT_DELAY)
        kill_descendants(os.getpid())
        time.sleep(_EXIT_DELAY)
        os._exit(1)

    # A thread is used because the event loop itself may be blocked. It is a daemon: if the process ends in
    # time, the thread ends with it.
    threading.Thread(target=force_exit, name="end", daemon=True).start()
