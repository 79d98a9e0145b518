"""Start of the service's own processes: runners, trials, and explaining processes."""

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
"""Environment variables of a new process, unless the service's own environment sets them.

By default glibc raises its thresholds with every large image and keeps blocks of up to 32 MB (mallopt(3)), so
memory would grow with the largest image. Instead, Pillow keeps four of its blocks of at most 16 MB: otherwise
the system's work on fresh pages takes an eighth of the decoding time of a phone's photograph.
"""

LOAD_TIMEOUT_FACTOR: Final = 10
"""Time limit of a load or a trial, as a multiple of its limit of processor time: other processes run too."""

_PROCESS_CODE: Final = (
    "import sys; sys.path[:] = {path!r}; import fovea.service.{module} as process; process.main{arguments}"
)
"""Code for the new interpreter. It uses the same module path as this process."""


def start_process(
    module: str, descriptors: Sequence[int], *limits: int, quiet: bool = False
) -> subprocess.Popen[bytes]:
    """Run `main(*descriptors, *limits)` of a module of `fovea.service` in a new process.

    The process inherits these file descriptors under the same numbers, and no others. The caller must keep
    them open until this function returns, and may close its copies afterwards. With `quiet`, standard error
    of the process is discarded: native libraries may write messages when they exit. Raises `OSError`.
    """
    arguments = (*descriptors, *limits)
    return subprocess.Popen(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-c", _PROCESS_CODE.format(path=sys.path, module=module, arguments=arguments)],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if quiet else None,
        process_group=0,  # Ctrl-C in a terminal then reaches only the service, which ends this process
        env={**ENVIRONMENT, **os.environ},
    )
