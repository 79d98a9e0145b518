"""The server of the state machine as seen from outside: its views of the models, processes and log."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.servers import METRIC_SAMPLE, ROOT, Server

Version = tuple[str, str]
"""The name of a model and its version."""

RUNNERS: Final = 2

_SETTINGS: Final = {
    "FOVEA_MANAGEMENT": "true",
    "FOVEA_RUNNERS": str(RUNNERS),
    "FOVEA_RUNNER_THREADS": "1",  # else the first runner would have every model twice
    "FOVEA_WATCH": "0.1",
    "FOVEA_TRIAL_SECONDS": "5",
    "FOVEA_BATCH_TIMEOUT": "3",
    "FOVEA_RUNNER_WAIT": "5",
    "FOVEA_EXPLAIN_SECONDS": "1",
    "FOVEA_EXPLAIN_IDLE": "2",
    "FOVEA_LOG_FORMAT": "json",
    "FOVEA_LOG_REQUESTS": "0",
}

_SITECUSTOMIZE: Final = """
import sys

if "fovea.service" in sys.orig_argv:
    from fovea.service.rollout import change_backoff, manager, refusals
    from fovea.service.runners import pool

    for module, name, value in (
        (change_backoff, "_BACKOFF_SECONDS", (0.2, 2.0)),
        (refusals, "_RETRY_SECONDS", (2.0, 60.0)),
        (manager, "_RETRY_SECONDS", 0.5),
        (manager, "_RELOAD_DELAYS", (0.2, 2.0)),
        (pool, "_BACKOFF_SECONDS", 0.2),
        (pool, "_MAX_BACKOFF_SECONDS", 2.0),
    ):
        getattr(module, name)  # a delay that has another name now must have it here too
        setattr(module, name, value)
"""
"""Code for the service that shortens its delays before another attempt, so that a run ends."""

_SERVED_LOG: Final = re.compile(r"now serves (?P<paths>.*)|no longer serves model (?P<name>.*)")


@dataclass(frozen=True)
class Views:
    """The models as `/v1/models`, `/v2/repository/index` and `/metrics` show them."""

    loaded: frozenset[Version]
    resting: frozenset[Version]
    refused: frozenset[Version]
    default_names: frozenset[str]
    index: frozenset[tuple[str, str, str]]
    """Name, version, and `READY` or the reason why not."""
    statuses: tuple[tuple[Version, str], ...]
    """Every version with its state."""
    metrics: dict[str, Counter[Version]]
    """Sums of metrics by model and version or state; a missing label is empty."""

    def find_disagreement(self) -> str:
        """Return a sentence about two views that differ; empty if all agree."""
        ready = {(name, version) for name, version, state in self.index if state == "READY"}
        resting = {(name, version) for name, version, state in self.index if state.startswith("resting")}
        refused = {(name, version) for name, version, state in self.index if state.startswith("refused")}
        measured = {key for key, value in self.metrics["fovea_model_info"].items() if value}
        refused_counts = Counter(name for name, _ in self.refused)
        statuses = {state: {key for key, one in self.statuses if one == state} for _, state in self.statuses}
        state_counts = {
            (name, state): int(value)
            for (name, state), value in self.metrics["fovea_model_versions"].items()
            if value
        }
        measured_counts = {
            name: int(value) for (name, _), value in self.metrics["fovea_versions_refused"].items() if value
        }
        for what, view, listing in (
            ("ready in the index", ready, self.loaded),
            ("resting in the index", resting, self.resting),
            ("refused in the index", refused, self.refused),
            ("ready among all versions", statuses.get("ready", set()), self.loaded),
            ("found among all versions", statuses.get("found", set()), self.resting),
            ("refused among all versions", statuses.get("refused", set()), self.refused),
            ("loading or draining", statuses.get("loading", set()) | statuses.get("draining", set()), set()),
            ("the metric of states", state_counts, Counter((key[0], one) for key, one in self.statuses)),
            ("the metric of loaded models", measured, self.loaded),
            ("the metric of refused versions", measured_counts, dict(refused_counts)),
        ):
            if view != listing:
                return f"{what}: {view}, but /v1/models has {listing}"
        return ""


class DisturbedServer:
    """A server with fast watching, two runners and management."""

    def __init__(self, server: Server, log: Path) -> None:
        self._server = server
        self._log = log
        self.url = server.url
        self.client = server.client

    @property
    def pid(self) -> int:
        """Process id of the service."""
        return self._server.process.pid

    @property
    def is_alive(self) -> bool:
        """Return whether the service has not ended."""
        return self._server.process.poll() is None

    def list_loaded(self) -> set[Version]:
        """Return the loaded versions."""
        models = self.client.get("/v1/models").json()["models"]
        return {(one["name"], one["version"]) for one in models}

    def read_metric(self, name: str, **labels: str) -> float:
        """Return the sum of all samples with this name and these labels."""
        return self._server.read_metric(name, **labels)

    def read_views(self) -> Views:
        """Read all views, one after another."""
        listing = self.client.get("/v1/models").json()
        sets = {
            key: frozenset((one["name"], one["version"]) for one in listing[key])
            for key in ("models", "resting", "refused")
        }
        index = frozenset(
            (one["name"], one["version"], "READY" if one["state"] == "READY" else one["reason"])
            for one in self.client.post("/v2/repository/index").json()
        )
        metrics: dict[str, Counter[Version]] = {
            name: Counter()
            for name in ("fovea_model_info", "fovea_versions_refused", "fovea_runners",
                         "fovea_images_in_flight", "fovea_requests_in_flight", "fovea_model_versions")
        }  # fmt: skip
        for sample in METRIC_SAMPLE.finditer(self.client.get("/metrics").text):
            if sample["name"] in metrics:
                labels = dict(re.findall(r'(\w+)="([^"]*)"', sample["labels"] or ""))
                key = labels.get("model", ""), labels.get("version") or labels.get("state", "")
                metrics[sample["name"]][key] += float(sample["value"])  # type: ignore[assignment]
        return Views(
            sets["models"],
            sets["resting"],
            sets["refused"],
            frozenset(one["name"] for one in listing["models"] if one["default"]),
            index,
            tuple(((one["name"], one["version"]), one["state"]) for one in listing["versions"]),
            metrics,
        )

    # --- processes ---

    def list_pids(self, module: str) -> list[int]:
        """Return the processes that run this module of the service."""
        return sorted(self._server.child_pids(module))

    def send_signal(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a child of the service, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)  # the process id alone could belong to another process soon
            try:
                if pid in self._server.runner_pids | self._server.child_pids("explain.process"):
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)

    def hang_up(self) -> None:
        """Let the service scan its repository now."""
        self._server.process.send_signal(signal.SIGHUP)

    def list_open_files(self, pid: int) -> list[str]:
        """Return the targets of a process's descriptors."""
        targets = []
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                targets.append(str(descriptor.readlink()))
        return targets

    def measure_anonymous_bytes(self, pid: int) -> int:
        """Return the memory of a process without mapped files of a disk, in bytes."""
        status = Path(f"/proc/{pid}/status").read_text()
        return sum(int(size) << 10 for size in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status))

    # --- log ---

    def read_log(self) -> list[dict[str, Any]]:
        """Return all lines of the log; a line that is not JSON has only an `event`."""
        lines = self._log.read_text().splitlines()
        return [json.loads(line) if line.startswith("{") else {"event": line} for line in lines]

    def read_logged_versions(self) -> dict[str, set[str]]:
        """Return the versions of each model that the log names last; nothing for a model without a change."""
        versions: dict[str, set[str]] = {}
        for line in self.read_log():
            if match := _SERVED_LOG.fullmatch(line["event"]):
                if match["name"]:
                    versions[match["name"]] = set()
                else:
                    paths = [Path(one) for one in match["paths"].split(", ")]
                    versions[paths[0].parents[1].name] = {one.parent.name for one in paths}
        return versions


@contextmanager
def run_disturbed_server(root: Path, models_loaded: int) -> Iterator[DisturbedServer]:
    """Run a server of a repository with room for `models_loaded` models; 0: for all."""
    folder = root.parent
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    log = folder / "log"
    settings = {
        **_SETTINGS,
        "FOVEA_MODELS": str(root),
        "FOVEA_MODELS_LOADED": str(models_loaded),
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
    }
    with log.open("w") as file, Server({"stderr": file}, **settings) as server:
        yield DisturbedServer(server, log)
