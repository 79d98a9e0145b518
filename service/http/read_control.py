"""Pauses in reading from one client, and the detection of a client that leaves meanwhile."""

from __future__ import annotations

import asyncio
import socket

from fovea.service.http.hangups import HangUpCallback, HangUpWatcher


class ReadControl:
    """Pauses and resumes reading. `on_hang_up` is called when the client hangs up while nothing is read."""

    def __init__(
        self, transport: asyncio.Transport, hangups: HangUpWatcher, on_hang_up: HangUpCallback
    ) -> None:
        self._transport = transport
        self._hangups = hangups
        self._on_hang_up = on_hang_up
        self._socket: socket.socket = transport.get_extra_info("socket")
        self._descriptor = self._socket.fileno()
        self.is_reading = True
        """False while reading is paused."""

    def pause(self) -> None:
        """Stop reading until `resume`."""
        self.is_reading = False
        self._transport.pause_reading()
        self._hangups.watch(self._descriptor, self._on_hang_up, half_close=True)

    def resume(self) -> None:
        """Read again."""
        self.is_reading = True
        self._hangups.unwatch(self._descriptor)
        self._transport.resume_reading()

    def watch_half_closed(self) -> None:
        """Watch a client that has closed its sending side. asyncio reads nothing from it any more."""
        self._hangups.watch(self._descriptor, self._on_hang_up, half_close=False)

    def has_error(self) -> bool:
        """Return whether the system has reported an error, as when the client has left."""
        return bool(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def close(self) -> None:
        """Stop watching. Call this before the socket is closed: the kernel may reuse its descriptor."""
        self._hangups.unwatch(self._descriptor)
        del self._on_hang_up  # breaks the reference cycle with the connection
