"""The end of a service in order: ready → draining → refusing → closed."""

from __future__ import annotations

from enum import IntEnum

from service.errors import Draining


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
