"""The limit on replies that clients have not read yet."""

from __future__ import annotations

import asyncio
from functools import partial

from fovea.service.access.caller import Caller, exceeds_share, name_caller
from fovea.service.errors import Overloaded


class UnreadReplies:
    """Bytes of the replies that clients have not read yet. Call every method on the event loop.

    gRPC keeps a reply until its client has read it, and no function drops the reply before. A client decides
    how much it reads, and could let replies pile up. So further replies are refused.
    """

    def __init__(self, limit: int) -> None:
        """Set the limit in bytes (FOVEA_BODIES_BYTES)."""
        self._limit = limit
        self._bytes = 0
        self._sizes: dict[str, int] = {}
        """Bytes by caller."""

    def add(self, caller: Caller, size: int) -> None:
        """Count a reply of `size` bytes until the current task ends, which is when the client has read it.

        A single reply is always accepted; see also `exceeds_share`. Raises `Overloaded`.
        """
        name, task = name_caller(caller), asyncio.current_task()
        assert task, "gRPC runs each handler in a task"  # noqa: S101
        own, total = self._sizes.get(name, 0), self._bytes + size
        callers = len(self._sizes) + (name not in self._sizes)
        is_full = self._bytes and total > self._limit
        if is_full or (
            own and exceeds_share(own=own + size, total=total, callers=callers, limit=self._limit)
        ):
            raise Overloaded(
                f"there is no room for this reply: clients have not read {self._bytes} bytes of other "
                f"replies, of which {own} are for this caller, and all replies together may take "
                f"{self._limit} (FOVEA_BODIES_BYTES)",
                retry_after=1.0,
            )
        self._bytes = total
        self._sizes[name] = own + size
        task.add_done_callback(partial(self._remove, name, size))

    def _remove(self, name: str, size: int, _task: asyncio.Task[object]) -> None:
        self._bytes -= size
        self._sizes[name] -= size
        if not self._sizes[name]:
            del self._sizes[name]
