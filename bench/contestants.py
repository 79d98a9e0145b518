"""The contestants of the benchmark: the bare loop, and servers in their own processes.

`bench.peers` starts the servers of others.
"""

from __future__ import annotations

import http.client
import json
import operator
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from fovea.bench import bare
from fovea.bench.load import compute_percentile
from fovea.bench.processes import pause_tree, resume_tree, start_process, wait_until_idle
from fovea.bench.workloads import ROOT, BenchError, Workload
from fovea.service.runners.fork_server import ENVIRONMENT

MIN_AGREEMENT: Final = 0.95
"""Minimum share of images with the bare loop's top-1 label for Fovea.

Fovea converts colour profiles to sRGB, and plain code does not: 2 of 40 photographs have another label.
`fast` decodes at a smaller size as well.
"""

OWN_MODEL_AGREEMENT: Final = 0.5
"""The same for a version with models of its own, such as int8; its share is shown beside its speed.

A server that mixes up its answers has a share of a few percent, because most images have their own labels.
"""

_START_TIMEOUT: Final = 120.0  # many configurations start at the same time

_IDLE_TIMEOUT: Final = 1.0
"""Time in seconds that a server gets to end its work after a turn."""

_CHECK_CALLERS: Final = 8
"""Number of requests at a time when answers are checked, so that a server forms batches."""


@dataclass(frozen=True)
class Latencies:
    """The percentiles of latencies, in seconds."""

    p50: float
    p99: float


@dataclass(frozen=True)
class BareLoop:
    """The bare loop in `len(processes)` processes."""

    name: str
    processes: list[subprocess.Popen[str]]

    def run(self, seconds: float) -> tuple[Latencies, float]:
        """Run all processes at once; return single-image latencies and total images per second."""
        # all processes get their line before the first answer is awaited, so that they run at the same time
        for process in self.processes:
            _require_pipe(process.stdin).write(f"{seconds}\n")
            _require_pipe(process.stdin).flush()
        reports = [json.loads(_require_pipe(process.stdout).readline()) for process in self.processes]
        sorted_latencies = sorted(latency for one in reports for latency in one["latencies"])
        rate = sum(len(one["latencies"]) / one["seconds"] for one in reports)
        return Latencies(
            compute_percentile(sorted_latencies, 50), compute_percentile(sorted_latencies, 99)
        ), rate


@dataclass(frozen=True)
class Server:
    """A server that answers at `url`."""

    name: str
    url: str
    process: subprocess.Popen[str]
    configuration: str = ""
    """Configuration of a peer; empty for Fovea, which chooses its own."""
    key: str = ""
    """API key to send; empty if the server needs none."""

    @contextmanager
    def take_turn(self) -> Iterator[None]:
        """Let the server run within the block only.

        Between their turns servers are stopped, because some are busy while nobody asks them anything.
        """
        resume_tree(self.process.pid)
        try:
            yield
        finally:
            wait_until_idle([self.process.pid], limit=_IDLE_TIMEOUT)
            pause_tree(self.process.pid)

    def predict_top1(self, image: bytes) -> int:
        """Return the index of the most probable label according to this server."""
        key_header = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(  # noqa: S310 - our own servers
            self.url, image, {"Content-Type": "image/jpeg", **key_header}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=_START_TIMEOUT) as response:  # noqa: S310
            index: int = json.load(response)["predictions"][0]["index"]
        return index


@dataclass(frozen=True)
class FoveaVersion:
    """A version of Fovea: its source tree and its settings that differ from the defaults."""

    name: str = "fovea"
    source_tree: Path = ROOT
    settings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> FoveaVersion:
        """Parse `label=/path/to/tree[,FOVEA_NAME=value…]`; an empty path is this tree."""
        label, _, rest = text.partition("=")
        source_tree, *settings = rest.split(",")
        return cls(
            label,
            Path(source_tree).absolute() if source_tree else ROOT,
            dict(one.split("=", 1) for one in settings),
        )

    @property
    def has_own_models(self) -> bool:
        """Flag for a version that serves its own models instead of the workload's."""
        return "FOVEA_MODELS" in self.settings


# --- the bare loop -------------------------------------------------------------------------------

LOOPS: Final = {"bare": ("plain", 2, 1), "bare, Fovea's code": ("fovea", 2, 1), "alone": ("plain", 1, 0)}
"""Kind, processes and threads of ONNX Runtime (0: its own choice) of each loop, by name.

`bare, Fovea's code` decodes and runs as Fovea's runners do; no service around them can be faster.
"""


@contextmanager
def start_loop(name: str, workload: Workload) -> Iterator[BareLoop]:
    """Start a bare loop of `LOOPS`, which sleeps until it gets work."""
    kind, count, threads = LOOPS[name]
    model = workload.build_model("plain" if kind == "plain" else workload.pixel_paths[0])
    environment = os.environ if kind == "plain" else {**ENVIRONMENT, **os.environ}
    size, resize_to = bare.preprocessing_sizes(workload.geometry)
    images = workload.images
    with ExitStack() as stack:
        list_file = stack.enter_context(write_image_list(workload))
        processes = [
            stack.enter_context(
                start_process(
                    [sys.executable, "-m", "fovea.bench.bare", kind, str(model), str(list_file),
                     f"--size={size}", f"--resize-to={resize_to}", f"--threads={threads}",
                     f"--first={number * len(images) // count}"],
                    cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )
            )
            for number in range(count)
        ]  # fmt: skip
        bare_loop = BareLoop(name, processes)
        bare_loop.run(0.5)
        yield bare_loop


@contextmanager
def write_image_list(workload: Workload) -> Iterator[Path]:
    """Yield a file that lists the workload's images, one per line."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{path}\n" for path in workload.images))
        file.flush()
        yield Path(file.name)


# --- servers -------------------------------------------------------------------------------------


@contextmanager
def start_fovea(
    version: FoveaVersion, name: str, workload: Workload, path: str, key: str = ""
) -> Iterator[Server]:
    """Start a version of Fovea; its log goes to a file. `key` is an API key if its settings need one.

    The model is the workload's for this pixel path, unless the version has models of its own.
    """
    base_environment = {key: value for key, value in os.environ.items() if not key.startswith("FOVEA_")}
    models = {} if version.has_own_models else {"FOVEA_MODELS": str(workload.build_model(path))}
    environment = {**base_environment, "FOVEA_PORT": "0", **models, **version.settings}
    command = [sys.executable, "-m", "fovea.service"]
    with (
        tempfile.TemporaryFile("w") as log,
        start_process(
            command, cwd=version.source_tree, env=environment, stdout=subprocess.PIPE, stderr=log
        ) as process,
    ):
        yield wait_until_ready(
            Server(name, f"{_read_address(process, version.name)}/v1/classify", process, key=key), workload
        )


def _read_address(process: subprocess.Popen[str], name: str) -> str:
    """Return the first URL that the service prints."""
    for line in _require_pipe(process.stdout):
        if address_match := re.search(r"http://\S+", line):
            return address_match[0]
    raise BenchError(f"{name} did not start")


def _require_pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise BenchError("a process has no pipe")
    return stream


def find_free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_until_ready(server: Server, workload: Workload) -> Server:
    """Wait until the server classifies an image.

    Raises `BenchError` if it does not.
    """
    image = workload.images[0].read_bytes()
    end = time.monotonic() + _START_TIMEOUT
    while server.process.poll() is None and time.monotonic() < end:
        try:
            server.predict_top1(image)
            return server
        except (OSError, http.client.HTTPException):  # not listening, or listening without a worker yet
            time.sleep(0.1)
    raise BenchError(f"{server.name} did not start")


def check_answers(server: Server, expected_labels: Mapping[Path, int], *, agreement: float) -> float:
    """Return the share of images with the expected top-1 label, with several requests at a time.

    Raises `BenchError` below `agreement`.
    """
    images = [path.read_bytes() for path in expected_labels]
    with ThreadPoolExecutor(_CHECK_CALLERS) as pool:
        labels = list(pool.map(server.predict_top1, images))
    share: float = sum(map(operator.eq, labels, expected_labels.values())) / len(expected_labels)
    if share < agreement:
        raise BenchError(
            f"{server.name} answers {share:.1%} of the images as the bare loop does; at least {agreement:.0%}"
        )
    return share


def compute_reference(workload: Workload) -> dict[Path, int]:
    """Return the in-process answer for each image: the index of its most probable label."""
    classify: Any = bare.make_plain_classifier(
        workload.build_model("plain"), *bare.preprocessing_sizes(workload.geometry), threads=1
    )
    return {path: int(classify(path.read_bytes()).argmax()) for path in workload.images}
