"""Models on disk, and what is known of them once they are loaded.

The layout is Triton's, `<root>/<name>/<version>/model.onnx`, and the folders' names are what a model
is called. The newest version of each model is served. A single file is a repository of one, called what
its contract says.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from service.batcher import Lane
from service.contract import Contract
from service.errors import ModelError, ModelNotFound
from service.messages import Answer, Image, Loaded
from service.metrics import Metrics
from service.settings import Settings
from service.threads import expects_cuda

log = logging.getLogger(__name__)

MODEL_FILE: Final = "model.onnx"

DEFAULT_FILE: Final = "default"
"""Beside the models' folders: the name of the one that answers where a request names none."""


@dataclass(frozen=True)
class Found:
    """A model file, and what its folders call it."""

    path: Path
    name: str | None
    version: str | None


@dataclass(frozen=True)
class LiveModel:
    """A model that is ready to answer."""

    name: str
    version: str
    contract: Contract
    loaded: Loaded
    lane: Lane[Image, Answer]
    """Where its images wait for a runner."""

    def __hash__(self) -> int:
        return id(self)


class Repository:
    """The models that are served."""

    def __init__(
        self, settings: Settings, found: Sequence[Found], loaded: Sequence[Loaded], metrics: Metrics
    ) -> None:
        """`loaded` tells of each model of `found`. Raises `ModelError` when the default is none of them."""
        models = [_live(index, *both, settings) for index, both in enumerate(zip(found, loaded, strict=True))]
        self.models = {model.name: model for model in models}
        self.default = self._default(settings)
        for model in models:
            _announce(
                model, metrics, fell_back=model.loaded.provider == "cpu" and expects_cuda(settings.provider)
            )

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

    def _default(self, settings: Settings) -> str | None:
        """The setting comes first, then the repository's own file; the only model needs neither."""
        where, name = "FOVEA_DEFAULT_MODEL", settings.default_model
        if name is None and (file := settings.models / DEFAULT_FILE).is_file():
            where, name = str(file), file.read_text().strip()
        if name is None:
            return next(iter(self.models)) if len(self.models) == 1 else None
        if name not in self.models:
            raise ModelError(f"{where} is {name!r}; there are {self._names()}")
        return name

    def _names(self) -> str:
        return ", ".join(sorted(self.models))


def find(root: Path) -> list[Found]:
    """The newest version of each model. Raises `ModelError` if there is none."""
    if root.is_file():
        return [Found(root, None, None)]
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        found = [newest for folder in folders if (newest := _newest(folder))]
    except OSError as error:
        raise ModelError(f"cannot read the repository {root}: {error.strerror}") from None
    if not found:
        raise ModelError(f"{root} has no <name>/<version>/{MODEL_FILE}")
    return found


def _newest(folder: Path) -> Found | None:
    """The highest version that has a model file; that a higher one has none is said in the log."""
    numbered = [path for path in folder.iterdir() if path.name.isdecimal()]
    usable = [path for path in numbered if (path / MODEL_FILE).exists()]
    if not usable:
        return None
    version = max(usable, key=lambda path: int(path.name))
    for higher in numbered:
        if int(higher.name) > int(version.name):
            log.warning(f"{higher} has no {MODEL_FILE}, and is not served")
    return Found(version / MODEL_FILE, folder.name, version.name)


def _live(index: int, found: Found, loaded: Loaded, settings: Settings) -> LiveModel:
    contract = Contract.from_json(loaded.contract)
    lane: Lane[Image, Answer] = Lane(
        index=index,
        batch_max=loaded.batch_max,
        weight_max=loaded.batch_bytes,
        weigh=len,
        shares=loaded.provider == "cpu" and not settings.batch_wait_ms,
        wait=settings.batch_wait_ms / 1000,
    )
    return LiveModel(found.name or contract.name, found.version or contract.version, contract, loaded, lane)


def _announce(model: LiveModel, metrics: Metrics, *, fell_back: bool) -> None:
    labels, loaded, own = len(model.contract.labels), model.loaded, (model.name, model.version)
    metrics.model_info.labels(*own, model.contract.task, loaded.provider).set(1)
    metrics.model_load_seconds.labels(*own).set(loaded.seconds)
    metrics.golden_logit_difference.labels(*own).set(loaded.golden["logit_difference"])
    metrics.provider_fallback.labels(*own).set(fell_back)
    if fell_back:
        log.warning(f"model {model.name} runs on a CPU: there is a GPU, and ONNX Runtime cannot use it")
    log.info(
        f"model {model.name} version {model.version}: {labels} labels on {loaded.provider}, proven on "
        f"{loaded.golden['images']} golden images, ready in {loaded.seconds:.2f} s"
    )
    if model.contract.reference is None:
        log.info(f"model {model.name} came without images to compare with: its drift cannot be told")
