"""The command line of this process, as text."""

from __future__ import annotations

import shlex
import sys


def format_command_line() -> str:
    """Return the command line of this process, which models and checkpoints record.

    A question mark replaces each byte that is not UTF-8.
    """
    return shlex.join(["fovea", *sys.argv[1:]]).encode(errors="replace").decode()
