"""The `make bench-inline` benchmark: what it costs that models run in processes of their own.

The other extreme is two replicas that share the port and run each image on their event loop. They have no
limits, metrics, log or queue, and an image that kills a model takes all requests of a replica with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from fovea.bench.bare import ImageClassifier, make_fovea_classifier
from fovea.bench.cells import run_wrk
from fovea.bench.contestants import (
    FoveaVersion,
    Server,
    find_free_port,
    start_fovea,
    wait_until_ready,
    write_image_list,
)
from fovea.bench.minimal_server import MinimalProtocol
from fovea.bench.mixed import describe_machine
from fovea.bench.processes import start_process
from fovea.bench.workloads import ROOT, WORKLOADS

_CONNECTIONS: Final = (1, 8, 32)
_REPLICAS: Final = 2


class InlineProtocol(MinimalProtocol):
    """A connection that classifies each body on the event loop."""

    def __init__(self, classify: ImageClassifier) -> None:
        self._classify = classify

    def create_answer(self, body: bytes) -> bytes:
        """Return the answer with the most probable label."""
        index = int(self._classify(body).argmax())
        content = json.dumps({"predictions": [{"index": index}]}).encode()
        return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
            len(content),
            content,
        )


async def _serve(model: Path, port: int) -> None:
    classify = make_fovea_classifier(model, threads=1)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: InlineProtocol(classify), "127.0.0.1", port, reuse_port=True)
    await server.serve_forever()


def main() -> None:
    """Measure both and print a table."""
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.inline", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="rounds for each load (default: 6)")
    parser.add_argument("--seconds", type=float, default=2, help="time of one service (default: 2)")
    parser.add_argument("--serve", nargs=2, metavar=("MODEL", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(_serve(Path(options.serve[0]), int(options.serve[1])))
        return
    workload = WORKLOADS["thumbnails"]
    path = workload.pixel_paths[0]
    port = find_free_port()
    command = [
        sys.executable,
        "-m",
        "fovea.bench.inline",
        "--serve",
        str(workload.build_model(path)),
        f"{port}",
    ]
    with ExitStack() as stack:
        images = stack.enter_context(write_image_list(workload))
        fovea = stack.enter_context(start_fovea(FoveaVersion(), "fovea", workload, path))
        replicas = [
            stack.enter_context(start_process(command, cwd=ROOT, stdout=subprocess.DEVNULL))
            for _ in range(_REPLICAS)
        ]
        inline = wait_until_ready(Server("inline", f"http://127.0.0.1:{port}/", replicas[-1]), workload)
        print("| connections | inline, images/s | Fovea, images/s | Fovea / inline, median (range) |")
        print("|---|---|---|---|")
        for connections in _CONNECTIONS:
            rates: list[tuple[float, float]] = []
            for _ in range(options.rounds + 1):
                reports = [run_wrk(one.url, connections, options.seconds, images) for one in (inline, fovea)]
                rates.append((reports[0]["requests"], reports[1]["requests"]))
            del rates[0]  # both were cold
            ratios = sorted(own / other for other, own in rates)
            medians = [statistics.median(column) / options.seconds for column in zip(*rates, strict=True)]
            print(
                f"| {connections} | {medians[0]:,.0f} | {medians[1]:,.0f} | {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
                flush=True,
            )
    print(f"\n{describe_machine()}.")


if __name__ == "__main__":
    main()
