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

from fovea.bench.mixed import machine
from fovea.bench.processes import resident_bytes, running, settle
from fovea.service.artifact.contract import METADATA_KEY, Contract
from fovea.service.artifact.repository import MODEL_FILE, scan_repository

ROOT: Final = Path(__file__).resolve().parents[1]
SAMPLES: Final = sorted(path for path in (ROOT / "samples").iterdir() if path.suffix in (".jpg", ".png"))
CALLERS: Final = 8
MB: Final = 1e6


@dataclass
class Seen:
    """The results of the callers."""

    seconds: list[float] = field(default_factory=list)
    """Duration of each request."""
    lost: Counter[str] = field(default_factory=Counter)
    """Number of requests without an answer, by the error."""
    versions: set[str] = field(default_factory=set)
    mixed: int = 0

    @property
    def p99(self) -> float:
        """99th percentile of the durations, in seconds."""
        return statistics.quantiles(self.seconds, n=100)[98]


def main() -> int:
    """Measure as the command line asks, and print; return 1 if a request was lost or an answer mixed."""
    given = _arguments()
    failed = False
    print(
        "| workers | requests | lost | mixed | p99 before, ms | during the swaps | ratio | swap, median s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for workers in given.workers:
        before, during, swaps = _measure(workers, given.swaps, given.seconds)
        lost, mixed = before.lost + during.lost, before.mixed + during.mixed
        print(
            f"| {workers} | {len(before.seconds) + len(during.seconds)} | {lost.total()} | {mixed} "
            f"| {1000 * before.p99:.1f} | {1000 * during.p99:.1f} | {during.p99 / before.p99:.2f} "
            f"| {statistics.median(swaps):.2f} |",
            flush=True,
        )
        for reason, times in lost.items():
            print(f"lost {times} times: {reason}")
        failed |= bool(lost or mixed) or len(during.versions) < given.swaps
    early, late = _memory(given.cycles)
    print(f"\nMemory of all processes after 10 times unload and load {early / MB:.1f} MB, "
          f"after {given.cycles} {late / MB:.1f} MB: {late / early - 1:+.1%}")  # fmt: skip
    print(f"{machine()}.")
    return int(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fovea.bench.swaps", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0, help="of load before the first swap")
    parser.add_argument("--workers", type=lambda text: text.split(","), default=["1", "2"], metavar="N,M")
    parser.add_argument("--cycles", type=int, default=200, help="more than 10")
    return parser.parse_args()


def _measure(workers: str, swaps: int, seconds: float) -> tuple[Seen, Seen, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo(Path(folder))
        with _service(zoo.root, FOVEA_WORKERS=workers) as (url, _), ThreadPoolExecutor(CALLERS) as pool:
            before, during, enough = Seen(), Seen(), threading.Event()
            turn = [before]
            callers = [pool.submit(_call, url, turn, enough) for _ in range(CALLERS)]
            try:
                time.sleep(seconds)
                turn[0] = during
                taken = [_timed(lambda: zoo.swap(url)) for _ in range(swaps)]
            finally:
                enough.set()
            for caller in callers:
                caller.result()
    return before, during, taken


def _memory(cycles: int) -> tuple[int, int]:
    """Return the resident bytes of all processes after 10 cycles, and after all."""
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo(Path(folder), "first", "second")
        with _service(zoo.root) as (url, process):
            connection = _connect(url)
            for cycle in range(1, cycles + 1):
                _post(connection, "/v2/repository/models/second/unload")
                _post(connection, "/v2/repository/models/second/load")
                _post(connection, "/v1/models/second/classify", SAMPLES[0].read_bytes())
                if cycle in (10, cycles):
                    settle([process.pid])
                    measured.append(resident_bytes([process.pid]))
    return measured[0], measured[1]


class Zoo:
    """A repository with the default model and further versions of the first model."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.root = folder / "zoo"
        self.name, *_ = names = names or ("swapped",)
        content = next(iter(scan_repository(ROOT / "zoo").versions_by_model.values()))[-1].path.read_bytes()
        self._files = [folder / f"{turn}.onnx" for turn in range(2)]
        for turn, file in enumerate(self._files):
            file.write_bytes(_turned(content, turn))
        self._version = 1
        for name in names:
            self._publish(self.root / name)

    def swap(self, url: str) -> None:
        """Publish the next version, and wait until it is served."""
        self.publish_next()
        _post(_connect(url), f"/v2/repository/models/{self.name}/load")

    def publish_next(self) -> str:
        """Publish the next version of the first model in the repository, and return the version."""
        self._version += 1
        self._publish(self.root / self.name)
        return str(self._version)

    def _publish(self, folder: Path) -> None:
        hidden = folder / ".next"
        hidden.mkdir(parents=True)
        os.link(self._files[turn_of(str(self._version))], hidden / MODEL_FILE)
        hidden.rename(folder / str(self._version))


def turn_of(version: str) -> int:
    """Return the number of positions by which the version's labels are rotated."""
    return int(version) % 2


def _turned(content: bytes, turn: int) -> bytes:
    """Return the model with each label's logit taken from the label `turn` positions before."""
    model = onnx.load_from_string(content)
    contract = Contract.from_metadata({one.key: one.value for one in model.metadata_props})
    order = np.roll(np.arange(len(contract.labels)), turn)
    graph, logits = model.graph, contract.logits_name
    place, node = next((place, one) for place, one in enumerate(graph.node) if logits in one.output)
    node.output[list(node.output).index(logits)] = "unturned"
    graph.initializer.append(onnx.numpy_helper.from_array(order, "turn"))
    graph.node.insert(place + 1, onnx.helper.make_node("Gather", ["unturned", "turn"], [logits], axis=1))
    golden = [
        replace(image, logits=tuple(image.logits[one] for one in order)) for image in contract.golden.images
    ]
    contract = replace(contract, golden=replace(contract.golden, images=tuple(golden)))
    onnx.helper.set_model_props(model, {METADATA_KEY: contract.to_json()})
    written: bytes = model.SerializeToString()
    return written


@contextmanager
def _service(root: Path, **settings: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    settings = {"FOVEA_MODELS": str(root), "FOVEA_PORT": "0", "FOVEA_DRAIN_GRACE": "0", **settings}
    settings |= {"FOVEA_MANAGEMENT": "true", "FOVEA_WATCH": "0", "FOVEA_QUEUE_IMAGES": "1024"}
    environment = {**os.environ, **settings}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with running([sys.executable, "-m", "fovea.service"], cwd=ROOT, env=environment, **pipes) as process:
        greeting = process.stdout.readline() if process.stdout else ""
        yield greeting.split(" at ")[-1].strip(), process


def _call(url: str, turn: list[Seen], enough: threading.Event) -> None:
    """Send several images per request repeatedly, and check the answers."""
    images = [{"b64": base64.b64encode(path.read_bytes()).decode()} for path in SAMPLES]
    body = json.dumps({"images": images, "top_k": 1}).encode()
    connection = _connect(url)
    first = _labels(json.loads(_post(connection, "/v1/classify", body, "application/json")))
    while not enough.is_set():
        seen, started = turn[0], time.monotonic()
        try:
            answer = json.loads(_post(connection, "/v1/classify", body, "application/json"))
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            seen.lost[repr(error)] += 1
            connection = _connect(url)
            continue
        seen.seconds.append(time.monotonic() - started)
        seen.versions.add(answer["model"]["version"])
        seen.mixed += _labels(answer) != first


def _labels(answer: dict[str, Any]) -> list[int]:
    """Return each image's label index before the rotation."""
    turn = turn_of(answer["model"]["version"])
    return [(result["predictions"][0]["index"] - turn) % 10 for result in answer["results"]]


def _connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)


def _post(connection: http.client.HTTPConnection, path: str, body: bytes = b"", kind: str = "") -> bytes:
    """Send a POST request and return the answer's content.

    Raises `RuntimeError` unless the status is 200.
    """
    connection.request("POST", path, body, {"Content-Type": kind} if kind else {})
    reply = connection.getresponse()
    content = reply.read()
    if reply.status != 200:
        raise RuntimeError(f"{reply.status} {content.decode(errors='replace')}")
    return content


def _timed(act: Any) -> float:
    started = time.monotonic()
    act()
    return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
