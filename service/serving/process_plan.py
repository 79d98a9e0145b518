"""Plan of a process that runs a model, from the settings and the model's configuration."""

from __future__ import annotations

from fovea.service.artifact.repository import ModelConfig
from fovea.service.providers import PROVIDERS, ProviderSetting
from fovea.service.resources.threads import ThreadPlan
from fovea.service.runners.load_messages import ProcessPlan
from fovea.service.settings import Settings


def create_plan(
    settings: Settings, thread_plan: ThreadPlan, config: ModelConfig | None = None
) -> ProcessPlan:
    """Return how a process runs a model.

    The plan combines the settings, the model's own configuration, and the process's share of the processors.
    """
    config = config or ModelConfig()
    provider = config.provider or settings.provider
    return ProcessPlan(
        provider=provider,
        batch_max=config.batch_max or settings.batch_max,
        threads=config.threads or thread_plan.runner_threads,
        wide_threads=0 if config.threads else thread_plan.wide_threads,
        decode_threads=thread_plan.decode_threads,
        image_pixels=settings.image_pixels,
        decode_bytes=settings.decode_bytes // settings.workers,
        processes=thread_plan.runners,
        engine_cache=find_engine_cache(settings, provider),
    )


def find_engine_cache(settings: Settings, provider: ProviderSetting) -> str:
    """Return the folder for compiled engines; empty if there is none, or the provider compiles nothing."""
    compiles = provider != "auto" and PROVIDERS[provider].compiles
    return str(settings.engine_cache) if compiles and settings.engine_cache else ""
