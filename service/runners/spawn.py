"""How a process of the service's own is started: a runner, a trial, one that explains."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

ENVIRONMENT: Final = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "4194304",
    "MALLOC_TRIM_THRESHOLD_": "4194304",
    "PILLOW_BLOCKS_MAX": "4",
}
"""Unless the service's own environment says otherwise. By default glibc raises its thresholds
with every large image and keeps blocks of up to 32 MB (mallopt(3)): memory would grow with the largest.
Pillow keeps four of its blocks of at most 16 MB instead: fresh pages took an eighth of the time of a phone's
photograph."""

PATIENCE: Final = 10
"""How many times its processor time a load or a trial may last: others are at work too."""

_CODE: Final = (
    "import sys; sys.path[:] = {path!r}; import fovea.service.{module} as process; process.main{arguments}"
)
"""What the interpreter is started with: it must find the modules where this one has."""


def start(
    module: str, descriptors: Sequence[int], *limits: int, quiet: bool = False
) -> subprocess.Popen[bytes]:
    """Run `main(*descriptors, *limits)` of a module of `fovea.service` in a process that has these files too.

    `quiet`: what native libraries say on their way out is not shown. Raises `OSError`.
    """
    arguments = (*descriptors, *limits)
    return subprocess.Popen(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-c", _CODE.format(path=sys.path, module=module, arguments=arguments)],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if quiet else None,
        process_group=0,  # a terminal's Ctrl-C is for the service
        env={**ENVIRONMENT, **os.environ},
    )
