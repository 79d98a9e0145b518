"""Configuration of the C library's allocator, and the return of unused memory to the system.

By default glibc raises its thresholds with every large block that is freed, up to 32 MB, and each thread has
its own arena (mallopt(3)). A service that had inflated some large bodies kept 75 MB of unused memory.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

_THRESHOLD_BYTES: Final = 4 << 20
"""Threshold in bytes. Larger blocks are returned when they are freed, and so is free memory at an arena's
end."""

_MAX_ARENAS: Final = 2
"""Maximum number of arenas. Threads of this process wait for the interpreter's lock, not for the
allocator's."""

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
"""Parameter numbers of mallopt(3)."""


_MADV_DONTNEED: Final = 4
"""Number of the advice in madvise(2)."""


def configure_allocator() -> None:
    """Set the thresholds above; call this before the first thread starts.

    Does nothing with C libraries other than glibc.
    """
    with suppress(OSError, AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_ARENA_MAX, _MAX_ARENAS)
        set_option(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
        set_option(_M_TRIM_THRESHOLD, _THRESHOLD_BYTES)


def trim_heap() -> None:
    """Return all free memory inside the arenas to the system, which takes milliseconds."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def release_code_pages() -> None:
    """Unmap the pages of program code that this process has used so far.

    Imports and the load of a model use much code only once: 10 to 20 MB in a runner. Code that is needed
    again is mapped again from the file cache.
    """
    with suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, permissions, _, _, _, *path = line.split()
            # Such a mapping of a file has no changed pages, which the call would lose.
            if permissions == "r-xp" and path and path[0].startswith("/"):
                start, end = (int(one, 16) for one in addresses.split("-"))
                advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


class DelayedTrim:
    """Trims the heap one second after large content was released. Call `schedule` on the event loop.

    Content of many MB often consists of blocks below the threshold, such as the pieces in which a compressed
    body arrives. Free blocks between blocks in use stay in the process until its heap is trimmed: 20 to 46 MB
    after six clients had sent compressed bodies of 7 MB. Trimming 50 MB takes 3 ms of a processor.
    """

    def __init__(self) -> None:
        """Have nothing scheduled."""
        self._is_scheduled = False

    def schedule(self) -> None:
        """Trim the heap in one second, unless that is scheduled already."""
        # Not at the start of this module: runners use it too, and asyncio takes 9 MB with what it imports.
        import asyncio

        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_later(_TRIM_DELAY_SECONDS, self._trim)

    def _trim(self) -> None:
        self._is_scheduled = False
        # The thread keeps the milliseconds of system calls off the event loop.
        threading.Thread(target=trim_heap, name="trim", daemon=True).start()


_TRIM_DELAY_SECONDS: Final = 1.0
