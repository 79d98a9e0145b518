"""The manager of the loaded models: changes, requests and losses at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from fovea.service.artifact.repository import ServingState, find_versions, scan_repository
from fovea.service.errors import Interrupted, NotReady, Unproven
from fovea.service.observability.metrics import Metrics
from fovea.service.rollout import manager as module
from fovea.service.rollout.manager import ModelManager
from fovea.service.rollout.trial import ShadowTests
from fovea.service.runners.load_messages import LoadCommand, LoadedModel
from fovea.service.serving.catalog import VersionState
from fovea.service.serving.classifier import Classifier
from fovea.service.serving.live_model import LiveModel
from fovea.service.settings import load_settings
from tests.graphs import add_to_repository, build_model
from tests.memory_files import is_sealed, weights_path_of
from tests.zoo import publish_variant

pytestmark = pytest.mark.long


class Case:
    """A repository with the models `small` and `other`, and one runner."""

    def __init__(self, folder: Path, models_loaded: int) -> None:
        self.zoo = add_to_repository(build_model(), folder)
        add_to_repository(build_model(seed=3), folder, "other")
        settings = load_settings(models=self.zoo, runners=1, models_loaded=models_loaded)
        self.classifier = Classifier(settings, Metrics(CollectorRegistry()))
        self.catalog = self.classifier.catalog
        self.loads: list[str] = []
        self.weight_sizes: list[int] = []
        """Sizes of the memory files of weights at each load, in bytes."""

    async def run(self, work: Callable[[ModelManager], Awaitable[None]]) -> None:
        """Run `work` with a manager, and check that nothing is left behind."""
        await self.classifier.start()
        load_model = self.classifier.runners.load_model

        async def count_load(load: LoadCommand) -> LoadedModel:
            self.loads.append(Path(load.path).parents[1].name)
            assert is_sealed(weights_path_of(load)), "a runner could change what another runner reads"
            self.weight_sizes.append(weights_path_of(load).stat().st_size)
            return await load_model(load)

        self.classifier.runners.load_model = count_load  # type: ignore[method-assign]
        self.manager = ModelManager(self.classifier)
        self.classifier.on_model_lost = self.manager.handle_lost_model
        try:
            await work(self.manager)
            assert all(not one.task_count for one in self.catalog.entries)
            self.check_runner()
        finally:
            self.manager.close()
            await self.classifier.close()

    def check_runner(self) -> None:
        """Check that the runner and the service have the models of the catalog, and no others."""
        (connection,) = self.classifier.runners._connections.values()
        models = [one.model for one in self.catalog.entries if one.model]
        assert sorted(connection.models) == sorted(one.load.model_id for one in models)
        assert sorted(self.classifier._pinned_files) == sorted(connection.models)

    def state_of(self, name: str) -> VersionState:
        (version,) = find_versions(self.zoo, name)
        return self.catalog.get_entry(version).state

    def serve(self, *names: str) -> None:
        """Serve only these models."""
        versions = scan_repository(self.zoo).versions_by_model
        self.manager.serve(ServingState({one: versions[one] for one in names}, None))


def run_case(
    folder: Path, work: Callable[[Case, ModelManager], Awaitable[None]], *, models_loaded: int = 0
) -> Case:
    case = Case(folder / "zoo", models_loaded)
    asyncio.run(case.run(lambda manager: work(case, manager)))
    return case


async def wait_for(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def test_aborted_change_leaves_nothing_in_service_or_runner(tmp_path: Path) -> None:
    async def work(case: Case, manager: ModelManager) -> None:
        publish_variant(case.zoo, seed=1)
        preparation = asyncio.create_task(manager.prepare("small", find_versions(case.zoo, "small")))
        await wait_for(manager._load_lock.locked)  # until the trial has passed
        manager.abort("small")
        with pytest.raises(Interrupted, match="given up"):
            await preparation
        assert case.state_of("small") is VersionState.GONE

    assert run_case(tmp_path, work).loads == ["small"]


@pytest.mark.parametrize("is_written", [True, False])
def test_runners_get_sealed_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_written: bool
) -> None:
    """Without a process that writes them, each runner loads its own weights from the model."""

    def write_half(self: ShadowTests, load: LoadCommand) -> None:
        weights_path_of(load).write_bytes(b"half of the weights")
        raise Unproven("its trial process was killed")

    if not is_written:
        monkeypatch.setattr(ShadowTests, "write_weights", write_half)

    async def work(case: Case, manager: ModelManager) -> None:
        (await manager.load_on_demand("small", None)).release()
        assert case.state_of("small") is VersionState.READY

    (size,) = run_case(tmp_path, work, models_loaded=1).weight_sizes
    assert (size > 0) is is_written
    assert ("do not share the weights" in caplog.text) is not is_written


def test_draining_model_that_is_wanted_again_is_not_loaded_twice(tmp_path: Path) -> None:
    async def work(case: Case, manager: ModelManager) -> None:
        model = case.catalog.get("small")
        assert isinstance(model, LiveModel)
        model.acquire()
        case.serve("other")
        assert case.state_of("small") is VersionState.DRAINING
        await manager.prepare("small", find_versions(case.zoo, "small"))
        assert case.state_of("small") is VersionState.LOADING
        model.release()  # its last request ends while it waits for the switch
        assert case.state_of("small") is VersionState.LOADING
        case.serve("small", "other")
        assert case.catalog.get("small") is model
        case.serve("other")
        assert case.state_of("small") is VersionState.GONE

    assert run_case(tmp_path, work).loads == []


def test_requests_and_a_change_load_a_version_once(tmp_path: Path) -> None:
    async def work(case: Case, manager: ModelManager) -> None:
        assert case.state_of("small") is VersionState.FOUND
        requests = [asyncio.create_task(manager.load_on_demand("small", None)) for _ in range(5)]
        change = asyncio.create_task(manager.prepare("small", find_versions(case.zoo, "small")))
        models = await asyncio.gather(*requests)
        await change
        case.serve("other", "small")
        assert set(models) == {case.catalog.get("small")}
        assert [case.state_of(one) for one in ("small", "other")] == [VersionState.READY, VersionState.FOUND]
        for model in models:
            model.release()
        assert models[0].active_requests == 0

    assert run_case(tmp_path, work, models_loaded=1).loads == ["small"]


def test_request_for_an_evicted_model_that_still_answers_takes_it_back(tmp_path: Path) -> None:
    async def work(case: Case, manager: ModelManager) -> None:
        other = case.catalog.get("other")
        assert isinstance(other, LiveModel)
        other.acquire()
        small = await manager.load_on_demand("small", None)
        assert case.state_of("other") is VersionState.DRAINING
        small.release()
        assert await manager.load_on_demand("other", None) is other
        assert [case.state_of(one) for one in ("small", "other")] == [VersionState.FOUND, VersionState.READY]
        other.release()
        other.release()
        assert case.state_of("other") is VersionState.READY

    assert run_case(tmp_path, work, models_loaded=1).loads == ["small"]


def test_model_that_is_removed_while_a_request_loads_it_is_not_served(tmp_path: Path) -> None:
    async def work(case: Case, manager: ModelManager) -> None:
        request = asyncio.create_task(manager.load_on_demand("small", None))
        await wait_for(lambda: bool(case.loads))
        case.serve("other")
        with pytest.raises(Exception, match="there is no model 'small'"):
            await request
        assert case.state_of("small") is VersionState.GONE
        assert case.state_of("other") is VersionState.FOUND, "it had made room"

    run_case(tmp_path, work, models_loaded=1)


def test_other_changes_do_not_disturb_a_load(tmp_path: Path) -> None:
    async def work(case: Case, manager: ModelManager) -> None:
        request = asyncio.create_task(manager.load_on_demand("small", None))
        await wait_for(lambda: bool(case.loads))
        case.serve("small", "other")
        assert case.state_of("small") is VersionState.LOADING
        (await request).release()
        assert case.state_of("small") is VersionState.READY

    assert run_case(tmp_path, work, models_loaded=1).loads == ["small"]


def test_model_that_is_removed_while_a_request_waits_is_not_loaded(tmp_path: Path) -> None:
    async def work(case: Case, manager: ModelManager) -> None:
        async with manager._load_lock:
            request = asyncio.create_task(manager.load_on_demand("small", None))
            (version,) = find_versions(case.zoo, "small")
            await wait_for(lambda: case.catalog.get_entry(version).has_passed)
            case.serve("other")
        with pytest.raises(Exception, match="there is no model 'small'"):
            await request
        assert case.state_of("other") is VersionState.READY, "it need not make room"

    assert run_case(tmp_path, work, models_loaded=1).loads == []


def test_failed_load_is_not_repeated_by_the_next_requests(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(case: Case, manager: ModelManager) -> None:
        (version,) = find_versions(case.zoo, "small")
        content = version.path.read_bytes()
        version.path.write_bytes(b"another file")
        requests = [manager.load_on_demand("small", None) for _ in range(5)]
        outcomes = await asyncio.gather(*requests, return_exceptions=True)
        assert {type(one) for one in outcomes} == {NotReady}
        changes = case.catalog.change_count
        with pytest.raises(NotReady):
            await manager.load_on_demand("small", None)
        assert case.catalog.change_count == changes, "cached replies would be rendered again"
        assert caplog.text.count("has changed since it was found") == 1
        entry = case.catalog.get_entry(version)
        assert (entry.state, entry.reason) == ("found", "it could not be loaded; the log says why")
        version.path.write_bytes(content)

    run_case(tmp_path, work, models_loaded=1)


def test_models_in_turn_end_in_the_runners_as_the_catalog_says(tmp_path: Path) -> None:
    """Requests queue for the load of two models with room for one: each load evicts the other model."""

    async def work(case: Case, manager: ModelManager) -> None:
        for name in ("small", "other"):  # so that both have passed their trials
            await ask(manager, name)
        async with manager._load_lock:
            lose(case, "other")
            names = ["small", "small", "other", "small", "other"]
            requests = [asyncio.create_task(ask(manager, one)) for one in names]
            await asyncio.sleep(0.5)  # until the lost model is about to be loaded again too
        await asyncio.gather(*requests)
        await wait_for(lambda: not manager._tasks)
        assert len(case.catalog.models) == 1
        case.check_runner()
        case.serve()
        assert [case.state_of(one) for one in ("small", "other")] == [VersionState.GONE] * 2

    run_case(tmp_path, work, models_loaded=1)


async def ask(manager: ModelManager, name: str) -> None:
    (await manager.load_on_demand(name, None)).release()


def test_requests_that_wait_share_one_load(tmp_path: Path) -> None:
    async def work(case: Case, manager: ModelManager) -> None:
        for name in ("small", "other"):
            await ask(manager, name)
        case.loads.clear()
        await asyncio.gather(*(ask(manager, one) for one in ("small", "small", "small", "other")))

    assert run_case(tmp_path, work, models_loaded=1).loads == ["small", "other"]


def test_concurrent_requests_try_a_failing_model_once(tmp_path: Path) -> None:
    refusals: list[str] = []

    async def work(case: Case, manager: ModelManager) -> None:
        manager.on_refused = lambda version, reason, lasting: refusals.append(reason)
        (version,) = find_versions(case.zoo, "small")
        version.path.write_bytes(b"no model at all")
        case.serve("small", "other")
        requests = [manager.load_on_demand("small", None) for _ in range(5)]
        outcomes = await asyncio.gather(*requests, return_exceptions=True)
        assert {type(one) for one in outcomes} == {NotReady}
        assert len(refusals) == 1

    assert run_case(tmp_path, work, models_loaded=1).loads == []


def lose(case: Case, name: str) -> None:
    """Lose a model as the pool does when no new runner can load it."""
    (entry,) = [one for one in case.catalog.entries if one.model and one.model.name == name]
    assert entry.model
    case.classifier._handle_lost_model(entry.model.load.model_id)


def test_lost_model_is_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RELOAD_DELAYS", (0.01, 1.0))
    losses: list[tuple[str | None, bool]] = []

    async def work(case: Case, manager: ModelManager) -> None:
        manager.on_lost = lambda name, is_lost: losses.append((name, is_lost))
        lose(case, "small")
        (status,) = [one for one in case.catalog.list_statuses() if one.name == "small"]
        assert (status.state, status.reason) == ("found", "it was lost with all runners")
        await wait_for(lambda: losses == [("small", True), ("small", False)])
        assert case.state_of("small") is VersionState.READY

    assert run_case(tmp_path, work).loads == ["small"]


def test_lost_model_whose_place_is_taken_waits_for_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RELOAD_DELAYS", (4.0, 4.0))  # longer than the load of `small`
    losses: list[tuple[str | None, bool]] = []

    async def work(case: Case, manager: ModelManager) -> None:
        manager.on_lost = lambda name, is_lost: losses.append((name, is_lost))
        for name in ("small", "other"):  # so that both have passed their trials
            await ask(manager, name)
        lose(case, "other")
        (await manager.load_on_demand("small", None)).release()
        await wait_for(lambda: losses == [("other", True), ("other", False)])
        assert [case.state_of(one) for one in ("small", "other")] == [VersionState.READY, VersionState.FOUND]

    assert run_case(tmp_path, work, models_loaded=1).loads == ["small", "other", "small"]


def test_change_survives_the_loss_of_the_model_that_it_has_loaded(tmp_path: Path) -> None:
    async def work(case: Case, manager: ModelManager) -> None:
        publish_variant(case.zoo, seed=1)
        versions = find_versions(case.zoo, "small")
        await manager.prepare("small", versions)
        new_model = case.catalog.get_entry(versions[0]).model
        assert new_model
        case.classifier._handle_lost_model(new_model.load.model_id)
        case.serve("small", "other")
        assert case.state_of("small") is VersionState.FOUND
        (await manager.load_on_demand("small", None)).release()
        assert case.state_of("small") is VersionState.READY

    assert run_case(tmp_path, work).loads == ["small", "small"]
