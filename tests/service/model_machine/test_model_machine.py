"""Random changes, requests and faults during each other: every answer is allowed, and all views agree.

`make machine` takes 2,000 steps, `make proof` takes 200. The environment variable MACHINE_STEPS sets another
number. A failure prints the steps that led to it, and the end of the service's log.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar, Final, NoReturn

import httpx
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

from fovea.bench.chaos.faults import NOTICE_SECONDS, Fault, FaultLog
from tests.raw import Wire
from tests.service.model_machine.builds import PICTURE, Build, FileKind, ModelFiles
from tests.service.model_machine.disturbed_server import run_disturbed_server
from tests.service.model_machine.judgement import CHANGE_LIMIT, FOLLOW, Judge, Mode, ModelHistory, Operation
from tests.service.model_machine.rest import RestingPoint

STEPS: Final = int(os.environ.get("MACHINE_STEPS", "200"))

STEPS_PER_SERVER: Final = 25

STEPS_PER_REST: Final = 9
"""Number of steps after which the service must settle, and gets back the models that it lacks."""

NAMES: Final = ("ants", "bees", "cows")

DEFAULT_NAME: Final = NAMES[0]

SETTLE_SECONDS: Final = 60.0
"""Time within which the service must serve what the repository and the callers want, in seconds."""

_MAX_PENDING: Final = 10
"""Maximum number of requests that wait for their answers."""

_PAUSES: Final = (0.0, 0.2, 0.0, 0.0, 0.8, 0.05, 0.0)
"""Time after a step in seconds, in turn: the next step may come during any stage of a change."""

_names = st.sampled_from(NAMES)
_places = st.integers(0, 5)
"""Place in a list of versions or processes, counted from the end of the list."""


class ModelMachine(RuleBasedStateMachine):
    """One server, its repository, and what the server may answer."""

    folder: ClassVar[Path]
    machine_count: ClassVar[int] = 0
    step_count: ClassVar[int] = 0
    outcomes: ClassVar[Counter[str]] = Counter()
    failure: ClassVar[AssertionError | None] = None
    """First failure. Hypothesis runs the steps again to print them; they are in the message already."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._journal: list[str] = []
        self._pending: list[tuple[Operation, Future[None]]] = []
        self._stop_event = threading.Event()
        self._stop_tasks: list[Future[None]] = []
        self._is_running = False
        self._pauses = cycle(_PAUSES)
        self._steps = 0

    # --- start and end ---

    @initialize(models_loaded=st.sampled_from([None, 0, 1, 2]))
    def start(self, models_loaded: int | None) -> None:
        assume(models_loaded is not None)  # leaves out the simplest case: the first rule again and again
        assert models_loaded is not None
        if self.failure:
            raise self.failure
        cls = type(self)
        cls.machine_count += 1
        self._models_loaded = models_loaded
        self._files = ModelFiles(self.folder / str(self.machine_count))
        self._faults = FaultLog()
        self._histories = {name: ModelHistory() for name in NAMES}
        self._began_at = time.monotonic()
        for name in NAMES:
            self._publish(name, FileKind.GOOD)
        (self._files.root / "default").write_text(DEFAULT_NAME)
        self._server = self._stack.enter_context(run_disturbed_server(self._files.root, models_loaded))
        self._pool = self._stack.enter_context(ThreadPoolExecutor(_MAX_PENDING + 6))
        self._judge = Judge(self._files, self._histories, self._faults, loads_on_demand=models_loaded > 0)
        self._rest = RestingPoint(self._server, self._files, DEFAULT_NAME)
        self._is_running = True
        self._note(f"start with FOVEA_MODELS_LOADED={models_loaded}")
        self._settle()

    def teardown(self) -> None:
        try:
            if self._is_running and sys.exc_info()[0] is None:
                self._settle()
                if events := self._rest.find_unexpected_logs():
                    self._fail(f"the log has: {events}")
        finally:
            self._stop_event.set()
            self._stack.close()

    # --- changes of the repository ---

    @rule(name=_names)
    def publish(self, name: str) -> None:
        self._publish(name, FileKind.GOOD)

    @rule(name=_names, kind=st.sampled_from([FileKind.BROKEN, FileKind.UNPROVEN]))
    def publish_failing(self, name: str, kind: FileKind) -> None:
        self._publish(name, kind)

    @rule(name=_names, place=_places)
    def remove_version(self, name: str, place: int) -> None:
        if builds := self._files.list_present(name):
            build = builds[-1 - place % len(builds)]
            self._note(f"remove {build}")
            self._files.remove_version(build)
            self._allow_present(name, [build])

    @rule(name=_names)
    def remove_model(self, name: str) -> None:
        others = [one for one in NAMES if one != name and self._files.has_folder(one)]
        if others and self._files.has_folder(name):  # an empty repository may just not be mounted
            builds = self._files.list_present(name)
            self._note(f"remove {name}")
            self._files.remove_model(name)
            self._allow_present(name, builds)

    def _publish(self, name: str, kind: FileKind) -> None:
        build = self._files.prepare(name, kind)
        self._note(f"publish {build}")
        if build.is_good:
            self._histories[name].allow(build)
        self._files.publish(build)

    def _allow_present(self, name: str, removed: list[Build]) -> None:
        """Allow what the service may serve after versions were removed."""
        history, builds = self._histories[name], self._files.list_present(name)
        if good_builds := [one for one in builds if one.is_good]:
            history.allow(good_builds[-1])
        if not builds:
            history.allow(None)
        if any(Mode(version=one.version) in history.modes for one in removed):
            history.modes.add(FOLLOW)

    # --- changes by request ---

    @rule(name=_names, place=st.none() | _places)
    def load(self, name: str, place: int | None) -> None:
        builds = self._files.list_present(name)
        build = builds[-1 - (place or 0) % len(builds)] if builds else None
        version = None if place is None else build.version if build else "1"
        body = {} if version is None else {"parameters": {"version": version}}
        if build and build.is_good:
            self._histories[name].allow(build)
        self._change(Operation("load", name, version), body)

    @rule(name=_names)
    def unload(self, name: str) -> None:
        self._histories[name].allow(None)
        self._change(Operation("unload", name), {})

    def _change(self, operation: Operation, body: dict[str, Any]) -> None:
        self._histories[operation.name].changes.append(operation)
        path = f"/v2/repository/models/{operation.name}/{operation.action}"
        self._start(operation, lambda: self._server.client.post(path, json=body, timeout=CHANGE_LIMIT + 60))

    @rule()
    def hang_up(self) -> None:
        self._note("SIGHUP")
        self._server.hang_up()

    # --- questions ---

    @rule(name=_names, images=st.sampled_from([1, 1, 4]))
    def classify(self, name: str, images: int) -> None:
        self._ask(Operation("classify", name), images)

    @rule(place=_places, name=_names)
    def classify_by_version(self, name: str, place: int) -> None:
        versions = sorted({one.version for one in self._files.builds if one.name == name}, key=int)
        self._ask(Operation("classify", name, versions[-1 - place % len(versions)]))

    @rule()
    def classify_by_default(self) -> None:
        self._ask(Operation("classify", DEFAULT_NAME, path="/v1"))

    @rule(
        name=_names,
        milliseconds=st.sampled_from([1, 10, 100, 1000]),
        action=st.sampled_from(["classify", "explain"]),
    )
    def ask_with_deadline(self, name: str, milliseconds: int, action: str) -> None:
        self._ask(Operation(action, name, deadline=milliseconds / 1000))

    @rule(name=_names, method=st.sampled_from(["auto", "occlusion"]))
    def explain(self, name: str, method: str) -> None:
        if sum(one.action == "explain" for one, _ in self._pending) < 4:  # eight may wait
            self._ask(Operation("explain", name), method=method)

    @rule(name=_names, action=st.sampled_from(["classify", "explain"]), is_complete=st.booleans())
    def leave(self, name: str, action: str, is_complete: bool) -> None:
        self._note(f"{action} {name} and leave {'after' if is_complete else 'during'} the body")
        head = (
            f"POST /v1/models/{name}/{action} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(PICTURE)}\r\n\r\n"
        )
        with Wire(self._server.url) as wire:
            wire.send(head.encode(), PICTURE if is_complete else PICTURE[:20])

    def _ask(self, operation: Operation, images: int = 1, *, method: str = "auto") -> None:
        self._start(operation, self._build_question(operation, images, method))

    def _build_question(
        self, operation: Operation, images: int, method: str = "auto"
    ) -> Callable[[], httpx.Response]:
        version = f"/versions/{operation.version}" if operation.version else ""
        path = f"{operation.path or f'/v1/models/{operation.name}{version}'}/{operation.action}"
        params: dict[str, Any] = {"top_k": 0}
        if operation.action == "explain":
            params |= {"method": method, "samples": 200}
        headers = {"X-Deadline-Ms": f"{1000 * operation.deadline:g}"} if operation.deadline else {}
        body: dict[str, Any] = (
            {"content": PICTURE} if images == 1 else {"files": [("image", PICTURE)] * images}
        )
        client = self._server.client
        return lambda: client.post(path, params=params, headers=headers, timeout=120, **body)

    # --- faults ---

    @rule(place=_places)
    def kill_runner(self, place: int) -> None:
        if pids := self._server.list_pids("runners.process"):
            pid = pids[place % len(pids)]
            self._note(f"kill runner {pid}")
            now = time.monotonic()
            self._faults.add(Fault("runner", "killed", now, now + NOTICE_SECONDS))
            self._server.send_signal(pid, signal.SIGKILL)

    @rule(place=_places, seconds=st.sampled_from([0.2, 1.0, 4.0]))
    def stop_runner(self, place: int, seconds: float) -> None:
        """Stop a runner, in the longest case for longer than a batch may take."""
        if (pids := self._server.list_pids("runners.process")) and not self._stop_tasks:
            pid = pids[place % len(pids)]
            self._note(f"stop runner {pid} for {seconds:g} s")
            fault = self._faults.add(Fault("runner", "stopped", time.monotonic()))
            self._server.send_signal(pid, signal.SIGSTOP)
            self._stop_tasks.append(self._pool.submit(self._continue_runner, pid, seconds, fault))

    def _continue_runner(self, pid: int, seconds: float, fault: Fault) -> None:
        self._stop_event.wait(seconds)
        fault.ended_at = time.monotonic() + NOTICE_SECONDS
        self._server.send_signal(pid, signal.SIGCONT)

    @rule(place=_places)
    def kill_explainer(self, place: int) -> None:
        if pids := self._server.list_pids("explain.process"):
            pid = pids[place % len(pids)]
            self._note(f"kill explainer {pid}")
            now = time.monotonic()
            self._faults.add(Fault("explainer", "killed", now, now + NOTICE_SECONDS))
            self._server.send_signal(pid, signal.SIGKILL)

    # --- joins ---

    @rule(place=_places)
    def join(self, place: int) -> None:
        if self._pending:
            self._pending[place % len(self._pending)][1].result()

    # --- what must hold ---

    @invariant()
    def check_step(self) -> None:
        type(self).step_count += 1
        self._steps += 1
        if self._steps % STEPS_PER_REST == 0:
            self._settle()
            self._revive()
        end = time.monotonic() + next(self._pauses)
        self._check_moment()
        while time.monotonic() < end:
            time.sleep(0.01)
            self._check_moment()

    def _check_moment(self) -> None:
        self._judge_finished()
        loaded = self._server.list_loaded()
        if self._models_loaded and len(loaded) > self._models_loaded:
            self._fail(f"{loaded} are loaded; at most {self._models_loaded}")
        for name in NAMES:
            possible = {one.version for one in self._histories[name].list_possible() if one}
            if not {version for one, version in loaded if one == name} <= possible:
                self._fail(f"/v1/models has {loaded}; of {name}, only {possible} may be loaded")
        if not self._server.is_alive:
            self._fail("the service has ended")

    def _settle(self) -> None:
        """Wait for all answers, and then until the service serves what it should and nothing else."""
        self._note("settle")
        for _, future in self._pending:
            future.result()
        self._judge_finished()
        for task in self._stop_tasks:
            task.result()
        self._stop_tasks.clear()
        for name, history in self._histories.items():
            history.conclude_changes([one for one in self._files.builds if one.name == name])
        deadline = time.monotonic() + SETTLE_SECONDS
        while reason := self._find_unrest():
            if time.monotonic() > deadline:
                self._fail(f"not settled after {SETTLE_SECONDS:g} s: {reason}")
            time.sleep(0.02)
        self._note(f"settled: {', '.join(f'{name} {build}' for name, build in self._answering.items())}")

    def _revive(self) -> None:
        """Publish and load the models that are not served, so that there is something to change."""
        for name in [name for name, build in self._answering.items() if build is None]:
            if not any(one.is_good for one in self._files.list_present(name)[-1:]):
                self._publish(name, FileKind.GOOD)
            if any(one.is_unloaded for one in self._histories[name].modes):
                self.load(name, None)

    def _find_unrest(self) -> str:
        """Return what is not yet as it should be; empty if the service has settled."""
        answering: dict[str, Build | None] = {}
        for name in NAMES:
            operation = Operation("classify", name, began_at=time.monotonic())
            self._run(operation, self._build_question(operation, 8))  # for all runners
            self._judge_operation(operation)
            answering[name] = self._find_answering(operation)
            desired = self._list_desired(name)
            if answering[name] not in desired:
                return (
                    f"{name}: {operation.status} by {answering[name]}, not by {', '.join(map(str, desired))}"
                )
        if reason := self._rest.find_unrest(
            answering,
            {name: history.modes == {FOLLOW} for name, history in self._histories.items()},
            on_demand=self._models_loaded > 0,
        ):
            return reason
        self._answering = answering
        for name, build in answering.items():
            self._conclude(name, build)
        return ""

    def _find_answering(self, operation: Operation) -> Build | None:
        if operation.status != 200:
            return None
        labels = {one["label"]: 0.0 for one in operation.content["results"][0]["predictions"]}
        return self._files.find_build(operation.name, labels)

    def _list_desired(self, name: str) -> set[Build | None]:
        """Return the outcomes that the repository and the callers' last wishes ask for."""
        return {one for mode in self._histories[name].modes for one in self._list_desired_by(name, mode)}

    def _list_desired_by(self, name: str, mode: Mode) -> list[Build | None]:
        present = {one.version: one for one in self._files.list_present(name)}
        good_builds = [one for one in present.values() if one.is_good]
        requested = present.get(mode.version or "")
        if mode.is_unloaded or not present:
            return [None]
        if requested and requested.is_good:
            return [requested]
        if good_builds and not requested:
            return [good_builds[-1]]
        # Nothing can replace what is served. On demand, what is served may be gone from the disk.
        return [*self._histories[name].list_possible(), *([None] if self._models_loaded else [])]

    def _conclude(self, name: str, build: Build | None) -> None:
        """Allow only what answers now."""
        history = self._histories[name]
        history.modes = {one for one in history.modes if build in self._list_desired_by(name, one)}
        history.keep_only(build)

    # --- requests ---

    def _start(self, operation: Operation, send: Callable[[], httpx.Response]) -> None:
        """Send a request in a thread, when not too many wait."""
        while len(self._pending) >= _MAX_PENDING:
            self._pending[0][1].result()
            self._judge_finished()
        self._note(f"{operation} …")
        operation.began_at = time.monotonic()
        self._pending.append((operation, self._pool.submit(self._run, operation, send)))

    def _run(self, operation: Operation, send: Callable[[], httpx.Response]) -> None:
        try:
            response = send()
            operation.ended_at = time.monotonic()
            operation.status, operation.content = response.status_code, response.json()
        except (httpx.HTTPError, ValueError) as error:
            operation.ended_at = time.monotonic()
            operation.content = repr(error)

    def _judge_finished(self) -> None:
        for operation, future in [one for one in self._pending if one[1].done()]:
            self._pending.remove((operation, future))
            future.result()
            self._note(f"… {operation}: {operation.status} after {operation.seconds:.2f} s")
            self._judge_operation(operation)

    def _judge_operation(self, operation: Operation) -> None:
        self.outcomes[f"{operation.action} {operation.status} {operation.error_code}".strip()] += 1
        if complaint := self._judge.find_complaint(operation):
            self._fail(f"{operation}: {complaint}")

    # --- the journal ---

    def _note(self, text: str) -> None:
        self._journal.append(f"{time.monotonic() - self._began_at:7.2f} s  {text}")

    def _fail(self, complaint: str) -> NoReturn:
        log = [str(line.get("event")) for line in self._server.read_log()[-30:]]
        parts = [complaint, "", "steps:", *self._journal, "", "end of the log:", *log]
        type(self).failure = AssertionError("\n".join(parts))
        raise self.failure


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
    except BaseException:
        if ModelMachine.failure:  # without the steps that hypothesis could not repeat
            raise ModelMachine.failure from None
        raise
    finally:
        outcomes = ", ".join(f"{count} x {one}" for one, count in sorted(ModelMachine.outcomes.items()))
        print(f"\n{ModelMachine.step_count} steps on {ModelMachine.machine_count} servers: {outcomes}")
    assert ModelMachine.step_count >= STEPS
