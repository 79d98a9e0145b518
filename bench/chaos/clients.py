"""The clients of `make chaos`: good callers, and clients that leave, send bad input, giants or questions."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final

from fovea.bench import gallery, questions
from fovea.bench.caller import Connection, Response, build_request
from fovea.bench.chaos.injector import FaultInjector
from fovea.bench.chaos.options import Options
from fovea.bench.chaos.service import ANSWER_LIMIT
from fovea.bench.chaos.state import ChaosState, close_connections, find_error_codes
from fovea.bench.chaos.verdict import ClientRequest
from fovea.bench.gallery import REQUEST_FORMATS, Picture
from fovea.bench.questions import LeaveMoment, Question, QuestionKind

GIANT_LIMIT: Final = 60.0
"""Time limit for an answer to a giant, in seconds; a giant may wait for other giants."""

EXPLAIN_LIMIT: Final = 90.0
"""Time limit for an explanation, in seconds; the service gives up a silent process after 60."""

CALLER_COUNT: Final = 16
"""Number of clients that send good pictures."""


class ChaosClients:
    """All clients of one service, which run beside the faults that are inflicted on it."""

    def __init__(
        self,
        state: ChaosState,
        injector: FaultInjector,
        pictures: Sequence[Picture],
        giants: Sequence[Picture],
        options: Options,
    ) -> None:
        self._state = state
        self._injector = injector
        self._pictures = pictures
        self._giants = giants
        self._options = options
        self._bombs = gallery.build_bombs(pictures[0].content)
        self._runners = len(state.service.find_pids("runner"))
        self.rate = 0.0
        """Planned requests per second of all good callers together."""

    async def run(self, seconds: float) -> None:
        """Run all actors for `seconds`, and return when every client has its answer."""
        if not self._state.start_run():
            return
        gaps = self._options.gaps
        actors: list[Coroutine[Any, Any, None]] = [self._state.measure_lag()]
        actors += [self._run_caller(number) for number in range(CALLER_COUNT)]
        actors += [self._run_leaver(number) for number in range(2)]
        actors += [self._run_bomber(), self._run_giant_caller()]
        actors += [self._injector.probe_workers()] if self._state.has_workers else []
        actors += [self._run_explanation_client(number) for number in range(3)]
        actors += [self._injector.swap_versions(gaps["swap"]), self._injector.unload_and_load(gaps["unload"])]
        for target in ("runner", "explainer", *(["worker"] if self._state.has_workers else [])):
            actors += [self._injector.inject_faults(target, gaps[f"kill-{target}"], is_kill=True)]
            actors += [self._injector.inject_faults(target, gaps[f"stop-{target}"], is_kill=False)]
        async with asyncio.TaskGroup() as group:
            for actor in actors:
                group.create_task(actor)
            await self._state.pause(seconds)
            self._state.stop_event.set()

    async def measure_capacity(self) -> None:
        """Measure the requests per second of the good callers without pauses; the load is a share of them."""
        for picture in self._giants:  # enough giants for every runner to allocate its permanent memory
            async with asyncio.TaskGroup() as group:
                for _ in range(2 * self._runners):
                    group.create_task(self._send_giant(picture, []))
        await self._request_explanation(self._state.make_generator("capacity"), LeaveMoment.NEVER)
        end = time.monotonic() + min(5.0, 10 * self._options.minutes)
        request_counts = [0] * CALLER_COUNT

        async def run_caller(number: int) -> None:
            connections: list[Connection] = []
            generator = self._state.make_generator(f"capacity {number}")
            while time.monotonic() < end:
                await self._send_good_request(
                    generator, self._own_pictures(number), connections, no_deadline=True
                )
                request_counts[number] += 1
            close_connections(connections)

        started_at = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(CALLER_COUNT):
                group.create_task(run_caller(number))
        self.rate = self._options.load * sum(request_counts) / (time.monotonic() - started_at)

    def _own_pictures(self, number: int) -> Sequence[Picture]:
        """Return the pictures of one caller."""
        return self._pictures[number::CALLER_COUNT]

    async def _run_caller(self, number: int) -> None:
        """Send good pictures at the planned rate, one at a time."""
        generator, connections = self._state.make_generator(f"caller {number}"), list[Connection]()
        due = time.monotonic()
        while await self._state.pause(due - time.monotonic()):
            await self._send_good_request(generator, self._own_pictures(number), connections)
            due = max(due + generator.expovariate(self.rate / CALLER_COUNT), time.monotonic() - 1.0)
        close_connections(connections)

    async def _send_good_request(
        self,
        generator: random.Random,
        pictures: Sequence[Picture],
        connections: list[Connection],
        *,
        no_deadline: bool = False,
    ) -> None:
        request, content, check_response = self._build_classification(
            generator, pictures, no_deadline=no_deadline
        )
        await self._state.send_request(request, content, check_response, connections)

    def _build_classification(
        self, generator: random.Random, own_pictures: Sequence[Picture], *, no_deadline: bool
    ) -> tuple[ClientRequest, bytes, Callable[[Response, ClientRequest], str]]:
        request_format = generator.choice(REQUEST_FORMATS)
        pictures = gallery.pick_pictures(generator, own_pictures, request_format.max_pictures)
        is_second = request_format.has_model_name and generator.random() < 0.3
        model = "second" if is_second else "swapped"
        body, headers = request_format.build_body(pictures, f"fovea{generator.getrandbits(64):x}")
        deadline = None
        if not no_deadline and generator.random() < 0.15:
            deadline = 0.002 * 500 ** generator.random()
            headers = {**headers, "X-Deadline-Ms": f"{1000 * deadline:.3f}"}
        content = build_request(request_format.path.format(model=model), body, headers, request_format.method)
        request = ClientRequest(
            f"good, {request_format.name}" if deadline is None else "good, with a deadline",
            request_format.route,
            0.0,
            0.0,
            ANSWER_LIMIT if deadline is None else deadline,
            deadline=deadline,
            model="second" if is_second else "",
            images=len(pictures),
        )

        def check_response(response: Response, request: ClientRequest) -> str:
            versions = (
                frozenset({"1"})
                if is_second
                else self._state.versions.versions_between(request.sent_at, request.ended_at)
            )
            return gallery.find_mistake(request_format, pictures, response.content, versions)

        return request, content, check_response

    async def _run_leaver(self, number: int) -> None:
        generator = self._state.make_generator(f"leaver {number}")
        while await self._state.pause(generator.expovariate(2.0)):
            request, content, _ = self._build_classification(
                generator, self._own_pictures(number), no_deadline=True
            )
            request = replace(request, kind="leaver", model="")
            await self._state.send_and_leave(
                request, content, generator.choice(list(LeaveMoment)[1:]), generator
            )

    async def _run_bomber(self) -> None:
        generator, connections = self._state.make_generator("bomber"), list[Connection]()
        while await self._state.pause(generator.expovariate(1.5)):
            name, body, headers, status, code = generator.choice(self._bombs)
            allowed = frozenset({status, 503})
            request = ClientRequest(f"bad, {name}", "/v1/classify", 0.0, 0.0, ANSWER_LIMIT, allowed, images=0)
            content = build_request("/v1/classify", body, headers)
            result = await self._state.send_request(
                request, content, lambda *_: "bad input was answered", connections
            )
            if result.status == status and result.codes != (code,):
                self._state.failures.append(f"bad, {name}: the code is {result.codes}, not {code}")
        close_connections(connections)

    async def _run_giant_caller(self) -> None:
        generator, connections = self._state.make_generator("giants"), list[Connection]()
        while await self._state.pause(generator.expovariate(1 / self._options.gaps["giant"])):
            await self._send_giant(generator.choice(self._giants), connections)
        close_connections(connections)

    async def _send_giant(self, picture: Picture, connections: list[Connection]) -> None:
        """Send a giant, which may be refused, since limits exist for giants."""
        request = ClientRequest(f"giant, {picture.name}", REQUEST_FORMATS[0].route, 0.0, 0.0, GIANT_LIMIT,
                          frozenset({200, 413, 503}))  # fmt: skip
        headers = {"Content-Type": "application/octet-stream"}
        content = build_request(REQUEST_FORMATS[0].path, picture.content, headers)

        def check_response(response: Response, request: ClientRequest) -> str:
            versions = self._state.versions.versions_between(request.sent_at, request.ended_at)
            return gallery.find_mistake(REQUEST_FORMATS[0], [picture], response.content, versions)

        await self._state.send_request(request, content, check_response, connections)

    async def _run_explanation_client(self, number: int) -> None:
        generator = self._state.make_generator(f"explained {number}")
        while await self._state.pause(generator.expovariate(0.7)):
            await self._request_explanation(
                generator, generator.choices(list(LeaveMoment), [0.6, 0.2, 0.1, 0.1])[0]
            )

    async def _request_explanation(self, generator: random.Random, moment: LeaveMoment) -> None:
        deadline = 0.005 * 400 ** generator.random() if generator.random() < 0.3 else None
        question = Question(
            QuestionKind.AUTO,
            (generator.randrange(256), generator.randrange(256), generator.randrange(256)),
            (generator.randint(8, 400), generator.randint(8, 400)),
            response_format=generator.choices(["json", "png", "lines"], [0.8, 0.1, 0.1])[0],
            samples=16 * generator.randint(1, 4),
            padding=round(100 * 10_000 ** generator.random()),
            deadline=deadline,
        )
        limit = EXPLAIN_LIMIT if deadline is None else deadline
        request = ClientRequest("explanation", "/v1/explain", 0.0, 0.0, limit, frozenset({200, 503}),
                          deadline=deadline, is_explanation=True)  # fmt: skip
        content = question.build_request("")
        if moment is not LeaveMoment.NEVER:
            await self._state.send_and_leave(
                replace(request, kind="explanation, leaves"), content, moment, generator
            )
            return

        def check_response(response: Response, request: ClientRequest) -> str:
            if find_error_codes(response):  # the code decides whether that is allowed
                return ""
            return questions.find_mistake(question, response, request.seconds, {})

        await self._state.send_request(request, content, check_response, [])
