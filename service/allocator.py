"""The C library's allocator, which must return memory that the service no longer uses.

By default glibc raises its thresholds with every large block that is freed, up to 32 MB, and each thread has
an arena of its own (mallopt(3)). A service that had inflated some large bodies kept 75 MB for nothing.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Final

_BLOCK_BYTES: Final = 4 << 20
"""Larger blocks are returned as soon as they are freed, as is what is free at the end of an arena."""

_ARENAS: Final = 2
"""Threads of this process wait for the interpreter's lock and not for the allocator's."""

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
"""Parameters of mallopt(3)."""


def return_memory() -> None:
    """Set the limits above; call it before the first thread starts. Another C library is left as it is."""
    with suppress(OSError, AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_ARENA_MAX, _ARENAS)
        set_option(_M_MMAP_THRESHOLD, _BLOCK_BYTES)
        set_option(_M_TRIM_THRESHOLD, _BLOCK_BYTES)


def trim() -> None:
    """Return all memory that is free inside the arenas, which takes milliseconds."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
