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


def test_a_change_that_is_given_up_while_a_runner_loads_leaves_nothing(tmp_path: Path) -> None:
    zoo = add_to_repository(build_model(), tmp_path / "zoo")
    classifier = Classifier(load_settings(models=zoo, runners=1), Metrics(CollectorRegistry()))

    async def work() -> None:
        await classifier.start()
        steward = ModelManager(classifier)
        try:
            publish_variant(zoo, seed=1)
            preparing = asyncio.create_task(steward.prepare("small", find_versions(zoo, "small")))
            while not steward._load_lock.locked():
                await asyncio.sleep(0.001)  # the trial is under way
            steward.abort("small")
            with pytest.raises(Interrupted, match="given up"):
                await preparing
            (link,) = classifier.runners._connections.values()
            assert list(link.models) == [model.load.model_id for model in classifier.registry.models]
            assert len(classifier._pinned_files) == 1, "the new version's file is still open"
        finally:
            steward.close()
            await classifier.close()

    asyncio.run(work())
