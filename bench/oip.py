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

from fovea.bench.mixed import machine
from fovea.bench.probe import probing
from fovea.bench.processes import running
from fovea.bench.workloads import CACHE, ROOT, BenchError

IMAGES: Final = 64
"""Number of images in one request: the default maximum."""

SIDE: Final = 224

LEAST: Final = 0.9
"""Minimum share of bare ONNX Runtime's rate."""

NETWORKS: Final = ("resnet50", "mobilenet_v2")

JSON_BYTES: Final = (1 << 18, 1 << 20, 1 << 22, 1 << 24)
"""Sizes of JSON requests, in bytes; the third is the default limit."""

_BINARY: Final = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Pair:
    """One measurement of both contestants, in images per second."""

    network: str
    processors: int
    bare: float
    ours: float


@dataclass(frozen=True)
class Stall:
    """The waiting time of others while JSON of one size is read, in seconds."""

    size: int
    median: float
    longest: float
    answered: float
    """Median time of the JSON request itself, in seconds."""


def main() -> int:
    """Measure as the command line asks, print tables, write JSON; return 1 if a claim fails."""
    given = _arguments()
    try:
        pairs = [pair for name in given.networks for pair in _compare(name, given.rounds)]
        stalls = list(_stalls(given.requests))
    except BenchError as error:
        print(f"oip: {error}", file=sys.stderr)
        return 2
    slow = _show(pairs, stalls)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": machine(),
        "pairs": [asdict(pair) for pair in pairs],
        "stalls": [asdict(stall) for stall in stalls],
    }
    given.out.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if slow else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.oip", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=7, help="turns of both")
    parser.add_argument("--requests", type=int, default=20, help="JSON requests of each size")
    parser.add_argument("--out", type=Path, default=CACHE / "oip.json")
    return parser.parse_args()


# --- the same array ------------------------------------------------------------------------------


def _compare(name: str, rounds: int) -> Iterator[Pair]:
    zoo, plain = _imported(name)
    array = np.random.default_rng(0).normal(0, 1, (IMAGES, 3, SIDE, SIDE)).astype(np.float32)
    everywhere = os.sched_getaffinity(0)
    for processors in dict.fromkeys((len(everywhere), 1)):
        chosen = set(sorted(everywhere)[:processors])
        os.sched_setaffinity(0, chosen)  # the service's processes inherit the affinity
        try:
            with service(zoo) as (host, port), asking(host, port, array) as ask:
                yield from _turns(name, processors, rounds, bare(plain, processors), ask, array)
        finally:
            os.sched_setaffinity(0, everywhere)


def _turns(
    name: str,
    processors: int,
    rounds: int,
    bare: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]],
    ask: Callable[[], npt.NDArray[np.float32]],
    array: npt.NDArray[np.float32],
) -> Iterator[Pair]:
    """Yield the measured turns, after a warm-up turn that compares the logits.

    Raises `BenchError` if the logits differ.
    """
    difference = float(np.abs(bare(array) - ask()).max())
    if not difference <= 1e-3:
        raise BenchError(f"a logit of {name} is off by {difference:.3g}")
    for turn in range(rounds):
        pair = Pair(name, processors, IMAGES / _seconds(lambda: bare(array)), IMAGES / _seconds(ask))
        print(
            f"  {name:<14}{processors} processors  round {turn + 1}  bare {pair.bare:7.1f} images/s, "
            f"ours {pair.ours:7.1f}",
            flush=True,
        )
        yield pair


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def bare(plain: Path, threads: int) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    """Return a function from an array to the logits of the original file, in this process."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # spinning threads would disturb the next turn
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(plain, options, providers=["CPUExecutionProvider"])
    (only,) = session.get_inputs()

    def run(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = session.run(None, {only.name: array})[0]
        return logits

    return run


@contextmanager
def asking(
    host: str, port: int, array: npt.NDArray[np.float32]
) -> Iterator[Callable[[], npt.NDArray[np.float32]]]:
    """Yield a function that sends one request over a shared connection and returns the logits."""
    connection = http.client.HTTPConnection(host, port, timeout=600)
    connection.request("GET", "/v2/models/network")
    (tensor,) = json.loads(connection.getresponse().read())["inputs"]
    parameters = {"binary_data_size": array.nbytes}
    asked = {
        "inputs": [{**tensor, "shape": list(array.shape), "parameters": parameters}],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }
    head = json.dumps(asked).encode()
    body = head + array.tobytes()
    headers = {_BINARY: str(len(head)), "Content-Type": "application/octet-stream"}

    def ask() -> npt.NDArray[np.float32]:
        connection.request("POST", "/v2/models/network/infer", body, headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise BenchError(f"the service answers {answer.status}: {content[:200]!r}")
        values = np.frombuffer(content[int(answer.headers[_BINARY]) :], np.float32)
        return values.reshape(len(array), -1)

    with closing(connection):
        yield ask


def _imported(name: str) -> tuple[Path, Path]:
    """Return a repository with the imported network and the original file, created once."""
    folder = CACHE / "oip" / name
    plain = folder / "plain.onnx"
    if not (folder / "zoo").exists():
        import torch  # not needed if everything exists

        from fovea.export.from_checkpoint import plain_graph
        from fovea.export.importer.inspect import Request
        from fovea.export.importer.pipeline import import_model
        from fovea.export.importer.preprocessing import IMAGENET, Wishes
        from fovea.model.atomic_files import write_file
        from fovea.model.networks.network import NETS, NetConfig
        from fovea.service.artifact.contract import Task

        torch.manual_seed(0)
        features = NETS[name](NetConfig(Task.MULTICLASS, 1000, name, SIDE))
        pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        net = torch.nn.Sequential(features, pool, torch.nn.Linear(features.channels, 1000))
        example = torch.zeros(2, 3, SIDE, SIDE)
        write_file(plain, plain_graph(net, example, ["logits"]).SerializeToString())
        labels = folder / "labels.txt"
        write_file(labels, "".join(f"label {number}\n" for number in range(1000)))
        import_model(Request(plain, labels, "network", folder / "zoo", Wishes(preset=IMAGENET)))
    return folder / "zoo", plain


@contextmanager
def service(models: Path, **settings: str) -> Iterator[tuple[str, int]]:
    """Start a service and yield its host and port."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    environment |= {"FOVEA_PORT": "0", "FOVEA_MODELS": str(models), "FOVEA_LOG_LEVEL": "error", **settings}
    command = [sys.executable, "-m", "fovea.service"]
    with running(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        if process.stdout is None or not (greeting := process.stdout.readline()):
            raise BenchError("the service has not started")
        host, port = greeting.split("http://")[1].strip().split(":")
        yield host, int(port)


# --- JSON ----------------------------------------------------------------------------------------


def _stalls(requests: int) -> Iterator[Stall]:
    with service(ROOT / "zoo", FOVEA_JSON_BYTES=str(1 << 25), FOVEA_DEFAULT_MODEL="cifar10") as (host, port):
        yield _stall(host, port, 0, requests)
        for size in JSON_BYTES:
            yield _stall(host, port, size, requests)


def _stall(host: str, port: int, size: int, requests: int) -> Stall:
    """Measure a request of this size, which is read completely and then refused for too many numbers.

    With size 0 there is no such request, and the others wait for nothing.
    """
    numbers = ",".join(["0.12345678"] * (size // 11))
    tensor = '{"name":"pixels","shape":[1,32,32,3],"datatype":"UINT8","data":['
    body = f'{{"inputs":[{tensor}{numbers}]}}]}}'.encode()
    took = []
    with probing(host, port) as waits:
        connection = http.client.HTTPConnection(host, port, timeout=60)
        for _ in range(requests):
            started = time.perf_counter()
            if size:
                connection.request("POST", "/v2/models/cifar10/infer", body)
                if connection.getresponse().read().find(b"values") < 0:
                    raise BenchError("a JSON request was not read to its end")
            else:
                time.sleep(0.05)
            took.append(time.perf_counter() - started)
    return Stall(size, statistics.median(waits), max(waits), statistics.median(took))


# --- tables --------------------------------------------------------------------------------------


def _show(pairs: list[Pair], stalls: list[Stall]) -> list[str]:
    """Print the tables and return the failed claims."""
    slow = []
    print("\n| network | processors | bare ONNX Runtime, images/s | ours | ratio |\n|---|---|---|---|---|")
    for key in dict.fromkeys((pair.network, pair.processors) for pair in pairs):
        mine = [pair for pair in pairs if (pair.network, pair.processors) == key]
        bare, ours = (
            statistics.median(one) for one in zip(*((pair.bare, pair.ours) for pair in mine), strict=True)
        )
        ratio = statistics.median(pair.ours / pair.bare for pair in mine)
        print(f"| {key[0]} | {key[1]} | {bare:.1f} | {ours:.1f} | {ratio:.3f} |")
        if ratio < LEAST:
            slow.append(f"{key[0]} on {key[1]} processors: {ratio:.3f}; at least {LEAST}")
    print("\n| JSON, MB | others wait, median ms | longest | the request itself |\n|---|---|---|---|")
    for one in stalls:
        times = " | ".join(f"{1000 * seconds:.1f}" for seconds in (one.median, one.longest, one.answered))
        print(f"| {one.size / 1e6:.2f} | {times} |")
    print(f"\n{machine()}.")
    print("\n".join(slow) or f"All have at least {LEAST} of bare ONNX Runtime's rate.")
    return slow


if __name__ == "__main__":
    sys.exit(main())
