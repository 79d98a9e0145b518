"""Registry of the models that are loaded, and of the models that can be loaded on demand."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from fovea.service.artifact.contract import Contract
from fovea.service.artifact.inputs import InputTensor, input_tensors_of
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
from fovea.service.resources.threads import expects_cuda
from fovea.service.runners.batch_messages import Answer, Item, weight_of
from fovea.service.runners.batcher import LEVEL_COUNT
from fovea.service.runners.lane import Lane
from fovea.service.runners.load_messages import LoadCommand, LoadedModel
from fovea.service.serving.statistics import ModelStatistics
from fovea.service.settings import Settings

log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 5.0
"""Time in seconds after which a client may retry a request for a model that cannot be served now."""


@dataclass(eq=False)
class LiveModel:
    """A loaded model."""

    name: str
    version: str
    model_version: ModelVersion
    load: LoadCommand
    """Load message that the runners received."""
    contract: Contract
    load_result: LoadedModel
    tensors: tuple[InputTensor, ...]
    """Tensors that the model accepts besides encoded images."""
    lanes: Sequence[Lane[Item, Answer]]
    """Queues of images for the runners, by decode cost: one for each of the `LEVEL_COUNT` levels."""
    statistics: ModelStatistics = field(default_factory=ModelStatistics)
    images_in_flight: int = 0
    """Number of accepted images that are not yet answered."""
    last_used: float = 0.0
    """Time of the last request for the model on the monotonic clock in seconds."""
    active_requests: int = 0
    """Number of requests that the model has to answer."""
    idle_callbacks: list[Callable[[], None]] = field(default_factory=list)
    """Callbacks that are called once, on the event loop, when the model has no more requests."""

    @classmethod
    def from_load_result(
        cls, model_version: ModelVersion, load: LoadCommand, load_result: LoadedModel, settings: Settings
    ) -> LiveModel:
        """Create the model from the runners' reply to a load message."""
        contract = Contract.from_json(load_result.contract_json)
        # Images of higher levels run in a batch of their own.
        max_shared_level = LEVEL_COUNT - 2 if load_result.provider == "cuda" else 0
        lanes: list[Lane[Item, Answer]] = [
            Lane(
                model_id=load.model_id,
                batch_max=1 if level > max_shared_level else load_result.batch_max,
                weight_max=load_result.batch_bytes,
                weigh=weight_of,
                split_evenly=load_result.provider == "cpu" and not settings.batch_wait_ms,
                max_wait=0.0 if level else settings.batch_wait_ms / 1000,
                level=level,
            )
            for level in range(LEVEL_COUNT)
        ]
        name, version = model_version.name or contract.name, model_version.version or contract.version
        tensors = input_tensors_of(contract)
        return cls(
            name,
            version,
            model_version,
            load,
            contract,
            load_result,
            tensors,
            lanes,
            last_used=time.monotonic(),
        )

    def acquire(self) -> None:
        """Add a request, which keeps the model loaded."""
        self.active_requests += 1

    def release(self) -> None:
        """Remove a request."""
        self.active_requests -= 1
        self._run_idle_callbacks()

    def call_when_idle(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the model has no requests.

        `callback` is called here if there are none now, or else by the `release` of the last request.
        """
        self.idle_callbacks.append(callback)
        self._run_idle_callbacks()

    def _run_idle_callbacks(self) -> None:
        """Call the callbacks if the model has no requests."""
        if not self.active_requests:
            # Clear the list first, so that each callback is called once, even if it calls this again.
            callbacks, self.idle_callbacks = self.idle_callbacks, []
            for callback in callbacks:
                callback()


class ModelRegistry:
    """Registry that finds the model for a request."""

    def __init__(self, settings: Settings, state: ServingState, metrics: Metrics) -> None:
        """Create the registry with `state` as the desired state."""
        self.lost_versions: set[ModelVersion] = set()
        """Versions that were served and then lost with all their runners."""
        self.single_model_name: str | None = None
        """Name of a single model file, once it is loaded."""
        self._metrics = metrics
        self._provider = settings.provider
        self._live_models: dict[str, dict[str, LiveModel]] = {}
        self.change_count = 0
        """Number of changes to the served versions or to their description."""
        self.refused_versions: Sequence[RefusedVersion] = ()
        self.set_state(state)

    def set_state(self, state: ServingState) -> None:
        """Set the desired state."""
        self.change_count += 1
        refused_versions = state.refused_versions
        for name in {one.name for one in self.refused_versions} - {one.name for one in refused_versions}:
            self._metrics.versions_refused.labels(name).set(0)
        for name, count in Counter(one.name for one in refused_versions).items():
            self._metrics.versions_refused.labels(name).set(count)
        self.versions_by_model = state.versions_by_model
        self.refused_versions = refused_versions
        """Refused versions, which are newer than the served versions."""
        self.is_repository_empty = state.is_empty
        """True if the repository has no version yet that could be served."""
        self.lost_versions &= set(self._iterate_versions())
        self._default_name = state.default_model

    @property
    def is_waiting(self) -> bool:
        """Return whether no model is loaded although models are expected."""
        return not self._live_models and (self.is_repository_empty or bool(self.lost_versions))

    @property
    def models(self) -> list[LiveModel]:
        """Return all loaded models, by name."""
        return [model for _, versions in sorted(self._live_models.items()) for model in versions.values()]

    def initial_versions(self, max_count: int) -> list[ModelVersion]:
        """Return the versions to load at the start: at most `max_count`, or all if `max_count` is 0.

        The default model and the latest versions come first.
        """
        return select_initial_versions(ServingState(self.versions_by_model, self._default_name), max_count)

    @property
    def on_demand_versions(self) -> list[ModelVersion]:
        """Return the versions that are not loaded until they are requested."""
        return [
            version
            for version in self._iterate_versions()
            if version.name is not None and not self._is_loaded(version)
        ]

    @property
    def default(self) -> str | None:
        """Return the name of the default model. A single file has the name in its contract."""
        return self._default_name or (self.single_model_name if None in self.versions_by_model else None)

    @property
    def state(self) -> ServingState:
        """Return the current state."""
        return ServingState(
            self.versions_by_model, self.default, tuple(self.refused_versions), self.is_repository_empty
        )

    def get(self, name: str | None = None, version: str | None = None) -> LiveModel | ModelVersion:
        """Return a model by name and version. The defaults are the default model and its latest version.

        A version that is not loaded is returned as `ModelVersion`. Raises `ModelNotFound`, or `NotReady` if
        the repository has the model but cannot serve it.
        """
        name = name or self.default
        if name is None:
            where = f"the repository's file `{DEFAULT_MODEL_FILE}`, or FOVEA_DEFAULT_MODEL"
            raise ModelNotFound(
                f"name a model, because there is no default model ({where}); there are {self._format_names()}"
            )
        live_models, model_versions = self._live_models.get(name, {}), self.versions_by_model.get(name, ())
        if not live_models and name == self.single_model_name and None in self.versions_by_model:
            return self.versions_by_model[None][-1]
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
        reasons = [one for one in self.refused_versions if one.name == name]
        if reasons:
            raise NotReady(
                f"model {name!r} is in the repository but cannot be served; /v1/models says why",
                retry_after=_RETRY_SECONDS,
            )
        if self.is_repository_empty:
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
        live_models, model_versions = self._live_models.get(name, {}), self.versions_by_model.get(name, ())
        if not live_models and not model_versions:
            raise ModelNotFound(f"there is no model {name!r}; there are {self._format_names()}")
        return [live_models.get(version.version or "", version) for version in model_versions] or list(
            live_models.values()
        )

    def list_live_versions(self, name: str | None) -> list[LiveModel]:
        """Return the loaded versions of a model, the latest last.

        `name` is the name of the model's folder, None for a single file.
        """
        return [model for model in self.models if model.model_version.name == name]

    def add(self, model: LiveModel) -> None:
        """Serve a loaded model beside its other versions."""
        self.change_count += 1
        self.lost_versions.discard(model.model_version)
        if model.model_version.name is None:
            self.single_model_name = model.name
        versions = {**self._live_models.get(model.name, {}), model.version: model}
        self._live_models[model.name] = dict(
            sorted(versions.items(), key=lambda one: _version_sort_key(one[0]))
        )
        self._announce_model(model)

    def remove(self, model: LiveModel) -> None:
        """Stop serving a model."""
        self.change_count += 1
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

    def _iterate_versions(self) -> Iterator[ModelVersion]:
        """Yield every version that is to be served."""
        for versions in self.versions_by_model.values():
            yield from versions

    def _is_loaded(self, version: ModelVersion) -> bool:
        """Return whether a version is loaded."""
        return version.version in self._live_models.get(version.name or "", {})

    def check_default_model(self) -> None:
        """Raise `ModelError` if the only file is a different model from the configured default."""
        if (
            None in self.versions_by_model
            and self._default_name
            and self._default_name not in self._live_models
        ):
            raise ModelError(
                f"FOVEA_DEFAULT_MODEL is {self._default_name!r}; there are {self._format_names()}"
            )

    def _format_names(self) -> str:
        """Return the known names, for error messages."""
        names = {*self._live_models, *(name for name in self.versions_by_model if name is not None)}
        return ", ".join(sorted(names)) or "none"

    def _announce_model(self, model: LiveModel) -> None:
        """Set the metrics of a new model and log it."""
        provider = model.model_version.config.provider or self._provider
        is_fallback = model.load_result.provider == "cpu" and expects_cuda(provider)
        load_result, identity = model.load_result, (model.name, model.version)
        set_info, set_fallback = self._get_gauge_setters(model)
        set_info(1)
        set_fallback(is_fallback)
        self._metrics.model_load_seconds.labels(*identity).set(load_result.load_seconds)
        golden = load_result.golden_differences
        self._metrics.golden_logit_difference.labels(*identity).set(golden["logit_difference"])
        if is_fallback:
            log.warning(f"model {model.name} runs on the CPU: ONNX Runtime cannot use the machine's GPU")
        log.info(
            f"model {model.name} version {model.version}: {len(model.contract.labels)} labels on "
            f"{load_result.provider}, verified on {golden['images']} golden images, "
            f"ready in {load_result.load_seconds:.2f} s"
        )
        if model.contract.reference is None:
            log.info(f"model {model.name} has no drift reference, so its drift is not measured")

    def _get_gauge_setters(self, model: LiveModel) -> tuple[Callable[[float], None], Callable[[float], None]]:
        """Return the setters of the model's info gauge and its provider fallback gauge."""
        identity = (model.name, model.version)
        info = self._metrics.model_info.labels(*identity, model.contract.task, model.load_result.provider)
        return info.set, self._metrics.provider_fallback.labels(*identity).set


def _version_sort_key(version: str) -> tuple[int, str]:
    """Return a sort key that puts the latest version last, by number."""
    return (int(version) if version.isdecimal() else -1, version)
