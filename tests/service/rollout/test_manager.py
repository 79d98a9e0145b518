"""An aborted change leaves nothing behind, neither in the service nor in its runners."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from fovea.service.artifact.repository import find_versions
from fovea.service.errors import Interrupted
from fovea.service.observability.metrics import Metrics
from fovea.service.rollout.manager import ModelManager
from fovea.service.serving.classifier import Classifier
from fovea.service.settings import load_settings
from tests.graphs import add_to_repository, build_model
from tests.zoo import publish_variant


def test_aborted_change_leaves_nothing_in_service_or_runner(tmp_path: Path) -> None:
    zoo = add_to_repository(build_model(), tmp_path / "zoo")
    classifier = Classifier(load_settings(models=zoo, runners=1), Metrics(CollectorRegistry()))

    async def work() -> None:
        await classifier.start()
        manager = ModelManager(classifier)
        try:
            publish_variant(zoo, seed=1)
            preparation = asyncio.create_task(manager.prepare("small", find_versions(zoo, "small")))
            while not manager._load_lock.locked():
                await asyncio.sleep(0.001)  # until the trial has begun
            manager.abort("small")
            with pytest.raises(Interrupted, match="given up"):
                await preparation
            (connection,) = classifier.runners._connections.values()
            assert list(connection.models) == [model.load.model_id for model in classifier.catalog.models]
            assert len(classifier._pinned_files) == 1, "the new version's file is still open"
        finally:
            manager.close()
            await classifier.close()

    asyncio.run(work())
