"""Signal handling of the process, from its first moment on.

SIGTERM and SIGINT end the process at once until it is ready. After that they start an orderly shutdown
(`service.http.server`). SIGHUP makes the service check its repository; if the process has a terminal, SIGHUP
means that the terminal has closed, and stops the service. SIGUSR1 and other signals without a meaning here
are ignored.

A signal without a handler does not end process 1 of a container (pid_namespaces(7)). Without a handler such a
process would go on loading its models after SIGTERM.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

_IGNORED_SIGNALS: Final = (
    signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO,
    *(getattr(signal, name) for name in ("SIGPWR", "SIGSTKFLT") if hasattr(signal, name)),
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)  # fmt: skip
"""Signals that would end the process by default, but are never sent to end it."""


def install_start_handlers() -> None:
    """Install handlers with which signals end the process while it starts.

    Child processes inherit the ignored signals.
    """
    for number in _IGNORED_SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:  # otherwise someone has given the signal a meaning
            signal.signal(number, signal.SIG_IGN)
    for number in STOP_SIGNALS:
        signal.signal(number, _end_process)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # otherwise the process runs under nohup(1)
        signal.signal(signal.SIGHUP, _end_process if has_terminal() else signal.SIG_IGN)


def install_serving_handlers(stop: Callable[[int], None], reload: Callable[[], None]) -> None:
    """Make signals stop or reload the service from now on; requires a running event loop.

    The event loop runs the handlers between callbacks, so that `stop` and `reload` may use asyncio.
    """
    # Importing asyncio takes longer than the rest of this module, and `install_start_handlers` must not wait.
    import asyncio

    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop, number)
    if has_terminal():
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGHUP, stop, signal.SIGINT)
    else:
        loop.add_signal_handler(signal.SIGHUP, reload)


def ignore_signals() -> None:
    """Ignore signals that are sent to a whole process group; the supervisor handles them."""
    for number in (*STOP_SIGNALS, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def delay_interrupt() -> Iterator[None]:
    """Delay `KeyboardInterrupt` until the block has ended; a second Ctrl-C interrupts at once.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received_signals: list[int] = []

    def handle_interrupt(number: int, _frame: FrameType | None) -> None:
        if received_signals:
            raise KeyboardInterrupt
        received_signals.append(number)

    previous_handler = signal.signal(signal.SIGINT, handle_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    if received_signals:
        raise KeyboardInterrupt


def has_terminal() -> bool:
    """Return True if a terminal controls this process."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _end_process(number: int, _frame: FrameType | None) -> None:
    """End the process by the same signal.

    The signal does not end process 1, which exits with the equivalent exit code instead. No request has been
    accepted yet, and runners that are loading end by themselves.
    """
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)
