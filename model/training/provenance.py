"""The hardware and code version of a run, stored with its weights for reproducibility."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch


def describe_provenance() -> dict[str, str]:
    """Return the hardware, commit and torch version of the run."""
    return {"hardware": describe_hardware(), "commit": _describe_commit(), "torch": torch.__version__}


def describe_hardware() -> str:
    """Return the name of the GPU, or the number of threads and the CPU's name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{torch.get_num_threads()} threads of {name or platform.machine()}"


def _describe_commit() -> str:
    """Return the commit of the training code, with the suffix `-dirty` if the code was changed since."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],  # noqa: S607
            cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:  # no git here
        return "unknown"
    return result.stdout.strip() or "unknown"
