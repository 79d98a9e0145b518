"""Frames between processes: a runner that a hostile image has taken over may send anything to the service."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from typing import Final

from fovea.service.errors import BadImage, RequestError
from fovea.service.runners.batch_messages import Answer, BatchReport, BoxAnswers
from fovea.service.runners.frames import Frame, FrameDecoder, FrameError
from fovea.service.runners.messages import Message
from fovea.service.supervisor.messages import SUPERVISOR_MESSAGES, WORKER_MESSAGES
from tests.fuzz.json_changes import change_json
from tests.fuzz.target import Target, require
from tests.service.runners.test_frames import ANSWER, MESSAGES

_LENGTHS: Final = struct.Struct("<II")

_TYPES: Final[dict[str, type[Message]]] = {
    one.__name__: one for one in (*map(type, MESSAGES), *SUPERVISOR_MESSAGES, *WORKER_MESSAGES)
}


def _decode(pieces: Sequence[bytes]) -> tuple[list[tuple[str, object, bytes]], bool]:
    """Return the frames of a stream, and True if it ends with an error."""
    decoder, frames = FrameDecoder(max_bytes=10_000), list[Frame]()
    try:
        for piece in pieces:
            for frame in decoder.feed(piece):
                frames.append(frame)
    except FrameError as error:
        str(error).encode()
        return [(one.kind, one.values, bytes(one.content)) for one in frames], True
    return [(one.kind, one.values, bytes(one.content)) for one in frames], False


def check_stream(stream: bytes) -> bool:
    """Decode a stream whole and in pieces, and read each frame as the message that it names."""
    expected = _decode([stream])
    step = 1 + len(stream) % 13
    pieces = [stream[start : start + step] for start in range(0, len(stream), step)]
    require(_decode(pieces) == expected, "other pieces give other frames")
    is_accepted = not expected[1]
    for kind, values, content in expected[0]:
        require(isinstance(values, dict), "the values of a frame are no object")
        frame = Frame(kind, values, memoryview(content))  # type: ignore[arg-type]
        try:
            if kind == BatchReport.__name__:
                report = BatchReport.from_frame(frame)
                require(len(report.answers) < 10_000, "the report has more answers than bytes")
            elif kind in _TYPES:
                message = _TYPES[kind].from_frame(frame)
                require(isinstance(message.to_bytes(), bytes), "the message cannot be sent on")
            else:
                is_accepted = False
        except FrameError as error:
            require(len(str(error).encode()) < 2000, "the error quotes the frame")
            is_accepted = False
    return is_accepted and bool(expected[0])


def _make_seeds() -> list[bytes]:
    answers: list[Answer | BoxAnswers | RequestError] = [
        ANSWER,
        BadImage("cut"),
        BoxAnswers([ANSWER, ANSWER], "JPEG", 5, 4),
    ]
    reports = [BatchReport(answers[:count], [0.5] * count, 0.25, count, 7) for count in (1, 2, 3)]
    return [message.to_bytes() for message in MESSAGES] + [report.to_bytes() for report in reports]


_change = change_json(
    ("BatchReport", "number", "answers", "boxes", "logits", "embeddings", "embedding_rows", "reason",
     *sorted(_TYPES))
)  # fmt: skip


def _mutate(stream: bytes, choice: random.Random) -> bytes:
    """Change the header or the content of the first frame, with lengths that are right."""
    if len(stream) < _LENGTHS.size:
        return stream + bytes(_LENGTHS.size)
    size, content_size = _LENGTHS.unpack_from(stream)
    body = stream[_LENGTHS.size :]
    header, content, rest = body[:size], body[size : size + content_size], body[size + content_size :]
    action = choice.random()
    if action < 0.7:
        header = _change(header, choice)
    elif action < 0.9:
        content = choice.choice((content[:-1], content + b"\0", content[4:], content * 2))
    else:
        rest += stream
    return _LENGTHS.pack(len(header), len(content)) + header + content + rest


TARGET = Target(check_stream, _make_seeds, _mutate, max_size=4000)
