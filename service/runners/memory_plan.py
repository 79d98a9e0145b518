"""Division of the container's memory, as `service.resources.threads` does for processors.

A control group may be killed as a whole when one of its processes takes too much memory. The plan first sets
aside the memory that the processes need at rest. The limits for callers (images being decoded, waiting
bodies) share the rest. Settings made by hand are kept.
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

from fovea.service.resources import threads
from fovea.service.resources.cgroup import Cgroup
from fovea.service.settings import Settings

if TYPE_CHECKING:
    from fovea.service.runners.messages import Load

log = logging.getLogger(__name__)

_SERVICE_BYTES: Final = 70 << 20
"""Memory of a process that serves HTTP, at rest, in bytes (`make figures`: 56 MB)."""

_SUPERVISOR_BYTES: Final = 40 << 20
"""Memory of the supervisor of several workers, in bytes (measured: 32 MB)."""

_PROCESS_BYTES: Final = 58 << 20
"""Memory of a process with ONNX Runtime and Pillow but no model, in bytes (measured: 50 MB)."""

_COPIES: Final = 3
"""Memory of a loaded model, as a multiple of its file size.

It holds the weights, ONNX Runtime's prepared weights, and the activations of a batch.
"""

_USABLE: Final = 0.9
"""Share of the limit that is planned. The rest is for page tables, sockets and allocator fragmentation."""

_LEAST: Final = 48 << 20
"""Minimum memory for decoding and bodies, in bytes. To reach it, runners are left out, except one."""

_SPARE_DECODE_BYTES: Final = 16 << 20
_SPARE_DECODE_SHARE: Final = 8
"""Decoding memory of a trial or an explaining process: minimum in bytes, and divisor of `decode_bytes`."""

_BODIES_SHARE: Final = 1 / 4
"""Share of the remaining memory for waiting bodies. Runners decode in the rest."""

_IDLE: Final = 5.0
"""Seconds after which an unused explaining process ends, where memory is limited."""

_ROOMY: Final = 4 << 30
"""Memory limit in bytes from which Pillow may keep its blocks for the next image."""


class _Shares(NamedTuple):
    """The division of the memory limit, in bytes, for all workers together except `runners`."""

    limit: int
    runners: int
    """Number of runners of each worker."""
    planned_runners: int
    """Number of runners of each worker by the processors only."""
    left: int
    """Memory for callers in bytes; negative if the processes need more than the limit."""
    spare: int
    """Memory set aside for one more process in each worker: a trial or an explaining process."""
    missing: int
    """Bytes by which the limit is too small for `spare`; 0 if it is large enough."""


def fit(settings: Settings, cgroup: Cgroup | None = None) -> Settings:
    """Return the settings with limits lowered to the container's memory.

    Limits that were set by hand are kept. Without a memory limit nothing changes.
    """
    shares = _shares(settings, cgroup)
    if shares is None:
        return settings
    count = settings.workers * shares.runners
    if shares.left < _LEAST:
        log.warning(
            f"the container's memory limit of {_mb(shares.limit)} MB is little for {count} runners: with the "
            f"service they take {_mb(shares.limit * _USABLE - shares.left)} MB at rest"
        )
    elif not shares.spare:
        log.warning(
            f"the container's memory limit of {_mb(shares.limit)} MB leaves no memory to try new versions or "
            f"to explain with {count} runners: new versions wait and explanations are refused unless images "
            f"leave enough; give the container {_mb(shares.missing)} MB more, or lower FOVEA_RUNNERS or "
            "FOVEA_WORKERS"
        )
    left = max(shares.left - shares.spare, _LEAST)
    bodies = min(settings.bodies_bytes, int(left * _BODIES_SHARE) // settings.workers)
    if "body_bytes" in settings.model_fields_set:
        bodies = max(bodies, settings.body_bytes)
    fewer = shares.runners < shares.planned_runners
    values: dict[str, Any] = {
        "runners": shares.runners if fewer else settings.runners,
        "decode_bytes": min(settings.decode_bytes, int(left * (1 - _BODIES_SHARE))),
        "bodies_bytes": bodies,
        "body_bytes": min(settings.body_bytes, bodies // 2),
        "json_bytes": min(settings.json_bytes, bodies // 2),
        "explain_idle": min(settings.explain_idle, _IDLE),
        "connections": min(settings.connections, max(64, left // settings.workers // _CONNECTION_BYTES)),
    }
    lowered = {
        name: value
        for name, value in values.items()
        if value != getattr(settings, name) and name not in settings.model_fields_set
    }
    if shares.limit < _ROOMY:
        os.environ.setdefault("PILLOW_BLOCKS_MAX", "0")  # read by child processes, which inherit it
    if lowered:
        log.info(
            f"by the container's memory limit of {_mb(shares.limit)} MB: "
            + ", ".join(f"FOVEA_{name.upper()}={value:.12g}" for name, value in lowered.items())
        )
    return settings.model_copy(update=lowered)


def _shares(settings: Settings, cgroup: Cgroup | None) -> _Shares | None:
    """Return the division of the memory; None without a memory limit."""
    limit = (cgroup or Cgroup()).memory_limit_bytes()
    if limit is None:
        return None
    usable = int(limit * _USABLE)
    models = _model_sizes(settings)
    runner = _PROCESS_BYTES + _COPIES * sum(models)
    base = settings.workers * _SERVICE_BYTES + (_SUPERVISOR_BYTES if settings.workers > 1 else 0)
    planned = threads.plan(
        settings,
        threads.available_cpus(cgroup) / settings.workers,
        cuda=threads.expects_cuda(settings.provider),
    )
    most = max(1, (usable - base - _LEAST) // (settings.workers * runner))
    runners = settings.runners or min(planned.runners, most)
    left = usable - base - settings.workers * runners * runner
    spare = settings.workers * (_PROCESS_BYTES + 2 * _COPIES * max(models, default=0) + _SPARE_DECODE_BYTES)
    missing = max(0, spare + _LEAST - left)
    more = math.ceil(missing / _USABLE)
    return _Shares(limit, runners, planned.runners, left, 0 if missing else spare, more)


_CONNECTION_BYTES: Final = 64 << 10
"""Memory of an open connection with waiting headers, in bytes (`make soak`, with a large margin)."""


_CLAIM_SECONDS: Final = 30.0
"""Longest wait of a trial for memory, in seconds. A running explanation may finish first."""

_LOOK_SECONDS: Final = 0.25
"""Interval between two checks of the memory for decoding, in seconds."""


class SpareMemory:
    """Memory for temporary processes: the part set aside for them, and free decoding memory.

    A trial takes precedence over explanations. It may claim the memory of an explaining process, which would
    otherwise keep the memory as long as explanations are requested. Call every method on the event loop.
    """

    def __init__(
        self,
        aside: int,
        *,
        decode_bytes: int,
        reserve: Callable[[int], bool],
        give_back: Callable[[int], None],
    ) -> None:
        """Set the memory `aside` in bytes, and the functions for decoding memory.

        `reserve` takes decoding memory and returns False if it is not free. `give_back` returns it.
        """
        self._aside = aside
        self.decode_bytes = decode_bytes
        """Number of bytes that such a process may use to decode an image."""
        self._reserve = reserve
        self._give_back = give_back
        self._holders: list[Callable[[], None]] = []
        self._claims = 0
        self._changed = asyncio.Event()

    @property
    def is_claimed(self) -> bool:
        """True while a trial waits for memory: no explaining process may start."""
        return self._claims > 0

    def on_claim(self, end: Callable[[], None]) -> None:
        """Register `end`, which is called on the event loop when a trial needs memory.

        `end` must return the memory that it can, now or soon. It may be called repeatedly for one claim.
        """
        self._holders.append(end)

    def reserve(self, size: int) -> Callable[[], None] | None:
        """Take `size` bytes; return the function that returns them, or None when they are not free now.

        Decoding memory covers a shortage of the memory set aside: a new version may be a little larger than
        the version that the plan was made for.
        """
        aside = min(size, self._aside)
        if aside < size and not self._reserve(size - aside):
            return None
        self._aside -= aside
        return lambda: self._return(aside, size - aside)

    async def claim(self, size: int) -> Callable[[], None] | None:
        """Take `size` bytes before any explaining process gets them.

        Return the function that returns them, or None when they were not free within `_CLAIM_SECONDS`.
        """
        limit = asyncio.get_running_loop().time() + _CLAIM_SECONDS
        self._claims += 1
        try:
            while (give_back := self.reserve(size)) is None:
                if asyncio.get_running_loop().time() > limit:
                    return None
                # Explaining processes end asynchronously, so try to reserve again after the wait below.
                for end in self._holders:
                    end()
                with contextlib.suppress(TimeoutError):  # decoding memory is returned without a notice
                    await asyncio.wait_for(self._changed.wait(), _LOOK_SECONDS)
                self._changed.clear()
            return give_back
        finally:
            self._claims -= 1

    def _return(self, aside: int, reserved: int) -> None:
        self._aside += aside
        if reserved:
            self._give_back(reserved)
        self._changed.set()


def spare_memory(
    settings: Settings, reserve: Callable[[int], bool], give_back: Callable[[int], None]
) -> SpareMemory | None:
    """Return the spare memory of one worker; None if memory is not limited.

    `settings` must come from `fit`.
    """
    shares = _shares(settings, None)
    if shares is None:
        return None
    return SpareMemory(
        shares.spare // settings.workers,
        decode_bytes=max(_SPARE_DECODE_BYTES, settings.decode_bytes // _SPARE_DECODE_SHARE),
        reserve=reserve,
        give_back=give_back,
    )


def process_bytes(loads: Iterable[Load]) -> int:
    """Return the memory in bytes of one more process (a trial or explaining process) with these models."""
    return _PROCESS_BYTES + _COPIES * sum(_size(Path(load.file)) for load in loads)


def _model_sizes(settings: Settings) -> list[int]:
    """Return the file sizes of the latest versions, in bytes, for as many models as may be loaded."""
    root = settings.models
    if root.is_file():
        return [_size(root)]
    latest = sorted((_latest(folder) for folder in root.iterdir() if folder.is_dir()), reverse=True)
    return latest[: settings.models_loaded or None]


def _latest(folder: Path) -> int:
    versions: Mapping[int, Path] = {
        int(version.name): version / "model.onnx"
        for version in folder.iterdir()
        if version.name.isdecimal() and version.is_dir()
    }
    return _size(versions[max(versions)]) if versions else 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _mb(size: float) -> int:
    return round(size / (1 << 20))
