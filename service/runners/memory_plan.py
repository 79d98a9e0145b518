"""How the memory that a container may use is shared out, as `service.resources.threads` does for processors.

Nobody may be killed for want of memory: a control group may end as a whole when one of its processes takes
too much. So what the processes need at rest is set aside first, and the limits of what callers can make the
service take (images that are decoded, bodies that wait) share the rest. What was set by hand stays as it is.
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
"""Memory of a process that serves HTTP, at rest (`make figures`: 56 MB)."""

_SUPERVISOR_BYTES: Final = 40 << 20
"""Memory of the supervisor of several workers (32 MB)."""

_PROCESS_BYTES: Final = 58 << 20
"""Memory of a process with ONNX Runtime and Pillow, without a model (50 MB)."""

_COPIES: Final = 3
"""Memory of a loaded model, by the size of its file: the weights, what ONNX Runtime prepares of them, and the
activations of a batch."""

_USABLE: Final = 0.9
"""Share of the limit that is planned with: the rest is for page tables, sockets and the allocator's gaps."""

_LEAST: Final = 48 << 20
"""Memory for decoding and bodies below which runners are left out, as long as there is another one."""

_SPARE_DECODE_BYTES: Final = 16 << 20
_SPARE_DECODE_SHARE: Final = 8
"""What a process that explains or tries a version has to decode an image: bytes at least, and the share of
the memory for decoding."""

_BODIES_SHARE: Final = 1 / 4
"""Share of what is left for bodies that wait; runners decode in the rest."""

_IDLE: Final = 5.0
"""Seconds after which an unused explaining process ends, where memory is limited."""

_ROOMY: Final = 4 << 30
"""Memory from which on Pillow may keep its blocks for the next image."""


class _Shares(NamedTuple):
    """What a memory limit is used for, in bytes, of all workers together but for `runners`."""

    limit: int
    runners: int
    """Of each worker."""
    planned_runners: int
    """By the processors alone."""
    left: int
    """For what callers can make the service take; negative where the processes need more than there is."""
    spare: int
    """Set aside for one more process in each worker: a trial, or one that explains."""
    missing: int
    """Bytes of limit more with which memory could be set aside for it; 0 where it is."""


def fit(settings: Settings, cgroup: Cgroup | None = None) -> Settings:
    """Return the settings with those limits lowered that the container's memory has no room for.

    Limits that were set by hand are kept. Where there is no memory limit nothing changes.
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
        os.environ.setdefault("PILLOW_BLOCKS_MAX", "0")  # children inherit it
    if lowered:
        log.info(
            f"by the container's memory limit of {_mb(shares.limit)} MB: "
            + ", ".join(f"FOVEA_{name.upper()}={value:.12g}" for name, value in lowered.items())
        )
    return settings.model_copy(update=lowered)


def _shares(settings: Settings, cgroup: Cgroup | None) -> _Shares | None:
    """None where there is no memory limit."""
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
"""Memory of an open connection with headers that wait (`make soak`), several times over."""


_CLAIM_SECONDS: Final = 30.0
"""Longest wait of a trial for memory. An explanation that is being made may finish first."""

_LOOK_SECONDS: Final = 0.25
"""Time between two looks at the memory for decoding."""


class SpareMemory:
    """The memory of processes that come and go: what is set aside for them, and what decoding has free.

    A trial comes before explanations: it may claim the memory that a process which explains has, as that
    process would otherwise keep it as long as somebody asks. Every method must be called on the event loop.
    """

    def __init__(
        self,
        aside: int,
        *,
        decode_bytes: int,
        reserve: Callable[[int], bool],
        give_back: Callable[[int], None],
    ) -> None:
        """`aside` is in bytes; `reserve` takes memory from decoding, and says whether it was free."""
        self._aside = aside
        self.decode_bytes = decode_bytes
        """How much such a process may use to decode an image."""
        self._reserve = reserve
        self._give_back = give_back
        self._holders: list[Callable[[], None]] = []
        self._claims = 0
        self._changed = asyncio.Event()

    @property
    def is_claimed(self) -> bool:
        """Whether a trial waits for memory: no process that explains may start."""
        return self._claims > 0

    def on_claim(self, end: Callable[[], None]) -> None:
        """Call `end` when a trial needs memory. It must give back what it can, now or soon."""
        self._holders.append(end)

    def reserve(self, size: int) -> Callable[[], None] | None:
        """Take `size` bytes; return the function that gives them back, or None when they are not free now.

        Memory for decoding makes up for what is set aside: a new version may be a little larger than the one
        that was reckoned with at the start.
        """
        aside = min(size, self._aside)
        if aside < size and not self._reserve(size - aside):
            return None
        self._aside -= aside
        return lambda: self._return(aside, size - aside)

    async def claim(self, size: int) -> Callable[[], None] | None:
        """Take `size` bytes before any process that explains gets them.

        Return the function that gives them back, or None when they were not free for `_CLAIM_SECONDS`.
        """
        limit = asyncio.get_running_loop().time() + _CLAIM_SECONDS
        self._claims += 1
        try:
            while (give_back := self.reserve(size)) is None:
                if asyncio.get_running_loop().time() > limit:
                    return None
                for end in self._holders:
                    end()
                with contextlib.suppress(TimeoutError):  # images give their memory back without a word
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
    """Return the spare memory of one worker with these settings, as `fit` has made them; None where memory is
    not limited."""
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
    """Return what one more process takes that loads these models: a trial, or one that explains."""
    return _PROCESS_BYTES + _COPIES * sum(_size(Path(load.file)) for load in loads)


def _model_sizes(settings: Settings) -> list[int]:
    """Return the sizes of the latest versions' files, of as many models as may be loaded."""
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
