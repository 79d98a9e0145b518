"""The service at rest: all views agree, and what is not served any more takes no memory and no files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.service.model_machine.builds import BALLAST_BYTES, Build, FileKind, ModelFiles
from tests.service.model_machine.disturbed_server import RUNNERS, DisturbedServer, Views

_MODEL_BYTES: Final = BALLAST_BYTES
"""Memory of a model in a runner, in bytes: its sessions share one copy of the weights."""

_MEMORY_SLACK: Final = 3 * BALLAST_BYTES
"""Allowed growth of a runner's memory, in bytes, beside its models."""

_SOCKET_SLACK: Final = 20
"""Number of additional sockets, for callers and explaining processes."""


class RestingPoint:
    """The views, the memory and the files of a service that has nothing to do."""

    def __init__(self, server: DisturbedServer, files: ModelFiles, default_name: str) -> None:
        """Measure the service after its start."""
        self._server = server
        self._files = files
        self._default_name = default_name
        loaded_bytes = len(server.list_loaded()) * _MODEL_BYTES
        runners = server.list_pids("runners.process")
        self._runner_bytes = max(server.measure_anonymous_bytes(pid) for pid in runners) - loaded_bytes
        self._runner_files = max(len(server.list_open_files(pid)) for pid in runners)
        self._sockets, self._others, _ = self._count_service_files()

    def find_unrest(
        self, answering: Mapping[str, Build | None], is_following: Mapping[str, bool], *, on_demand: bool
    ) -> str:
        """Return a sentence about what is not at rest; empty if everything is.

        `answering` maps each model to the file that answers, `is_following` whether the repository chooses
        its version.
        """
        views = self._server.read_views()
        return (
            views.find_disagreement()
            or self._find_wrong_listing(views, answering, is_following, on_demand=on_demand)
            or self._find_wrong_log(views)
            or self._find_leak(views)
        )

    def count_refusals(self) -> float:
        """Return the number of trials that have failed."""
        return self._server.read_metric("fovea_model_changes_total", result="refused")

    def find_unexpected_logs(self) -> list[str]:
        """Return log entries that tell of a mistake in the service."""
        return [
            str(line)
            for line in self._server.read_log()
            if "Traceback" in str(line) or "exception" in line or "sitecustomize" in line["event"]
        ]

    def _find_wrong_listing(
        self,
        views: Views,
        answering: Mapping[str, Build | None],
        is_following: Mapping[str, bool],
        *,
        on_demand: bool,
    ) -> str:
        if views.resting and not on_demand:
            return f"{views.resting} rest although all models are loaded"
        loaded_default = {name for name, _ in views.loaded} & {self._default_name}
        if views.default_names != loaded_default:
            return f"{views.default_names} is the default, not {self._default_name}"
        for name, build in answering.items():
            listed = {version for one, version in views.loaded | views.resting if one == name}
            if build is None and (not listed or on_demand):
                continue
            if listed != ({build.version} if build else set()):
                return f"/v1/models lists {listed} of {name}, but {build} answers"
        return self._find_missing_entry(views, answering, is_following)

    def _find_missing_entry(
        self, views: Views, answering: Mapping[str, Build | None], is_following: Mapping[str, bool]
    ) -> str:
        """Return a sentence about a file in the repository that is missing in a view."""
        for name, build in answering.items():
            builds = self._files.list_present(name)
            if builds and name not in {one for one, _, _ in views.index}:
                return f"the index has nothing of {name}"
            for one in builds:
                is_later = build is None or int(one.version) > int(build.version)
                is_refused = one.kind is FileKind.BROKEN and is_later and is_following[name]
                if is_refused and (name, one.version) not in views.refused:
                    return f"{one} is not listed as refused"
        return ""

    def _find_wrong_log(self, views: Views) -> str:
        for name, versions in self._server.read_logged_versions().items():
            listed = {version for one, version in views.loaded | views.resting if one == name}
            if versions != listed:
                return f"the log says that {versions or 'no version'} of {name} is served, but {listed} is"
        return ""

    def _find_leak(self, views: Views) -> str:
        runners = self._server.list_pids("runners.process")
        counts = (
            sum(views.metrics["fovea_runners"].values()),
            sum(views.metrics["fovea_images_in_flight"].values()),
            sum(views.metrics["fovea_requests_in_flight"].values()),
        )
        if len(runners) != RUNNERS or counts != (RUNNERS, 0, 1):  # one request is the scrape
            return f"{len(runners)} runners; runners, images and requests by the metrics: {counts}"
        if trials := self._server.list_pids("rollout.trial_process"):
            return f"{len(trials)} versions are being tried"
        sockets, others, model_files = self._count_service_files()
        if model_files != len(views.loaded):
            return f"the service has {model_files} model files open for {len(views.loaded)} loaded models"
        if others > self._others or sockets > self._sockets + _SOCKET_SLACK:
            return f"the service has {sockets} sockets and {others} other files open"
        limit = self._runner_bytes + len(views.loaded) * _MODEL_BYTES + _MEMORY_SLACK
        for pid in runners:
            if (files := len(self._server.list_open_files(pid))) > self._runner_files:
                return f"runner {pid} has {files} open files; {self._runner_files} at its start"
            if (size := self._server.measure_anonymous_bytes(pid)) > limit:
                sizes = f"{size >> 20} MB; at most {limit >> 20} MB"
                return f"{len(views.loaded)} models in runner {pid} take {sizes}"
        return ""

    def _count_service_files(self) -> tuple[int, int, int]:
        """Return the numbers of sockets, other files and model files that the service has open."""
        targets = self._server.list_open_files(self._server.pid)
        sockets = sum(one.startswith("socket:") for one in targets)
        model_files = sum("/model.onnx" in one for one in targets)
        return sockets, len(targets) - sockets - model_files, model_files
