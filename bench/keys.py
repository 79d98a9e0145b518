"""The `make bench-keys` benchmark: what API keys cost, and the rotation of a key under load.

wrk loads the services in turn with thumbnails, the cheapest images: a service without keys, the same with
keys, and with `--old` an earlier source tree. All of them get the key, so that the client has the same work:
it shares the processors with the service. The ratios are taken in each round: of the images per second,
and of the images per processor time of the service's own process. Then callers send requests without a pause
while keys are added, taken into use and removed; no request may fail.
"""

from __future__ import annotations

import argparse
import http.client
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from fovea.bench.cells import run_wrk
from fovea.bench.contestants import FoveaVersion, Server, start_fovea, write_image_list
from fovea.bench.mixed import describe_machine
from fovea.bench.processes import measure_own_cpu_seconds
from fovea.bench.workloads import WORKLOADS, BenchError
from fovea.service.access.caller import Scope
from fovea.service.access.key_editor import add_key, remove_key
from fovea.service.access.key_watcher import POLL_SECONDS

CONNECTIONS: Final = (8, 32)

_WORKLOAD: Final = WORKLOADS["thumbnails"]

_CALLERS: Final = 4
"""Number of callers during a rotation, with one request at a time each."""

_TIMEOUT: Final = 60.0
"""Time in seconds within which a change of the keys file must count."""


def main() -> int:
    """Measure and print; return 1 if a request failed during a rotation."""
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.keys", description=__doc__)
    parser.add_argument("--old", type=Path, help="source tree of an earlier version, to compare with")
    parser.add_argument("--rounds", type=int, default=6, help="rounds for each load (default: 6)")
    parser.add_argument("--seconds", type=float, default=3, help="time of a service in a round (default: 3)")
    parser.add_argument(
        "--requests", type=int, default=20_000, help="requests during rotations (default: 20,000)"
    )
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "keys")
            if options.rounds:
                _measure_ratios(file, options.old, options.rounds, options.seconds)
            result = rotate_under_load(file.with_name("rotated"), requests=options.requests, rotations=3)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    failed = result.sent - result.statuses[200]
    print(f"{result.rotations} rotations under load: {failed} of {result.sent:,} requests failed")
    print(*result.errors, sep="\n", end="")

    print(describe_machine())
    return int(failed > 0)


def _measure_ratios(file: Path, old: Path | None, rounds: int, seconds: float) -> None:
    """Print the images per second of each service, and the ratios within the rounds."""
    key = add_key(file, "bench", frozenset({Scope.CLASSIFY}))
    versions = {"open": FoveaVersion(), "keys": FoveaVersion(settings={"FOVEA_KEYS": str(file)})}
    if old:
        versions = {"old": FoveaVersion("old", old.absolute()), **versions}
    with ExitStack() as stack:
        images = stack.enter_context(write_image_list(_WORKLOAD))
        servers = [
            stack.enter_context(start_fovea(version, name, _WORKLOAD, _WORKLOAD.pixel_paths[0], key=key))
            for name, version in versions.items()
        ]
        for connections in CONNECTIONS:
            for server in servers:
                run_wrk(server.url, connections, 1, images, key=server.key)
            costs = [
                _measure_round(servers, connections, seconds, images, is_reversed=bool(number % 2))
                for number in range(rounds)
            ]
            for name, other in (("open", "old"), ("keys", "open")):
                if other in versions:
                    times = [row[other].seconds / row[name].seconds for row in costs]
                    own_times = [row[other].processor_seconds / row[name].processor_seconds for row in costs]
                    print(
                        f"{connections} connections, {name} / {other}: images/s {_format_ratios(times)}, "
                        f"images per processor time {_format_ratios(own_times)}; "
                        f"{statistics.median(1 / row[name].seconds for row in costs):,.0f} images/s, "
                        f"{statistics.median(1e6 * row[name].processor_seconds for row in costs):,.0f} us",
                        flush=True,
                    )


def _format_ratios(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


class _Cost(NamedTuple):
    """Times that one image takes."""

    seconds: float
    """Time of the round for each image, in seconds."""
    processor_seconds: float
    """Processor time of the service's own process, without its runners, in seconds."""


def _measure_round(
    servers: list[Server], connections: int, seconds: float, images: Path, *, is_reversed: bool
) -> Mapping[str, _Cost]:
    """Return what an image takes in each service. Every second round has the other order."""
    costs = {}
    for server in reversed(servers) if is_reversed else servers:
        before = measure_own_cpu_seconds(server.process.pid)
        report = run_wrk(server.url, connections, seconds, images, key=server.key)
        if report["refused"] or report["errors"]:
            raise BenchError(f"{server.name} refused {report['refused']:.0f} requests")
        processor_seconds = measure_own_cpu_seconds(server.process.pid) - before
        count = report["requests"]
        costs[server.name] = _Cost(report["seconds"] / count, processor_seconds / count)
    return costs


# --- rotation ------------------------------------------------------------------------------------


@dataclass
class RotationResult:
    """The answers that callers got while keys were rotated."""

    rotations: int = 0
    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    """First errors."""


class _Callers:
    """Threads that send requests one after the other, always with the newest key."""

    def __init__(self, url: str, key: str, image: bytes, requests: int) -> None:
        self.key = key
        self.result = RotationResult()
        self._parts = urlsplit(url)
        self._image = image
        self._requests = requests
        self._lock = threading.Lock()
        self._is_stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._send_requests, args=[number]) for number in range(_CALLERS)
        ]
        self._used_keys = [key] * _CALLERS
        """Key of the request that each thread sends now."""

    @contextmanager
    def run(self) -> Iterator[None]:
        """Send requests within the block, and behind it until there are enough."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        except BaseException:
            self._requests = 0
            raise
        finally:
            self._is_stopping.set()
            for thread in self._threads:
                thread.join()

    def use_key(self, key: str) -> None:
        """Send further requests with this key, and wait until no request has another key.

        Raises `BenchError`.
        """
        self.key = key
        deadline = time.monotonic() + _TIMEOUT
        while any(used_key != key for used_key in self._used_keys):
            if time.monotonic() > deadline:
                raise BenchError(f"a caller did not use the new key within {_TIMEOUT:g} s")
            time.sleep(0.01)

    def _send_requests(self, number: int) -> None:
        connection = http.client.HTTPConnection(self._parts.netloc, timeout=_TIMEOUT)
        while not (self._is_stopping.is_set() and self.result.sent >= self._requests):
            key = self._used_keys[number] = self.key
            headers = {"Authorization": f"Bearer {key}"}
            try:
                connection.request("POST", self._parts.path, self._image, headers)
                reply = connection.getresponse()
                content = reply.read()
                status = reply.status
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                content, status = repr(error).encode(), 0
            with self._lock:
                self.result.sent += 1
                self.result.statuses[status] += 1
                if status != 200 and len(self.result.errors) < 3:
                    self.result.errors.append(f"{status}: {content[:200].decode(errors='replace')}")
        connection.close()


def rotate_under_load(file: Path, *, requests: int, rotations: int, workers: int = 1) -> RotationResult:
    """Start a service with a new keys file, and rotate its key while callers send requests.

    Each rotation adds a key, waits until the service accepts it, lets the callers use it, removes the old
    key, and waits until the service refuses that. Raises `BenchError` if a change does not count in time.
    """
    key = add_key(file, "key-0", frozenset({Scope.CLASSIFY}))
    image = _WORKLOAD.images[0].read_bytes()
    version = FoveaVersion(settings={"FOVEA_KEYS": str(file), "FOVEA_WORKERS": str(workers)})
    with start_fovea(version, "keys", _WORKLOAD, _WORKLOAD.pixel_paths[0], key=key) as server:
        callers = _Callers(server.url, key, image, requests)
        with callers.run():
            for number in range(1, rotations + 1):
                new_key = add_key(file, f"key-{number}", frozenset({Scope.CLASSIFY}))
                _wait_for_status(server.url, new_key, 200, workers)
                if workers > 1:  # a busy worker may have got none of these connections
                    time.sleep(_AGREEMENT_SECONDS)
                old_key = callers.key
                callers.use_key(new_key)
                remove_key(file, f"key-{number - 1}")
                _wait_for_status(server.url, old_key, 401, workers)
                callers.result.rotations += 1
    return callers.result


_AGREEMENT_SECONDS: Final = 5 * POLL_SECONDS
"""Time in seconds in which every worker reads a changed file; it takes two looks."""


def _wait_for_status(url: str, key: str, status: int, workers: int) -> None:
    """Wait until the model list has this status, on enough connections in a row to reach every worker."""
    parts = urlsplit(url)
    deadline = time.monotonic() + _TIMEOUT
    needed_count = 1 if workers == 1 else 8 * workers
    same_count = 0
    while same_count < needed_count:
        connection = http.client.HTTPConnection(parts.netloc, timeout=_TIMEOUT)
        connection.request("GET", "/v1/models", headers={"X-API-Key": key})
        same_count = same_count + 1 if connection.getresponse().status == status else 0
        connection.close()
        if time.monotonic() > deadline:
            raise BenchError(f"a change of the keys file did not count within {_TIMEOUT:g} s")
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
