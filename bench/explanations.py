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

from fovea.bench.caller import Answer, Broken, Connection, address_of, post
from fovea.bench.mixed import machine
from fovea.bench.processes import running, tree
from fovea.bench.workloads import ROOT, BenchError

Colour = tuple[int, int, int]

PATIENCE: Final = 90.0
"""Time limit for an answer without a deadline, in seconds.

The service gives up a silent explaining process after 60 s, and a few questions may wait before this one.
"""

SLACK: Final = 3.0
"""Allowed delay of an answer after its deadline, in seconds; the clients share two busy processors."""

REFUSED: Final = 0.05
"""Maximum share of questions that may get 503 `overloaded`."""

ROUND: Final = 100
"""Number of questions between two ends of the explaining process."""

_IDLE: Final = "0.05"
"""Idle time after which the explaining process ends, in seconds (FOVEA_EXPLAIN_IDLE)."""

_START_SECONDS: Final = 60.0

_TOLERANCE: Final = 1e-3
"""Tolerance of a value in a layer's map; float32 results depend on batches and threads."""

_PALETTE: Final[tuple[Colour, ...]] = ((250, 20, 20), (20, 250, 20), (20, 20, 250), (240, 240, 20), (9, 9, 9))
"""Colours for which the layer's maps are known beforehand."""

_BYTES: Final = (100, 3 << 20)
"""Minimum and maximum number of bytes that are added to a picture."""


class Ask(Enum):
    """A question about a picture."""

    CAM = "cam"
    OCCLUSION = "occlusion"
    MAPS = "maps"
    AUTO = "auto"
    """A class activation map or an occlusion, as the service chooses."""


class Leave(Enum):
    """The moment at which a client leaves."""

    NEVER = "never"
    SENDING = "sending"
    WAITING = "waiting"
    READING = "reading"


@dataclass(frozen=True)
class Question:
    """A question and its client's behaviour."""

    ask: Ask
    colour: Colour
    size: tuple[int, int]
    """Width and height, in pixels."""
    form: str = "json"
    """`json`, `png` (a painted picture) or `lines` (JSON lines that show the progress)."""
    label: str | None = None
    samples: int = 0
    padding: int = 0
    """Number of bytes that are added to the picture."""
    deadline: float | None = None
    """Deadline in seconds."""
    leave: Leave = Leave.NEVER
    patience: float = 0.0
    """Time after which a client that does not read leaves, in seconds."""
    share: float = 1.0
    """Share of the body that is sent by a client that leaves while sending."""

    def picture(self) -> bytes:
        """Return the encoded picture."""
        return padded_png(self.size, self.colour, self.padding)

    def request(self, tensor: str) -> bytes:
        """Return the complete HTTP request; `tensor` is the layer whose maps are requested."""
        headers = {"Content-Type": "image/png"}
        if self.deadline is not None:
            headers["X-Deadline-Ms"] = f"{1000 * self.deadline:.3f}"
        if self.ask is Ask.MAPS:
            return post(f"/v1/models/cifar10/maps?tensor={quote(tensor)}&count=4", self.picture(), headers)
        query = f"method={self.ask.value}"
        if self.label is not None:
            query += f"&label={self.label}"
        if self.ask in (Ask.OCCLUSION, Ask.AUTO):
            query += f"&samples={self.samples}&seed=1"
        query += {"json": "", "png": "&format=png", "lines": "&progress=true"}[self.form]
        return post(f"/v1/explain?{query}", self.picture(), headers)


@dataclass
class Seen:
    """The results of the questions."""

    asked: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    """Number of clients that left, by moment."""
    answered: Counter[str] = field(default_factory=Counter)
    """Number of right answers, by question type."""
    late: int = 0
    """Number of questions with an allowed 504."""
    refused: int = 0
    """Number of questions with 503 `overloaded`."""
    restarts: int = 0
    """Number of times that the explaining process ended and another was started."""
    wrong: list[str] = field(default_factory=list)
    """Sentences about the first wrong answers."""
    wrongs: int = 0

    def blame(self, question: Question, what: str) -> None:
        """Count a wrong answer."""
        self.wrongs += 1
        if len(self.wrong) < 20:
            self.wrong.append(f"{question.ask.value}, {question.form}, colour {question.colour}: {what}")

    @property
    def failed(self) -> list[str]:
        """Sentences about everything that is wrong."""
        failed = list(self.wrong)
        if self.wrongs > len(self.wrong):
            failed.append(f"and {self.wrongs - len(self.wrong)} wrong answers more")
        if self.refused > REFUSED * self.asked.total():
            failed.append(f"{self.refused} of {self.asked.total()} questions got 503; at most {REFUSED:.0%}")
        failed += [f"no {ask.value} was answered" for ask in Ask if self.asked[ask.value] > 20
                   and not self.answered[ask.value]]  # fmt: skip
        return failed


# --- pictures ------------------------------------------------------------------------------------


def padded_png(size: tuple[int, int], colour: Colour, padding: int) -> bytes:
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


def _message(text: bytes) -> bytes:
    return struct.pack("<II", len(text), 0) + text


_TAIL: Final = b"".join(_message(b"{}".ljust(13)) for _ in range(64))
"""Messages of 21 bytes, as long as `stop` in 0.1.0, each of which would be answered."""


def colours_of(content: bytes) -> set[Colour]:
    """Return all colours of an encoded picture."""
    with Image.open(BytesIO(content)) as picture:
        found = picture.convert("RGB").getcolors(1 << 24) or []
    return {(int(one[0]), int(one[1]), int(one[2])) for _, one in found if isinstance(one, tuple)}


# --- the plan ------------------------------------------------------------------------------------


def plan(cams: int, occlusions: int, labels: Sequence[str], seed: int) -> list[list[Question]]:
    """Return rounds of questions; the explaining process ends before each round.

    The first question of each round leaves in the middle of a large picture.
    """
    chance = random.Random(f"{seed}/explanations")  # noqa: S311 - a plan, no secret
    asks = [Ask.CAM] * cams + [Ask.OCCLUSION] * occlusions + [Ask.MAPS] * (cams // 20)
    chance.shuffle(asks)
    questions = [_question(ask, labels, chance) for ask in asks]
    rounds = [questions[start : start + ROUND] for start in range(0, len(questions), ROUND)]
    return [[_crossing(chance), *one] for one in rounds]


def _question(ask: Ask, labels: Sequence[str], chance: random.Random) -> Question:
    leave = chance.choices(list(Leave), [0.6, 0.2, 0.1, 0.1])[0]
    return Question(
        ask,
        chance.choice(_PALETTE) if ask is Ask.MAPS else _colour(chance),
        (chance.randint(8, 500), chance.randint(8, 500)),
        form="json" if ask is Ask.MAPS else chance.choices(["json", "png", "lines"], [0.7, 0.15, 0.15])[0],
        label=chance.choice([*labels, None, None]),
        samples=16 * chance.randint(1, 4),
        padding=round(_spread(chance, *_BYTES)),
        deadline=_spread(chance, 0.001, 0.3) if chance.random() < 0.3 else None,
        leave=leave,
        patience=_spread(chance, 0.0005, 0.2),
        share=chance.random(),
    )


def _crossing(chance: random.Random) -> Question:
    """Return a question whose client leaves before a starting explaining process has read the picture."""
    patience = chance.uniform(0.02, 0.3)
    return Question(Ask.CAM, _colour(chance), (64, 64), padding=3 << 20, leave=Leave.WAITING,
                    patience=patience)  # fmt: skip


def _colour(chance: random.Random) -> Colour:
    return chance.randrange(256), chance.randrange(256), chance.randrange(256)


def _spread(chance: random.Random, lowest: float, highest: float) -> float:
    """Return a log-uniform random number."""
    return float(lowest * (highest / lowest) ** chance.random())


# --- verification of answers ---------------------------------------------------------------------


def mistake(question: Question, answer: Answer, seconds: float, maps: dict[Colour, Any]) -> str:
    """Return the difference between the answer and the expectation; empty if the answer is right.

    `seconds` is the duration. `maps` are the layer's maps for each colour of the palette.
    """
    if answer.status == 504:
        if question.deadline is None:
            return "504 without a deadline"
        return "" if seconds >= question.deadline - 0.01 else f"504 {question.deadline - seconds:.3f} s early"
    if answer.status != 200:
        return f"{answer.status} {answer.content[:300].decode(errors='replace').strip()}"
    try:
        return _mistake_of_answer(question, answer, maps)
    except (OSError, ValueError, LookupError, TypeError) as error:
        start = answer.content[:60]
        return f"an answer of {answer.media_type or 'no type'} that cannot be read: {error!r}, {start!r}"


def _mistake_of_answer(question: Question, answer: Answer, maps: dict[Colour, Any]) -> str:
    if question.ask is Ask.MAPS:
        return _mistake_of_maps(question, answer, maps)
    if question.form == "png":
        with Image.open(BytesIO(answer.content)) as painted:
            size = painted.size
        return "" if size == question.size else f"a painted picture of {size}, not {question.size}"
    if question.form == "lines":
        lines = [json.loads(line) for line in answer.content.splitlines()]
        if "result" not in lines[-1]:
            late = lines[-1].get("error", {}).get("code") == "deadline_exceeded"
            return "" if late and question.deadline is not None else f"the last line is {lines[-1]}"
        parts = [line for line in lines[:-1] if "what_the_model_saw" in line]
        said = [_mistake_of_part(question, line) for line in parts]
        return next(filter(None, [*said, _mistake_of_result(question, lines[-1]["result"])]), "")
    return _mistake_of_result(question, json.loads(answer.content))


def _mistake_of_part(question: Question, part: dict[str, Any]) -> str:
    colours = colours_of(base64.b64decode(part["what_the_model_saw"]["png"]))
    if colours != {question.colour}:
        return f"the model saw {sorted(colours)[:3]}"
    size = part["image"]["width"], part["image"]["height"]
    return "" if size == question.size else f"an image of {size}, not {question.size}"


def _mistake_of_result(question: Question, result: dict[str, Any]) -> str:
    if said := _mistake_of_part(question, result):
        return said
    if question.ask is not Ask.AUTO and result["method"] != question.ask.value:
        return f"method {result['method']}"
    if question.label is not None and result["label"] != question.label:
        return f"label {result['label']!r}, not {question.label!r}"
    wanted = question.samples if result["method"] == "occlusion" else 0
    return "" if result["samples"] == wanted else f"{result['samples']} samples, not {wanted}"


def _mistake_of_maps(question: Question, answer: Answer, maps: dict[Colour, Any]) -> str:
    values, wanted = np.load(BytesIO(answer.content)), maps[question.colour]
    if values.shape != wanted.shape:
        return f"maps of {values.shape}, not {wanted.shape}"
    difference = float(np.abs(values - wanted).max())
    return "" if difference <= _TOLERANCE else f"maps that differ by {difference:.3g}"


# --- the clients ---------------------------------------------------------------------------------


class Clients:
    """The clients of one plan; each asks its next question when the previous one is over."""

    def __init__(self, url: str, *, clients: int = 2) -> None:
        self._address = address_of(url)
        self._clients = clients
        self._tensor = ""
        self._maps: dict[Colour, Any] = {}
        self.seen = Seen()

    async def prepare(self) -> list[str]:
        """Learn the layer's maps for each colour of the palette; return the model's labels."""
        answer = await self._ask(b"GET /v1/models/cifar10/layers HTTP/1.1\r\nHost: x\r\n\r\n")
        layers = json.loads(answer.content)
        self._tensor = next(one["tensor"] for one in layers["layers"] if one["kind"] == "Conv")
        for colour in _PALETTE:
            answer = await self._ask(Question(Ask.MAPS, colour, (32, 32)).request(self._tensor))
            self._maps[colour] = np.load(BytesIO(answer.content))
        labels: list[str] = layers["labels"]
        return labels

    async def ask_all(self, questions: Sequence[Question]) -> None:
        """Ask all questions, and return after the last answer."""
        waiting = iter(questions)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._clients):
                group.create_task(self._client(waiting))

    async def _client(self, questions: Iterator[Question]) -> None:
        for question in questions:
            self.seen.asked[question.ask.value] += 1
            try:
                async with asyncio.timeout((question.deadline or PATIENCE) + SLACK):
                    await self._act(question)
            except TimeoutError:
                limit = f"{question.deadline or PATIENCE:.3f} s, and {SLACK:g} s more"
                self.seen.blame(question, f"no answer within {limit}")
            except Broken as error:
                self.seen.blame(question, f"no answer: {error}")

    async def _act(self, question: Question) -> None:
        connection = await Connection.open(self._address)
        try:
            content = question.request(self._tensor)
            if question.leave is Leave.SENDING:
                start = content.index(b"\r\n\r\n") + 4
                content = content[: start + round(question.share * (len(content) - start - 1))]
            started = time.monotonic()
            await connection.send(content)
            if question.leave is not Leave.NEVER:
                await self._leave(question, connection)
                return
            self._judge(question, await connection.receive(), time.monotonic() - started)
        finally:
            connection.leave()

    async def _leave(self, question: Question, connection: Connection) -> None:
        self.seen.left[question.leave.value] += 1
        if question.leave is Leave.READING:
            await connection.begin()
        else:
            await asyncio.sleep(question.patience)

    def _judge(self, question: Question, answer: Answer, seconds: float) -> None:
        if answer.status == 503 and b'"overloaded"' in answer.content:
            self.seen.refused += 1
        elif said := mistake(question, answer, seconds, self._maps):
            self.seen.blame(question, said)
        elif answer.status == 504:
            self.seen.late += 1
        else:
            self.seen.answered[question.ask.value] += 1

    async def _ask(self, content: bytes) -> Answer:
        connection = await Connection.open(self._address)
        try:
            async with asyncio.timeout(PATIENCE):
                await connection.send(content)
                answer = await connection.receive()
        except (Broken, TimeoutError) as error:
            raise BenchError(f"the service does not explain anything: {error!r}") from None
        finally:
            connection.leave()
        if answer.status != 200:
            raise BenchError(f"the service does not explain anything: {answer.content[:300]!r}")
        return answer


async def _rest(pid: int) -> None:
    """Wait until the explaining processes have ended for lack of questions.

    Raises `BenchError`.
    """
    end = time.monotonic() + PATIENCE
    while explainers(pid):
        if time.monotonic() > end:
            raise BenchError(f"an explaining process is still there after {PATIENCE:g} s without a question")
        await asyncio.sleep(0.02)


def explainers(pid: int) -> list[int]:
    """Return the explaining processes below a process."""
    return [one for one in tree(pid) if b"fovea.service.explain.process " in _command(one)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # the process has just ended
        return b""


def run(url: str, pid: int, *, cams: int, occlusions: int, seed: int) -> Seen:
    """Ask the service at `url`, whose process is `pid`, and return the results."""
    clients = Clients(url)

    async def work() -> None:
        rounds = plan(cams, occlusions, await clients.prepare(), seed)
        for number, questions in enumerate(rounds):
            await _rest(pid)
            clients.seen.restarts += 1
            await clients.ask_all(questions)
            if sys.stdout.isatty() or number % 10 == 9:
                print(f"  round {number + 1} of {len(rounds)}, {clients.seen.wrongs} wrong", flush=True)

    asyncio.run(work())
    return clients.seen


@contextmanager
def service(log: IO[str], **settings: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start the service with the default models on a free port.

    Raises `BenchError`.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    environment = {**inherited, "FOVEA_PORT": "0", "FOVEA_DRAIN_GRACE": "0", "FOVEA_EXPLAIN_IDLE": _IDLE,
                   **settings}  # fmt: skip
    command = [sys.executable, "-m", "fovea.service"]
    with running(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log) as process:
        for line in process.stdout or ():
            if found := re.search(r"http://\S+", line):
                yield found[0], process
                return
    raise BenchError(f"the service did not start; {log.name} says why")


def main() -> int:
    """Run the test as the command line asks, and print a table; return 1 if an answer was wrong."""
    options = _arguments()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    with tempfile.NamedTemporaryFile("w", prefix="fovea-explanations-", suffix=".log", delete=False) as log:
        try:
            with service(log) as (url, process):
                started = time.monotonic()
                seen = run(url, process.pid, cams=options.cams, occlusions=options.occlusions, seed=seed)
                seconds = time.monotonic() - started
        except BenchError as error:
            print(f"explanations: {error}", file=sys.stderr)
            return 2
    show(seen, seconds)
    if seen.failed:
        print(f"The service's log is {log.name}; the same again: --seed {seed}")
    else:
        Path(log.name).unlink()
    return 1 if seen.failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fovea.bench.explanations", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--cams", type=int, default=10_000, help="class activation maps")
    parser.add_argument("--occlusions", type=int, default=200)
    parser.add_argument("--seed", type=int, help="of all that is random; chosen and printed without one")
    return parser.parse_args()


def show(seen: Seen, seconds: float) -> None:
    """Print the results of the questions."""
    print("\n| asked | questions | answered, and rightly |\n|---|---|---|")
    for ask in (Ask.CAM, Ask.OCCLUSION, Ask.MAPS):
        print(f"| {ask.value} | {seen.asked[ask.value]} | {seen.answered[ask.value]} |")
    left = ", ".join(f"{number} while {when}" for when, number in sorted(seen.left.items()))
    print(f"\nClients that left: {left}. 504 after their deadline: {seen.late}. 503: {seen.refused}.")
    print(f"{seen.restarts} explaining processes, {seconds:.0f} s. {machine()}.")
    print("\n".join(seen.failed) or "Every answer belongs to its question.")


if __name__ == "__main__":
    sys.exit(main())
