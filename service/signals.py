"""The signals of the process, from its first moment on.

SIGTERM and SIGINT end it at once until it is ready, and stop it in order then (`service.http.server`). SIGHUP
makes it look at its repository; where a terminal is attached it says that the terminal has closed, and stops
the service. SIGUSR1 and others that have no meaning here do nothing.

Process 1 of a container is not ended by a signal for which it has no handler (pid_namespaces(7)): without one
it would load its models to the end.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Final

STOPS: Final = (signal.SIGINT, signal.SIGTERM)

_MEANINGLESS: Final = (
    signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO,
    *(getattr(signal, name) for name in ("SIGPWR", "SIGSTKFLT") if hasattr(signal, name)),
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)  # fmt: skip
"""Signals that would end the process, and that nobody sends to end it."""


def prepare() -> None:
    """Let signals end the process while it starts. Those that are ignored are ignored by its children too."""
    for number in _MEANINGLESS:
        if signal.getsignal(number) == signal.SIG_DFL:  # else somebody has given it a meaning
            signal.signal(number, signal.SIG_IGN)
    for number in STOPS:
        signal.signal(number, _end)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # it is under nohup(1)
        signal.signal(signal.SIGHUP, _end if has_terminal() else signal.SIG_IGN)


def serve(stop: Callable[[int], None], reload: Callable[[], None]) -> None:
    """From now on signals stop the service in order, or reload it; on the running event loop."""
    import asyncio  # it takes longer than all else here, and `prepare` must not wait for it

    loop = asyncio.get_running_loop()
    for number in STOPS:
        loop.add_signal_handler(number, stop, number)
    if has_terminal():
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGHUP, stop, signal.SIGINT)
    else:
        loop.add_signal_handler(signal.SIGHUP, reload)


def ignore() -> None:
    """Leave the signals of a whole process group to the supervisor."""
    for number in (*STOPS, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def has_terminal() -> bool:
    """Whether a terminal controls this process."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _end(number: int, _frame: FrameType | None) -> None:
    """End by this very signal; as process 1, which it does not end, with the exit code of that.

    Nothing has been accepted yet, and runners that are loading end by themselves.
    """
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)
