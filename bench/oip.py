"""The `make bench-oip` benchmark: Open Inference Protocol against bare ONNX Runtime, and stalls from JSON.

64 preprocessed images, float32 of 3 x 224 x 224, are sent in one request behind its JSON. Bare ONNX Runtime
runs the original file in this process, on the array in memory. Both use the same processors: first all, with
ONNX Runtime as threads of one session and the service as runners of one thread each, then one. They
alternate. The service's rate may be a tenth lower.

For JSON, another client repeatedly asks for `/health/live`. Its waiting time while large requests are read is
the delay for all other clients.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime

from fovea.bench.imported import SIDE, import_network
from fovea.bench.mixed import describe_machine
from fovea.bench.probe import probe_service
from fovea.bench.processes import start_process
from fovea.bench.workloads import CACHE, ROOT, BenchError

IMAGE_COUNT: Final = 64
"""Number of images in one request: the default maximum."""

MIN_RATIO: Final = 0.9
"""Minimum share of bare ONNX Runtime's rate."""

NETWORKS: Final = ("resnet50", "mobilenet_v2")

JSON_BYTES: Final = (1 << 18, 1 << 20, 1 << 22, 1 << 24)
"""Sizes of JSON requests, in bytes; the third is the default limit."""

_BINARY_HEADER: Final = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class PairedRates:
    """One measurement of both contestants, in images per second."""

    network: str
    processors: int
    bare: float
    fovea: float


@dataclass(frozen=True)
class Stall:
    """The waiting time of others while JSON of one size is read, in seconds."""

    size: int
    median: float
    longest: float
    request_seconds: float
    """Median time of the JSON request itself, in seconds."""


def main() -> int:
    """Measure as the command line asks, print tables, write JSON; return 1 if a claim fails."""
    options = _parse_arguments()
    try:
        pairs = [pair for name in options.networks for pair in _compare_network(name, options.rounds)]
        stalls = list(_measure_stalls(options.requests))
    except BenchError as error:
        print(f"oip: {error}", file=sys.stderr)
        return 2
    failures = _show_tables(pairs, stalls)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": describe_machine(),
        "pairs": [asdict(pair) for pair in pairs],
        "stalls": [asdict(stall) for stall in stalls],
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failures else 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.oip", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each contestant (default: 7)")
    parser.add_argument("--requests", type=int, default=20, help="JSON requests of each size (default: 20)")
    parser.add_argument("--out", type=Path, default=CACHE / "oip.json")
    return parser.parse_args()


# --- the same array ------------------------------------------------------------------------------


def _compare_network(name: str, rounds: int) -> Iterator[PairedRates]:
    network = import_network(name)
    array = np.random.default_rng(0).normal(0, 1, (IMAGE_COUNT, 3, SIDE, SIDE)).astype(np.float32)
    all_processors = os.sched_getaffinity(0)
    for processors in dict.fromkeys((len(all_processors), 1)):
        affinity = set(sorted(all_processors)[:processors])
        os.sched_setaffinity(0, affinity)  # the service's processes inherit the affinity
        try:
            with (
                start_service(network.repository) as (host, port),
                open_inference_client(host, port, array) as infer,
            ):
                yield from _measure_pairs(
                    name,
                    processors,
                    rounds,
                    make_bare_runner(network.original_file, processors),
                    infer,
                    array,
                )
        finally:
            os.sched_setaffinity(0, all_processors)


def _measure_pairs(
    name: str,
    processors: int,
    rounds: int,
    run_bare: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]],
    infer: Callable[[], npt.NDArray[np.float32]],
    array: npt.NDArray[np.float32],
) -> Iterator[PairedRates]:
    """Yield the measured pairs, after a warm-up that compares the logits.

    Raises `BenchError` if the logits differ.
    """
    difference = float(np.abs(run_bare(array) - infer()).max())
    if not difference <= 1e-3:
        raise BenchError(f"the service's logits of {name} differ from ONNX Runtime's by {difference:.3g}")
    for round_number in range(rounds):
        pair = PairedRates(
            name,
            processors,
            IMAGE_COUNT / _measure_seconds(lambda: run_bare(array)),
            IMAGE_COUNT / _measure_seconds(infer),
        )
        print(
            f"  {name:<14}{processors} processors  round {round_number + 1}  bare {pair.bare:7.1f} images/s, "
            f"Fovea {pair.fovea:7.1f}",
            flush=True,
        )
        yield pair


def _measure_seconds(call: Callable[[], Any]) -> float:
    started_at = time.perf_counter()
    call()
    return time.perf_counter() - started_at


def make_bare_runner(
    original_file: Path, threads: int
) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    """Return a function from an array to the logits of the original file, in this process."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # spinning threads would disturb the next measurement
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(original_file, options, providers=["CPUExecutionProvider"])
    (model_input,) = session.get_inputs()

    def run(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = session.run(None, {model_input.name: array})[0]
        return logits

    return run


@contextmanager
def open_inference_client(
    host: str, port: int, array: npt.NDArray[np.float32]
) -> Iterator[Callable[[], npt.NDArray[np.float32]]]:
    """Yield a function that sends one request over a shared connection and returns the logits."""
    connection = http.client.HTTPConnection(host, port, timeout=600)
    connection.request("GET", "/v2/models/network")
    (tensor,) = json.loads(connection.getresponse().read())["inputs"]
    parameters = {"binary_data_size": array.nbytes}
    header_fields = {
        "inputs": [{**tensor, "shape": list(array.shape), "parameters": parameters}],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }
    head = json.dumps(header_fields).encode()
    body = head + array.tobytes()
    headers = {_BINARY_HEADER: str(len(head)), "Content-Type": "application/octet-stream"}

    def infer() -> npt.NDArray[np.float32]:
        connection.request("POST", "/v2/models/network/infer", body, headers)
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise BenchError(f"the service answers {response.status}: {content[:200]!r}")
        values = np.frombuffer(content[int(response.headers[_BINARY_HEADER]) :], np.float32)
        return values.reshape(len(array), -1)

    with closing(connection):
        yield infer


@contextmanager
def start_service(models: Path, **settings: str) -> Iterator[tuple[str, int]]:
    """Start a service and yield its host and port."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    environment |= {"FOVEA_PORT": "0", "FOVEA_MODELS": str(models), "FOVEA_LOG_LEVEL": "error", **settings}
    command = [sys.executable, "-m", "fovea.service"]
    with start_process(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        if process.stdout is None or not (greeting := process.stdout.readline()):
            raise BenchError("the service has not started")
        host, port = greeting.split("http://")[1].strip().split(":")
        yield host, int(port)


# --- JSON ----------------------------------------------------------------------------------------


def _measure_stalls(requests: int) -> Iterator[Stall]:
    with start_service(ROOT / "zoo", FOVEA_JSON_BYTES=str(1 << 25), FOVEA_DEFAULT_MODEL="cifar10") as (
        host,
        port,
    ):
        yield _measure_stall(host, port, 0, requests)
        for size in JSON_BYTES:
            yield _measure_stall(host, port, size, requests)


def _measure_stall(host: str, port: int, size: int, requests: int) -> Stall:
    """Measure a request of this size, which is read completely and then refused for too many numbers.

    With size 0 there is no such request, and the others wait for nothing.
    """
    numbers = ",".join(["0.12345678"] * (size // 11))
    tensor = '{"name":"pixels","shape":[1,32,32,3],"datatype":"UINT8","data":['
    body = f'{{"inputs":[{tensor}{numbers}]}}]}}'.encode()
    durations = []
    with probe_service(host, port) as waits:
        connection = http.client.HTTPConnection(host, port, timeout=60)
        for _ in range(requests):
            started_at = time.perf_counter()
            if size:
                connection.request("POST", "/v2/models/cifar10/infer", body)
                if connection.getresponse().read().find(b"values") < 0:
                    raise BenchError("a JSON request was not read to its end")
            else:
                time.sleep(0.05)
            durations.append(time.perf_counter() - started_at)
    return Stall(size, statistics.median(waits), max(waits), statistics.median(durations))


# --- tables --------------------------------------------------------------------------------------


def _show_tables(pairs: list[PairedRates], stalls: list[Stall]) -> list[str]:
    """Print the tables and return the failed claims."""
    failures = []
    print("\n| network | processors | bare ONNX Runtime, images/s | Fovea | ratio |\n|---|---|---|---|---|")
    for key in dict.fromkeys((pair.network, pair.processors) for pair in pairs):
        network_pairs = [pair for pair in pairs if (pair.network, pair.processors) == key]
        bare, fovea = (
            statistics.median(one)
            for one in zip(*((pair.bare, pair.fovea) for pair in network_pairs), strict=True)
        )
        ratio = statistics.median(pair.fovea / pair.bare for pair in network_pairs)
        print(f"| {key[0]} | {key[1]} | {bare:.1f} | {fovea:.1f} | {ratio:.3f} |")
        if ratio < MIN_RATIO:
            failures.append(f"{key[0]} on {key[1]} processors: {ratio:.3f}; at least {MIN_RATIO}")
    print("\n| JSON, MB | others wait, median ms | longest | the request itself |\n|---|---|---|---|")
    for one in stalls:
        times = " | ".join(
            f"{1000 * seconds:.1f}" for seconds in (one.median, one.longest, one.request_seconds)
        )
        print(f"| {one.size / 1e6:.2f} | {times} |")
    print(f"\n{describe_machine()}.")
    print("\n".join(failures) or f"Every network reaches at least {MIN_RATIO} of bare ONNX Runtime's rate.")
    return failures


if __name__ == "__main__":
    sys.exit(main())
