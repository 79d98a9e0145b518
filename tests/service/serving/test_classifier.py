"""The classifier: an unexpected error with one image harms no other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from fovea.service.observability.metrics import Metrics
from fovea.service.runners.batch_messages import ImageRequest, Item
from fovea.service.serving.classifier import Classification, Classifier
from fovea.service.settings import load_settings
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg


class NoBytes:
    """An image with only a length, so that its header cannot be read and it cannot be sent."""

    def __len__(self) -> int:
        return 100


@pytest.fixture
def classifier(tmp_path: Path) -> Iterator[Classifier]:
    zoo = add_to_repository(build_model(), tmp_path / "zoo")
    yield Classifier(load_settings(models=zoo, runners=1), Metrics(CollectorRegistry()))


async def classify(classifier: Classifier, *images: Item) -> list[Any]:
    (model,) = classifier.catalog.models
    return list(await classifier.classify_images(images, model, on_answer=lambda *_: None))


def test_failed_queueing_leaves_no_images_in_the_queue(classifier: Classifier) -> None:
    async def work() -> None:
        await classifier.start()
        try:
            bad_image: Any = NoBytes()
            with pytest.raises(TypeError):
                await classify(classifier, make_jpeg(), bad_image)
            assert classifier._batcher.count_waiting(0) == 0
            (answer,) = await classify(classifier, make_jpeg())
            assert isinstance(answer, Classification)
        finally:
            await classifier.close()

    asyncio.run(work())


def test_unencodable_batch_does_not_end_its_runner(classifier: Classifier) -> None:
    async def work() -> None:
        await classifier.start()
        try:
            (pid,) = [connection.process.pid for connection in classifier.runners._connections.values()]
            bad_image = ImageRequest(NoBytes(), tensor_name="pixels")  # type: ignore[arg-type]
            with pytest.raises(Exception, match="bytes-like"):
                await classify(classifier, bad_image)
            (answer,) = await classify(classifier, make_jpeg())
            assert isinstance(answer, Classification)
            assert [connection.process.pid for connection in classifier.runners._connections.values()] == [
                pid
            ]
        finally:
            await classifier.close()

    asyncio.run(work())
