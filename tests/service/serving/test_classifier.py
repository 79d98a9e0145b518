"""The classifier: an unexpected error with one image harms no other."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import ModelError, ShareExceeded
from fovea.service.http.request_record import RequestRecord
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.observability.metrics import Metrics
from fovea.service.runners.batch_messages import Batch, ImageRequest, Item
from fovea.service.runners.connection import _count_suspects, _PendingBatch
from fovea.service.runners.lane import INFINITY
from fovea.service.runners.load_messages import LoadCommand
from fovea.service.runners.predictor import Predictor
from fovea.service.runners.process import _pop_group
from fovea.service.serving.classifier import BoxClassification, Classification, Classifier
from fovea.service.settings import load_settings
from tests.graphs import add_to_repository, build_model
from tests.memory_files import is_sealed, weights_path_of
from tests.pictures import make_jpeg, make_png_header


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


def test_boxes_run_in_a_batch_of_their_own(classifier: Classifier) -> None:
    """The runner groups batches by the same weights, and so does the connection when the runner dies."""

    async def work() -> None:
        await classifier.start()
        try:
            boxes = ((0, 0, 64, 48), (1, 2, 3, 4))
            outcomes = await classify(
                classifier,
                *(make_jpeg(), make_jpeg()),
                ImageRequest(make_jpeg(), boxes=boxes),
                *(make_jpeg(), ImageRequest(make_jpeg(), boxes=())),
            )
            boxed = outcomes[2]
            assert isinstance(boxed, BoxClassification)
            assert boxed.boxes == boxes
            assert [one.timing.batch_size for one in boxed.outcome.answers] == [2, 2]
            assert isinstance(outcomes[4], BoxClassification)
            assert all(isinstance(outcomes[index], Classification) for index in (0, 1, 3))
            assert outcomes[0].answer.timing.batch_size + outcomes[3].answer.timing.batch_size <= 5
            # A shadow test would compare answers to the whole image, which nobody has asked for.
            assert classifier.get_recent_images("small") == [make_jpeg()] * 3
        finally:
            await classifier.close()

    asyncio.run(work())


def test_runner_and_service_agree_that_boxes_run_alone(classifier: Classifier, tmp_path: Path) -> None:
    (model,) = classifier.catalog.models
    lane, image = model.lanes[0], make_jpeg()
    boxed: Item = ImageRequest(image, boxes=((0, 0, 9, 9),))
    assert lane.compute_share(boxed) == 1
    predictor = Predictor.from_load(model.load, DecodeMemory(1 << 28))
    for items, group_size in (
        ([image, image, image], 2),  # one is left over for later
        ([image, boxed, image], 1),
        ([boxed, image, image], 1),
        ([boxed, boxed], 1),
    ):
        batches = deque(Batch(0, 0, [item], [None], False, False) for item in items)
        assert len(_pop_group(batches, {0: predictor})) == group_size
        pending = [_PendingBatch(0, lambda _: None, lane, [item], False) for item in items]
        assert _count_suspects(pending) == (3 if boxed not in items else 1)
    asyncio.run(classifier.close())


def test_boxes_share_the_queue_time_of_their_image(classifier: Classifier) -> None:
    async def work() -> None:
        await classifier.start()
        try:
            record, (model,) = RequestRecord("POST", {}), classifier.catalog.models
            image = ImageRequest(make_jpeg(), boxes=((0, 0, 64, 48),) * 3)
            await classifier.classify_images([image], model, on_answer=record.add_image)
            assert record.images == 3
            names = [stage.name for stage in record.stages]
            assert {name: names.count(name) for name in names} == {"queue": 1, "decode": 3, "inference": 3}
        finally:
            await classifier.close()

    asyncio.run(work())


def test_many_boxes_wait_behind_cheap_images(classifier: Classifier) -> None:
    (model,) = classifier.catalog.models
    image, box = make_jpeg(), (0, 0, 64, 48)

    def choose_level(count: int) -> int:
        return classifier._choose_lane(ImageRequest(image, boxes=(box,) * count), model)[0].level

    lane = model.lanes[0]
    assert classifier._choose_lane(image, model)[0] is lane
    assert [choose_level(count) for count in (0, 1, lane.batch_max)] == [0, 0, 0]
    assert choose_level(lane.batch_max + 1) == 1  # before the time of an image is known
    lane.seconds_per_item = 0.01
    assert [choose_level(count) for count in (1, 2, 3, 25, 64)] == [0, 0, 1, 2, 2]
    assert classifier._choose_lane(image, model)[0] is lane
    asyncio.run(classifier.close())


def test_places_of_costly_images_are_shared_out_among_callers(tmp_path: Path) -> None:
    zoo = add_to_repository(build_model(), tmp_path / "zoo")
    settings = load_settings(models=zoo, runners=1, queue_images=48, request_images=1, caller_shares=True)
    classifier = Classifier(settings, Metrics(CollectorRegistry()))
    (model,) = classifier.catalog.models
    giant = make_png_header(7000, 7000)

    def submit(caller: str) -> None:
        classifier.submit_image(
            giant, model, lambda outcome: None, deadline=INFINITY, on_answer=lambda *_: None, caller=caller
        )

    async def work() -> None:
        for _ in range(6):  # half of the twelve places
            submit("flood")
        with pytest.raises(ShareExceeded):
            submit("flood")
        for _ in range(4):
            submit("other")
        with pytest.raises(ShareExceeded):
            submit("other")
        await classifier.close()

    asyncio.run(work())


def test_weights_that_no_runner_has_written_are_sealed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runner that replaces another one would write them, beside runners that work on images."""
    create_load = Classifier.create_load
    files: list[Path] = []

    def create_unshared_load(self: Classifier, version: ModelVersion) -> LoadCommand:
        load = create_load(self, version)
        files.append(weights_path_of(load))
        return replace(load, weights_file=None)

    monkeypatch.setattr(Classifier, "create_load", create_unshared_load)
    zoo = add_to_repository(build_model(), tmp_path / "zoo")
    classifier = Classifier(load_settings(models=zoo, runners=1), Metrics(CollectorRegistry()))
    assert [is_sealed(file) for file in files] == [True]
    asyncio.run(classifier.close())


def test_failed_start_leaves_no_file_open(tmp_path: Path) -> None:
    """The start goes on without the broken model, in the same process."""
    zoo = add_to_repository(build_model(), tmp_path / "zoo")
    (zoo / "small" / "1" / "model.onnx").write_bytes(b"no model")
    before = _list_open_files(zoo)
    for _ in range(2):
        with pytest.raises(ModelError):
            Classifier(load_settings(models=zoo, runners=1), Metrics(CollectorRegistry()))
    assert _list_open_files(zoo) == before


def _list_open_files(zoo: Path) -> list[str]:
    """Return the open model files of the repository, and the memory files of weights, also of other tests."""
    names = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sorted(name for name in names if "memfd:weights" in name or str(zoo) in name)
