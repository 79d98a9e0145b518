"""The process that writes the weights of a version, which runners then share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from fovea.service.artifact.model_file import PinnedFile, fingerprint_of
from fovea.service.errors import Interrupted, ModelError
from fovea.service.inference.shared_weights import share_weights
from fovea.service.rollout import trial
from fovea.service.rollout.trial import ShadowTests, compute_change_timeout
from fovea.service.runners.child_process import LOAD_TIMEOUT_FACTOR, ChildProcess
from fovea.service.runners.load_messages import LoadCommand, ProcessPlan
from tests.memory_files import is_sealed, weights_path_of
from tests.servers import DEFAULT_MODEL

PLAN = ProcessPlan("cpu", 4, 1, 0, 1, 1_000_000, 1 << 28, 1)


@pytest.fixture
def shadow_tests() -> ShadowTests:
    return ShadowTests(seconds=30, memory=1 << 32)


@pytest.fixture
def load() -> Iterator[LoadCommand]:
    """The default model, whose weights nobody has written."""
    fingerprint = fingerprint_of(DEFAULT_MODEL)
    pinned_file = PinnedFile(DEFAULT_MODEL, fingerprint)
    yield LoadCommand(
        0, str(DEFAULT_MODEL), pinned_file.path, fingerprint, PLAN, weights_file=pinned_file.weights_file
    )
    pinned_file.close()


def test_process_writes_and_seals_the_weights(shadow_tests: ShadowTests, load: LoadCommand) -> None:
    shadow_tests.write_weights(load)
    file = weights_path_of(load)
    assert is_sealed(file)
    assert file.stat().st_size >= 0.9 * DEFAULT_MODEL.stat().st_size
    assert load.weights_file
    assert share_weights(b"", load.weights_file), "the model itself is not needed any more"


def test_death_of_the_process_is_an_error(
    shadow_tests: ShadowTests, load: LoadCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: object, quiet: bool) -> ChildProcess:
        process = ChildProcess("rollout.trial_process", 1 << 32, 30, quiet=quiet)
        process.kill()
        assert process.wait_exit() == -signal.SIGKILL
        return process

    monkeypatch.setattr(trial, "ChildProcess", start)
    with pytest.raises(ModelError, match="was killed"):
        shadow_tests.write_weights(load)
    assert not is_sealed(weights_path_of(load))


def test_closed_tests_write_nothing(shadow_tests: ShadowTests, load: LoadCommand) -> None:
    shadow_tests.close()
    with pytest.raises(Interrupted):
        shadow_tests.write_weights(load)


def test_change_has_time_for_its_trial_its_weights_and_its_load() -> None:
    """Otherwise the supervisor kills a worker whose steps all keep their limits."""
    seconds = 2.0
    trial_limit = weights_limit = load_limit = LOAD_TIMEOUT_FACTOR * seconds
    assert compute_change_timeout(seconds) >= trial_limit + weights_limit + load_limit
