"""Models on disk to models that answer: loaded, warmed up and proven against their golden set.

The layout is Triton's, `<root>/<name>/<version>/model.onnx`, and the folders' names are what a model
is called. The newest version of each model is served. A single file is a repository of one, called what
its contract says.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from service.batcher import Batcher
from service.contract import Contract
from service.engine import Engine, Proof
from service.errors import ModelError, ModelNotFound
from service.metrics import Metrics
from service.settings import Settings
from service.threads import ThreadPlan

log = logging.getLogger(__name__)

MODEL_FILE = "model.onnx"


@dataclass(frozen=True)
class LiveModel:
    """A model that is ready to answer."""

    name: str
    version: str
    engine: Engine
    batcher: Batcher
    proof: Proof

    @property
    def contract(self) -> Contract:
        """What the model says about itself."""
        return self.engine.contract


class Repository:
    """The models that are served."""

    def __init__(self, settings: Settings, thread_plan: ThreadPlan, metrics: Metrics) -> None:
        """Load every model that `settings.models` holds. Raises `ModelError` if any of them fails."""
        self.models: dict[str, LiveModel] = {}
        for path, name, version in _find(settings.models):
            model = _load(path, name, version, settings, thread_plan, metrics)
            self.models[model.name] = model
        self.default = settings.default_model
        if self.default is None and len(self.models) == 1:
            self.default = next(iter(self.models))
        if self.default is not None and self.default not in self.models:
            raise ModelError(
                f"FOVEA_DEFAULT_MODEL is {self.default!r}; {settings.models} has {self._names()}"
            )

    def get(self, name: str | None = None, version: str | None = None) -> LiveModel:
        """The model of this name, or the default one. Raises `ModelNotFound`."""
        name = name or self.default
        if name is None:
            raise ModelNotFound(f"no default model is set (FOVEA_DEFAULT_MODEL); name one of {self._names()}")
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


def _find(root: Path) -> Iterator[tuple[Path, str | None, str | None]]:
    """The newest version of each model: path, name, version. Raises `ModelError` if there is none."""
    if root.is_file():
        yield root, None, None
        return
    found = False
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        numbered = (path for path in folder.iterdir() if path.name.isdecimal())
        versions = [path for path in numbered if (path / MODEL_FILE).exists()]
        if versions:
            newest = max(versions, key=lambda path: int(path.name))
            found = True
            yield newest / MODEL_FILE, folder.name, newest.name
    if not found:
        raise ModelError(f"{root} has no <name>/<version>/{MODEL_FILE}")


def _load(
    path: Path, name: str | None, version: str | None,
    settings: Settings, thread_plan: ThreadPlan, metrics: Metrics,
) -> LiveModel:  # fmt: skip
    started = time.monotonic()
    engine = Engine.load(path, provider=settings.provider, threads=thread_plan.runner_threads)
    batch_max = settings.batch_max or (32 if engine.provider == "cuda" else 4)
    try:
        engine.warm_up((1, batch_max))
        proof = engine.prove()
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    elapsed = time.monotonic() - started
    batcher = Batcher(engine.run, runners=thread_plan.runners, batch_max=batch_max, metrics=metrics)
    name, version = name or engine.contract.name, version or engine.contract.version
    model = LiveModel(name, version, engine, batcher, proof)
    metrics.model_info.labels(model.name, model.version, model.contract.task, engine.provider).set(1)
    metrics.model_load_seconds.labels(model.name, model.version).set(elapsed)
    log.info(
        "model %s version %s: %d labels, provider %s, proven on %d golden images, %.2f s",
        model.name, model.version, len(model.contract.labels), engine.provider, proof.images, elapsed,
    )  # fmt: skip
    return model
