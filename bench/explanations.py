"""The `make explanations` test: every explanation must belong to its question, even if clients leave.

Two clients ask for heat maps (10,000 class activation maps, 200 occlusions) and for the maps of a layer, with
pictures of random sizes. Every picture has its own colour, so the answer's `what_the_model_saw` must have
that colour too. Size, label and number of samples must be those of the question. Some clients leave while
they send, wait or read, and some set a deadline. The explaining process ends repeatedly for lack of
questions, so that the next picture is sent to a process that is still starting. The socket between them is
then full, and a client can leave in the middle of its picture.

Behind its last pixel every picture carries bytes that look like messages between the service and the
explaining process. These bytes have no effect unless the two lose their place in the stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from fovea.bench.caller import BrokenConnection, Connection, Response, parse_address
from fovea.bench.mixed import describe_machine
from fovea.bench.processes import find_process_tree, read_command_line, start_process
from fovea.bench.questions import (
    PALETTE,
    Colour,
    LeaveMoment,
    Question,
    QuestionKind,
    find_mistake,
    plan_rounds,
)
from fovea.bench.workloads import ROOT, BenchError

ANSWER_TIMEOUT: Final = 90.0
"""Time limit for an answer without a deadline, in seconds.

The service gives up a silent explaining process after 60 s, and a few questions may wait before this one.
"""

SLACK: Final = 3.0
"""Allowed delay of an answer after its deadline, in seconds; the clients share two busy processors."""

MAX_REFUSED_SHARE: Final = 0.05
"""Maximum share of questions that may get 503 `overloaded`."""

_IDLE_SECONDS: Final = "0.05"
"""Idle time after which the explaining process ends, in seconds (FOVEA_EXPLAIN_IDLE)."""

_START_TIMEOUT: Final = 60.0


@dataclass
class ExplanationResults:
    """The results of the questions."""

    questions: Counter[str] = field(default_factory=Counter)
    leavers: Counter[str] = field(default_factory=Counter)
    """Number of clients that left, by moment."""
    right_answers: Counter[str] = field(default_factory=Counter)
    """Number of right answers, by question type."""
    deadline_misses: int = 0
    """Number of questions with an allowed 504."""
    refusals: int = 0
    """Number of questions with 503 `overloaded`."""
    restarts: int = 0
    """Number of times that the explaining process ended and another was started."""
    mistakes: list[str] = field(default_factory=list)
    """Sentences about the first wrong answers."""
    mistake_count: int = 0

    def add_mistake(self, question: Question, reason: str) -> None:
        """Count a wrong answer."""
        self.mistake_count += 1
        if len(self.mistakes) < 20:
            self.mistakes.append(
                f"{question.kind.value}, {question.response_format}, colour {question.colour}: {reason}"
            )

    @property
    def failures(self) -> list[str]:
        """Sentences about everything that is wrong."""
        failures = list(self.mistakes)
        if self.mistake_count > len(self.mistakes):
            failures.append(f"and {self.mistake_count - len(self.mistakes)} more wrong answers")
        if self.refusals > MAX_REFUSED_SHARE * self.questions.total():
            failures.append(
                f"{self.refusals} of {self.questions.total()} questions got 503; "
                f"at most {MAX_REFUSED_SHARE:.0%}"
            )
        failures += [f"no {ask.value} was answered" for ask in QuestionKind if self.questions[ask.value] > 20
                   and not self.right_answers[ask.value]]  # fmt: skip
        return failures


class ExplanationClients:
    """The clients of one plan; each asks its next question when the previous one is over."""

    def __init__(self, url: str, *, client_count: int = 2) -> None:
        self._address = parse_address(url)
        self._client_count = client_count
        self._tensor = ""
        self._maps: dict[Colour, Any] = {}
        self.results = ExplanationResults()

    async def learn_maps(self) -> list[str]:
        """Learn the layer's maps for each colour of the palette; return the model's labels."""
        response = await self._fetch_response(b"GET /v1/models/cifar10/layers HTTP/1.1\r\nHost: x\r\n\r\n")
        layers = json.loads(response.content)
        self._tensor = next(one["tensor"] for one in layers["layers"] if one["kind"] == "Conv")
        for colour in PALETTE:
            response = await self._fetch_response(
                Question(QuestionKind.MAPS, colour, (32, 32)).build_request(self._tensor)
            )
            self._maps[colour] = np.load(BytesIO(response.content))
        labels: list[str] = layers["labels"]
        return labels

    async def ask_questions(self, questions: Sequence[Question]) -> None:
        """Ask all questions, and return after the last answer."""
        question_iterator = iter(questions)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._client_count):
                group.create_task(self._run_client(question_iterator))

    async def _run_client(self, questions: Iterator[Question]) -> None:
        for question in questions:
            self.results.questions[question.kind.value] += 1
            try:
                async with asyncio.timeout((question.deadline or ANSWER_TIMEOUT) + SLACK):
                    await self._ask_question(question)
            except TimeoutError:
                limit = f"{question.deadline or ANSWER_TIMEOUT:.3f} s, and {SLACK:g} s more"
                self.results.add_mistake(question, f"no answer within {limit}")
            except BrokenConnection as error:
                self.results.add_mistake(question, f"no answer: {error}")

    async def _ask_question(self, question: Question) -> None:
        connection = await Connection.open(self._address)
        try:
            content = question.build_request(self._tensor)
            if question.leave_moment is LeaveMoment.SENDING:
                start = content.index(b"\r\n\r\n") + 4
                content = content[: start + round(question.sent_share * (len(content) - start - 1))]
            started_at = time.monotonic()
            await connection.send(content)
            if question.leave_moment is not LeaveMoment.NEVER:
                await self._leave_early(question, connection)
                return
            self._check_response(question, await connection.receive(), time.monotonic() - started_at)
        finally:
            connection.abort()

    async def _leave_early(self, question: Question, connection: Connection) -> None:
        self.results.leavers[question.leave_moment.value] += 1
        if question.leave_moment is LeaveMoment.READING:
            await connection.read_start()
        else:
            await asyncio.sleep(question.leave_after)

    def _check_response(self, question: Question, response: Response, seconds: float) -> None:
        if response.status == 503 and b'"overloaded"' in response.content:
            self.results.refusals += 1
        elif mistake := find_mistake(question, response, seconds, self._maps):
            self.results.add_mistake(question, mistake)
        elif response.status == 504:
            self.results.deadline_misses += 1
        else:
            self.results.right_answers[question.kind.value] += 1

    async def _fetch_response(self, content: bytes) -> Response:
        connection = await Connection.open(self._address)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await connection.send(content)
                response = await connection.receive()
        except (BrokenConnection, TimeoutError) as error:
            raise BenchError(f"the service does not explain anything: {error!r}") from None
        finally:
            connection.abort()
        if response.status != 200:
            raise BenchError(f"the service does not explain anything: {response.content[:300]!r}")
        return response


async def _wait_until_idle(pid: int) -> None:
    """Wait until the explaining processes have ended for lack of questions.

    Raises `BenchError`.
    """
    end = time.monotonic() + ANSWER_TIMEOUT
    while find_explainers(pid):
        if time.monotonic() > end:
            raise BenchError(
                f"an explaining process still runs after {ANSWER_TIMEOUT:g} s without a question"
            )
        await asyncio.sleep(0.02)


def find_explainers(pid: int) -> list[int]:
    """Return the explaining processes below a process."""
    return [
        one for one in find_process_tree(pid) if b"fovea.service.explain.process " in read_command_line(one)
    ]


def ask_service(url: str, pid: int, *, cams: int, occlusions: int, seed: int) -> ExplanationResults:
    """Ask the service at `url`, whose process is `pid`, and return the results."""
    clients = ExplanationClients(url)

    async def run_rounds() -> None:
        rounds = plan_rounds(cams, occlusions, await clients.learn_maps(), seed)
        for number, questions in enumerate(rounds):
            await _wait_until_idle(pid)
            clients.results.restarts += 1
            await clients.ask_questions(questions)
            if sys.stdout.isatty() or number % 10 == 9:
                print(
                    f"  round {number + 1} of {len(rounds)}, {clients.results.mistake_count} wrong",
                    flush=True,
                )

    asyncio.run(run_rounds())
    return clients.results


@contextmanager
def start_service(log: IO[str], **settings: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start the service with the default models on a free port.

    Raises `BenchError`.
    """
    base_environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    base_settings = {
        "FOVEA_PORT": "0",
        "FOVEA_DRAIN_GRACE": "0",
        "FOVEA_EXPLAIN_IDLE": _IDLE_SECONDS,
    }
    environment = {**base_environment, **base_settings, **settings}
    command = [sys.executable, "-m", "fovea.service"]
    with start_process(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log) as process:
        for line in process.stdout or ():
            if address_match := re.search(r"http://\S+", line):
                yield address_match[0], process
                return
    raise BenchError(f"the service did not start; see its log {log.name}")


def main() -> int:
    """Run the test as the command line asks, and print a table; return 1 if an answer was wrong."""
    options = _parse_arguments()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    with tempfile.NamedTemporaryFile("w", prefix="fovea-explanations-", suffix=".log", delete=False) as log:
        try:
            with start_service(log) as (url, process):
                started_at = time.monotonic()
                results = ask_service(
                    url, process.pid, cams=options.cams, occlusions=options.occlusions, seed=seed
                )
                seconds = time.monotonic() - started_at
        except BenchError as error:
            print(f"explanations: {error}", file=sys.stderr)
            return 2
    show_results(results, seconds)
    if results.failures:
        print(f"The service's log is {log.name}. Repeat this run with --seed {seed}.")
    else:
        Path(log.name).unlink()
    return 1 if results.failures else 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fovea.bench.explanations", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--cams", type=int, default=10_000, help="number of class activation maps (default: 10,000)"
    )
    parser.add_argument("--occlusions", type=int, default=200, help="number of occlusions (default: 200)")
    parser.add_argument(
        "--seed", type=int, help="seed of all random choices (default: a new one, which is printed)"
    )
    return parser.parse_args()


def show_results(results: ExplanationResults, seconds: float) -> None:
    """Print the results of the questions."""
    print("\n| question | asked | right answers |\n|---|---|---|")
    for kind in (QuestionKind.CAM, QuestionKind.OCCLUSION, QuestionKind.MAPS):
        print(f"| {kind.value} | {results.questions[kind.value]} | {results.right_answers[kind.value]} |")
    leavers_text = ", ".join(f"{number} while {moment}" for moment, number in sorted(results.leavers.items()))
    print(
        f"\nClients that left: {leavers_text}. 504 after their deadline: {results.deadline_misses}. "
        f"503: {results.refusals}."
    )
    print(f"{results.restarts} explaining processes, {seconds:.0f} s. {describe_machine()}.")
    print("\n".join(results.failures) or "Every answer belongs to its question.")


if __name__ == "__main__":
    sys.exit(main())
