"""The command in this process: what it is called like, and what it writes when it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

import fovea

Command = Callable[..., int]
"""`fovea` with these arguments; gives its exit code."""


def caller(monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command, called by name in this process."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["fovea", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            fovea.main()
        code = ended.value.code
        assert isinstance(code, int)
        return code

    return run


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was written to stderr: one line, in the command's name."""
    written = capsys.readouterr().err
    assert written.startswith("fovea: ")
    assert written.endswith("\n")
    assert written.count("\n") == 1
    return written
