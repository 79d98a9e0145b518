"""Clients that leave while nothing is read from their connection.

The event loop learns that a client has gone by reading from its socket. While reading is paused, or after the
client has closed its sending side, nothing is read: an epoll instance of its own watches such sockets for
hang-ups alone.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from typing import Final, TypeAlias

HangUp: TypeAlias = Callable[[bool], None]
"""Called with True when the connection is dead in both directions, with False when the client has closed its
sending side: it may have left, or it may still read."""

_DEAD: Final = select.EPOLLHUP | select.EPOLLERR


class Hangups:
    """Watches sockets for hang-ups. Every method must be called on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._calls: dict[int, HangUp] = {}
        """By the socket's descriptor."""
        loop.add_reader(self._epoll.fileno(), self._report)

    def watch(self, descriptor: int, call: HangUp, *, half: bool) -> None:
        """Call `call` when the client hangs up; with `half`, also once when it closes its sending side."""
        if self._epoll.closed:  # the service has stopped
            return
        events = select.EPOLLRDHUP if half else 0  # a dead connection is reported in any case
        if descriptor in self._calls:
            self._epoll.modify(descriptor, events)
        else:
            self._epoll.register(descriptor, events)
        self._calls[descriptor] = call

    def forget(self, descriptor: int) -> None:
        """Stop watching a socket, before it is closed."""
        if self._calls.pop(descriptor, None):
            self._epoll.unregister(descriptor)

    def close(self) -> None:
        """Watch nothing more."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._calls.clear()

    def _report(self) -> None:
        for descriptor, events in self._epoll.poll(0):
            call = self._calls.get(descriptor)
            if call is None:
                continue
            is_dead = bool(events & _DEAD)
            if not is_dead:
                self._epoll.modify(descriptor, 0)  # once: it stays so
            call(is_dead)
