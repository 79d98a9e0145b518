"""The catalog: each version has one state, and every view follows it."""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from fovea.service.artifact.repository import (
    ModelVersion,
    RefusedVersion,
    ServingState,
    VersionsByModel,
    find_versions,
    scan_repository,
)
from fovea.service.errors import NotReady
from fovea.service.observability.metrics import Metrics
from fovea.service.runners.load_messages import LoadCommand, LoadedModel, ProcessPlan
from fovea.service.serving import catalog as module
from fovea.service.serving.catalog import TRANSITIONS, CatalogEntry, ModelCatalog, VersionState
from fovea.service.serving.live_model import LiveModel
from fovea.service.settings import Settings, load_settings
from tests.graphs import add_to_repository, build_model
from tests.zoo import publish_variant

STATES = [one for one in VersionState if one is not VersionState.REFUSED]


class Case:
    """The catalog of a repository with one model, of which nothing is loaded."""

    def __init__(self, root: Path) -> None:
        self.zoo = add_to_repository(build_model(), root)
        self.settings: Settings = load_settings(models=self.zoo)
        self.registry = CollectorRegistry()
        self.catalog = ModelCatalog(self.settings, scan_repository(self.zoo), Metrics(self.registry))
        (self.version,) = find_versions(self.zoo, "small")
        self.entry = self.catalog.get_entry(self.version)

    def load(self, version: ModelVersion) -> LiveModel:
        """Return a model as the runners report it."""
        contract = build_model().metadata_props[0].value
        plan = ProcessPlan("cpu", 1, 1, 0, 1, 1_000_000, 1_000_000, 1)
        command = LoadCommand(7, str(version.path), str(version.path), version.fingerprint, plan)
        result = LoadedModel(contract, "cpu", 1, 1.0, 0.5, {"images": 8, "logit_difference": 0.0})
        return LiveModel.from_load_result(version, command, result, self.settings)

    def serve(self, *versions: ModelVersion, refused: tuple[RefusedVersion, ...] = ()) -> None:
        models: VersionsByModel = {"small": versions} if versions else {}
        self.catalog.set_state(ServingState(models, None, refused))

    def count(self, state: VersionState) -> float:
        series = {"model": "small", "state": state}
        return self.registry.get_sample_value("fovea_model_versions", series) or 0.0


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path / "zoo")


def put(case: Case, state: VersionState) -> CatalogEntry:
    """Return an entry that has come to this state by legal moves."""
    entry = CatalogEntry(case.version)
    paths = {
        VersionState.GONE: [],
        VersionState.FOUND: [VersionState.FOUND],
        VersionState.LOADING: [VersionState.LOADING],
        VersionState.READY: [VersionState.LOADING, VersionState.READY],
        VersionState.DRAINING: [VersionState.LOADING, VersionState.READY, VersionState.DRAINING],
    }
    for one in paths[state]:
        if one is VersionState.READY:
            entry.model = case.load(case.version)
        case.catalog.move(entry, one)
    return entry


@pytest.mark.parametrize(("before", "after"), list(product(STATES, STATES)))
def test_only_moves_of_the_table_are_possible(case: Case, before: VersionState, after: VersionState) -> None:
    entry = put(case, before)
    if entry.state is VersionState.LOADING:
        entry.model = case.load(case.version)
    if after in TRANSITIONS[before]:
        had_model = entry.model is not None
        case.catalog.move(entry, after)
        assert entry.state is after
        keeps_model = had_model and after not in (VersionState.FOUND, VersionState.GONE)
        assert (entry.model is not None) == keeps_model
    else:
        with pytest.raises(RuntimeError, match=f"is {before} and cannot become {after}"):
            case.catalog.move(entry, after)
        assert entry.state is before


def test_every_view_follows_the_state(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog, entry = case.catalog, case.entry
    assert (catalog.get(), catalog.models, catalog.on_demand_versions) == (case.version, [], [case.version])
    assert [case.count(one) for one in STATES if one is not VersionState.GONE] == [1, 0, 0, 0]
    changes = catalog.change_count
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    catalog.move(entry, VersionState.LOADING, "it was asked for")
    (status,) = catalog.list_statuses()
    assert status == ("small", "1", "loading", "it was asked for", 1000.0)
    assert catalog.get() == case.version, "no request may get a model that is loading"
    entry.model = case.load(case.version)
    catalog.move(entry, VersionState.READY)
    assert (catalog.get(), catalog.models) == (entry.model, [entry.model])
    assert catalog.on_demand_versions == []
    assert "verified on 8 golden images" in catalog.list_statuses()[0].reason
    assert (case.count(VersionState.READY), case.count(VersionState.LOADING)) == (1, 0)
    assert catalog.find_entry(7) is entry
    catalog.move(entry, VersionState.DRAINING)
    assert (catalog.get(), catalog.models) == (case.version, [])
    assert catalog.change_count >= changes + 3
    case.serve()
    catalog.move(entry, VersionState.GONE)
    assert (catalog.list_statuses(), catalog.find_entry(7)) == ([], None)
    assert not any(case.count(one) for one in STATES if one is not VersionState.GONE)


def test_refused_versions_keep_their_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = RefusedVersion("small", "2", "it is broken")
    for now in (1000.0, 2000.0):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        case.serve(case.version, refused=(refused,))
    assert case.catalog.list_statuses()[1] == ("small", "2", "refused", "it is broken", 1000.0)
    assert case.count(VersionState.REFUSED) == 1
    case.serve(case.version)
    assert len(case.catalog.list_statuses()) == 1
    assert case.count(VersionState.REFUSED) == 0


def test_replaced_file_takes_over_the_lookup_of_its_version(case: Case) -> None:
    catalog, old_entry = case.catalog, case.entry
    catalog.add(old_model := case.load(case.version))
    publish_variant(case.zoo, seed=1)
    (case.zoo / "small" / "2" / "model.onnx").replace(case.version.path)
    (new_version,) = find_versions(case.zoo, "small", "1")
    new_entry = catalog.get_entry(new_version)
    assert new_entry is not old_entry
    new_entry.model = case.load(new_version)
    catalog.move(new_entry, VersionState.LOADING)
    case.serve(new_version)
    assert catalog.get("small", "1") is old_model
    catalog.move(new_entry, VersionState.READY)
    assert catalog.get("small", "1") is new_entry.model
    catalog.move(old_entry, VersionState.DRAINING)
    assert catalog.get("small", "1") is new_entry.model
    gauge = {"model": "small", "version": "1", "task": "multiclass", "provider": "cpu"}
    assert case.registry.get_sample_value("fovea_model_info", gauge) == 1


def test_lookup_follows_the_desired_state_at_once(case: Case) -> None:
    case.catalog.add(model := case.load(case.version))
    assert case.catalog.get("small") is model
    case.serve(case.version, refused=(RefusedVersion("small", "2", "it is broken", is_pinned=True),))
    with pytest.raises(NotReady):
        case.catalog.get("small")
    assert case.catalog.get("small", "1") is model
    case.serve(case.version)
    assert case.catalog.get("small") is model


def test_versions_that_are_gone_are_forgotten_in_the_end(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_GONE", 3)
    kept = case.entry
    for number in range(10):
        fingerprint = cast(tuple[int, ...], (number,))
        entry = case.catalog.get_entry(ModelVersion(case.version.path, "small", "1", fingerprint))
        case.catalog.move(entry, VersionState.LOADING)
        case.catalog.move(entry, VersionState.GONE)
    assert len(case.catalog.entries) == 4  # the served one, and three that are gone
    assert case.catalog.get_entry(case.version) is kept


def test_service_waits_for_a_lost_model_only_while_it_is_wanted(case: Case) -> None:
    assert not case.catalog.is_waiting, "a resting model is no reason to wait"
    case.entry.is_lost = True
    assert case.catalog.is_waiting
    case.serve()
    assert not case.catalog.is_waiting
