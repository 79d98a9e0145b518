"""How many processors this process may use, and how they are shared out.

ONNX Runtime and Python count the host's cores; a container may have a fraction of them. What
counts is the smallest of the CPU affinity (which includes the cpuset) and the cgroup quota.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fovea.service.resources.cgroup import Cgroup
from fovea.service.settings import Settings

_NVIDIA: Final = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class ThreadPlan:
    """Which processes and threads run models. All of them sleep when there is nothing to do."""

    cpus: float
    """Processors that may be used, fractional under a quota."""
    runners: int
    """Processes that decode and run batches, one at a time each."""
    runner_threads: int
    """Threads inside one model call."""
    wide_threads: int
    """Threads inside a model call that is alone; 0 where it is like any other."""
    decode_threads: int
    """Images of one batch that are decoded at the same time."""


def plan(settings: Settings, cpus: float, *, cuda: bool = False) -> ThreadPlan:
    """Share `cpus` processors out, unless the settings say otherwise.

    One single-threaded runner a processor: at full load the work is then spread with no thread ever
    waiting for another. A call that is alone takes all processors instead. With CUDA two runners, of
    which one decodes, with half of the processors, while the other's batch is on the GPU.
    """
    whole = max(1, math.ceil(cpus))
    runner_threads = settings.runner_threads or 1
    runners = settings.runners or (2 if cuda else max(1, whole // runner_threads))
    return ThreadPlan(
        cpus=cpus,
        runners=runners,
        runner_threads=runner_threads,
        wide_threads=0 if settings.runner_threads or cuda or whole == 1 else whole,
        decode_threads=settings.decode_threads or (max(1, whole // runners) if cuda else 1),
    )


def expects_cuda(provider: str) -> bool:
    """Will models run on CUDA? Told by what is installed: the service itself does not load ONNX Runtime."""
    if provider != "auto":
        return provider == "cuda"
    runtime = importlib.util.find_spec("onnxruntime")
    folders = runtime.submodule_search_locations if runtime else None
    libraries = [Path(folder) / "capi" / "libonnxruntime_providers_cuda.so" for folder in folders or ()]
    return _NVIDIA.exists() and any(library.exists() for library in libraries)


def available_cpus(cgroup: Cgroup | None = None) -> float:
    """Processors that this process may use: affinity, or the cgroup quota where that is less."""
    affinity = float(len(os.sched_getaffinity(0)))
    return min(affinity, (cgroup or Cgroup()).cpus() or affinity)
