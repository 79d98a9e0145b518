"""The frame of a converter: it reports refusals and missing packages to the import that has started it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.sources.conversion import MISSING_PACKAGE_CODE, REFUSAL_CODE
from fovea.service.errors import to_one_line

_PARENT_INTERVAL: Final = 0.5
"""Interval at which the parent process is looked for, in seconds."""


def run_child(convert: Callable[..., None]) -> None:
    """Run `convert` with the arguments of this process, and exit."""
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        convert(*sys.argv[1:])
    except ModuleNotFoundError as error:
        _exit((error.name or "a package").partition(".")[0], MISSING_PACKAGE_CODE)
    except ImportRefused as error:
        _exit(to_one_line(error), REFUSAL_CODE)
    except Exception as error:  # of any library
        _exit(f"{type(error).__name__}: {to_one_line(error)}", 1)


def _exit_with_parent(parent: int) -> None:
    """Exit when the import has been killed, which then cannot end its converter."""
    while os.getppid() == parent:
        time.sleep(_PARENT_INTERVAL)
    os._exit(1)


def _exit(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)
