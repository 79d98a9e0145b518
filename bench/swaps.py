"""The `make swaps` test: fifty version swaps under continuous load, and the memory after many reloads.

Each version gives every image the label next to the previous version's label, so that an answer from two
versions shows. A new version is tried on the last images, loaded beside the old version and switched to. No
request may be lost and no answer mixed. The callers' latency is compared with that of the same load before.
Then a model is unloaded and loaded repeatedly.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import onnx

from fovea.bench.mixed import describe_machine
from fovea.bench.processes import measure_resident_bytes, start_process, wait_until_idle
from fovea.service.artifact.contract import METADATA_KEY, Contract
from fovea.service.artifact.repository import MODEL_FILE, scan_repository

ROOT: Final = Path(__file__).resolve().parents[1]
SAMPLES: Final = sorted(path for path in (ROOT / "samples").iterdir() if path.suffix in (".jpg", ".png"))
CALLER_COUNT: Final = 8
MB: Final = 1e6


@dataclass
class CallerResults:
    """The results of the callers."""

    seconds: list[float] = field(default_factory=list)
    """Duration of each request."""
    lost_requests: Counter[str] = field(default_factory=Counter)
    """Number of requests without an answer, by the error."""
    versions: set[str] = field(default_factory=set)
    mixed_count: int = 0

    @property
    def p99(self) -> float:
        """99th percentile of the durations, in seconds."""
        return statistics.quantiles(self.seconds, n=100)[98]


def main() -> int:
    """Measure as the command line asks, and print; return 1 if a request was lost or an answer mixed."""
    options = _parse_arguments()
    has_failed = False
    print(
        "| workers | requests | lost | mixed | p99 before, ms | during the swaps | ratio | swap, median s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for workers in options.workers:
        results_before, results_during, swaps = _measure_swaps(workers, options.swaps, options.seconds)
        lost_requests, mixed_count = (
            results_before.lost_requests + results_during.lost_requests,
            results_before.mixed_count + results_during.mixed_count,
        )
        print(
            f"| {workers} | {len(results_before.seconds) + len(results_during.seconds)} "
            f"| {lost_requests.total()} | {mixed_count} "
            f"| {1000 * results_before.p99:.1f} | {1000 * results_during.p99:.1f} "
            f"| {results_during.p99 / results_before.p99:.2f} | {statistics.median(swaps):.2f} |",
            flush=True,
        )
        for reason, times in lost_requests.items():
            print(f"lost {times} times: {reason}")
        has_failed |= bool(lost_requests or mixed_count) or len(results_during.versions) < options.swaps
    early_bytes, late_bytes = _measure_memory(options.cycles)
    print(
        f"\nMemory of all processes after 10 unloads and loads: {early_bytes / MB:.1f} MB; "
        f"after {options.cycles}: {late_bytes / MB:.1f} MB ({late_bytes / early_bytes - 1:+.1%})"
    )
    print(f"{describe_machine()}.")
    return int(has_failed)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fovea.bench.swaps", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--swaps", type=int, default=50, help="number of swaps (default: 50)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="seconds of load before the first swap (default: 20)"
    )
    parser.add_argument("--workers", type=lambda text: text.split(","), default=["1", "2"], metavar="N,M",
                        help="measure each of these numbers of workers (default: 1,2)")  # fmt: skip
    parser.add_argument("--cycles", type=int, default=200,
                        help="number of unloads and loads, more than 10 (default: 200)")  # fmt: skip
    return parser.parse_args()


def _measure_swaps(
    workers: str, swaps: int, seconds: float
) -> tuple[CallerResults, CallerResults, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        repository = BenchRepository(Path(folder))
        with (
            _start_service(repository.root, FOVEA_WORKERS=workers) as (url, _),
            ThreadPoolExecutor(CALLER_COUNT) as pool,
        ):
            results_before, results_during, stop_event = CallerResults(), CallerResults(), threading.Event()
            current_results = [results_before]
            callers = [
                pool.submit(_run_caller, url, current_results, stop_event) for _ in range(CALLER_COUNT)
            ]
            try:
                time.sleep(seconds)
                # The callers read this element before each request, in their own threads. A request that is
                # under way still counts for the time before.
                current_results[0] = results_during
                durations = [_measure_seconds(lambda: repository.swap_version(url)) for _ in range(swaps)]
            finally:
                stop_event.set()
            for caller in callers:
                caller.result()
    return results_before, results_during, durations


def _measure_memory(cycles: int) -> tuple[int, int]:
    """Return the resident bytes of all processes after 10 cycles, and after all."""
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        repository = BenchRepository(Path(folder), "first", "second")
        with _start_service(repository.root) as (url, process):
            connection = _open_connection(url)
            for cycle in range(1, cycles + 1):
                _send_post(connection, "/v2/repository/models/second/unload")
                _send_post(connection, "/v2/repository/models/second/load")
                _send_post(connection, "/v1/models/second/classify", SAMPLES[0].read_bytes())
                if cycle in (10, cycles):
                    wait_until_idle([process.pid])
                    sizes.append(measure_resident_bytes([process.pid]))
    return sizes[0], sizes[1]


class BenchRepository:
    """A repository with the default model and further versions of the first model."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.root = folder / "zoo"
        self.name, *_ = names = names or ("swapped",)
        content = next(iter(scan_repository(ROOT / "zoo").versions_by_model.values()))[-1].path.read_bytes()
        self._files = [folder / f"{rotation}.onnx" for rotation in range(2)]
        for rotation, file in enumerate(self._files):
            file.write_bytes(_rotate_labels(content, rotation))
        self._version = 1
        for name in names:
            self._publish(self.root / name)

    def swap_version(self, url: str) -> None:
        """Publish the next version, and wait until it is served."""
        self.publish_next_version()
        _send_post(_open_connection(url), f"/v2/repository/models/{self.name}/load")

    def publish_next_version(self) -> str:
        """Publish the next version of the first model in the repository, and return the version."""
        self._version += 1
        self._publish(self.root / self.name)
        return str(self._version)

    def _publish(self, folder: Path) -> None:
        # the service sees the version only after the rename, and then completely
        hidden = folder / ".next"
        hidden.mkdir(parents=True)
        os.link(self._files[rotation_of(str(self._version))], hidden / MODEL_FILE)
        hidden.rename(folder / str(self._version))


def rotation_of(version: str) -> int:
    """Return the number of positions by which the version's labels are rotated."""
    return int(version) % 2


def _rotate_labels(content: bytes, rotation: int) -> bytes:
    """Return the model with each label's logit taken from the label `rotation` positions before."""
    model = onnx.load_from_string(content)
    contract = Contract.from_metadata({one.key: one.value for one in model.metadata_props})
    order = np.roll(np.arange(len(contract.labels)), rotation)
    graph, logits = model.graph, contract.logits_name
    index, node = next((index, one) for index, one in enumerate(graph.node) if logits in one.output)
    node.output[list(node.output).index(logits)] = "unrotated"
    graph.initializer.append(onnx.numpy_helper.from_array(order, "rotation"))
    graph.node.insert(index + 1, onnx.helper.make_node("Gather", ["unrotated", "rotation"], [logits], axis=1))
    golden = [
        replace(image, logits=tuple(image.logits[one] for one in order)) for image in contract.golden.images
    ]
    contract = replace(contract, golden=replace(contract.golden, images=tuple(golden)))
    onnx.helper.set_model_props(model, {METADATA_KEY: contract.to_json()})
    rotated_content: bytes = model.SerializeToString()
    return rotated_content


@contextmanager
def _start_service(root: Path, **settings: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    settings = {"FOVEA_MODELS": str(root), "FOVEA_PORT": "0", "FOVEA_DRAIN_GRACE": "0", **settings}
    settings |= {"FOVEA_MANAGEMENT": "true", "FOVEA_WATCH": "0", "FOVEA_QUEUE_IMAGES": "1024"}
    environment = {**os.environ, **settings}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with start_process(
        [sys.executable, "-m", "fovea.service"], cwd=ROOT, env=environment, **pipes
    ) as process:
        greeting = process.stdout.readline() if process.stdout else ""
        yield greeting.split(" at ")[-1].strip(), process


def _run_caller(url: str, current_results: list[CallerResults], stop_event: threading.Event) -> None:
    """Send several images per request repeatedly, and check the answers."""
    images = [{"b64": base64.b64encode(path.read_bytes()).decode()} for path in SAMPLES]
    body = json.dumps({"images": images, "top_k": 1}).encode()
    connection = _open_connection(url)
    expected_labels = _unrotate_labels(
        json.loads(_send_post(connection, "/v1/classify", body, "application/json"))
    )
    while not stop_event.is_set():
        results, started_at = current_results[0], time.monotonic()
        try:
            response = json.loads(_send_post(connection, "/v1/classify", body, "application/json"))
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            results.lost_requests[repr(error)] += 1
            connection = _open_connection(url)
            continue
        results.seconds.append(time.monotonic() - started_at)
        results.versions.add(response["model"]["version"])
        results.mixed_count += _unrotate_labels(response) != expected_labels


def _unrotate_labels(response: dict[str, Any]) -> list[int]:
    """Return each image's label index before the rotation."""
    rotation = rotation_of(response["model"]["version"])
    return [(result["predictions"][0]["index"] - rotation) % 10 for result in response["results"]]


def _open_connection(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)


def _send_post(
    connection: http.client.HTTPConnection, path: str, body: bytes = b"", content_type: str = ""
) -> bytes:
    """Send a POST request and return the answer's content.

    Raises `RuntimeError` unless the status is 200.
    """
    connection.request("POST", path, body, {"Content-Type": content_type} if content_type else {})
    reply = connection.getresponse()
    content = reply.read()
    if reply.status != 200:
        raise RuntimeError(f"{reply.status} {content.decode(errors='replace')}")
    return content


def _measure_seconds(action: Any) -> float:
    started_at = time.monotonic()
    action()
    return time.monotonic() - started_at


if __name__ == "__main__":
    sys.exit(main())
