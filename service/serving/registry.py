"""The models that are served, and those that would be if somebody asked for them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from fovea.service.artifact.contract import Contract
from fovea.service.artifact.inputs import Tensor, tensors_of
from fovea.service.artifact.repository import CONFIG_FILE, DEFAULT_FILE, Found, Refused, Served, first
from fovea.service.errors import ModelError, ModelNotFound, NotReady
from fovea.service.observability.metrics import Metrics
from fovea.service.resources.threads import expects_cuda
from fovea.service.runners.batcher import LEVELS, Lane
from fovea.service.runners.messages import Answer, Item, Load, Loaded, weight_of
from fovea.service.serving.statistics import Tally
from fovea.service.settings import Settings

log = logging.getLogger(__name__)

_RETRY: Final = 5.0
"""Seconds after which a model may be asked for again that cannot be served now."""


@dataclass(eq=False)
class LiveModel:
    """A model that is ready to answer."""

    name: str
    version: str
    found: Found
    load: Load
    """As the runners were told to."""
    contract: Contract
    loaded: Loaded
    tensors: tuple[Tensor, ...]
    """What it can be given besides encoded images."""
    lanes: Sequence[Lane[Item, Answer]]
    """Where its images wait for a runner, by how expensive they are to decode (`batcher.LEVELS`)."""
    tally: Tally = field(default_factory=Tally)
    images: int = 0
    """Accepted and not yet answered."""
    used: float = 0.0
    """When it was last asked for, on the monotonic clock, in seconds."""
    users: int = 0
    """Requests that it is to answer."""
    on_rest: list[Callable[[], None]] = field(default_factory=list)
    """What is called, once, when there is no such request."""

    @classmethod
    def of(cls, found: Found, load: Load, loaded: Loaded, settings: Settings) -> LiveModel:
        """The model that runners have loaded."""
        contract = Contract.from_json(loaded.contract)
        most_together = LEVELS - 2 if loaded.provider == "cuda" else 0  # the level up to which images share
        lanes: list[Lane[Item, Answer]] = [
            Lane(
                index=load.slot,
                batch_max=1 if level > most_together else loaded.batch_max,
                weight_max=loaded.batch_bytes,
                weigh=weight_of,
                shares=loaded.provider == "cpu" and not settings.batch_wait_ms,
                wait=0.0 if level else settings.batch_wait_ms / 1000,
                level=level,
            )
            for level in range(LEVELS)
        ]
        name, version = found.name or contract.name, found.version or contract.version
        tensors = tensors_of(contract)
        return cls(name, version, found, load, contract, loaded, tensors, lanes, used=time.monotonic())

    def take(self) -> None:
        """One request more."""
        self.users += 1

    def release(self) -> None:
        """One request less."""
        self.users -= 1
        self._check_rest()

    def when_at_rest(self, call: Callable[[], None]) -> None:
        """Call once nobody needs it: now, or when the last request is over."""
        self.on_rest.append(call)
        self._check_rest()

    def _check_rest(self) -> None:
        if not self.users:
            calls, self.on_rest = self.on_rest, []
            for call in calls:
                call()


class Repository:
    """Finds the model that a request asks for."""

    def __init__(self, settings: Settings, served: Served, metrics: Metrics) -> None:
        """`served` is what is to be."""
        self.shelf = dict(served.shelf)
        self.refused: Sequence[Refused] = ()
        """Versions that did not pass their checks, newer than those that are served."""
        self.waits = False
        """There is nothing in the repository yet that could be served."""
        self.lost: set[Found] = set()
        """What was served, and was lost with all its runners."""
        self.single: str | None = None
        """What a single file is called, once it was loaded."""
        self._metrics = metrics
        self._provider = settings.provider
        self._live: dict[str, dict[str, LiveModel]] = {}
        self._default = served.default
        self.changes = 0
        """How often what is served, or said of it, has changed."""
        self.note(served.refused, waits=served.waits)

    def note(self, refused: Sequence[Refused], *, waits: bool) -> None:
        """Remember what the repository has that is not served."""
        self.changes += 1
        for name in {one.name for one in self.refused} - {one.name for one in refused}:
            self._metrics.versions_refused.labels(name).set(0)
        for name, count in Counter(one.name for one in refused).items():
            self._metrics.versions_refused.labels(name).set(count)
        self.refused = tuple(refused)
        self.waits = waits

    @property
    def is_waiting(self) -> bool:
        """Whether there is no model though there should be."""
        return not self._live and (self.waits or bool(self.lost))

    @property
    def models(self) -> list[LiveModel]:
        """All that are loaded, by name."""
        return [model for _, versions in sorted(self._live.items()) for model in versions.values()]

    def first(self, most: int) -> list[Found]:
        """Those that are loaded at the start: all, or at most so many, unless 0; the default model and latest
        versions before others."""
        return first(Served(self.shelf, self._default), most)

    @property
    def resting(self) -> list[Found]:
        """All that are not loaded until somebody asks for them."""
        return [found for found in self._all() if found.name is not None and not self._loaded(found)]

    @property
    def default(self) -> str | None:
        """The model that answers where a request names none; a single file is called as it says itself."""
        return self._default or (self.single if None in self.shelf else None)

    @property
    def served(self) -> Served:
        """What is served now."""
        return Served(self.shelf, self.default, tuple(self.refused), self.waits)

    def choose(self, name: str | None) -> None:
        """Make this model the default from now on."""
        self._default = name
        self.changes += 1

    def get(self, name: str | None = None, version: str | None = None) -> LiveModel | Found:
        """The model of this name, or the default one; the latest version unless told. What is not loaded is
        a `Found`. Raises `ModelNotFound`."""
        name = name or self.default
        if name is None:
            where = f"the repository's file `{DEFAULT_FILE}`, or FOVEA_DEFAULT_MODEL"
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
        """Raise `NotReady` where the repository has the model, and no version of it can be served."""
        reasons = [one for one in self.refused if one.name == name]
        if reasons:
            raise NotReady(
                f"model {name!r} is in the repository, and cannot be served; /v1/models says why",
                retry_after=_RETRY,
            )
        if self.waits:
            raise NotReady(f"model {name!r} is not in the repository yet", retry_after=_RETRY)

    def _check_pinned(self, name: str) -> None:
        """Raise `NotReady` where another version would answer in place of the one that is configured."""
        if any(one.name == name and one.is_pinned for one in self.refused):
            raise NotReady(
                f"the version of model {name!r} that its {CONFIG_FILE} asks for cannot be served; /v1/models "
                "says why",
                retry_after=_RETRY,
            )

    def versions(self, name: str) -> list[LiveModel | Found]:
        """All of a model that are served, the latest last; what is not loaded is a `Found`. Raises
        `ModelNotFound` when there are none."""
        live, shelved = self._live.get(name, {}), self.shelf.get(name, ())
        if not live and not shelved:
            raise ModelNotFound(f"there is no model {name!r}; there are {self._names()}")
        return [live.get(found.version or "", found) for found in shelved] or list(live.values())

    def live(self, name: str | None) -> list[LiveModel]:
        """The versions of a model that are loaded, the latest last, by its folder's name: None of a single
        file."""
        return [model for model in self.models if model.found.name == name]

    def add(self, model: LiveModel) -> None:
        """Serve it from now on, beside its other versions."""
        self.changes += 1
        self.lost.discard(model.found)
        if model.found.name is None:
            self.single = model.name
        versions = {**self._live.get(model.name, {}), model.version: model}
        self._live[model.name] = dict(sorted(versions.items(), key=lambda one: _order(one[0])))
        self._announce(model)

    def remove(self, model: LiveModel) -> None:
        """Serve it no more."""
        self.changes += 1
        versions = self._live[model.name]
        if versions.get(model.version) is model:
            del versions[model.version]
            if not versions:
                del self._live[model.name]
        info, fallback = self._gauges(model)
        info(0)
        fallback(0)
        if other := versions.get(model.version):  # the same version of another file
            self._gauges(other)[0](1)

    def _all(self) -> Iterator[Found]:
        for versions in self.shelf.values():
            yield from versions

    def _loaded(self, found: Found) -> bool:
        return found.version in self._live.get(found.name or "", {})

    def check_single(self) -> None:
        """Raise `ModelError` when a single file turns out to be another model than the default."""
        if None in self.shelf and self._default and self._default not in self._live:
            raise ModelError(f"FOVEA_DEFAULT_MODEL is {self._default!r}; there are {self._names()}")

    def _names(self) -> str:
        return ", ".join(sorted({*self._live, *(name for name in self.shelf if name is not None)}))

    def _announce(self, model: LiveModel) -> None:
        provider = model.found.config.provider or self._provider
        fell_back = model.loaded.provider == "cpu" and expects_cuda(provider)
        labels, loaded, own = len(model.contract.labels), model.loaded, (model.name, model.version)
        info, fallback = self._gauges(model)
        info(1)
        fallback(fell_back)
        self._metrics.model_load_seconds.labels(*own).set(loaded.seconds)
        self._metrics.golden_logit_difference.labels(*own).set(loaded.golden["logit_difference"])
        if fell_back:
            log.warning(f"model {model.name} runs on a CPU: there is a GPU, and ONNX Runtime cannot use it")
        log.info(
            f"model {model.name} version {model.version}: {labels} labels on {loaded.provider}, proven on "
            f"{loaded.golden['images']} golden images, ready in {loaded.seconds:.2f} s"
        )
        if model.contract.reference is None:
            log.info(f"model {model.name} came without images to compare with: its drift cannot be told")

    def _gauges(self, model: LiveModel) -> tuple[Callable[[float], None], Callable[[float], None]]:
        """Of what is served now."""
        own = (model.name, model.version)
        info = self._metrics.model_info.labels(*own, model.contract.task, model.loaded.provider)
        return info.set, self._metrics.provider_fallback.labels(*own).set


def _order(version: str) -> tuple[int, str]:
    """The latest last, by number."""
    return (int(version) if version.isdecimal() else -1, version)
