"""Workers of bulk classification in a Ray cluster. They need the wheel of Fovea, and Ray."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fovea.bulk.engine import ClassifiedChunk
from fovea.bulk.local_engine import LocalEngine
from fovea.errors import FoveaError
from fovea.service import __version__
from fovea.service.artifact.repository import ModelConfig, ModelVersion
from fovea.service.image_files import ImageEntry
from fovea.service.inference.preprocess import configure_pillow
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.ranking import find_coverage
from fovea.service.serving.standalone import create_load, load_predictor
from fovea.service.settings import Settings

Columns = dict[str, npt.NDArray[Any]]
"""A batch of Ray Data."""


WORKER_SETTINGS: Final = (
    "batch_max",
    "batch_wait_ms",
    "body_bytes",
    "decode_bytes",
    "decode_threads",
    "engine_cache",
    "image_pixels",
    "model_name",
    "provider",
    "workers",
)
"""Settings of the command that a worker needs to load the model. No others go to the cluster."""

_HEARTBEAT_SECONDS: Final = 5.0
"""Time between two heartbeats of a worker, in seconds."""


@dataclass(frozen=True)
class WorkerModel:
    """How a worker loads the model, whose file it gets beside, and what it answers."""

    name: str
    version: str
    config: ModelConfig
    settings: Mapping[str, Any]
    """Values of the `WORKER_SETTINGS`."""
    batch_size: int
    top_k: int
    coverage: float | None
    folder: str
    """Working folder of the command, to which paths may be relative."""


def report_version() -> str:
    """Return the version of Fovea on a worker."""
    return __version__


class Heartbeats:
    """An actor that hears from all workers of a run."""

    def __init__(self) -> None:
        self._last_beat_at = time.monotonic()

    def beat(self) -> None:
        """Note that a worker runs."""
        self._last_beat_at = time.monotonic()

    def read_age(self) -> float:
        """Return the time since the last heartbeat of any worker, or since the start of this actor."""
        return time.monotonic() - self._last_beat_at


class TaskClassifier:
    """The stateful actor of the data set: it loads the model once, and classifies chunks.

    It reads the images, too: their bytes stay on the machine that decodes them, and no other task has to get
    a processor for the run to go on.
    """

    def __init__(self, model: WorkerModel, content: Any, heartbeats: Any) -> None:
        """Load the model; `content` is the Ray reference of the bytes of its file.

        `heartbeats` is the handle of the actor `Heartbeats`. An error is kept and answered, because Ray would
        start the actor again for ever.
        """
        import ray

        threading.Thread(target=_send_heartbeats, args=(heartbeats,), daemon=True).start()
        with suppress(OSError):  # this machine may have no such folder; then paths are absolute
            os.chdir(model.folder)
        self._engine: LocalEngine | None = None
        self._error: FoveaError | None = None
        try:
            self._engine = _load_engine(model, ray.get(content))
        except FoveaError as error:
            self._error = error.with_traceback(None)

    def __call__(self, batch: Mapping[str, npt.NDArray[Any]]) -> Columns:
        """Classify the chunks of some tasks: columns `position` and `task` become `position` and `result`."""
        results = np.empty(len(batch["task"]), object)
        for index, task in enumerate(batch["task"]):
            chunks = [pickle.loads(chunk) for chunk in pickle.loads(task)]  # noqa: S301 - our driver's
            results[index] = pickle.dumps(self._classify(chunks), 5)
        return {"position": batch["position"], "result": results}

    def _classify(self, chunks: Sequence[Sequence[ImageEntry]]) -> list[ClassifiedChunk] | FoveaError:
        if self._engine is None:
            assert self._error  # noqa: S101 - one of both is set
            return self._error
        try:
            return list(self._engine.classify(iter(chunks)))
        except FoveaError as error:
            return error.with_traceback(None)


def _send_heartbeats(heartbeats: Any) -> None:
    """Tell the run that this worker is alive, until its process ends. Slow images do not delay this."""
    while True:
        with suppress(Exception):  # the actor may be starting again elsewhere; Ray raises many classes
            heartbeats.beat.remote()
        time.sleep(_HEARTBEAT_SECONDS)


def _load_engine(model: WorkerModel, content: npt.NDArray[np.uint8]) -> LocalEngine:
    """Load the model for one processor: Ray starts an actor for each."""
    configure_pillow()
    with TemporaryDirectory(prefix="fovea-") as folder:
        path = Path(folder) / "model.onnx"
        content.tofile(path)
        settings = Settings.model_construct(None, **model.settings, models=path)  # reads no environment
        config = model.config.model_copy(update={"threads": None})
        version = replace(ModelVersion.from_path(path, model.name, model.version), config=config)
        load = create_load(version, settings, 1)
        load = replace(load, plan=replace(load.plan, batch_max=model.batch_size))
        predictor = load_predictor(load)
        live_model = LiveModel.from_load_result(version, load, predictor.loaded_model, settings)
        return LocalEngine(
            predictor,
            live_model,
            top_k=model.top_k,
            coverage=None if model.coverage is None else find_coverage(live_model.contract, model.coverage),
            max_bytes=settings.body_bytes,
        )
