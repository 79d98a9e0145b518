"""Run the command in this process, and read its error line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from fovea import cli

Command = Callable[..., int]
"""Function that runs `fovea` with its arguments and returns the exit code."""


def make_command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs the command in this process."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["fovea", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info, _restore_signals():
            cli.main()
        code = exit_info.value.code
        assert isinstance(code, int)
        return code

    return run


@contextmanager
def _restore_signals() -> Iterator[None]:
    """Restore the signal handlers: `fovea serve` replaces those of this process, in which other tests run."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)


def read_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the text on stderr, which must be one line that starts with `fovea: `."""
    text = capsys.readouterr().err
    assert text.startswith("fovea: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text
