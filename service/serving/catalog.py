"""The catalog of models: the versions that should be served, and the one state of each version."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from fovea.service.artifact.repository import (
    CONFIG_FILE,
    DEFAULT_MODEL_FILE,
    ModelVersion,
    RefusedVersion,
    ServingState,
    select_initial_versions,
)
from fovea.service.errors import ModelError, ModelNotFound, NotReady
from fovea.service.observability.metrics import Metrics
from fovea.service.resources.threads import expects_gpu
from fovea.service.serving.live_model import LiveModel
from fovea.service.settings import Settings

log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 5.0
"""Time in seconds after which a client may retry a request for a model that cannot be served now."""

_MAX_GONE: Final = 1000
"""Maximum number of remembered versions that are not served any more."""


class VersionState(StrEnum):
    """The state of a version."""

    FOUND = "found"
    """To be served, but no runner has it: it is loaded by the first request, or again after it was lost."""
    LOADING = "loading"
    """It is being tried or loaded, or it is loaded and waits for the switch to it."""
    READY = "ready"
    """It answers."""
    DRAINING = "draining"
    """It answers the requests that it has, and no more."""
    GONE = "gone"
    """It was served or tried before. No runner has it, and no view shows it."""
    REFUSED = "refused"
    """It would be served if it had passed its checks."""


TRANSITIONS: Final = {
    VersionState.FOUND: {VersionState.LOADING, VersionState.GONE},
    VersionState.LOADING: {
        VersionState.READY,
        VersionState.DRAINING,
        VersionState.FOUND,
        VersionState.GONE,
    },
    VersionState.READY: {VersionState.DRAINING, VersionState.FOUND},
    VersionState.DRAINING: {VersionState.LOADING, VersionState.FOUND, VersionState.GONE},
    VersionState.GONE: {VersionState.LOADING, VersionState.FOUND},
}
"""Possible next states of a version that this process knows. `REFUSED` is decided by the watcher of the
repository, which lists these versions in the desired state."""

_LOGGED_STATES: Final = {VersionState.READY, VersionState.DRAINING, VersionState.GONE}
"""States that are logged at the level `info`; the others at `debug`."""


class VersionStatus(NamedTuple):
    """The state of a version, as all views show it."""

    name: str
    version: str
    state: VersionState
    reason: str
    """Reason for the state, for people; empty if there is nothing to say."""
    since: float
    """Time of the last change of state, in seconds since 1970."""


@dataclass(eq=False)
class CatalogEntry:
    """A version in the catalog. Only `ModelCatalog.move` changes its state."""

    model_version: ModelVersion
    state: VersionState = VersionState.GONE
    reason: str = ""
    since: float = field(default_factory=time.time)
    model: LiveModel | None = None
    """The model in the runners. `LOADING`: once it is loaded; `READY`, `DRAINING`: always; otherwise None."""
    task_count: int = 0
    """Number of tasks that try or load it. It stays `LOADING` while there are any and it has no model."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Lock of the request that tries and loads it; other requests for it wait."""
    has_passed: bool = False
    """True once it has passed its trial, or was loaded at the start."""
    is_lost: bool = False
    """True after it was lost with all runners, until it is loaded again or given up."""
    series: tuple[str, VersionState] | None = None
    """Labels of the metric that counts it."""
    retry_at: float = 0.0
    """Time until which no request tries it again, because it could not be loaded; monotonic, in seconds."""


class ModelCatalog:
    """All versions that one process knows, and the lookup of the model for a request.

    `state` is what should be served. `ModelManager` works towards it and moves the entries.
    """

    def __init__(self, settings: Settings, state: ServingState, metrics: Metrics) -> None:
        """Create the catalog with `state` as the desired state."""
        self._metrics = metrics
        self._provider = settings.provider
        self._entries: dict[ModelVersion, CatalogEntry] = {}
        self._live_models: dict[str, dict[str, LiveModel]] = {}
        """Models that answer, by name and version: the index of the entries that are `READY`."""
        self._found_models: dict[tuple[str | None, str | None], LiveModel] = {}
        """Results of `get` since the last change of what it depends on."""
        self.single_model_name: str | None = None
        """Name of a single model file, once it is loaded."""
        self.change_count = 0
        """Number of changes to the served versions or to their description."""
        self._refused_since: dict[RefusedVersion, float] = {}
        self._state_counts: Counter[tuple[str, VersionState]] = Counter()
        self.set_state(state)

    # --- the desired state ---

    def set_state(self, state: ServingState) -> None:
        """Set the desired state. `ModelManager.serve` brings the entries in line with it."""
        self.change_count += 1
        now = time.time()
        refused_counts = Counter(one.name for one in state.refused_versions)
        for name in {one.name for one in self._refused_since} | refused_counts.keys():
            self._metrics.versions_refused.labels(name).set(refused_counts[name])
            self._metrics.model_versions.labels(name, VersionState.REFUSED).set(refused_counts[name])
        self._refused_since = {one: self._refused_since.get(one, now) for one in state.refused_versions}
        self._state = state
        self._found_models.clear()
        for versions in state.versions_by_model.values():
            for version in versions:
                entry = self.get_entry(version)
                if entry.state is VersionState.GONE:
                    self.move(entry, VersionState.FOUND)

    @property
    def state(self) -> ServingState:
        """Desired state."""
        return self._state

    @property
    def default(self) -> str | None:
        """Name of the default model; None if there is none. A single file has the name in its contract."""
        return self._state.default_model or (self.single_model_name if self.is_single_file else None)

    @property
    def is_single_file(self) -> bool:
        """True if the only model is a file outside of a repository."""
        return None in self._state.versions_by_model

    @property
    def refused_versions(self) -> Sequence[RefusedVersion]:
        """Versions in the repository that are not served, because they did not pass their checks."""
        return self._state.refused_versions

    def is_desired(self, version: ModelVersion) -> bool:
        """Return whether a version should be served."""
        return version in self._state.versions_by_model.get(version.name, ())

    def initial_versions(self, max_count: int) -> list[ModelVersion]:
        """Return the versions to load at the start: at most `max_count`, or all if `max_count` is 0.

        The default model and the latest versions come first.
        """
        return select_initial_versions(self._state, max_count)

    def check_default_model(self) -> None:
        """Raise `ModelError` if the only file is a different model from the configured default."""
        default = self._state.default_model
        if self.is_single_file and default and default not in self._live_models:
            raise ModelError(f"FOVEA_DEFAULT_MODEL is {default!r}; there are {self._format_names()}")

    # --- the state of each version ---

    @property
    def entries(self) -> list[CatalogEntry]:
        """All versions that this process knows, including those that are gone."""
        return list(self._entries.values())

    def get_entry(self, version: ModelVersion) -> CatalogEntry:
        """Return the entry of a version. An unknown version gets one, which is `GONE`."""
        if version not in self._entries:
            self._entries[version] = CatalogEntry(version)
        return self._entries[version]

    def find_entry(self, model_id: int) -> CatalogEntry | None:
        """Return the version that the runners know by this id."""
        entries = self._entries.values()
        return next((one for one in entries if one.model and one.model.load.model_id == model_id), None)

    def move(self, entry: CatalogEntry, state: VersionState, reason: str = "") -> None:
        """Change the state of a version, and with it every view: the lookup, the metrics and the log.

        A version that becomes `READY` must have its model. One that becomes `FOUND` or `GONE` loses it.
        """
        if state not in TRANSITIONS[entry.state]:
            raise RuntimeError(f"{entry.model_version.path} is {entry.state} and cannot become {state}")
        self.change_count += 1
        if entry.model and entry.state is VersionState.READY:
            self._remove_model(entry.model)
        if entry.model and state is VersionState.READY:
            reason = _describe_load(entry.model)
        entry.state, entry.reason, entry.since = state, reason, time.time()
        name, version = self.get_identity(entry)
        level = logging.INFO if state in _LOGGED_STATES else logging.DEBUG
        log.log(level, f"model {name} version {version} is {state}{f': {reason}' if reason else ''}")
        if entry.model and state is VersionState.READY:
            entry.is_lost = False
            self._add_model(entry.model)
        if state in (VersionState.FOUND, VersionState.GONE):
            entry.model = None
        self._update_metric(entry)
        if state is VersionState.GONE:
            self._forget_gone()

    def _forget_gone(self) -> None:
        """Remove the oldest versions that are gone, beyond the number that is remembered."""
        entries = self._entries.items()
        gone = [key for key, one in entries if one.state is VersionState.GONE and not one.task_count]
        for key in gone[: max(0, len(gone) - _MAX_GONE)]:
            del self._entries[key]

    def _update_metric(self, entry: CatalogEntry) -> None:
        """Count an entry in its new state and no longer in the one before.

        The name of a single file changes when it is loaded.
        """
        old_series, entry.series = entry.series, None
        if entry.state is not VersionState.GONE:
            entry.series = self.get_identity(entry)[0], entry.state
        for series, change in ((old_series, -1), (entry.series, 1)):
            if series:
                self._state_counts[series] += change
                self._metrics.model_versions.labels(*series).set(self._state_counts[series])

    def get_identity(self, entry: CatalogEntry) -> tuple[str, str]:
        """Return the name and the version; before a single file is loaded, the name of the file."""
        if entry.model:
            return entry.model.name, entry.model.version
        version = entry.model_version
        return version.name or self.single_model_name or version.path.stem, version.version or ""

    def list_statuses(self) -> list[VersionStatus]:
        """Return the state of every version that is not gone, by name and version."""
        statuses = [
            VersionStatus(*self.get_identity(one), one.state, one.reason, one.since)
            for one in self._entries.values()
            if one.state is not VersionState.GONE
        ]
        statuses += [
            VersionStatus(one.name, one.version, VersionState.REFUSED, one.reason, since)
            for one, since in self._refused_since.items()
        ]
        return sorted(statuses, key=lambda one: (one.name, _version_sort_key(one.version), one.since))

    @property
    def is_waiting(self) -> bool:
        """Return whether no model is loaded although models are expected."""
        return not self._live_models and (
            self._state.is_empty
            or any(one.is_lost and self.is_desired(one.model_version) for one in self._entries.values())
        )

    @property
    def on_demand_versions(self) -> list[ModelVersion]:
        """Return the versions of a repository that are to be served but do not answer yet."""
        return [
            version
            for name, versions in self._state.versions_by_model.items()
            for version in versions
            if name is not None and version.version not in self._live_models.get(name, {})
        ]

    # --- lookup ---

    @property
    def models(self) -> list[LiveModel]:
        """Return all models that answer, by name."""
        return [model for _, versions in sorted(self._live_models.items()) for model in versions.values()]

    def get(self, name: str | None = None, version: str | None = None) -> LiveModel | ModelVersion:
        """Return a model by name and version. The defaults are the default model and its latest version.

        A version that is not loaded is returned as `ModelVersion`. Raises `ModelNotFound`, or `NotReady` if
        the repository has the model but cannot serve it.
        """
        model: LiveModel | ModelVersion | None = self._found_models.get((name, version))
        if model is None:
            model = self._find(name, version)
            if isinstance(model, LiveModel):
                self._found_models[name, version] = model
        return model

    def _find(self, name: str | None, version: str | None) -> LiveModel | ModelVersion:
        name = name or self.default
        if name is None:
            where = f"the repository's file `{DEFAULT_MODEL_FILE}`, or FOVEA_DEFAULT_MODEL"
            raise ModelNotFound(
                f"name a model, because there is no default model ({where}); there are {self._format_names()}"
            )
        live_models = self._live_models.get(name, {})
        model_versions = self._state.versions_by_model.get(name, ())
        if not live_models and name == self.single_model_name and self.is_single_file:
            return self._state.versions_by_model[None][-1]
        if not live_models and not model_versions:
            self._check_refused(name)
        if version is None:
            self._check_pinned(name)
            latest = model_versions[-1].version if model_versions else next(reversed(live_models), None)
            version = latest or ""
        for spelling in (version, version.removesuffix(".0")):  # TorchServe calls its first version 1.0
            if spelling in live_models:
                return live_models[spelling]
            for model_version in model_versions:
                if model_version.version == spelling:
                    return model_version
        known_versions = ", ".join(repr(one.version) for one in self.list_versions(name))
        raise ModelNotFound(f"model {name!r} has no version {version!r}; it has {known_versions}")

    def _check_refused(self, name: str) -> None:
        """Raise `NotReady` if the repository has the model but no version of it can be served."""
        if any(one.name == name for one in self.refused_versions):
            raise NotReady(
                f"model {name!r} is in the repository but cannot be served; /v1/models says why",
                retry_after=_RETRY_SECONDS,
            )
        if self._state.is_empty:
            raise NotReady(f"model {name!r} is not in the repository yet", retry_after=_RETRY_SECONDS)

    def _check_pinned(self, name: str) -> None:
        """Raise `NotReady` if the configured version cannot be served.

        Otherwise another version would answer in its place.
        """
        if any(one.name == name and one.is_pinned for one in self.refused_versions):
            raise NotReady(
                f"the version of model {name!r} that its {CONFIG_FILE} asks for cannot be served; /v1/models "
                "says why",
                retry_after=_RETRY_SECONDS,
            )

    def list_versions(self, name: str) -> list[LiveModel | ModelVersion]:
        """Return all served versions of a model, the latest last.

        A version that is not loaded is a `ModelVersion`. Raises `ModelNotFound` when there is none.
        """
        live_models = self._live_models.get(name, {})
        model_versions = self._state.versions_by_model.get(name, ())
        if not live_models and not model_versions:
            raise ModelNotFound(f"there is no model {name!r}; there are {self._format_names()}")
        return [live_models.get(version.version or "", version) for version in model_versions] or list(
            live_models.values()
        )

    def list_live_versions(self, name: str | None) -> list[LiveModel]:
        """Return the versions of a model that answer, the latest last.

        `name` is the name of the model's folder, None for a single file.
        """
        return [model for model in self.models if model.model_version.name == name]

    def _format_names(self) -> str:
        """Return the known names, for error messages."""
        names = {*self._live_models, *filter(None, self._state.versions_by_model)}
        return ", ".join(sorted(names)) or "none"

    # --- models that answer ---

    def add(self, model: LiveModel) -> None:
        """Serve a model that was loaded at the start, without a trial."""
        entry = self.get_entry(model.model_version)
        self.move(entry, VersionState.LOADING)
        entry.model, entry.has_passed = model, True
        self.move(entry, VersionState.READY)

    def _add_model(self, model: LiveModel) -> None:
        """Add a model to the lookup beside its other versions, and set its metrics."""
        self._found_models.clear()
        if model.model_version.name is None:
            self.single_model_name = model.name
        versions = {**self._live_models.get(model.name, {}), model.version: model}
        self._live_models[model.name] = dict(
            sorted(versions.items(), key=lambda one: _version_sort_key(one[0]))
        )
        provider = model.model_version.config.provider or self._provider
        is_fallback = model.load_result.provider == "cpu" and expects_gpu(provider)
        load_result, identity = model.load_result, (model.name, model.version)
        set_info, set_fallback = self._get_gauge_setters(model)
        set_info(1)
        set_fallback(is_fallback)
        self._metrics.model_load_seconds.labels(*identity).set(load_result.load_seconds)
        logit_difference = load_result.golden_differences["logit_difference"]
        self._metrics.golden_logit_difference.labels(*identity).set(logit_difference)
        if is_fallback:
            log.warning(f"model {model.name} runs on the CPU: ONNX Runtime cannot use the machine's GPU")
        if model.contract.reference is None:
            log.info(f"model {model.name} has no drift reference, so its drift is not measured")

    def _remove_model(self, model: LiveModel) -> None:
        """Remove a model from the lookup."""
        self._found_models.clear()
        versions = self._live_models[model.name]
        if versions.get(model.version) is model:
            del versions[model.version]
            if not versions:
                del self._live_models[model.name]
        set_info, set_fallback = self._get_gauge_setters(model)
        set_info(0)
        set_fallback(0)
        if other := versions.get(model.version):  # the same version from another file
            self._get_gauge_setters(other)[0](1)

    def _get_gauge_setters(self, model: LiveModel) -> tuple[Callable[[float], None], Callable[[float], None]]:
        """Return the setters of the model's info gauge and its provider fallback gauge."""
        identity = (model.name, model.version)
        info = self._metrics.model_info.labels(*identity, model.contract.task, model.load_result.provider)
        return info.set, self._metrics.provider_fallback.labels(*identity).set


def _describe_load(model: LiveModel) -> str:
    """Return what the log and the views say about a model that is ready."""
    result = model.load_result
    return (
        f"{len(model.contract.labels)} labels on {result.provider}, verified on "
        f"{result.golden_differences['images']} golden images, loaded in {result.load_seconds:.2f} s"
    )


def _version_sort_key(version: str) -> tuple[int, str]:
    """Return a sort key that puts the latest version last, by number."""
    return (int(version) if version.isdecimal() else -1, version)
