"""Models in this process, without a server: `fovea classify`, `fovea explain` and `fovea.load`."""

from __future__ import annotations

import os

from fovea.service.artifact.repository import ModelVersion
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.preprocess import release_pillow_memory
from fovea.service.resources import threads
from fovea.service.runners.load_messages import LoadCommand
from fovea.service.runners.predictor import Predictor
from fovea.service.serving.process_plan import create_plan
from fovea.service.settings import Settings


def create_load(version: ModelVersion, settings: Settings, cpus: float | None = None) -> LoadCommand:
    """Return the load message for a model in this process, which may use `cpus` processors; None for all.

    Loads of the same file with the same settings are equal, and may share a predictor.
    """
    thread_plan = threads.plan_threads(
        settings,
        threads.available_cpus() if cpus is None else cpus,
        gpu=threads.expects_gpu(version.config.provider or settings.provider),
    )
    path = os.path.realpath(version.path)
    return LoadCommand(
        0, str(version.path), path, version.fingerprint, create_plan(settings, thread_plan, version.config)
    )


def load_predictor(load: LoadCommand) -> Predictor:
    """Load a model into this process, with the service's limit on decode memory. Raises `ModelError`."""
    memory = DecodeMemory(load.plan.decode_bytes, release_memory=release_pillow_memory)
    return Predictor.from_load(load, memory)
