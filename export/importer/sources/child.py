"""The frame of a converter: it reports refusals and missing packages to the import that has started it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.sources.conversion import MISSING_PACKAGE_CODE, REFUSAL_CODE
from fovea.service.errors import to_one_line


def run_child(convert: Callable[..., None]) -> None:
    """Run `convert` with the arguments of this process, and exit."""
    try:
        convert(*sys.argv[1:])
    except ModuleNotFoundError as error:
        _exit((error.name or "a package").partition(".")[0], MISSING_PACKAGE_CODE)
    except ImportRefused as error:
        _exit(to_one_line(error), REFUSAL_CODE)
    except Exception as error:  # of any library
        _exit(f"{type(error).__name__}: {to_one_line(error)}", 1)


def _exit(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)
