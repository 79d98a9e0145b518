"""The servers of others: their versions, the configurations to search, and how they start.

Each peer has an environment of its own under `build/bench/peers/`, which is made once. ONNX Runtime, NumPy
and Pillow have the versions that Fovea uses here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from fovea.bench import bare
from fovea.bench.contestants import Server, find_free_port
from fovea.bench.processes import start_process
from fovea.bench.workloads import CACHE, ROOT, BenchError, Workload

_PROCESSORS: Final = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Configuration:
    """Settings of a peer; a peer without batches keeps the defaults of the last fields."""

    workers: int
    """Number of processes with a model each."""
    threads: int
    """Threads of ONNX Runtime in each process; 0 is ONNX Runtime's own choice."""
    path: str = "/classify"
    batch: int = 1
    """Maximum number of images in a batch."""
    wait_ms: int = 0
    """Time to wait for the rest of a batch, in milliseconds."""

    def __str__(self) -> str:
        workers = f"{self.workers} process" + ("es" if self.workers > 1 else "")
        threads = f"{self.threads or 'default'} thread" + ("" if self.threads == 1 else "s")
        batch = f", batch {self.batch}, wait {self.wait_ms} ms" if self.batch > 1 else ""
        return f"{workers}, {threads}{batch}" + (", on the loop" if "loop" in self.path else "")


@dataclass(frozen=True)
class Peer:
    """A server to compare with."""

    name: str
    requirements: tuple[str, ...]
    arguments: tuple[str, ...]
    """Arguments of its Python; `{port}`, `{workers}` and `{folder}` are filled in."""
    configurations: tuple[Configuration, ...]
    """Configurations to search."""
    short_list: tuple[Configuration, ...]
    """Configurations of a short search: those that have won somewhere."""

    @property
    def folder(self) -> Path:
        """Folder of the environment."""
        return CACHE / "peers" / self.name


_ON_LOOP: Final = "/classify-on-loop"
_WORKERS: Final = tuple(sorted({1, _PROCESSORS}))

PEERS: Final = {
    peer.name: peer
    for peer in (
        Peer(
            "tutorial",
            ("fastapi==0.165.0", "uvicorn[standard]==0.54.0"),
            ("-m", "uvicorn", "fovea.bench.servers.tutorial:app", "--port={port}", "--workers={workers}",
             "--log-level=error"),
            tuple(
                Configuration(workers, threads, path)
                for path in ("/classify", _ON_LOOP)
                for workers in _WORKERS
                for threads in (0, 1)
            ),
            (Configuration(1, 0, _ON_LOOP), Configuration(_PROCESSORS, 1, _ON_LOOP)),
        ),
        Peer(
            "mosec",
            ("mosec==0.9.8",),
            ("-m", "fovea.bench.servers.mosec_server", "--address=127.0.0.1", "--port={port}", "--wait=0",
             "--timeout=30000", "--log-level=error", "--path={folder}/mosec"),
            (
                Configuration(1, 0, "/inference"),
                Configuration(_PROCESSORS, 1, "/inference"),
                *(
                    Configuration(_PROCESSORS, 1, "/inference", batch, wait_ms)
                    for batch in (2, 4, 8)
                    for wait_ms in (0, 1, 2)
                ),
            ),
            (
                Configuration(1, 0, "/inference"),
                Configuration(_PROCESSORS, 1, "/inference", 4, 1),
                Configuration(_PROCESSORS, 1, "/inference", 8, 1),
            ),
        ),
        Peer(
            "LitServe",
            ("litserve==0.2.19",),
            ("-m", "fovea.bench.servers.litserve_server"),
            (
                Configuration(1, 0, "/predict"),
                Configuration(_PROCESSORS, 1, "/predict"),
                *(
                    Configuration(_PROCESSORS, 1, "/predict", batch, wait_ms)
                    for batch in (4, 8)
                    for wait_ms in (0, 1)
                ),
            ),
            (Configuration(_PROCESSORS, 1, "/predict"),),
        ),
        Peer(
            "BentoML",
            ("bentoml==1.4.40",),
            ("-m", "bentoml", "serve", "fovea.bench.servers.bentoml_server:ClassifyService",
             "--host=127.0.0.1", "--port={port}"),
            tuple(Configuration(workers, threads) for workers in _WORKERS for threads in (0, 1)),
            (Configuration(_PROCESSORS, 1),),
        ),
    )
}  # fmt: skip
"""The peers by name; this is the only place with their versions."""

_SHARED_REQUIREMENTS: Final = ("numpy", "onnxruntime", "pillow")


def install_peer(peer: Peer) -> Path:
    """Return the Python of the peer's environment, which is made if it does not exist.

    Raises `BenchError`.
    """
    requirements = [*peer.requirements, *(f"{name}=={version(name)}" for name in _SHARED_REQUIREMENTS)]
    python = peer.folder / "bin" / "python"
    stamp = peer.folder / "requirements.txt"
    content = "".join(f"{one}\n" for one in requirements)
    if stamp.exists() and stamp.read_text() == content:
        return python
    print(f"bench: installing {' '.join(requirements)} into {peer.folder}, once", flush=True)
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(peer.folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements],
    ):
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode != 0:
            reason = (process.stderr or process.stdout).strip().splitlines()
            raise BenchError(
                f"{peer.name} cannot be installed: {reason[-1] if reason else 'no reason given'}"
            )
    stamp.write_text(content)
    return python


@contextmanager
def start_peer(peer: Peer, configuration: Configuration, workload: Workload) -> Iterator[Server]:
    """Start an installed peer; it may not be ready yet."""
    port = find_free_port()
    size, resize_to = bare.preprocessing_sizes(workload.geometry)
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "BENCH_MODEL": str(workload.build_model("plain")),
            "BENCH_SIZE": str(size),
            "BENCH_RESIZE_TO": str(resize_to),
            "BENCH_PORT": str(port),
            "BENCH_WORKERS": str(configuration.workers),
            "BENCH_THREADS": str(configuration.threads),
            "BENCH_BATCH": str(configuration.batch),
            "BENCH_WAIT_MS": str(configuration.wait_ms),
            "BENTOML_HOME": folder,
            "BENTOML_DO_NOT_TRACK": "True",
        }
        arguments = [
            argument.format(port=port, workers=configuration.workers, folder=folder)
            for argument in peer.arguments
        ]
        no_output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with start_process(
            [str(peer.folder / "bin" / "python"), *arguments], cwd=ROOT, env=environment, **no_output
        ) as process:
            url = f"http://127.0.0.1:{port}{configuration.path}"
            yield Server(peer.name, url, process, str(configuration))
