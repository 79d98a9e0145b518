"""Models on disk to models that answer: loaded, warmed up and proven against their golden set.

The layout is Triton's, `<root>/<name>/<version>/model.onnx`, and the folders' names are what a model
is called. The newest version of each model is served. A single file is a repository of one, called what
its contract says.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from service.batcher import Batcher
from service.contract import Contract
from service.engine import Engine, Proof
from service.errors import ModelError, ModelNotFound
from service.metrics import Metrics
from service.settings import Settings
from service.threads import ThreadPlan

log = logging.getLogger(__name__)

MODEL_FILE: Final = "model.onnx"

_BATCH_MAX: Final = {"cpu": 4, "cuda": 32}
"""Images in one model call. On a CPU larger ones gain nothing and hold the others up."""


@dataclass(frozen=True)
class LiveModel:
    """A model that is ready to answer."""

    name: str
    version: str
    engine: Engine
    batcher: Batcher
    proof: Proof
    load_seconds: float
    """Time to load, warm up and prove it."""

    @property
    def contract(self) -> Contract:
        """What the model says about itself."""
        return self.engine.contract


@dataclass(frozen=True)
class _Found:
    """A model file, and what its folders call it."""

    path: Path
    name: str | None
    version: str | None


class Repository:
    """The models that are served."""

    def __init__(self, settings: Settings, thread_plan: ThreadPlan, metrics: Metrics) -> None:
        """Load every model that `settings.models` holds. Raises `ModelError` if any of them fails."""
        loaded = [_load(found, settings, thread_plan, metrics) for found in _find(settings.models)]
        self.models = {model.name: model for model in loaded}
        self.default = settings.default_model
        if self.default is None and len(self.models) == 1:
            self.default = next(iter(self.models))
        if self.default is not None and self.default not in self.models:
            raise ModelError(f"FOVEA_DEFAULT_MODEL is {self.default!r}; there are {self._names()}")
        for model in loaded:
            _announce(model, metrics)

    def get(self, name: str | None = None, version: str | None = None) -> LiveModel:
        """The model of this name, or the default one. Raises `ModelNotFound`."""
        name = name or self.default
        if name is None:
            raise ModelNotFound(f"no model is the default (FOVEA_DEFAULT_MODEL); name one of {self._names()}")
        model = self.models.get(name)
        if model is None:
            raise ModelNotFound(f"there is no model {name!r}; there are {self._names()}")
        if version not in (None, model.version):
            raise ModelNotFound(f"model {name!r} has no version {version!r}; it has {model.version!r}")
        return model

    def close(self) -> None:
        """End all runner threads."""
        for model in self.models.values():
            model.batcher.close()

    def _names(self) -> str:
        return ", ".join(sorted(self.models))


def _find(root: Path) -> list[_Found]:
    """The newest version of each model. Raises `ModelError` if there is none."""
    if root.is_file():
        return [_Found(root, None, None)]
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        found = [newest for folder in folders if (newest := _newest(folder))]
    except OSError as error:
        raise ModelError(f"cannot read the repository {root}: {error.strerror}") from None
    if not found:
        raise ModelError(f"{root} has no <name>/<version>/{MODEL_FILE}")
    return found


def _newest(folder: Path) -> _Found | None:
    """The highest version that has a model file; that a higher one has none is said in the log."""
    numbered = [path for path in folder.iterdir() if path.name.isdecimal()]
    usable = [path for path in numbered if (path / MODEL_FILE).exists()]
    if not usable:
        return None
    version = max(usable, key=lambda path: int(path.name))
    for higher in numbered:
        if int(higher.name) > int(version.name):
            log.warning(f"{higher} has no {MODEL_FILE}, and is not served")
    return _Found(version / MODEL_FILE, folder.name, version.name)


def _load(found: _Found, settings: Settings, thread_plan: ThreadPlan, metrics: Metrics) -> LiveModel:
    started = time.monotonic()
    engine = Engine.load(found.path, provider=settings.provider, threads=thread_plan.runner_threads)
    batch_max = settings.batch_max or _BATCH_MAX[engine.provider]
    try:
        engine.warm_up((1, batch_max))
        proof = engine.prove()
    except ModelError as error:
        raise ModelError(f"{found.path}: {error}") from None
    return LiveModel(
        name=found.name or engine.contract.name,
        version=found.version or engine.contract.version,
        engine=engine,
        batcher=Batcher(engine.run, runners=thread_plan.runners, batch_max=batch_max, metrics=metrics),
        proof=proof,
        load_seconds=time.monotonic() - started,
    )


def _announce(model: LiveModel, metrics: Metrics) -> None:
    labels = len(model.contract.labels)
    metrics.model_info.labels(model.name, model.version, model.contract.task, model.engine.provider).set(1)
    metrics.model_load_seconds.labels(model.name, model.version).set(model.load_seconds)
    log.info(
        f"model {model.name} version {model.version}: {labels} labels on {model.engine.provider}, proven on "
        f"{model.proof.images} golden images, ready in {model.load_seconds:.2f} s"
    )
