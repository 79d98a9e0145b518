"""Converters in a child process, with limits of time and memory.

A converter runs code of large packages on files from elsewhere. Its crash, its appetite for memory and its
warnings must not reach the import.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final

import fovea
from fovea.export.importer.foreign_model import ImportRefused
from fovea.service.errors import to_one_line
from fovea.service.resources.cgroup import Cgroup

REFUSAL_CODE: Final = 3
"""Exit code of a converter whose last line on stderr is a sentence for the user."""

MISSING_PACKAGE_CODE: Final = 4
"""Exit code of a converter whose last line on stderr is the name of a package that is missing."""

_POLL_INTERVAL: Final = 0.1
"""Interval at which the memory of a converter is read, in seconds."""

_MEMORY_SHARE: Final = 0.8
"""Share of the memory of this machine or container that a converter may use."""

_INSTALL_COMMANDS: Final = {
    "transformers": "pip install 'fovea-serve[hub]'",
    "timm": "pip install timm",
    "torchvision": "pip install torchvision",
    "tf2onnx": "pip install 'fovea-serve[tflite]'",
    "tensorflow": "pip install 'fovea-serve[tflite]'",
}
"""Command that installs each package; others are installed by their own name."""


@dataclass(frozen=True)
class Limits:
    """The limits of one converter."""

    seconds: float = 900.0
    memory_bytes: int | None = None
    """Limit of resident memory in bytes; None for 80 % of the memory of this machine or container."""


def run_converter(
    module: str,
    arguments: Sequence[str | Path],
    *,
    what: str,
    limits: Limits | None = None,
    may_download: bool = False,
) -> None:
    """Run `python -m module arguments` to its end.

    `what` names the converted file for messages. Without `may_download`, libraries
    of the hub use no network. Raises `ImportRefused` if the converter refuses the file,
    fails, or exceeds a limit.
    """
    limits = limits or Limits()
    memory_limit = limits.memory_bytes or int(_MEMORY_SHARE * _find_memory_bytes())
    with TemporaryFile() as errors:
        process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=_create_environment(os.environ, may_download=may_download),
            start_new_session=True,
        )
        try:
            reason = _wait(process, limits.seconds, memory_limit)
        finally:
            _end(process)
        if reason:
            raise ImportRefused(f"the conversion of {what} {reason}")
        if process.returncode:
            errors.seek(0)
            text = errors.read().decode(errors="replace")
            raise ImportRefused(_describe_failure(process.returncode, text, what))


def _wait(process: subprocess.Popen[bytes], seconds: float, memory_limit: int) -> str:
    """Wait for the end. Return the limit that the process has exceeded, or an empty text."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_INTERVAL)
            return ""
        if time.monotonic() > deadline:
            return f"took more than {seconds:g} s and was ended"
        used = _read_resident_bytes(process.pid)
        if used > memory_limit:
            return (
                f"needed {used / 1e9:.1f} GB of memory, more than the limit of {memory_limit / 1e9:.1f} GB; "
                "convert it on a machine with more memory"
            )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children, and wait for it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_resident_bytes(process_id: int) -> int:
    """Return the resident memory of a process in bytes; 0 where the system does not tell."""
    try:
        pages = Path(f"/proc/{process_id}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _find_memory_bytes() -> int:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(machine, Cgroup().memory_limit_bytes() or machine)


def _create_environment(environment: Mapping[str, str], *, may_download: bool) -> dict[str, str]:
    """Return the environment: this Fovea and no other code, no network, no messages of the packages."""
    root = str(Path(next(iter(fovea.__path__))).parent)
    paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
    return {
        **environment,
        **({} if may_download else {"HF_HUB_OFFLINE": "1"}),
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",  # else `python -m` imports modules from the current folder first
        "PYTHONWARNINGS": "ignore",
    }


def _describe_failure(code: int, text: str, what: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last_line = lines[-1] if lines else ""
    if code == REFUSAL_CODE and last_line:
        return last_line
    if code == MISSING_PACKAGE_CODE and last_line:
        command = _INSTALL_COMMANDS.get(last_line, f"pip install {last_line}")
        return f"the conversion of {what} needs {last_line}: {command}"
    if code < 0:
        with suppress(ValueError):
            return f"the conversion of {what} was ended by {signal.Signals(-code).name}"
    return f"the conversion of {what} failed: {to_one_line(ValueError(last_line)) or f'exit code {code}'}"
