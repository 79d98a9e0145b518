"""Metrics of several workers, combined into the metrics of one service.

The values of each process lie in memory files (memfd_create(2)). Memory files have no place in a file system,
so a full, small, read-only or cleaned-up folder cannot remove them. The supervisor creates the files and the
worker maps them. A scrape of any worker returns the sum over all workers, including dead workers.
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
from fovea.service.observability.process_metrics import ContainerCollector, ProcessTreeCollector
from fovea.service.resources.cgroup import Cgroup

log = logging.getLogger(__name__)

METRIC_KINDS: Final = ("counter", "histogram", "gauge_livesum", "gauge_livemax")
"""Metric kinds in use, with the aggregation of gauges. Each process has one file for each kind."""

_SUMMED_KINDS: Final = ("counter", "histogram")
"""Kinds whose values are kept after the worker has died. A gauge describes living workers only."""

_INDEX_HEADER: Final = struct.Struct("qq")
"""Header of the index: a sequence number, and the size of the index in bytes.

The sequence number is odd while the supervisor changes the index.
"""

_INDEX_TIMEOUT: Final = 1.0
"""Time limit for a change of the index, in seconds. After this time the supervisor must have died."""


_Labels = tuple[tuple[str, str], ...]


class MetricFiles:
    """The metric values of one process: one memory file for each kind.

    The supervisor creates the files. A worker inherits the descriptors, under the same numbers, when it
    starts.
    """

    def __init__(self, descriptors: Sequence[int]) -> None:
        """Wrap file descriptors, given in the order of `METRIC_KINDS`."""
        self.descriptors = tuple(descriptors)

    @classmethod
    def create(cls) -> MetricFiles:
        """Create empty files. Raises `OSError` when the system has no room."""
        descriptors: list[int] = []
        try:
            for kind in METRIC_KINDS:
                descriptors.append(os.memfd_create(f"fovea-{kind}"))
                MmapedDict(f"/proc/self/fd/{descriptors[-1]}").close()  # type: ignore[no-untyped-call]
        except BaseException:
            cls(descriptors).close()
            raise
        return cls(descriptors)

    def open(self) -> dict[str, MmapedDict]:
        """Map the files and return them by kind."""
        paths = (f"/proc/self/fd/{descriptor}" for descriptor in self.descriptors)
        return {kind: MmapedDict(path) for kind, path in zip(METRIC_KINDS, paths, strict=True)}  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Close the file descriptors."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def use_metric_files(files: MetricFiles) -> None:
    """Store the values of all metrics that this process creates from now on in `files`.

    Call this before the first metric is created: existing metrics keep their values in the process.
    """
    dicts = files.open()
    lock = threading.Lock()

    class Value(_Value):
        """A value in one of the files."""

        # One lock for all values: a new value may grow its file, which moves the mapping of all others.
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

    # prometheus_client looks up this class whenever a metric is created.
    values.ValueClass = Value


class _Value:
    """One number of a metric, with the interface of `prometheus_client.values`.

    `prometheus_client` calls the methods in whichever thread counts. Only this process writes the file; other
    processes read the file at any time.
    """

    _multiprocess = True
    _lock: threading.Lock

    def __init__(self, file: MmapedDict, key: str) -> None:
        """Read the stored value of `key`.

        If the file has no room, log an error and count in this process only. The request continues.
        """
        self._file: MmapedDict | None = file
        self._key = key
        self._value = 0.0
        with self._lock:
            try:
                self._value = file.read_value(key)[0]  # type: ignore[no-untyped-call]
            except (OSError, ValueError, IndexError) as error:
                self._file = None
                log.error(
                    "a metric has no room in its file, so /metrics will not show it: %s: %s", key, error
                )

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
        """Do nothing: memory files hold no exemplars."""

    def get_exemplar(self) -> None:
        """Return None: memory files hold no exemplars."""


class SharedMetrics:
    """The supervisor's side: the files of all processes, and the index that workers read.

    Only the event loop of the supervisor calls the methods, so the index has a single writer.
    """

    def __init__(self) -> None:
        """Create the index, and store this process's own metrics in memory files too.

        Raises `OSError` when the system has no room.
        """
        self.index = os.memfd_create("fovea-metrics")
        self._dead_files = MetricFiles.create()
        self._dead_totals = self._dead_files.open()
        self._own_files = MetricFiles.create()
        self._worker_files: dict[int, MetricFiles] = {}
        self._sequence_number = 0
        use_metric_files(self._own_files)
        self.process_metrics = ProcessMetrics(CollectorRegistry())
        self._begin_change()
        self._publish_index()

    def add(self, pid: int, files: MetricFiles) -> None:
        """Add the files of a worker that has just been started.

        The supervisor keeps the files open until `merge_dead_worker`: workers read them through the
        supervisor's descriptors, also after their owner has died.
        """
        self._begin_change()
        self._worker_files[pid] = files
        self._publish_index()

    def merge_dead_worker(self, pid: int) -> None:
        """Add the counts of a dead worker to the sums of all dead workers, and close the worker's files."""
        files = self._worker_files.pop(pid)
        # Mark the index as changing first: a reader in between would count the same values twice. The
        # descriptors are closed last: until the index is published, readers may open them.
        self._begin_change()
        try:
            for kind in _SUMMED_KINDS:
                path = f"/proc/self/fd/{files.descriptors[METRIC_KINDS.index(kind)]}"
                total = self._dead_totals[kind]
                for key, value in _read_file(path):
                    total.write_value(key, total.read_value(key)[0] + value, 0.0)  # type: ignore[no-untyped-call]
        finally:
            self._publish_index()
            files.close()

    def _begin_change(self) -> None:
        """Make the sequence number odd. A worker that reads the index now has to read again."""
        self._sequence_number += 1
        os.pwrite(self.index, _INDEX_HEADER.pack(self._sequence_number, 0), 0)

    def _publish_index(self) -> None:
        """Write the index after `_begin_change`, then make the sequence number even.

        The order matters: an even number tells readers that the index is complete.
        """
        all_files = (self._dead_files, self._own_files, *self._worker_files.values())
        index = json.dumps([files.descriptors for files in all_files]).encode()
        os.pwrite(self.index, index, _INDEX_HEADER.size)
        self._sequence_number += 1
        os.pwrite(self.index, _INDEX_HEADER.pack(self._sequence_number, len(index)), 0)


def create_shared_registry(index: int, own_files: MetricFiles, supervisor_pid: int) -> CollectorRegistry:
    """Return the registry that a scrape of any worker shows.

    `index` is the descriptor of the supervisor's index, `own_files` are this worker's files, and
    `supervisor_pid` is the supervisor's process id.
    """
    registry = CollectorRegistry()
    registry.register(_WorkersCollector(index, own_files, supervisor_pid))
    registry.register(ProcessTreeCollector(supervisor_pid))
    registry.register(ContainerCollector(Cgroup()))
    PlatformCollector(registry=registry)
    return registry


class _WorkersCollector(Collector):
    """A collector of the sums over the files of all workers.

    A scrape calls `collect` in a thread of the worker that answers, never on the event loop: the supervisor
    may be in the middle of a change, for which the thread waits.
    """

    def __init__(self, index: int, own_files: MetricFiles, supervisor_pid: int) -> None:
        self._index = index
        self._own_files = own_files
        self._supervisor_pid = supervisor_pid

    def collect(self) -> Iterator[Metric]:
        yield from _build_metrics(self._read_values())

    def _read_header(self) -> tuple[int, int]:
        number, size = _INDEX_HEADER.unpack(os.pread(self._index, _INDEX_HEADER.size, 0))
        return number, size

    def _read_values(self) -> Mapping[str, dict[str, float]]:
        """Read all files while no file is added or removed.

        If the supervisor has died, read only the files of this worker.

        Raises `TimeoutError` when the supervisor does not finish a change within `_INDEX_TIMEOUT` seconds,
        and `OSError` or `ValueError` when a file cannot be read although the index did not change.
        """
        deadline = time.monotonic() + _INDEX_TIMEOUT
        while os.getppid() == self._supervisor_pid:
            number, size = self._read_header()
            read_error: Exception | None = None
            if number % 2 == 0:
                try:
                    all_files = json.loads(os.pread(self._index, size, _INDEX_HEADER.size))
                    # The index holds descriptor numbers of the supervisor, which workers open through /proc.
                    sums = _sum_files(f"/proc/{self._supervisor_pid}/fd", all_files)
                except (OSError, ValueError) as error:  # a file was closed in the meantime
                    read_error = error
                # The index did not change while the files were read, so the sums are consistent.
                if self._read_header()[0] == number:
                    if not read_error:
                        return sums
                    if os.getppid() == self._supervisor_pid:
                        raise read_error
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"the supervisor has not finished a change of the metrics for {_INDEX_TIMEOUT:g} s"
                )
            time.sleep(0.001)
        return _sum_files("/proc/self/fd", [self._own_files.descriptors])


def _read_file(path: str) -> list[tuple[str, float]]:
    """Return the values in one file.

    If the worker died while it wrote, the file may be damaged. In this case, log an error and return nothing.
    """
    try:
        entries = MmapedDict.read_all_values_from_file(path)  # type: ignore[no-untyped-call]
        return [(key, value) for key, value, _, _ in entries]
    except (ValueError, RuntimeError, struct.error) as error:
        log.error("the metrics of one worker cannot be read: %s", error)
        return []


def _sum_files(folder: str, all_files: Iterable[Sequence[int]]) -> Mapping[str, dict[str, float]]:
    """Add up the values of all files, by kind and key."""
    sums: dict[str, dict[str, float]] = {kind: {} for kind in METRIC_KINDS}
    for descriptors in all_files:
        for kind, descriptor in zip(METRIC_KINDS, descriptors, strict=True):
            total = sums[kind]
            for key, value in _read_file(f"{folder}/{descriptor}"):
                previous = total.get(key)
                if previous is None:
                    total[key] = value
                else:
                    total[key] = max(previous, value) if kind == "gauge_livemax" else previous + value
    return sums


def _build_metrics(sums: Mapping[str, dict[str, float]]) -> Iterable[Metric]:
    """Return the metrics that consist of these values."""
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
        for edge, value in sorted(edges):  # files count each bucket separately, Prometheus cumulatively
            count += value
            le = floatToGoString(edge)  # type: ignore[no-untyped-call]
            metrics[name].add_sample(f"{name}_bucket", {**dict(pairs), "le": le}, count)
        metrics[name].add_sample(f"{name}_count", dict(pairs), count)
    return metrics.values()
