"""Division of the container's memory. `service.resources.threads` divides its processors.

A control group may be killed as a whole when one of its processes takes too much memory. The plan first sets
aside the memory that the processes need at rest. The limits for callers (images being decoded, waiting
bodies) share the rest. Limits that were set by hand are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fovea.service.artifact.repository import has_versions_of_one_model
from fovea.service.resources import threads
from fovea.service.resources.cgroup import Cgroup
from fovea.service.resources.model_memory import MODEL_COPIES
from fovea.service.settings import Settings

if TYPE_CHECKING:
    from fovea.service.runners.load_messages import LoadCommand

log = logging.getLogger(__name__)

_SERVICE_BYTES: Final = 62 << 20
"""Memory of a process that serves HTTP, at rest, in bytes (measured: 53 MB)."""

_GRPC_BYTES: Final = 16 << 20
"""Memory of the gRPC server in such a process, at rest, in bytes (measured: 12 MB)."""

_FORK_SERVER_BYTES: Final = 40 << 20
"""Memory of a fork server, in bytes: its own, and what it shares with its children (measured: 36 MB)."""

_SUPERVISOR_BYTES: Final = 40 << 20
"""Memory of the supervisor of several workers, in bytes (measured: 32 MB)."""

_PROCESS_BYTES: Final = 26 << 20
"""Memory of a child of the fork server without a model, in bytes, beside what it shares (measured: 15 MB)."""

USABLE_SHARE: Final = 0.9
"""Share of the limit that is planned. The rest is for page tables, sockets and allocator fragmentation."""

_MIN_CALLER_BYTES: Final = 48 << 20
"""Minimum memory for decoding and bodies, in bytes. To reach it, fewer runners are started, but at least one.
"""

_SPARE_DECODE_BYTES: Final = 16 << 20
_SPARE_DECODE_DIVISOR: Final = 8
"""Decoding memory of a trial or an explaining process: minimum in bytes, and divisor of `decode_bytes`."""

_BODIES_SHARE: Final = 1 / 4
"""Share of the remaining memory for waiting bodies. Runners decode in the rest."""

_GRPC_BODIES: Final = 3
"""Parts of that memory with FOVEA_GRPC_PORT: for bodies over HTTP, for gRPC messages that are being received
and for gRPC replies that nobody has read. Each part may take FOVEA_BODIES_BYTES."""

_IDLE_SECONDS: Final = 5.0
"""Seconds after which an unused explaining process ends, where memory is limited."""

_PILLOW_CACHE_BYTES: Final = 4 << 30
"""Memory limit of the container, in bytes, from which Pillow may keep its blocks for the next image."""


class _MemoryDivision(NamedTuple):
    """The division of the memory limit, in bytes, for all workers together except `runners`."""

    limit: int
    runners: int
    """Number of runners of each worker."""
    planned_runners: int
    """Number of runners of each worker that the processors allow."""
    caller_bytes: int
    """Memory for callers in bytes; negative if the processes need more than the limit."""
    spare_bytes: int
    """Memory set aside for one more process in each worker: a trial or an explaining process."""
    missing_bytes: int
    """Bytes by which the limit is too small for `spare_bytes`; 0 if it is large enough."""


def fit_to_memory(settings: Settings, cgroup: Cgroup | None = None) -> Settings:
    """Return the settings with limits lowered to the container's memory.

    Limits that were set by hand are kept. Without a memory limit nothing changes.
    """
    division = _divide_memory(settings, cgroup)
    if division is None:
        return settings
    limit = f"the container's memory limit of {_to_megabytes(division.limit)} MB"
    _warn_of_small_limit(limit, division, settings.workers * division.runners)
    caller_bytes = max(division.caller_bytes - division.spare_bytes, _MIN_CALLER_BYTES)
    parts = settings.workers * (1 if settings.grpc_port is None else _GRPC_BODIES)
    bodies_bytes = min(settings.bodies_bytes, int(caller_bytes * _BODIES_SHARE) // parts)
    if "body_bytes" in settings.model_fields_set:
        bodies_bytes = max(bodies_bytes, settings.body_bytes)
    has_fewer_runners = division.runners < division.planned_runners
    values: dict[str, Any] = {
        "runners": division.runners if has_fewer_runners else settings.runners,
        "decode_bytes": min(settings.decode_bytes, int(caller_bytes * (1 - _BODIES_SHARE))),
        "bodies_bytes": bodies_bytes,
        "body_bytes": min(settings.body_bytes, bodies_bytes // 2),
        "json_bytes": min(settings.json_bytes, bodies_bytes // 2),
        "explain_idle": min(settings.explain_idle, _IDLE_SECONDS),
        "connections": min(
            settings.connections, max(64, caller_bytes // settings.workers // _CONNECTION_BYTES)
        ),
    }
    lowered_limits = {
        name: value
        for name, value in values.items()
        if value != getattr(settings, name) and name not in settings.model_fields_set
    }
    if division.limit < _PILLOW_CACHE_BYTES:
        # Before any process is started: runners inherit the variable, and Pillow reads it when it is
        # imported.
        os.environ.setdefault("PILLOW_BLOCKS_MAX", "0")
    if lowered_limits:
        log.info(
            f"lowered to fit {limit}: "
            + ", ".join(f"FOVEA_{name.upper()}={value:.12g}" for name, value in lowered_limits.items())
        )
    return settings.model_copy(update=lowered_limits)


def _warn_of_small_limit(limit: str, division: _MemoryDivision, runner_count: int) -> None:
    if division.caller_bytes < _MIN_CALLER_BYTES:
        resting_bytes = division.limit * USABLE_SHARE - division.caller_bytes
        log.warning(
            f"{limit} is too small for {runner_count} runners: with the service they take "
            f"{_to_megabytes(resting_bytes)} MB at rest, and images need {_to_megabytes(_MIN_CALLER_BYTES)} "
            "MB; give the container more memory, or lower FOVEA_RUNNERS or FOVEA_WORKERS"
        )
    elif not division.spare_bytes:
        log.warning(
            f"{limit} leaves no memory to try new versions or to explain with {runner_count} runners: new "
            "versions wait and explanations are refused unless images leave enough free; give the container "
            f"{_to_megabytes(division.missing_bytes)} MB more, or lower FOVEA_RUNNERS or FOVEA_WORKERS"
        )


def _divide_memory(settings: Settings, cgroup: Cgroup | None) -> _MemoryDivision | None:
    """Return the division of the memory; None without a memory limit."""
    limit = (cgroup or Cgroup()).memory_limit_bytes()
    if limit is None:
        return None
    usable_bytes = int(limit * USABLE_SHARE)
    model_sizes = _model_sizes(settings)
    runner_bytes = _PROCESS_BYTES + MODEL_COPIES * sum(model_sizes)
    grpc_bytes = 0 if settings.grpc_port is None else _GRPC_BYTES
    base_bytes = settings.workers * (_SERVICE_BYTES + grpc_bytes + _FORK_SERVER_BYTES)
    if settings.workers > 1:
        base_bytes += _SUPERVISOR_BYTES
    thread_plan = threads.plan_threads(
        settings,
        threads.available_cpus(cgroup) / settings.workers,
        gpu=threads.expects_gpu(settings.provider),
    )
    max_runners = max(1, (usable_bytes - base_bytes - _MIN_CALLER_BYTES) // (settings.workers * runner_bytes))
    runners = settings.runners or min(thread_plan.runners, max_runners)
    caller_bytes = usable_bytes - base_bytes - settings.workers * runners * runner_bytes
    spare_bytes = settings.workers * (
        _PROCESS_BYTES + 2 * MODEL_COPIES * max(model_sizes, default=0) + _SPARE_DECODE_BYTES
    )
    shortage = max(0, spare_bytes + _MIN_CALLER_BYTES - caller_bytes)
    missing_bytes = math.ceil(shortage / USABLE_SHARE)
    return _MemoryDivision(
        limit, runners, thread_plan.runners, caller_bytes, 0 if shortage else spare_bytes, missing_bytes
    )


_CONNECTION_BYTES: Final = 64 << 10
"""Memory of an open connection with waiting headers, in bytes (`make soak`, with a large margin)."""


_CLAIM_SECONDS: Final = 30.0
"""Longest wait of a trial for memory, in seconds. A running explanation may finish first."""

_CHECK_SECONDS: Final = 0.25
"""Interval between two checks of the memory for decoding, in seconds."""


class SpareMemory:
    """Memory for temporary processes: the part set aside for them, and free decoding memory.

    A trial takes precedence over explanations. It may claim the memory of an explaining process, which would
    otherwise keep the memory as long as explanations are requested. Call every method on the event loop. Each
    function that `reserve` and `claim` return must be called exactly once, when the process ends.
    """

    def __init__(
        self,
        spare_bytes: int,
        *,
        decode_bytes: int,
        reserve: Callable[[int], bool],
        release: Callable[[int], None],
    ) -> None:
        """Set the memory `spare_bytes` in bytes, and the functions for decoding memory.

        `reserve` takes decoding memory and returns False if it is not free. `release` returns it. Both are
        called on the event loop.
        """
        self._spare_bytes = spare_bytes
        self.decode_bytes = decode_bytes
        """Number of bytes that a temporary process may use to decode an image."""
        self._reserve_decode_memory = reserve
        self._release_decode_memory = release
        self._claim_callbacks: list[Callable[[], None]] = []
        self._claim_count = 0
        self._change_event = asyncio.Event()

    @property
    def is_claimed(self) -> bool:
        """True while a trial waits for memory: no explaining process may start."""
        return self._claim_count > 0

    def add_claim_callback(self, callback: Callable[[], None]) -> None:
        """Register `callback`, which `claim` calls on the event loop when a trial needs memory.

        `callback` must release the memory that it can, now or soon. It may be called repeatedly for one
        claim.
        """
        self._claim_callbacks.append(callback)

    def reserve(self, size: int) -> Callable[[], None] | None:
        """Take `size` bytes; return the function that returns them, or None when they are not free now.

        Decoding memory covers a shortage of the memory set aside: a new version may be a little larger than
        the version that the plan was made for.
        """
        spare_bytes = min(size, self._spare_bytes)
        if spare_bytes < size and not self._reserve_decode_memory(size - spare_bytes):
            return None
        self._spare_bytes -= spare_bytes
        return lambda: self._release(spare_bytes, size - spare_bytes)

    async def claim(self, size: int) -> Callable[[], None] | None:
        """Take `size` bytes. Until then, no explaining process gets memory (`is_claimed`).

        Return the function that returns them, or None when they were not free within `_CLAIM_SECONDS`.
        """
        deadline = asyncio.get_running_loop().time() + _CLAIM_SECONDS
        # Before the first `await`: an explaining process that starts in the meantime must see the claim.
        self._claim_count += 1
        try:
            while (release := self.reserve(size)) is None:
                if asyncio.get_running_loop().time() > deadline:
                    return None
                # A process that is answering ends later; `_release` sets the event then.
                for callback in self._claim_callbacks:
                    callback()
                # Check at intervals too: decoding memory that becomes free sets no event.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._change_event.wait(), _CHECK_SECONDS)
                self._change_event.clear()
            return release
        finally:
            self._claim_count -= 1

    def _release(self, spare_bytes: int, decode_bytes: int) -> None:
        self._spare_bytes += spare_bytes
        if decode_bytes:
            self._release_decode_memory(decode_bytes)
        self._change_event.set()


def create_spare_memory(
    settings: Settings, reserve: Callable[[int], bool], release: Callable[[int], None]
) -> SpareMemory | None:
    """Return the spare memory of one worker; None if memory is not limited.

    `settings` must come from `fit_to_memory`.
    """
    division = _divide_memory(settings, None)
    if division is None:
        return None
    return SpareMemory(
        division.spare_bytes // settings.workers,
        decode_bytes=max(_SPARE_DECODE_BYTES, settings.decode_bytes // _SPARE_DECODE_DIVISOR),
        reserve=reserve,
        release=release,
    )


def estimate_process_bytes(loads: Iterable[LoadCommand]) -> int:
    """Return the memory in bytes of one more process (a trial or explaining process) with these models."""
    return _PROCESS_BYTES + MODEL_COPIES * sum(_file_size(Path(load.file)) for load in loads)


def _model_sizes(settings: Settings) -> list[int]:
    """Return the file sizes of the latest versions, in bytes, for as many models as may be loaded."""
    root = settings.models
    if root.is_file():
        return [_file_size(root)]
    if has_versions_of_one_model(root):
        return [_latest_version_size(root)]
    latest = sorted(
        (_latest_version_size(folder) for folder in root.iterdir() if folder.is_dir()), reverse=True
    )
    return latest[: settings.models_loaded or None]


def _latest_version_size(folder: Path) -> int:
    versions: Mapping[int, Path] = {
        int(version.name): version / "model.onnx"
        for version in folder.iterdir()
        if version.name.isdecimal() and version.is_dir()
    }
    return _file_size(versions[max(versions)]) if versions else 0


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _to_megabytes(size: float) -> int:
    return round(size / (1 << 20))
