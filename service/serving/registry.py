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
from fovea.service.runners.batcher import LEVEL_COUNT, Lane
from fovea.service.runners.messages import Answer, Item, LoadCommand, LoadedModel, weight_of
from fovea.service.serving.statistics import Tally
from fovea.service.settings import Settings

log = logging.getLogger(__name__)

_RETRY: Final = 5.0
"""Time in seconds after which a client may retry a request for a model that cannot be served now."""


@dataclass(eq=False)
class LiveModel:
    """A loaded model."""

    name: str
    version: str
    found: ModelVersion
    load: LoadCommand
    """Load message that the runners received."""
    contract: Contract
    loaded: LoadedModel
    tensors: tuple[InputTensor, ...]
    """Tensors that the model accepts besides encoded images."""
    lanes: Sequence[Lane[Item, Answer]]
    """Queues of images for the runners, by decode cost (`batcher.LEVELS`)."""
    tally: Tally = field(default_factory=Tally)
    images: int = 0
    """Number of accepted images that are not yet answered."""
    used: float = 0.0
    """Time of the last request for the model on the monotonic clock in seconds."""
    users: int = 0
    """Number of requests that the model has to answer."""
    on_rest: list[Callable[[], None]] = field(default_factory=list)
    """Callbacks that are called once when the model has no more requests."""

    @classmethod
    def of(cls, found: ModelVersion, load: LoadCommand, loaded: LoadedModel, settings: Settings) -> LiveModel:
        """Create the model from the runners' reply to a load message."""
        contract = Contract.from_json(loaded.contract_json)
        most_together = LEVEL_COUNT - 2 if loaded.provider == "cuda" else 0  # highest level of shared batches
        lanes: list[Lane[Item, Answer]] = [
            Lane(
                model_id=load.model_id,
                batch_max=1 if level > most_together else loaded.batch_max,
                weight_max=loaded.batch_bytes,
                weigh=weight_of,
                split_evenly=loaded.provider == "cpu" and not settings.batch_wait_ms,
                max_wait=0.0 if level else settings.batch_wait_ms / 1000,
                level=level,
            )
            for level in range(LEVEL_COUNT)
        ]
        name, version = found.name or contract.name, found.version or contract.version
        tensors = input_tensors_of(contract)
        return cls(name, version, found, load, contract, loaded, tensors, lanes, used=time.monotonic())

    def take(self) -> None:
        """Add a request, which keeps the model loaded."""
        self.users += 1

    def release(self) -> None:
        """Remove a request."""
        self.users -= 1
        self._check_rest()

    def when_at_rest(self, call: Callable[[], None]) -> None:
        """Call `call` once when the model has no requests: now, or when the last request is over."""
        self.on_rest.append(call)
        self._check_rest()

    def _check_rest(self) -> None:
        """Call the callbacks if the model has no requests."""
        if not self.users:
            # Clear the list first, so that each callback is called once.
            calls, self.on_rest = self.on_rest, []
            for call in calls:
                call()


class Repository:
    """Registry that finds the model for a request."""

    def __init__(self, settings: Settings, served: ServingState, metrics: Metrics) -> None:
        """Create the registry with `served` as the desired state."""
        self.shelf = dict(served.versions_by_model)
        self.refused: Sequence[RefusedVersion] = ()
        """Refused versions, which are newer than the served versions."""
        self.waits = False
        """True if the repository has no version yet that could be served."""
        self.lost: set[ModelVersion] = set()
        """Versions that were served and then lost with all their runners."""
        self.single: str | None = None
        """Name of a single model file, once it is loaded."""
        self._metrics = metrics
        self._provider = settings.provider
        self._live: dict[str, dict[str, LiveModel]] = {}
        self._default = served.default_model
        self.changes = 0
        """Number of changes to the served versions or to their description."""
        self.note(served.refused_versions, waits=served.is_empty)

    def note(self, refused: Sequence[RefusedVersion], *, waits: bool) -> None:
        """Remember the versions in the repository that are not served."""
        self.changes += 1
        for name in {one.name for one in self.refused} - {one.name for one in refused}:
            self._metrics.versions_refused.labels(name).set(0)
        for name, count in Counter(one.name for one in refused).items():
            self._metrics.versions_refused.labels(name).set(count)
        self.refused = tuple(refused)
        self.waits = waits

    @property
    def is_waiting(self) -> bool:
        """Return whether no model is loaded although models are expected."""
        return not self._live and (self.waits or bool(self.lost))

    @property
    def models(self) -> list[LiveModel]:
        """Return all loaded models, by name."""
        return [model for _, versions in sorted(self._live.items()) for model in versions.values()]

    def first(self, most: int) -> list[ModelVersion]:
        """Return the versions to load at the start: at most `most`, or all if `most` is 0.

        The default model and the latest versions come first.
        """
        return select_initial_versions(ServingState(self.shelf, self._default), most)

    @property
    def resting(self) -> list[ModelVersion]:
        """Return the versions that are not loaded until they are requested."""
        return [found for found in self._all() if found.name is not None and not self._loaded(found)]

    @property
    def default(self) -> str | None:
        """Return the name of the default model. A single file has the name in its contract."""
        return self._default or (self.single if None in self.shelf else None)

    @property
    def served(self) -> ServingState:
        """Return the current state."""
        return ServingState(self.shelf, self.default, tuple(self.refused), self.waits)

    def choose(self, name: str | None) -> None:
        """Set the default model."""
        self._default = name
        self.changes += 1

    def get(self, name: str | None = None, version: str | None = None) -> LiveModel | ModelVersion:
        """Return a model by name and version. The defaults are the default model and its latest version.

        A version that is not loaded is returned as `ModelVersion`. Raises `ModelNotFound`, or `NotReady` if
        the repository has the model but cannot serve it.
        """
        name = name or self.default
        if name is None:
            where = f"the repository's file `{DEFAULT_MODEL_FILE}`, or FOVEA_DEFAULT_MODEL"
            raise ModelNotFound(f"name a model: {self._names()}; none is the default ({where})")
        live, shelved = self._live.get(name, {}), self.shelf.get(name, ())
        if not live and name == self.single and None in self.shelf:
            return self.shelf[None][-1]
        if not live and not shelved:
            self._check_refused(name)
        if version is None:
            self._check_pinned(name)
            latest = shelved[-1].version if shelved else next(reversed(live), None)
            version = latest or ""
        for spelling in (version, version.removesuffix(".0")):  # TorchServe calls its first version 1.0
            if spelling in live:
                return live[spelling]
            for found in shelved:
                if found.version == spelling:
                    return found
        known = ", ".join(repr(one.version) for one in self.versions(name))
        raise ModelNotFound(f"model {name!r} has no version {version!r}; it has {known}")

    def _check_refused(self, name: str) -> None:
        """Raise `NotReady` if the repository has the model but no version of it can be served."""
        reasons = [one for one in self.refused if one.name == name]
        if reasons:
            raise NotReady(
                f"model {name!r} is in the repository, and cannot be served; /v1/models says why",
                retry_after=_RETRY,
            )
        if self.waits:
            raise NotReady(f"model {name!r} is not in the repository yet", retry_after=_RETRY)

    def _check_pinned(self, name: str) -> None:
        """Raise `NotReady` if the configured version cannot be served.

        Otherwise another version would answer in its place.
        """
        if any(one.name == name and one.is_pinned for one in self.refused):
            raise NotReady(
                f"the version of model {name!r} that its {CONFIG_FILE} asks for cannot be served; /v1/models "
                "says why",
                retry_after=_RETRY,
            )

    def versions(self, name: str) -> list[LiveModel | ModelVersion]:
        """Return all served versions of a model, the latest last. A version that is not loaded is a `ModelVersion`.

        Raises `ModelNotFound` when there is none.
        """
        live, shelved = self._live.get(name, {}), self.shelf.get(name, ())
        if not live and not shelved:
            raise ModelNotFound(f"there is no model {name!r}; there are {self._names()}")
        return [live.get(found.version or "", found) for found in shelved] or list(live.values())

    def live(self, name: str | None) -> list[LiveModel]:
        """Return the loaded versions of a model, the latest last.

        `name` is the name of the model's folder, None for a single file.
        """
        return [model for model in self.models if model.found.name == name]

    def add(self, model: LiveModel) -> None:
        """Serve a loaded model beside its other versions."""
        self.changes += 1
        self.lost.discard(model.found)
        if model.found.name is None:
            self.single = model.name
        versions = {**self._live.get(model.name, {}), model.version: model}
        self._live[model.name] = dict(sorted(versions.items(), key=lambda one: _order(one[0])))
        self._announce(model)

    def remove(self, model: LiveModel) -> None:
        """Stop serving a model."""
        self.changes += 1
        versions = self._live[model.name]
        if versions.get(model.version) is model:
            del versions[model.version]
            if not versions:
                del self._live[model.name]
        info, fallback = self._gauges(model)
        info(0)
        fallback(0)
        if other := versions.get(model.version):  # the same version from another file
            self._gauges(other)[0](1)

    def _all(self) -> Iterator[ModelVersion]:
        """Yield every version that is to be served."""
        for versions in self.shelf.values():
            yield from versions

    def _loaded(self, found: ModelVersion) -> bool:
        """Return whether a version is loaded."""
        return found.version in self._live.get(found.name or "", {})

    def check_single(self) -> None:
        """Raise `ModelError` if the only file is a different model from the configured default."""
        if None in self.shelf and self._default and self._default not in self._live:
            raise ModelError(f"FOVEA_DEFAULT_MODEL is {self._default!r}; there are {self._names()}")

    def _names(self) -> str:
        """Return the known names, for error messages."""
        return ", ".join(sorted({*self._live, *(name for name in self.shelf if name is not None)}))

    def _announce(self, model: LiveModel) -> None:
        """Set the metrics of a new model and log it."""
        provider = model.found.config.provider or self._provider
        fell_back = model.loaded.provider == "cpu" and expects_cuda(provider)
        labels, loaded, own = len(model.contract.labels), model.loaded, (model.name, model.version)
        info, fallback = self._gauges(model)
        info(1)
        fallback(fell_back)
        self._metrics.model_load_seconds.labels(*own).set(loaded.load_seconds)
        self._metrics.golden_logit_difference.labels(*own).set(loaded.golden_differences["logit_difference"])
        if fell_back:
            log.warning(f"model {model.name} runs on a CPU: there is a GPU, and ONNX Runtime cannot use it")
        log.info(
            f"model {model.name} version {model.version}: {labels} labels on {loaded.provider}, proven on "
            f"{loaded.golden_differences['images']} golden images, ready in {loaded.load_seconds:.2f} s"
        )
        if model.contract.reference is None:
            log.info(f"model {model.name} came without images to compare with: its drift cannot be told")

    def _gauges(self, model: LiveModel) -> tuple[Callable[[float], None], Callable[[float], None]]:
        """Return the setters of the model's info gauge and its provider fallback gauge."""
        own = (model.name, model.version)
        info = self._metrics.model_info.labels(*own, model.contract.task, model.loaded.provider)
        return info.set, self._metrics.provider_fallback.labels(*own).set


def _order(version: str) -> tuple[int, str]:
    """Return a sort key that puts the latest version last, by number."""
    return (int(version) if version.isdecimal() else -1, version)
