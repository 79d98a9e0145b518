"""Code that the runners of a real service execute at their start, to make them behave as a test needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from tests.servers import ROOT

_SITECUSTOMIZE: Final = """
import sys

if "fork_server_process" in " ".join(sys.orig_argv):
    from fovea.service.runners import process

    serve = process.main

    def main(*arguments):
        exec({code!r}, {{"__file__": __file__}})
        serve(*arguments)

    process.main = main
"""


def write_runner_code(folder: Path, code: str) -> dict[str, str]:
    """Return environment variables with which every runner executes `code` before it serves.

    The code finds `folder` as the parent of its `__file__`.
    """
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(code=code))
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
