"""The contestants of the benchmark: the bare loop, and servers in their own processes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from fovea.bench import bare
from fovea.bench.load import percentile
from fovea.bench.processes import running
from fovea.bench.workloads import ROOT, BenchError, Workload
from fovea.service.artifact.contract import PixelPath
from fovea.service.runners.spawn import ENVIRONMENT

AGREEMENT: Final = {PixelPath.EXACT: 1.0, PixelPath.FAST: 0.95}
"""Minimum share of images with the bare loop's top-1 label, by Fovea's pixel path."""

_START_SECONDS: Final = 60.0


@dataclass(frozen=True)
class Latencies:
    """The percentiles of latencies, in seconds."""

    p50: float
    p99: float


@dataclass(frozen=True)
class Loop:
    """The bare loop in `len(processes)` processes."""

    name: str
    processes: list[subprocess.Popen[str]]

    def work(self, seconds: float) -> tuple[Latencies, float]:
        """Run all processes at once; return single-image latencies and total images per second."""
        for process in self.processes:
            _pipe(process.stdin).write(f"{seconds}\n")
            _pipe(process.stdin).flush()
        done = [json.loads(_pipe(process.stdout).readline()) for process in self.processes]
        ordered = sorted(latency for one in done for latency in one["latencies"])
        rate = sum(len(one["latencies"]) / one["seconds"] for one in done)
        return Latencies(percentile(ordered, 50), percentile(ordered, 99)), rate


@dataclass(frozen=True)
class Server:
    """A server that answers at `url`."""

    name: str
    url: str
    process: subprocess.Popen[str]

    def top1(self, image: bytes) -> int:
        """Return the index of the most probable label according to this server."""
        request = urllib.request.Request(  # noqa: S310 - our own servers
            self.url, image, {"Content-Type": "image/jpeg"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=_START_SECONDS) as answer:  # noqa: S310
            index: int = json.load(answer)["predictions"][0]["index"]
        return index


@dataclass(frozen=True)
class Fovea:
    """A version of Fovea: its source tree and its settings that differ from the defaults."""

    name: str = "fovea"
    tree: Path = ROOT
    settings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Fovea:
        """Parse `label=/path/to/tree[,FOVEA_NAME=value…]`; an empty path is this tree."""
        label, _, rest = text.partition("=")
        tree, *settings = rest.split(",")
        return cls(
            label, Path(tree).absolute() if tree else ROOT, dict(one.split("=", 1) for one in settings)
        )


# --- the bare loop -------------------------------------------------------------------------------

LOOPS: Final = {"bare": ("by_hand", 2, 1), "bare, our way": ("by_us", 2, 1), "alone": ("by_hand", 1, 0)}
"""Kind, processes and threads of ONNX Runtime (0: its own choice) of each loop, by name.

`bare, our way` decodes and runs as Fovea's runners do; no service around them can be faster.
"""


@contextmanager
def loop(name: str, workload: Workload) -> Iterator[Loop]:
    """Start a bare loop of `LOOPS`, which sleeps until it gets work."""
    kind, count, threads = LOOPS[name]
    model = workload.model("plain" if kind == "by_hand" else workload.paths[0])
    environment = os.environ if kind == "by_hand" else {**ENVIRONMENT, **os.environ}
    size, resize_to = bare.sizes(workload.geometry)
    images = workload.images
    with ExitStack() as stack:
        listed = stack.enter_context(image_list(workload))
        processes = [
            stack.enter_context(
                running(
                    [sys.executable, "-m", "fovea.bench.bare", kind, str(model), str(listed),
                     f"--size={size}", f"--resize-to={resize_to}", f"--threads={threads}",
                     f"--first={number * len(images) // count}"],
                    cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )
            )
            for number in range(count)
        ]  # fmt: skip
        started = Loop(name, processes)
        started.work(0.5)
        yield started


@contextmanager
def image_list(workload: Workload) -> Iterator[Path]:
    """Yield a file that lists the workload's images, one per line."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{path}\n" for path in workload.images))
        file.flush()
        yield Path(file.name)


# --- servers -------------------------------------------------------------------------------------


@contextmanager
def fovea(version: Fovea, name: str, workload: Workload, path: str) -> Iterator[Server]:
    """Start a version of Fovea with the workload's model for this pixel path; its log goes to a file."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FOVEA_")}
    models = {"FOVEA_MODELS": str(workload.model(path))}
    environment = {**inherited, "FOVEA_PORT": "0", **version.settings, **models}
    command = [sys.executable, "-m", "fovea.service"]
    with (
        tempfile.TemporaryFile("w") as log,
        running(command, cwd=version.tree, env=environment, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        yield _ready(Server(name, f"{_address(process, version.name)}/v1/classify", process), workload)


def _address(process: subprocess.Popen[str], name: str) -> str:
    """Return the first URL that the service prints."""
    for line in _pipe(process.stdout):
        if found := re.search(r"http://\S+", line):
            return found[0]
    raise BenchError(f"{name} did not start")


@contextmanager
def tutorial(workload: Workload) -> Iterator[Server]:
    """Start the tutorial's service as the tutorial describes."""
    port = _free_port()
    size, resize_to = bare.sizes(workload.geometry)
    environment = {
        **os.environ,
        "TUTORIAL_MODEL": str(workload.model("plain")),
        "TUTORIAL_SIZE": str(size),
        "TUTORIAL_RESIZE_TO": str(resize_to),
    }
    command = [sys.executable, "-m", "uvicorn", "bench.tutorial:app", f"--port={port}"]
    with running(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        yield _ready(Server("tutorial", f"http://127.0.0.1:{port}/classify", process), workload)


@contextmanager
def mosec(workload: Workload) -> Iterator[Server]:
    """Start mosec with tuned settings."""
    port = _free_port()
    size, resize_to = bare.sizes(workload.geometry)
    environment = {
        **os.environ,
        "BENCH_MODEL": str(workload.model("plain")),
        "BENCH_SIZE": str(size),
        "BENCH_RESIZE_TO": str(resize_to),
        "MOSEC_LOG_LEVEL": "error",
    }
    command = [sys.executable, "-m", "fovea.bench.mosec_server", "--address=127.0.0.1", f"--port={port}",
               "--timeout=30000"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with running([*command, f"--path={folder}/mosec"], cwd=ROOT, env=environment, **quiet) as process:
            yield _ready(Server("mosec", f"http://127.0.0.1:{port}/inference", process), workload)


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise BenchError("a process has no pipe")
    return stream


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _ready(server: Server, workload: Workload) -> Server:
    """Wait until the server classifies an image.

    Raises `BenchError` if it does not.
    """
    image = workload.images[0].read_bytes()
    end = time.monotonic() + _START_SECONDS
    while server.process.poll() is None and time.monotonic() < end:
        try:
            server.top1(image)
            return server
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise BenchError(f"{server.name} did not start")


def check(server: Server, wanted: Mapping[Path, int], *, agreement: float) -> float:
    """Return the share of images with the wanted top-1 label.

    Raises `BenchError` below `agreement`.
    """
    same = sum(server.top1(path.read_bytes()) == index for path, index in wanted.items())
    share = same / len(wanted)
    if share < agreement:
        raise BenchError(f"{server.name} answers {share:.1%} of the images right; at least {agreement:.0%}")
    return share


def reference(workload: Workload) -> dict[Path, int]:
    """Return the in-process answer for each image: the index of its most probable label."""
    classify: Any = bare.by_hand(workload.model("plain"), *bare.sizes(workload.geometry), threads=1)
    return {path: int(classify(path.read_bytes()).argmax()) for path in workload.images}
