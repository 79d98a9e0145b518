"""Random changes, requests and faults during each other: every answer is allowed, and all views agree.

`make machine` takes 2,000 steps, `make proof` takes 125. The environment variable MACHINE_STEPS sets another
number. A failure prints the steps that led to it, and the end of the service's log.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from itertools import cycle
from pathlib import Path
from typing import ClassVar, Final

import pytest
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.service.model_machine.builds import FileKind
from tests.service.model_machine.judgement import Operation
from tests.service.model_machine.run import DEFAULT_NAME, NAMES, MachineFailure, MachineRun

STEPS: Final = int(os.environ.get("MACHINE_STEPS", "125"))

STEPS_PER_SERVER: Final = 25

STEPS_PER_REST: Final = 8
"""Number of steps after which the service must settle, whatever these steps were.

It must do so with a new version and without one of its runners. Then it gets back the models that it lacks.
"""

_PAUSES: Final = (0.0, 0.2, 0.0, 0.0, 0.8, 0.05, 0.0)
"""Time after a step in seconds, in turn: the next step may come during any stage of a change."""

_names = st.sampled_from(NAMES)
_actions = st.sampled_from(["classify", "explain"])
_places = st.integers(0, 5)
"""Place in a list of versions or processes, counted from the end of the list."""


class ModelMachine(RuleBasedStateMachine):
    """The steps, in any order: most start something that goes on during the next steps."""

    folder: ClassVar[Path]
    server_count: ClassVar[int] = 0
    step_count: ClassVar[int] = 0
    outcomes: ClassVar[Counter[str]] = Counter()
    failure: ClassVar[MachineFailure | None] = None
    """First failure. Hypothesis runs the steps again to print them; they are in the message already."""

    def __init__(self) -> None:
        super().__init__()
        self._run: MachineRun | None = None
        self._pauses = cycle(_PAUSES)
        self._steps = 0

    @initialize(models_loaded=st.sampled_from([-1, 0, 1, 2]))
    def start(self, models_loaded: int) -> None:
        assume(models_loaded >= 0)  # leaves out the simplest case: the first rule again and again
        if self.failure:
            raise self.failure
        type(self).server_count += 1
        run = MachineRun(self.folder / str(self.server_count), models_loaded, self.outcomes)
        self._run = run.__enter__()
        run.settle()

    @property
    def run(self) -> MachineRun:
        assert self._run
        return self._run

    # --- changes of the repository ---

    @rule(name=_names)
    def publish(self, name: str) -> None:
        self.run.publish(name, FileKind.GOOD)

    @rule(name=_names, kind=st.sampled_from([FileKind.BROKEN, FileKind.UNPROVEN]))
    def publish_failing(self, name: str, kind: FileKind) -> None:
        self.run.publish(name, kind)

    @rule(name=_names, place=_places, kind=st.sampled_from(FileKind))
    def replace(self, name: str, place: int, kind: FileKind) -> None:
        if builds := self.run.files.list_present(name):
            self.run.replace(builds[-1 - place % len(builds)], kind)

    @rule(name=_names, place=_places)
    def remove_version(self, name: str, place: int) -> None:
        if builds := self.run.files.list_present(name):
            self.run.remove_version(builds[-1 - place % len(builds)])

    @rule(name=_names)
    def remove_model(self, name: str) -> None:
        has_folder = self.run.files.has_folder
        if has_folder(name) and any(has_folder(one) for one in NAMES if one != name):
            self.run.remove_model(name)  # an empty repository may just not be mounted

    # --- changes by request ---

    @rule(name=_names, place=st.none() | _places)
    def load(self, name: str, place: int | None) -> None:
        builds = self.run.files.list_present(name)
        build = builds[-1 - (place or 0) % len(builds)] if builds else None
        version = None if place is None else build.version if build else "1"
        self.run.load(name, version, build)

    @rule(name=_names)
    def unload(self, name: str) -> None:
        self.run.unload(name)

    @rule()
    def hang_up(self) -> None:
        self.run.hang_up()

    # --- questions ---

    @rule(name=_names, images=st.sampled_from([1, 4]))
    def classify(self, name: str, images: int) -> None:
        self.run.ask(Operation("classify", name), images)

    @rule(name=_names, place=_places)
    def classify_by_version(self, name: str, place: int) -> None:
        versions = sorted({one.version for one in self.run.files.builds if one.name == name}, key=int)
        self.run.ask(Operation("classify", name, versions[-1 - place % len(versions)]))

    @rule(action=_actions)
    def ask_default(self, action: str) -> None:
        self.run.ask(Operation(action, DEFAULT_NAME, is_default=True))

    @rule(name=_names, action=_actions, milliseconds=st.sampled_from([1, 10, 100, 1000]))
    def ask_with_deadline(self, name: str, action: str, milliseconds: int) -> None:
        self.run.ask(Operation(action, name, deadline=milliseconds / 1000))

    @rule(name=_names, method=st.sampled_from(["auto", "occlusion"]))
    def explain(self, name: str, method: str) -> None:
        self.run.ask(Operation("explain", name), method=method)

    @rule(name=_names, action=_actions, is_complete=st.booleans())
    def leave(self, name: str, action: str, is_complete: bool) -> None:
        self.run.leave(name, action, is_complete=is_complete)

    # --- faults ---

    @rule(place=_places)
    def kill_runner(self, place: int) -> None:
        self.run.kill("runner", place)

    @rule(place=_places, seconds=st.sampled_from([0.2, 1.0, 4.0]))
    def stop_runner(self, place: int, seconds: float) -> None:
        self.run.stop_runner(place, seconds)  # at most for longer than a batch may take

    @rule(place=_places)
    def kill_explainer(self, place: int) -> None:
        self.run.kill("explainer", place)

    # --- what must hold ---

    @rule(place=_places)
    def join(self, place: int) -> None:
        self.run.join(place)

    @invariant()
    def check_step(self) -> None:
        type(self).step_count += 1
        self._steps += 1
        if self._steps % STEPS_PER_REST == 0:
            self.run.publish(NAMES[self._steps % len(NAMES)], FileKind.GOOD)
            self.run.kill("runner", self._steps)
            self.run.settle()
            self.run.revive()
        end = time.monotonic() + next(self._pauses)
        self.run.check_moment()
        while time.monotonic() < end:
            time.sleep(0.01)
            self.run.check_moment()

    def teardown(self) -> None:
        kind, error, trace = sys.exc_info()
        if self._run:
            try:
                if error is None:
                    self._run.settle()
                    self._run.check_end()
            except MachineFailure as failure:
                error = failure
                raise
            finally:
                if isinstance(error, MachineFailure):
                    type(self).failure = error
                self._run.__exit__(kind, error, trace)


@pytest.mark.slow
def test_answers_and_views_agree_under_random_changes_and_faults(tmp_path: Path) -> None:
    ModelMachine.folder = tmp_path
    try:
        run_state_machine_as_test(
            ModelMachine,
            settings=settings(
                max_examples=-(-STEPS // STEPS_PER_SERVER),
                stateful_step_count=STEPS_PER_SERVER,
                deadline=None,
                database=None,
                backend="hypothesis-urandom",  # prefers no short cases
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    except Exception:
        if ModelMachine.failure is None:
            raise
        pytest.fail(str(ModelMachine.failure), pytrace=False)  # the steps, and not how they were repeated
    finally:
        outcomes = ", ".join(f"{count} x {one}" for one, count in sorted(ModelMachine.outcomes.items()))
        print(f"\n{ModelMachine.step_count} steps on {ModelMachine.server_count} servers: {outcomes}")
    assert ModelMachine.step_count >= STEPS
