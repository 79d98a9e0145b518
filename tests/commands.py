"""The command in this process: what it is called like, and what it writes when it refuses."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from fovea import cli

Command = Callable[..., int]
"""`fovea` with these arguments; gives its exit code."""


def make_command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command, called by name in this process."""

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
    """`fovea serve` takes over the signals of its process, which here is that of all other tests."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)


def read_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was written to stderr: one line, in the command's name."""
    text = capsys.readouterr().err
    assert text.startswith("fovea: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text
