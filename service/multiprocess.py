"""Metrics of several workers as those of one service.

Each worker's values lie in files of a shared folder, which `prometheus_client` maps into memory. Whoever
scrapes any worker gets the sum over all, and of those that have died. `prometheus_client` reads the folder's
name when it is first imported: a worker is born with it in its environment.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, PlatformCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from service.cgroup import Cgroup
from service.errors import StartError
from service.processes import Container, Processes

log = logging.getLogger(__name__)

FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The variable that tells `prometheus_client` where the files are."""

_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a folder inside it is made, for this user alone
"""A file system in memory: writable in containers whose own is not, and never waiting for a disk."""

_SUMMED: Final = ("counter", "histogram")
"""Types whose values outlive the worker; a gauge is about the living."""


@contextmanager
def metrics_folder() -> Iterator[Path]:
    """A fresh folder, removed at the end. Raises `StartError` if there is no place for one."""
    memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    try:
        folder = Path(tempfile.mkdtemp(prefix="fovea-", dir=memory))
    except OSError as error:
        raise StartError(f"several workers need a temporary folder (TMPDIR): {error.strerror}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def shared_registry(folder: Path, supervisor: int) -> CollectorRegistry:
    """What a scrape of any worker shows. `supervisor` is the process that all workers belong to."""
    registry = CollectorRegistry()
    registry.register(_AllWorkers(folder))
    registry.register(Processes(supervisor))
    registry.register(Container(Cgroup()))
    PlatformCollector(registry=registry)
    return registry


def fold(folder: Path, pid: int) -> None:
    """Add what a dead worker has counted to one file for all the dead, and remove its own."""
    with _locked(folder, fcntl.LOCK_EX):
        for kind in _SUMMED:
            dead = folder / f"{kind}_{pid}.db"
            if dead.exists():
                _add(folder / f"{kind}_dead.db", dead)
        for left in folder.glob(f"*_{pid}.db"):
            left.unlink()


def _add(total: Path, dead: Path) -> None:
    files = [str(path) for path in (total, dead) if path.exists()]
    fresh = total.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    try:
        merged = MultiProcessCollector.merge(files, accumulate=False)  # type: ignore[no-untyped-call]
    except (ValueError, OSError) as error:  # killed while it wrote
        log.error("the metrics of a worker that died are lost: %s", error)
        return
    values = MmapedDict(str(fresh))  # type: ignore[no-untyped-call]
    for metric in merged:
        for sample in metric.samples:
            names, labels = list(sample.labels), list(sample.labels.values())
            key = mmap_key(metric.name, sample.name, names, labels, metric.documentation)
            values.write_value(key, sample.value, 0.0)  # type: ignore[no-untyped-call]
    values.close()  # type: ignore[no-untyped-call]
    fresh.replace(total)


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Nobody reads while the dead are added up: what is in two files would count twice."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, how)
        yield


class _AllWorkers(Collector):
    """The sum of all workers' files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._collector = MultiProcessCollector(None, str(folder))  # type: ignore[no-untyped-call]

    def collect(self) -> Iterator[Metric]:
        with _locked(self._folder, fcntl.LOCK_SH):
            yield from list(self._collector.collect())  # type: ignore[no-untyped-call]
