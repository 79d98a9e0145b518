"""The `make bench-grpc` benchmark: the same images over gRPC and over HTTP, in one run.

One service with one runner answers both. The client is another process with a few threads, one request at a
time in each. Every request has one encoded image as a `BYTES` tensor, and asks for the label. Both protocols
alternate. The processor time of the service's own process says what a request costs without the client, the
decoding and the model.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import grpc

from fovea.bench.mixed import describe_machine
from fovea.bench.processes import measure_own_cpu_seconds, start_process
from fovea.bench.workloads import CACHE, ROOT, WORKLOADS, BenchError
from fovea.service.grpc import inference_pb2 as pb

PROTOCOLS: Final = ("grpc", "http")

WORKLOAD_NAMES: Final = ("thumbnails", "photographs")

_MODEL: Final = "cifar10"

_CLIENT_OPTION: Final = "--client"


@dataclass(frozen=True)
class Round:
    """One measurement of one protocol."""

    workload: str
    protocol: str
    rate: float
    """Images per second."""
    service_seconds: float
    """Processor time of the service's own process for each image, in seconds."""


def main() -> int:
    """Measure as the command line asks, print a table, and write JSON."""
    if sys.argv[1:2] == [_CLIENT_OPTION]:
        return _run_client(*sys.argv[2:])
    options = _parse_arguments()
    rounds: list[Round] = []
    try:
        with _start_service() as (pid, ports):
            for workload in options.workloads:
                for protocol in PROTOCOLS:  # warm-up
                    _measure(pid, ports, workload, protocol, 1.0, options.threads)
                for _ in range(options.rounds):
                    for protocol in PROTOCOLS:
                        rounds.append(
                            _measure(pid, ports, workload, protocol, options.seconds, options.threads)
                        )
    except BenchError as error:
        print(f"grpc: {error}", file=sys.stderr)
        return 2
    _show_table(rounds, options.workloads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": describe_machine(), "rounds": [asdict(one) for one in rounds]}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.grpc", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOAD_NAMES, default=list(WORKLOAD_NAMES))
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each protocol (default: 5)")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of each (default: 4)")
    parser.add_argument("--threads", type=int, default=4, help="requests at the same time (default: 4)")
    parser.add_argument("--out", type=Path, default=CACHE / "grpc.json")
    return parser.parse_args()


@contextmanager
def _start_service() -> Iterator[tuple[int, dict[str, int]]]:
    """Start the service, and yield its process id and its ports by protocol."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    environment |= {
        "FOVEA_PORT": "0",
        "FOVEA_GRPC_PORT": "0",
        "FOVEA_RUNNERS": "1",
        "FOVEA_MODELS": str(ROOT / "zoo"),
        "FOVEA_DEFAULT_MODEL": _MODEL,
        "FOVEA_LOG_LEVEL": "error",
    }
    command = [sys.executable, "-m", "fovea.service"]
    with start_process(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        greeting = process.stdout.readline() if process.stdout else ""
        ports = re.search(r"http://127\.0\.0\.1:(\d+) and gRPC on port (\d+)", greeting)
        if not ports:
            raise BenchError("the service has not started")
        yield process.pid, {"http": int(ports[1]), "grpc": int(ports[2])}


def _measure(
    pid: int, ports: dict[str, int], workload: str, protocol: str, seconds: float, threads: int
) -> Round:
    before = measure_own_cpu_seconds(pid)
    command = [sys.executable, "-m", "fovea.bench.grpc", _CLIENT_OPTION]
    client = subprocess.run(
        [*command, protocol, str(ports[protocol]), workload, str(seconds), str(threads)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if client.returncode:
        raise BenchError(f"the client failed: {client.stderr[-500:]}")
    count, duration = json.loads(client.stdout)
    one = Round(workload, protocol, count / duration, (measure_own_cpu_seconds(pid) - before) / count)
    print(
        f"  {workload:<12}{protocol:<5} {one.rate:7.1f} images/s, {1e6 * one.service_seconds:6.0f} us of the "
        "service's processor time for each",
        flush=True,
    )
    return one


def _show_table(rounds: list[Round], workloads: list[str]) -> None:
    for workload in workloads:
        rates, costs = (
            {
                protocol: statistics.median(
                    getattr(one, field)
                    for one in rounds
                    if (one.workload, one.protocol) == (workload, protocol)
                )
                for protocol in PROTOCOLS
            }
            for field in ("rate", "service_seconds")
        )
        print(
            f"{workload}: gRPC {rates['grpc']:.0f}, HTTP {rates['http']:.0f} images/s, ratio "
            f"{rates['grpc'] / rates['http']:.2f}; service {1e6 * costs['grpc']:.0f} and "
            f"{1e6 * costs['http']:.0f} us for each"
        )


# --- the client process --------------------------------------------------------------------------


def _run_client(protocol: str, port: str, workload: str, seconds: str, threads: str) -> int:
    """Send images for some seconds, and print their number and the duration as JSON."""
    images = [path.read_bytes() for path in WORKLOADS[workload].images]
    create = {"grpc": _create_grpc_sender, "http": _create_http_sender}[protocol]
    started_at = time.perf_counter()
    end = started_at + float(seconds)
    counts = [0] * int(threads)

    def send_images(number: int) -> None:
        send = create(int(port))
        while time.perf_counter() < end:
            send(images[(number + counts[number] * len(counts)) % len(images)])
            counts[number] += 1

    workers = [threading.Thread(target=send_images, args=(number,)) for number in range(len(counts))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if not all(counts):
        return 1
    print(json.dumps([sum(counts), time.perf_counter() - started_at]))
    return 0


def _create_grpc_sender(port: int) -> Callable[[bytes], None]:
    channel = grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)])
    infer = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelInferResponse.FromString,
    )
    output = pb.ModelInferRequest.InferRequestedOutputTensor(name="probabilities")
    output.parameters["classification"].int64_param = 1
    tensor = pb.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[1])

    def send(image: bytes) -> None:
        raw = struct.pack("<I", len(image)) + image
        infer(
            pb.ModelInferRequest(
                model_name=_MODEL, inputs=[tensor], outputs=[output], raw_input_contents=[raw]
            )
        )

    return send


def _create_http_sender(port: int) -> Callable[[bytes], None]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    output = {"name": "probabilities", "parameters": {"classification": 1}}
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    head = json.dumps({"inputs": [tensor], "outputs": [output]}).encode()
    headers = {
        "Inference-Header-Content-Length": str(len(head)),
        "Content-Type": "application/octet-stream",
    }

    def send(image: bytes) -> None:
        body = head + struct.pack("<I", len(image)) + image
        connection.request("POST", f"/v2/models/{_MODEL}/infer", body, headers)
        reply = connection.getresponse()
        content = reply.read()
        if reply.status != 200:
            raise BenchError(content[:200].decode(errors="replace"))
        json.loads(content)

    return send


if __name__ == "__main__":
    sys.exit(main())
