"""Metrics of several workers as those of one service.

The values of each process lie in memory files (memfd_create(2)): they have no place in a file system, so that
no full, small, read-only or swept folder can take them away. The supervisor makes the files, the worker maps
them, and whoever scrapes any worker gets the sum over all, and of those that have died.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry, PlatformCollector, values
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from fovea.service.observability.metrics import ProcessMetrics
from fovea.service.observability.process_metrics import Container, Processes
from fovea.service.resources.cgroup import Cgroup

log = logging.getLogger(__name__)

KINDS: Final = ("counter", "histogram", "gauge_livesum", "gauge_livemax")
"""Every kind of metric that we have, and how gauges add up. Each process has a file for each."""

_SUMMED: Final = ("counter", "histogram")
"""Kinds whose values outlive the worker; a gauge is about the living."""

_HEADER: Final = struct.Struct("qq")
"""Of the index: a number that is odd while something changes, and the size in bytes of what follows."""

_PATIENCE: Final = 1.0
"""Seconds for a change to end; then the supervisor has died in the midst of it."""


_Labels = tuple[tuple[str, str], ...]


class MetricFiles:
    """The values of one process: a memory file for each kind."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        """`descriptors` are those of the files, in the order of `KINDS`."""
        self.descriptors = tuple(descriptors)

    @classmethod
    def create(cls) -> MetricFiles:
        """Make empty ones. Raises `OSError` when the system has no room."""
        descriptors: list[int] = []
        try:
            for kind in KINDS:
                descriptors.append(os.memfd_create(f"fovea-{kind}"))
                MmapedDict(f"/proc/self/fd/{descriptors[-1]}").close()  # type: ignore[no-untyped-call]
        except BaseException:
            cls(descriptors).close()
            raise
        return cls(descriptors)

    def open(self) -> dict[str, MmapedDict]:
        """Map them, by kind."""
        paths = (f"/proc/self/fd/{descriptor}" for descriptor in self.descriptors)
        return {kind: MmapedDict(path) for kind, path in zip(KINDS, paths, strict=True)}  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Let go of them."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def write_to(files: MetricFiles) -> None:
    """Keep the values of all metrics that this process makes from now on in these files."""
    dicts = files.open()
    lock = threading.Lock()

    class Value(_Value):
        """A value in one of them."""

        _lock = lock

        def __init__(
            self,
            kind: str,
            metric: str,
            name: str,
            labels: Iterable[str],
            label_values: Iterable[str],
            text: str,
            multiprocess_mode: str = "",
            **_: Any,
        ) -> None:
            file = dicts[f"{kind}_{multiprocess_mode}" if kind == "gauge" else kind]
            super().__init__(file, mmap_key(metric, name, list(labels), list(label_values), text))

    values.ValueClass = Value


class _Value:
    """One number of a metric, as `prometheus_client.values` has it."""

    _multiprocess = True
    _lock: threading.Lock

    def __init__(self, file: MmapedDict, key: str) -> None:
        """A value that has no room in the file is counted in this process alone: the request goes on."""
        self._file: MmapedDict | None = file
        self._key = key
        self._value = 0.0
        with self._lock:
            try:
                self._value = file.read_value(key)[0]  # type: ignore[no-untyped-call]
            except (OSError, ValueError, IndexError) as error:
                self._file = None
                log.error("no room for a metric, which no scrape will show: %s: %s", key, error)

    def inc(self, amount: float) -> None:
        with self._lock:
            self._value += amount
            self._write()

    def set(self, value: float, timestamp: float | None = None) -> None:
        with self._lock:
            self._value = value
            self._write()

    def _write(self) -> None:
        if self._file:
            self._file.write_value(self._key, self._value, 0.0)  # type: ignore[no-untyped-call]

    def get(self) -> float:
        return self._value

    def set_exemplar(self, _exemplar: Any) -> None:
        """There are none in such files."""

    def get_exemplar(self) -> None:
        """There are none in such files."""


class SharedMetrics:
    """The supervisor's side: the files of all processes, and an index of them that workers read."""

    def __init__(self) -> None:
        """Keep this process's own metrics in such files too. Raises `OSError` when the system has no room."""
        self.index = os.memfd_create("fovea-metrics")
        self._dead = MetricFiles.create()
        self._totals = self._dead.open()
        self._own = MetricFiles.create()
        self._living: dict[int, MetricFiles] = {}
        self._number = 0
        write_to(self._own)
        self.processes = ProcessMetrics(CollectorRegistry())
        self._change()
        self._publish()

    def add(self, pid: int, files: MetricFiles) -> None:
        """Show those of a worker that has just been started."""
        self._change()
        self._living[pid] = files
        self._publish()

    def fold(self, pid: int) -> None:
        """Add what a dead worker has counted to the sums of all the dead, and let its files go."""
        files = self._living.pop(pid)
        self._change()  # what is in two files would count twice
        try:
            for kind in _SUMMED:
                path = f"/proc/self/fd/{files.descriptors[KINDS.index(kind)]}"
                total = self._totals[kind]
                for key, value in _read(path):
                    total.write_value(key, total.read_value(key)[0] + value, 0.0)  # type: ignore[no-untyped-call]
        finally:
            self._publish()
            files.close()

    def _change(self) -> None:
        """Make the number of the index odd: whoever reads it now reads again."""
        self._number += 1
        os.pwrite(self.index, _HEADER.pack(self._number, 0), 0)

    def _publish(self) -> None:
        """Write the index after `_change`: the number becomes even last."""
        all_files = (self._dead, self._own, *self._living.values())
        index = json.dumps([files.descriptors for files in all_files]).encode()
        os.pwrite(self.index, index, _HEADER.size)
        self._number += 1
        os.pwrite(self.index, _HEADER.pack(self._number, len(index)), 0)


def shared_registry(index: int, own: MetricFiles, supervisor: int) -> CollectorRegistry:
    """Return what a scrape of any worker shows. `index` is the supervisor's file, `own` are this worker's."""
    registry = CollectorRegistry()
    registry.register(_AllWorkers(index, own, supervisor))
    registry.register(Processes(supervisor))
    registry.register(Container(Cgroup()))
    PlatformCollector(registry=registry)
    return registry


class _AllWorkers(Collector):
    """The sum of all workers' files."""

    def __init__(self, index: int, own: MetricFiles, supervisor: int) -> None:
        self._index = index
        self._own = own
        self._supervisor = supervisor

    def collect(self) -> Iterator[Metric]:
        yield from _metrics(self._values())

    def _header(self) -> tuple[int, int]:
        number, size = _HEADER.unpack(os.pread(self._index, _HEADER.size, 0))
        return number, size

    def _values(self) -> Mapping[str, dict[str, float]]:
        """Read all files while none of them comes or goes; those of this worker alone once the supervisor is
        gone."""
        limit = time.monotonic() + _PATIENCE
        while os.getppid() == self._supervisor:
            number, size = self._header()
            fault: Exception | None = None
            if number % 2 == 0:
                try:
                    all_files = json.loads(os.pread(self._index, size, _HEADER.size))
                    sums = _sums(f"/proc/{self._supervisor}/fd", all_files)
                except (OSError, ValueError) as error:  # a file has gone meanwhile
                    fault = error
                if self._header()[0] == number:
                    if not fault:
                        return sums
                    if os.getppid() == self._supervisor:
                        raise fault
            if time.monotonic() > limit:
                raise TimeoutError("the supervisor does not finish a change to the list of metrics")
            time.sleep(0.001)
        return _sums("/proc/self/fd", [self._own.descriptors])


def _read(path: str) -> list[tuple[str, float]]:
    """Return what one file holds. Of one that was being written when its worker died, nothing."""
    try:
        entries = MmapedDict.read_all_values_from_file(path)  # type: ignore[no-untyped-call]
        return [(key, value) for key, value, _, _ in entries]
    except (ValueError, RuntimeError, struct.error) as error:
        log.error("the metrics of one worker cannot be read: %s", error)
        return []


def _sums(folder: str, all_files: Iterable[Sequence[int]]) -> Mapping[str, dict[str, float]]:
    """Add up the values of all files, by kind and key."""
    sums: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for descriptors in all_files:
        for kind, descriptor in zip(KINDS, descriptors, strict=True):
            total = sums[kind]
            for key, value in _read(f"{folder}/{descriptor}"):
                before = total.get(key)
                if before is None:
                    total[key] = value
                else:
                    total[key] = max(before, value) if kind == "gauge_livemax" else before + value
    return sums


def _metrics(sums: Mapping[str, dict[str, float]]) -> Iterable[Metric]:
    """Return the metrics that these values make up."""
    metrics: dict[str, Metric] = {}
    buckets: defaultdict[tuple[str, _Labels], list[tuple[float, float]]] = defaultdict(list)
    for kind, total in sums.items():
        for key, value in total.items():
            name, sample, labels, text = json.loads(key)
            if name not in metrics:
                metrics[name] = Metric(name, text, kind.partition("_")[0])
            if "le" in labels and kind == "histogram":
                edge = float(labels.pop("le"))
                buckets[name, tuple(labels.items())].append((edge, value))
            else:
                metrics[name].add_sample(sample, labels, value)
    for (name, pairs), edges in buckets.items():
        count = 0.0
        for edge, value in sorted(edges):  # the files have what is in each alone, Prometheus what is below
            count += value
            le = floatToGoString(edge)  # type: ignore[no-untyped-call]
            metrics[name].add_sample(f"{name}_bucket", {**dict(pairs), "le": le}, count)
        metrics[name].add_sample(f"{name}_count", dict(pairs), count)
    return metrics.values()
