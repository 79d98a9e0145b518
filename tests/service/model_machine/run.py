"""One server, its repository, and what the server may answer: the state of the state machine."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn

import httpx

from fovea.bench.chaos.faults import NOTICE_SECONDS, Fault, FaultLog
from tests.raw import Wire
from tests.service.model_machine.builds import PICTURE, Build, FileKind, ModelFiles
from tests.service.model_machine.disturbed_server import run_disturbed_server
from tests.service.model_machine.judgement import CHANGE_LIMIT, FOLLOW, Judge, Mode, ModelHistory, Operation
from tests.service.model_machine.rest import RestingPoint

NAMES: Final = ("ants", "bees", "cows")

DEFAULT_NAME: Final = NAMES[0]

SETTLE_SECONDS: Final = 60.0
"""Time within which the service must serve what the repository and the callers want, in seconds."""

_MAX_PENDING: Final = 10
"""Maximum number of requests that wait for their answers."""

_MAX_TRIALS: Final = 8
"""Maximum number of trials of a file that fails, beside those by request; the delays between them double."""

_ALL_RUNNERS_IMAGES: Final = 8
"""Number of images in one request of which every runner gets some."""


class MachineRun(AbstractContextManager["MachineRun"]):
    """A server with three models inside the `with` block.

    All methods are called in one thread, which therefore knows at any time what the repository has. Requests
    wait for their answers in other threads.
    """

    def __init__(self, folder: Path, models_loaded: int, outcomes: Counter[str]) -> None:
        """Prepare a run; `outcomes` counts the answers."""
        self.files = ModelFiles(folder)
        self._models_loaded = models_loaded
        self._outcomes = outcomes
        self._histories = {name: ModelHistory() for name in NAMES}
        self._faults = FaultLog()
        self._stack = ExitStack()
        self._began_at = time.monotonic()
        self._journal: list[str] = []
        self._pending: list[tuple[Operation, Future[None]]] = []
        self._stop_event = threading.Event()
        self._stop_tasks: list[Future[None]] = []
        self._answering: dict[str, Build | None] = {}
        self._load_count = 0

    def __enter__(self) -> MachineRun:
        for name in NAMES:
            self.publish(name, FileKind.GOOD)
        (self.files.root / "default").write_text(DEFAULT_NAME)
        self._note(f"start with FOVEA_MODELS_LOADED={self._models_loaded}")
        server = run_disturbed_server(self.files.root, self._models_loaded)
        self._server = self._stack.enter_context(server)
        self._pool = self._stack.enter_context(ThreadPoolExecutor(_MAX_PENDING + 1))
        self._judge = Judge(
            self.files, self._histories, self._faults, loads_on_demand=self._models_loaded > 0
        )
        self._rest = RestingPoint(self._server, self.files, DEFAULT_NAME)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop_event.set()
        self._stack.close()

    # --- changes of the repository ---

    def publish(self, name: str, kind: FileKind) -> None:
        """Publish the next version of a model."""
        build = self.files.prepare(name, kind)
        self._note(f"publish {build}")
        if build.is_good:
            self._histories[name].allow(build)
        self.files.publish(build)

    def replace(self, old_build: Build, kind: FileKind) -> None:
        """Replace the file of a version."""
        build = self.files.prepare(old_build.name, kind, old_build.version)
        self._note(f"replace {old_build} by {build}")
        if build.is_good:
            self._histories[build.name].allow(build)
        self.files.replace(old_build, build)
        self._allow_present(build.name, [])

    def remove_version(self, build: Build) -> None:
        """Remove a version."""
        self._note(f"remove {build}")
        self.files.remove_version(build)
        self._allow_present(build.name, [build])

    def remove_model(self, name: str) -> None:
        """Remove a model with all versions."""
        builds = self.files.list_present(name)
        self._note(f"remove {name}")
        self.files.remove_model(name)
        self._allow_present(name, builds)

    def _allow_present(self, name: str, removed: Sequence[Build]) -> None:
        """Allow what the service may serve after versions were removed."""
        history, builds = self._histories[name], self.files.list_present(name)
        if good_builds := [one for one in builds if one.is_good]:
            history.allow(good_builds[-1])
        if not builds:
            history.allow(None)
        if any(Mode(version=one.version) in history.modes for one in removed):
            history.modes.add(FOLLOW)

    def revive(self) -> None:
        """Publish and load the models that are not served, so that there is something to change."""
        for name in [name for name, build in self._answering.items() if build is None]:
            if not any(one.is_good for one in self.files.list_present(name)[-1:]):
                self.publish(name, FileKind.GOOD)
            if any(one.is_unloaded for one in self._histories[name].modes):
                self.load(name, None, self.files.list_present(name)[-1])

    # --- changes by request ---

    def load(self, name: str, version: str | None, build: Build | None) -> None:
        """Load a version by request; `build` is its file, if there is one."""
        if build and build.is_good:
            self._histories[name].allow(build)
        self._load_count += 1
        body = {} if version is None else {"parameters": {"version": version}}
        self._change(Operation("load", name, version), body)

    def unload(self, name: str) -> None:
        """Unload a model by request."""
        self._histories[name].allow(None)
        self._change(Operation("unload", name), {})

    def _change(self, operation: Operation, body: dict[str, Any]) -> None:
        self._histories[operation.name].changes.append(operation)
        path = f"/v2/repository/models/{operation.name}/{operation.action}"
        self._start(operation, lambda: self._server.client.post(path, json=body, timeout=2 * CHANGE_LIMIT))

    def hang_up(self) -> None:
        """Send SIGHUP."""
        self._note("SIGHUP")
        self._server.hang_up()

    # --- questions ---

    def ask(self, operation: Operation, images: int = 1, *, method: str = "auto") -> None:
        """Ask a model, and do not wait for the answer."""
        if operation.action == "explain" and self._count_pending("explain") > 4:  # eight may wait
            return
        self._start(operation, self._build_question(operation, images, method))

    def leave(self, name: str, action: str, *, is_complete: bool) -> None:
        """Ask a model, and leave after the body or before its end."""
        self._note(f"{action} {name} and leave {'after' if is_complete else 'during'} the body")
        head = (
            f"POST /v1/models/{name}/{action} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(PICTURE)}\r\n\r\n"
        )
        with Wire(self._server.url) as wire:
            wire.send(head.encode(), PICTURE if is_complete else PICTURE[:20])

    def _count_pending(self, action: str) -> int:
        return sum(one.action == action for one, _ in self._pending)

    def _build_question(
        self, operation: Operation, images: int, method: str = "auto"
    ) -> Callable[[], httpx.Response]:
        version = f"/versions/{operation.version}" if operation.version else ""
        path = "/v1" if operation.is_default else f"/v1/models/{operation.name}{version}"
        params: dict[str, Any] = {"top_k": 0}
        if operation.action == "explain":
            params |= {"method": method, "samples": 200}
        headers = {"X-Deadline-Ms": f"{1000 * operation.deadline:g}"} if operation.deadline else {}
        body: dict[str, Any] = (
            {"content": PICTURE} if images == 1 else {"files": [("image", PICTURE)] * images}
        )
        url, client = f"{path}/{operation.action}", self._server.client
        return lambda: client.post(url, params=params, headers=headers, timeout=2 * CHANGE_LIMIT, **body)

    # --- faults ---

    def kill(self, target: str, place: int) -> None:
        """Kill a `runner` or an `explainer`, if there is one."""
        module = {"runner": "runners.process", "explainer": "explain.process"}[target]
        if pids := self._server.list_pids(module):
            pid = pids[place % len(pids)]
            self._note(f"kill {target} {pid}")
            now = time.monotonic()
            self._faults.add(Fault(target, "killed", now, now + NOTICE_SECONDS))
            self._server.send_signal(pid, signal.SIGKILL)

    def stop_runner(self, place: int, seconds: float) -> None:
        """Stop a runner for some seconds, unless another one is stopped."""
        pids = self._server.list_pids("runners.process")
        if pids and all(task.done() for task in self._stop_tasks):
            pid = pids[place % len(pids)]
            self._note(f"stop runner {pid} for {seconds:g} s")
            fault = self._faults.add(Fault("runner", "stopped", time.monotonic()))
            self._server.send_signal(pid, signal.SIGSTOP)
            self._stop_tasks.append(self._pool.submit(self._continue_runner, pid, seconds, fault))

    def _continue_runner(self, pid: int, seconds: float, fault: Fault) -> None:
        self._stop_event.wait(seconds)
        fault.ended_at = time.monotonic() + NOTICE_SECONDS
        self._server.send_signal(pid, signal.SIGCONT)

    # --- what must hold ---

    def check_moment(self) -> None:
        """Check the finished requests, and that only models are loaded that may be, and not too many."""
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

    def check_end(self) -> None:
        """Check that the log tells of no mistake, and that no file was tried again and again."""
        bad_count = sum(not one.is_good for one in self.files.builds)
        limit = bad_count * _MAX_TRIALS + self._load_count
        if (refusals := self._rest.count_refusals()) > limit:
            self._fail(
                f"{refusals} trials failed, with {bad_count} files that fail and {self._load_count} loads"
            )
        if events := self._rest.find_unexpected_logs():
            self._fail(f"the log has: {events}")

    def join(self, place: int) -> None:
        """Wait for one of the pending requests."""
        if self._pending:
            self._pending[place % len(self._pending)][1].result()

    def settle(self) -> None:
        """Wait for all answers, and then until the service serves what it should and nothing else."""
        self._note("settle")
        for future in (*(one for _, one in self._pending), *self._stop_tasks):
            future.result()
        self._judge_finished()
        self._stop_tasks.clear()
        for name, history in self._histories.items():
            history.conclude_changes([one for one in self.files.builds if one.name == name])
        deadline = time.monotonic() + SETTLE_SECONDS
        while reason := self._find_unrest():
            if time.monotonic() > deadline:
                self._fail(f"not settled after {SETTLE_SECONDS:g} s: {reason}")
            time.sleep(0.02)
        for name, build in self._answering.items():
            history = self._histories[name]
            history.modes = {one for one in history.modes if build in self._list_desired_by(name, one)}
            history.keep_only(build)
        self._note(f"settled: {', '.join(f'{name} {build}' for name, build in self._answering.items())}")

    def _find_unrest(self) -> str:
        """Return what is not yet as it should be; empty if the service has settled."""
        for name in NAMES:
            operation = Operation("classify", name, began_at=time.monotonic())
            self._run(operation, self._build_question(operation, _ALL_RUNNERS_IMAGES))
            self._judge_operation(operation)
            build = self._answering[name] = self._find_answering(operation)
            desired = self._list_desired(name)
            if build not in desired:
                return f"{name}: {operation.status} by {build}, not by {', '.join(map(str, desired))}"
        is_following = {name: history.modes == {FOLLOW} for name, history in self._histories.items()}
        return self._rest.find_unrest(self._answering, is_following, on_demand=self._models_loaded > 0)

    def _find_answering(self, operation: Operation) -> Build | None:
        if operation.status != 200:
            return None
        results = [one for one in operation.content["results"] if "predictions" in one]
        labels = {one["label"]: 0.0 for one in results[0]["predictions"]} if results else {}
        return self.files.find_build(operation.name, labels)

    def _list_desired(self, name: str) -> set[Build | None]:
        """Return the outcomes that the repository and the callers' last wishes ask for."""
        return {one for mode in self._histories[name].modes for one in self._list_desired_by(name, mode)}

    def _list_desired_by(self, name: str, mode: Mode) -> list[Build | None]:
        present = {one.version: one for one in self.files.list_present(name)}
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
        self._outcomes[f"{operation.action} {operation.status} {operation.error_code}".strip()] += 1
        if complaint := self._judge.find_complaint(operation):
            self._fail(f"{operation}: {complaint}")

    # --- the journal ---

    def _note(self, text: str) -> None:
        self._journal.append(f"{time.monotonic() - self._began_at:7.2f} s  {text}")

    def _fail(self, complaint: str) -> NoReturn:
        log = [str(line.get("event")) for line in self._server.read_log()[-30:]]
        raise MachineFailure("\n".join([complaint, "steps:", *self._journal, "end of the log:", *log]))


class MachineFailure(AssertionError):
    """The service did something that it must not, after the steps in the message."""
