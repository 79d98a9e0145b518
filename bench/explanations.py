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
import base64
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import quote

import numpy as np
from PIL import Image

from fovea.bench.caller import BrokenConnection, Connection, Response, build_request, parse_address
from fovea.bench.mixed import describe_machine
from fovea.bench.processes import find_process_tree, start_process
from fovea.bench.workloads import ROOT, BenchError

Colour = tuple[int, int, int]

ANSWER_TIMEOUT: Final = 90.0
"""Time limit for an answer without a deadline, in seconds.

The service gives up a silent explaining process after 60 s, and a few questions may wait before this one.
"""

SLACK: Final = 3.0
"""Allowed delay of an answer after its deadline, in seconds; the clients share two busy processors."""

MAX_REFUSED_SHARE: Final = 0.05
"""Maximum share of questions that may get 503 `overloaded`."""

ROUND_SIZE: Final = 100
"""Number of questions between two ends of the explaining process."""

_IDLE_SECONDS: Final = "0.05"
"""Idle time after which the explaining process ends, in seconds (FOVEA_EXPLAIN_IDLE)."""

_START_TIMEOUT: Final = 60.0

_TOLERANCE: Final = 1e-3
"""Tolerance of a value in a layer's map; float32 results depend on batches and threads."""

_PALETTE: Final[tuple[Colour, ...]] = ((250, 20, 20), (20, 250, 20), (20, 20, 250), (240, 240, 20), (9, 9, 9))
"""Colours for which the layer's maps are known beforehand."""

_PADDING_BYTES: Final = (100, 3 << 20)
"""Minimum and maximum number of bytes that are added to a picture."""


class QuestionKind(Enum):
    """A question about a picture."""

    CAM = "cam"
    OCCLUSION = "occlusion"
    MAPS = "maps"
    AUTO = "auto"
    """A class activation map or an occlusion, as the service chooses."""


class LeaveMoment(Enum):
    """The moment at which a client leaves."""

    NEVER = "never"
    SENDING = "sending"
    WAITING = "waiting"
    READING = "reading"


@dataclass(frozen=True)
class Question:
    """A question and its client's behaviour."""

    kind: QuestionKind
    colour: Colour
    size: tuple[int, int]
    """Width and height, in pixels."""
    response_format: str = "json"
    """`json`, `png` (a painted picture) or `lines` (JSON lines that show the progress)."""
    label: str | None = None
    samples: int = 0
    padding: int = 0
    """Number of bytes that are added to the picture."""
    deadline: float | None = None
    """Deadline in seconds."""
    leave_moment: LeaveMoment = LeaveMoment.NEVER
    leave_after: float = 0.0
    """Time after which a client that does not read leaves, in seconds."""
    sent_share: float = 1.0
    """Share of the body that is sent by a client that leaves while sending."""

    def encode_picture(self) -> bytes:
        """Return the encoded picture."""
        return encode_padded_png(self.size, self.colour, self.padding)

    def build_request(self, tensor: str) -> bytes:
        """Return the complete HTTP request; `tensor` is the layer whose maps are requested."""
        headers = {"Content-Type": "image/png"}
        if self.deadline is not None:
            headers["X-Deadline-Ms"] = f"{1000 * self.deadline:.3f}"
        if self.kind is QuestionKind.MAPS:
            return build_request(
                f"/v1/models/cifar10/maps?tensor={quote(tensor)}&count=4", self.encode_picture(), headers
            )
        query = f"method={self.kind.value}"
        if self.label is not None:
            query += f"&label={self.label}"
        if self.kind in (QuestionKind.OCCLUSION, QuestionKind.AUTO):
            query += f"&samples={self.samples}&seed=1"
        query += {"json": "", "png": "&format=png", "lines": "&progress=true"}[self.response_format]
        return build_request(f"/v1/explain?{query}", self.encode_picture(), headers)


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
            failures.append(f"and {self.mistake_count - len(self.mistakes)} wrong answers more")
        if self.refusals > MAX_REFUSED_SHARE * self.questions.total():
            failures.append(
                f"{self.refusals} of {self.questions.total()} questions got 503; "
                f"at most {MAX_REFUSED_SHARE:.0%}"
            )
        failures += [f"no {ask.value} was answered" for ask in QuestionKind if self.questions[ask.value] > 20
                   and not self.right_answers[ask.value]]  # fmt: skip
        return failures


# --- pictures ------------------------------------------------------------------------------------


def encode_padded_png(size: tuple[int, int], colour: Colour, padding: int) -> bytes:
    """Return a PNG of one colour with `padding` bytes that no pixel needs.

    The bytes are a private chunk before the pixels, and messages without effect behind the end.
    """
    content = BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG", compress_level=1)
    png = content.getvalue()
    header = 8 + 25  # the signature and the chunk IHDR
    filler = b"\0" * max(0, padding - len(_TAIL))
    chunk = b"foVe" + filler
    private = struct.pack(">I", len(filler)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:header] + private + png[header:] + _TAIL


def _build_message(text: bytes) -> bytes:
    return struct.pack("<II", len(text), 0) + text


_TAIL: Final = b"".join(_build_message(b"{}".ljust(13)) for _ in range(64))
"""Messages of 21 bytes, as long as `stop` in 0.1.0, each of which would be answered."""


def find_colours(content: bytes) -> set[Colour]:
    """Return all colours of an encoded picture."""
    with Image.open(BytesIO(content)) as picture:
        colours = picture.convert("RGB").getcolors(1 << 24) or []
    return {(int(one[0]), int(one[1]), int(one[2])) for _, one in colours if isinstance(one, tuple)}


# --- the plan ------------------------------------------------------------------------------------


def plan_rounds(cams: int, occlusions: int, labels: Sequence[str], seed: int) -> list[list[Question]]:
    """Return rounds of questions; the explaining process ends before each round.

    The first question of each round leaves in the middle of a large picture.
    """
    generator = random.Random(f"{seed}/explanations")  # noqa: S311 - a plan, no secret
    kinds = (
        [QuestionKind.CAM] * cams + [QuestionKind.OCCLUSION] * occlusions + [QuestionKind.MAPS] * (cams // 20)
    )
    generator.shuffle(kinds)
    questions = [_draw_question(ask, labels, generator) for ask in kinds]
    rounds = [questions[start : start + ROUND_SIZE] for start in range(0, len(questions), ROUND_SIZE)]
    return [[_draw_crossing_question(generator), *one] for one in rounds]


def _draw_question(kind: QuestionKind, labels: Sequence[str], generator: random.Random) -> Question:
    leave_moment = generator.choices(list(LeaveMoment), [0.6, 0.2, 0.1, 0.1])[0]
    return Question(
        kind,
        generator.choice(_PALETTE) if kind is QuestionKind.MAPS else _draw_colour(generator),
        (generator.randint(8, 500), generator.randint(8, 500)),
        response_format="json"
        if kind is QuestionKind.MAPS
        else generator.choices(["json", "png", "lines"], [0.7, 0.15, 0.15])[0],
        label=generator.choice([*labels, None, None]),
        samples=16 * generator.randint(1, 4),
        padding=round(_draw_log_uniform(generator, *_PADDING_BYTES)),
        deadline=_draw_log_uniform(generator, 0.001, 0.3) if generator.random() < 0.3 else None,
        leave_moment=leave_moment,
        leave_after=_draw_log_uniform(generator, 0.0005, 0.2),
        sent_share=generator.random(),
    )


def _draw_crossing_question(generator: random.Random) -> Question:
    """Return a question whose client leaves before a starting explaining process has read the picture."""
    leave_after = generator.uniform(0.02, 0.3)
    return Question(
        QuestionKind.CAM,
        _draw_colour(generator),
        (64, 64),
        padding=3 << 20,
        leave_moment=LeaveMoment.WAITING,
        leave_after=leave_after,
    )


def _draw_colour(generator: random.Random) -> Colour:
    return generator.randrange(256), generator.randrange(256), generator.randrange(256)


def _draw_log_uniform(generator: random.Random, lowest: float, highest: float) -> float:
    """Return a log-uniform random number."""
    return float(lowest * (highest / lowest) ** generator.random())


# --- verification of answers ---------------------------------------------------------------------


def find_mistake(question: Question, response: Response, seconds: float, maps: dict[Colour, Any]) -> str:
    """Return the difference between the answer and the expectation; empty if the answer is right.

    `seconds` is the duration. `maps` are the layer's maps for each colour of the palette.
    """
    if response.status == 504:
        if question.deadline is None:
            return "504 without a deadline"
        return "" if seconds >= question.deadline - 0.01 else f"504 {question.deadline - seconds:.3f} s early"
    if response.status != 200:
        return f"{response.status} {response.content[:300].decode(errors='replace').strip()}"
    try:
        return _find_response_mistake(question, response, maps)
    except (OSError, ValueError, LookupError, TypeError) as error:
        start = response.content[:60]
        return f"an answer of {response.media_type or 'no type'} that cannot be read: {error!r}, {start!r}"


def _find_response_mistake(question: Question, response: Response, maps: dict[Colour, Any]) -> str:
    if question.kind is QuestionKind.MAPS:
        return _find_maps_mistake(question, response, maps)
    if question.response_format == "png":
        with Image.open(BytesIO(response.content)) as painted_picture:
            size = painted_picture.size
        return "" if size == question.size else f"a painted picture of {size}, not {question.size}"
    if question.response_format == "lines":
        lines = [json.loads(line) for line in response.content.splitlines()]
        if "result" not in lines[-1]:
            is_late = lines[-1].get("error", {}).get("code") == "deadline_exceeded"
            return "" if is_late and question.deadline is not None else f"the last line is {lines[-1]}"
        parts = [line for line in lines[:-1] if "what_the_model_saw" in line]
        mistakes = [_find_part_mistake(question, line) for line in parts]
        return next(filter(None, [*mistakes, _find_result_mistake(question, lines[-1]["result"])]), "")
    return _find_result_mistake(question, json.loads(response.content))


def _find_part_mistake(question: Question, part: dict[str, Any]) -> str:
    colours = find_colours(base64.b64decode(part["what_the_model_saw"]["png"]))
    if colours != {question.colour}:
        return f"the model saw {sorted(colours)[:3]}"
    size = part["image"]["width"], part["image"]["height"]
    return "" if size == question.size else f"an image of {size}, not {question.size}"


def _find_result_mistake(question: Question, result: dict[str, Any]) -> str:
    if mistake := _find_part_mistake(question, result):
        return mistake
    if question.kind is not QuestionKind.AUTO and result["method"] != question.kind.value:
        return f"method {result['method']}"
    if question.label is not None and result["label"] != question.label:
        return f"label {result['label']!r}, not {question.label!r}"
    expected_samples = question.samples if result["method"] == "occlusion" else 0
    return (
        ""
        if result["samples"] == expected_samples
        else f"{result['samples']} samples, not {expected_samples}"
    )


def _find_maps_mistake(question: Question, response: Response, maps: dict[Colour, Any]) -> str:
    values, expected = np.load(BytesIO(response.content)), maps[question.colour]
    if values.shape != expected.shape:
        return f"maps of {values.shape}, not {expected.shape}"
    difference = float(np.abs(values - expected).max())
    return "" if difference <= _TOLERANCE else f"maps that differ by {difference:.3g}"


# --- the clients ---------------------------------------------------------------------------------


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
        for colour in _PALETTE:
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
                f"an explaining process is still there after {ANSWER_TIMEOUT:g} s without a question"
            )
        await asyncio.sleep(0.02)


def find_explainers(pid: int) -> list[int]:
    """Return the explaining processes below a process."""
    return [
        one for one in find_process_tree(pid) if b"fovea.service.explain.process " in _read_command_line(one)
    ]


def _read_command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # the process has just ended
        return b""


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
    raise BenchError(f"the service did not start; {log.name} says why")


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
        print(f"The service's log is {log.name}; the same again: --seed {seed}")
    else:
        Path(log.name).unlink()
    return 1 if results.failures else 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fovea.bench.explanations", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--cams", type=int, default=10_000, help="class activation maps")
    parser.add_argument("--occlusions", type=int, default=200)
    parser.add_argument("--seed", type=int, help="of all that is random; chosen and printed without one")
    return parser.parse_args()


def show_results(results: ExplanationResults, seconds: float) -> None:
    """Print the results of the questions."""
    print("\n| asked | questions | answered, and rightly |\n|---|---|---|")
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
