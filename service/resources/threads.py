"""Available processors, and their division among runners and threads.

ONNX Runtime and Python count the cores of the host, but a container may have a fraction of them. The
effective limit is the smaller of the CPU affinity (which includes the cpuset) and the cgroup quota.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fovea.service.providers import PROVIDERS, ProviderSetting
from fovea.service.resources.cgroup import Cgroup
from fovea.service.settings import Settings

_NVIDIA_DEVICE: Final = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class ThreadPlan:
    """The number of processes and threads that run models. All of them sleep when there is no work."""

    cpus: float
    """Number of usable processors; fractional under a quota."""
    runners: int
    """Number of processes that decode and run batches, one batch at a time each."""
    runner_threads: int
    """Number of CPU threads inside one model call."""
    wide_threads: int
    """Number of CPU threads inside an exclusive model call; 0 if it gets no extra threads."""
    decode_threads: int
    """Number of images of one batch that are decoded at the same time."""


def plan_threads(settings: Settings, cpus: float, *, gpu: bool = False) -> ThreadPlan:
    """Return the thread plan for `cpus` processors. Explicit settings take precedence.

    By default each processor gets one single-threaded runner. At full load this spreads the work, and no
    thread waits for another. An exclusive call, beside which no other call runs, uses all processors instead.
    With a GPU there are two runners: one decodes with half of the processors while the batch of the other
    runner is on the GPU.
    """
    cpu_count = max(1, math.ceil(cpus))
    runner_threads = settings.runner_threads or 1
    runners = settings.runners or (2 if gpu else max(1, cpu_count // runner_threads))
    return ThreadPlan(
        cpus=cpus,
        runners=runners,
        runner_threads=runner_threads,
        wide_threads=0 if settings.runner_threads or gpu or cpu_count == 1 else cpu_count,
        decode_threads=settings.decode_threads or (max(1, cpu_count // runners) if gpu else 1),
    )


def expects_gpu(provider: ProviderSetting) -> bool:
    """Return True if models will run on a GPU.

    The answer depends on the installed files, because the service itself does not load ONNX Runtime.
    """
    if provider != "auto":
        return PROVIDERS[provider].is_gpu
    runtime = importlib.util.find_spec("onnxruntime")
    folders = runtime.submodule_search_locations if runtime else None
    libraries = [Path(folder) / "capi" / "libonnxruntime_providers_cuda.so" for folder in folders or ()]
    return _NVIDIA_DEVICE.exists() and any(library.exists() for library in libraries)


def get_thread_count() -> int:
    """Return the number of threads that keep all usable processors busy."""
    return math.ceil(available_cpus())


def available_cpus(cgroup: Cgroup | None = None) -> float:
    """Return the number of usable processors: the CPU affinity, or the cgroup quota if it is smaller."""
    affinity = float(len(os.sched_getaffinity(0)))
    return min(affinity, (cgroup or Cgroup()).cpu_quota() or affinity)
