"""Detection of clients that disconnect while their connection is not read.

The event loop notices a disconnect only by reading from the socket. Nothing is read while reading is paused,
or after the client has closed its sending side. A separate epoll instance watches such sockets for hang-ups
only.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from typing import Final, TypeAlias

HangUpCallback: TypeAlias = Callable[[bool], None]
"""Callback for a hang-up. Its argument is True when the connection is dead in both directions. It is False
when the client has closed its sending side: the client may have left, or may still read."""

_DEAD_EVENTS: Final = select.EPOLLHUP | select.EPOLLERR


class HangUpWatcher:
    """Watcher for hang-ups of sockets. Every method must be called on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._callbacks: dict[int, HangUpCallback] = {}
        """Callbacks by socket descriptor."""
        loop.add_reader(self._epoll.fileno(), self._dispatch_events)

    def watch(self, descriptor: int, callback: HangUpCallback, *, half_close: bool) -> None:
        """Call `callback` when the client hangs up.

        With `half_close`, also call it once when the client closes its sending side. The callback runs on
        the event loop, and may call `watch` and `unwatch`.
        """
        if self._epoll.closed:  # the service has stopped
            return
        events = select.EPOLLRDHUP if half_close else 0  # epoll always reports a dead connection
        if descriptor in self._callbacks:
            self._epoll.modify(descriptor, events)
        else:
            self._epoll.register(descriptor, events)
        self._callbacks[descriptor] = callback

    def unwatch(self, descriptor: int) -> None:
        """Stop watching a socket. Call this before the socket is closed.

        The kernel may reuse the descriptor of a closed socket at once.
        """
        if self._callbacks.pop(descriptor, None):
            self._epoll.unregister(descriptor)

    def close(self) -> None:
        """Stop watching all sockets."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._callbacks.clear()

    def _dispatch_events(self) -> None:
        """Call the callbacks of the sockets that epoll reports."""
        for descriptor, events in self._epoll.poll(0):
            # An earlier callback of this loop may have removed the socket.
            callback = self._callbacks.get(descriptor)
            if callback is None:
                continue
            is_dead = bool(events & _DEAD_EVENTS)
            if not is_dead:
                self._epoll.modify(descriptor, 0)  # report once: the condition persists
            callback(is_dead)
