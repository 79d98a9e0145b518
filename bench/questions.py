"""Questions to the explaining processes: their pictures, a random plan, and the check of the answers.

Every picture has one colour, which the answer must show again. Behind its last pixel every picture carries
bytes that look like messages between the service and the explaining process (see `encode_padded_png`).
"""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from io import BytesIO
from typing import Any, Final
from urllib.parse import quote

import numpy as np
from PIL import Image

from fovea.bench.caller import Response, build_request

Colour = tuple[int, int, int]

ROUND_SIZE: Final = 100
"""Number of questions between two ends of the explaining process."""

_TOLERANCE: Final = 1e-3
"""Tolerance of a value in a layer's map; float32 results depend on batches and threads."""

PALETTE: Final[tuple[Colour, ...]] = ((250, 20, 20), (20, 250, 20), (20, 20, 250), (240, 240, 20), (9, 9, 9))
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
        generator.choice(PALETTE) if kind is QuestionKind.MAPS else _draw_colour(generator),
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
