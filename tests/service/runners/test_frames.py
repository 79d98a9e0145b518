"""Frames and messages: whatever arrives is either the exact message or one type of error."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fovea.service.errors import BadImage, RequestError
from fovea.service.explain.messages import (
    ContentPart,
    ExplainerReply,
    ExplainerRequest,
    ExplanationRequest,
    HeatmapProgress,
    HeatmapResult,
    HeatmapValues,
    InputPicture,
    LayerDescription,
    LayersQuestion,
    LayersResult,
    MapsQuestion,
    MapsResult,
    ModelInput,
    Photo,
    PreprocessingStep,
    Refusal,
    StopCommand,
    WeightsQuestion,
    WeightsResult,
)
from fovea.service.image_warnings import ImageWarning
from fovea.service.rollout.trial import ShadowTestReply, ShadowTestRequest, ShadowTestResult
from fovea.service.runners.batch_messages import (
    Answer,
    Batch,
    BatchReport,
    BoxAnswers,
    DropCommand,
    ImageRequest,
    ImageTiming,
    Item,
)
from fovea.service.runners.frames import (
    MAX_PIECE_BYTES,
    MAX_REPLY_BYTES,
    Frame,
    FrameDecoder,
    FrameError,
    encode_frame,
    receive_frame,
)
from fovea.service.runners.load_messages import (
    LoadCommand,
    LoadedModel,
    LoadReply,
    LoadRequest,
    ProcessPlan,
    Setup,
    SetupReply,
    UnloadCommand,
)
from fovea.service.runners.messages import Failure, Message
from fovea.service.runners.shared_memory import SharedRef

PLAN = ProcessPlan("cpu", 8, 1, 2, 1, 1_000_000, 1 << 28, 1)
LOAD = LoadCommand(3, "zoo/a/1/model.onnx", "/proc/self/fd/9", [1, 2, 3], PLAN)
MODEL = LoadedModel('{"labels": []}', "cpu", 8, 1e6, 0.25, {"logits": 0.5})
HEATMAP = HeatmapValues(1, 2, [[0.5, None]])
INPUT = ModelInput(
    [0.25, 0.75],
    2.5,
    Photo("PNG", 5, 4),
    [ImageWarning("end_missing", "the end is missing")],
    InputPicture(3, 2, "aGk=", [0.0, 0.0, 5.0, 4.0], [PreprocessingStep("crop", "cropped")]),
)
LAYER = LayerDescription(
    tensor="t",
    name="n",
    kind="Conv",
    sources=["s"],
    shape=[None, 3],
    left_out=0,
    direct=True,
    block=None,
    kernel=[3, 3],
    stride=None,
    padding=None,
    dilation=None,
    groups=1,
    parameters=27,
    constants={"min": None, "max": 6.0},
    attributes={"axis": [1, "x"]},
    weights=["weight"],
    input="x",
    order=None,
    field={"rows": [1, 0, 2], "columns": [1, 0, 2]},
)

MESSAGES: list[Message] = [
    Setup(0, PLAN, [LOAD, LOAD]),
    SetupReply(0, [MODEL, MODEL], "1.20", ["CPUExecutionProvider"], ["PNG"]),
    LoadRequest(1, LOAD),
    LoadReply(1, MODEL),
    UnloadCommand(3),
    DropCommand(2, 1),
    Failure(4, "wrong", is_golden_error=True, trace="Traceback"),
    ShadowTestRequest(0, LOAD, None, [3, 4], False),
    ShadowTestRequest(0, LOAD, LOAD, [], True),
    ShadowTestReply(0, ShadowTestResult(3, 1, 1.5)),
    *(
        ExplainerRequest(1, LOAD, contract, question)
        for contract in (None, "{}")
        for question in (
            ExplanationRequest("cam", None, 1, 2, 3.0, True, True),
            MapsQuestion("t", 0, 1, [2, 0], False, True),
            WeightsQuestion("t", "weight", 0, 1),
            LayersQuestion(),
        )
    ),
    StopCommand(1),
    HeatmapProgress(1, 0.5, 16, HEATMAP, None),
    HeatmapProgress(1, 0.0, 0, None, INPUT),
    ContentPart(1),
    ExplainerReply(1, HeatmapResult(INPUT, 1, "cam", 0, None, HEATMAP), 0),
    ExplainerReply(1, MapsResult(3, -1.5, 2.0), 5),
    ExplainerReply(1, WeightsResult(3), 5),
    ExplainerReply(1, LayersResult([LAYER], True, None), 0),
    ExplainerReply(1, None, 0),
    Refusal(1, "bad_image", "the image is truncated"),
]

CONTENTS: list[Sequence[bytes]] = [(), (b"",), (b"ab", b"", b"c"), (b"x" * (MAX_PIECE_BYTES + 1), b"y")]


def encode(message: Message, contents: Sequence[bytes] = ()) -> bytes:
    return b"".join(message.to_pieces(contents))


def decode_pieces(pieces: Sequence[bytes]) -> list[Frame]:
    decoder = FrameDecoder()
    return [frame for piece in pieces for frame in decoder.feed(piece)]


def cut(stream: bytes, places: Sequence[int]) -> list[bytes]:
    ends = [*sorted(places), len(stream)]
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def compare(frames: Sequence[Frame], messages: Sequence[tuple[Message, Sequence[bytes]]]) -> None:
    assert len(frames) == len(messages)
    for frame, (message, contents) in zip(frames, messages, strict=True):
        assert type(message).from_frame(frame) == message
        assert bytes(frame.content) == b"".join(contents)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_message_survives_every_cut(message: Message) -> None:
    stream = encode(message, (b"content",)) * 2
    for place in range(len(stream) + 1):
        compare(decode_pieces(cut(stream, [place])), [(message, (b"content",))] * 2)
    compare(decode_pieces([bytes([byte]) for byte in stream]), [(message, (b"content",))] * 2)


messages_with_contents = st.lists(
    st.tuples(st.sampled_from(MESSAGES), st.sampled_from(CONTENTS)), min_size=1, max_size=4
)


@given(messages_with_contents, st.data())
def test_stream_in_random_pieces_gives_exact_messages(
    messages: list[tuple[Message, Sequence[bytes]]], data: st.DataObject
) -> None:
    stream = b"".join(encode(*one) for one in messages)
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    compare(decode_pieces(cut(stream, places)), messages)


@given(messages_with_contents, st.data())
def test_damaged_stream_gives_messages_or_the_one_error(
    messages: list[tuple[Message, Sequence[bytes]]], data: st.DataObject
) -> None:
    """The messages before the damage are exact; then comes an error, another valid message, or a wait."""
    streams = [encode(*one) for one in messages]
    stream = bytearray(b"".join(streams))
    place = data.draw(st.integers(0, len(stream) - 1))
    damage = data.draw(st.binary(min_size=1, max_size=12))
    stream[place : place + data.draw(st.sampled_from([0, len(damage)]))] = damage
    intact = sum(sum(map(len, streams[: number + 1])) <= place for number in range(len(streams)))
    frames = iter_frames(cut(bytes(stream), data.draw(st.lists(st.integers(0, len(stream)), max_size=4))))
    compare([next(frames) for _ in range(intact)], messages[:intact])
    try:
        for frame in frames:
            kind = next((type(one) for one in MESSAGES if type(one).__name__ == frame.kind), StopCommand)
            assert isinstance(kind.from_frame(frame), kind)
    except FrameError as error:
        assert str(error).startswith("sent ")


def iter_frames(pieces: Sequence[bytes]) -> Iterator[Frame]:
    decoder = FrameDecoder()
    for piece in pieces:
        yield from decoder.feed(piece)


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_noise_gives_the_one_error_or_nothing(pieces: list[bytes]) -> None:
    with contextlib.suppress(FrameError):
        list(iter_frames(pieces))
    parent, child = socket.socketpair()
    with parent, child:
        child.sendall(b"".join(pieces))
        child.shutdown(socket.SHUT_WR)
        with contextlib.suppress(FrameError):
            receive_frame(parent, max_bytes=MAX_REPLY_BYTES)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_huge_lengths_are_refused_at_once(header_size: int, content_size: int) -> None:
    lengths = struct.pack("<II", header_size, content_size)
    if header_size + content_size > MAX_REPLY_BYTES:
        with pytest.raises(FrameError, match="the limit is"):
            list(FrameDecoder().feed(lengths))


def test_announced_bytes_take_no_memory_before_they_arrive() -> None:
    parent, child = socket.socketpair()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with parent, child:
        child.sendall(struct.pack("<II", 4, (1 << 32) - 5) + b"[1]")
        child.shutdown(socket.SHUT_WR)
        assert receive_frame(parent) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KB


@pytest.mark.parametrize(
    "header",
    [
        "",
        "[",
        '["StopCommand"]',
        '["StopCommand",[]]',
        '[1,{"number":1}]',
        '"ab"',
        '{"a":1,"b":2}',
        "[" * 9999,
    ],
)
def test_header_of_another_form_is_refused(header: str) -> None:
    with pytest.raises(FrameError, match="sent a header that"):
        list(FrameDecoder().feed(struct.pack("<II", len(header), 0) + header.encode()))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.long
@settings(max_examples=300)
@given(st.sampled_from(MESSAGES), st.data())
def test_message_with_a_wrong_field_is_refused_or_exact(message: Message, data: st.DataObject) -> None:
    (frame,) = decode_pieces([encode(message)])
    name = data.draw(st.sampled_from([*frame.values, "more"]) if frame.values else st.just("more"))
    frame.values[name] = data.draw(JSON)
    try:
        decoded = type(message).from_frame(frame)
    except FrameError:
        return
    assert name != "more"
    (again,) = decode_pieces([encode(decoded)])
    assert type(message).from_frame(again) == decoded


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_message_without_a_field_is_refused(message: Message) -> None:
    for name in decode_pieces([encode(message)])[0].values:
        (frame,) = decode_pieces([encode(message)])
        del frame.values[name]
        with pytest.raises(FrameError):
            type(message).from_frame(frame)


@pytest.mark.parametrize(
    ("message", "name", "value"),
    [
        (SetupReply(0, [], "", [], []), "formats", ["PNG", 3]),
        (ShadowTestRequest(0, LOAD, None, [], False), "image_sizes", [1, "2"]),
        (HeatmapProgress(1, 0.5, 16, HEATMAP, None), "heatmap", {"height": 1, "width": 1, "values": [["x"]]}),
        (LoadReply(1, MODEL), "model", {**vars(MODEL), "golden_differences": {"logits": "x"}}),
        (LoadReply(1, MODEL), "model", {**vars(MODEL), "provider": "tpu"}),
        (DropCommand(1, 1), "image_index", True),
    ],
)
def test_wrong_value_within_a_field_is_refused(message: Message, name: str, value: Any) -> None:
    (frame,) = decode_pieces([encode(message)])
    assert type(message).from_frame(frame) == message
    frame.values[name] = value
    with pytest.raises(FrameError, match=r"^sent a"):
        type(message).from_frame(frame)


def test_other_message_is_refused() -> None:
    (frame,) = decode_pieces([encode(StopCommand(1))])
    with pytest.raises(FrameError, match="sent an unexpected message 'StopCommand'"):
        ContentPart.from_frame(frame)


def test_blocking_reader_takes_exactly_one_message_until_its_deadline() -> None:
    """The rest of the stream belongs to the next reader. A sender that trickles does not extend the limit."""
    parent, child = socket.socketpair()
    is_over = threading.Event()

    def trickle() -> None:
        while not is_over.wait(0.02):
            child.sendall(b"\0")

    with parent, child:
        child.sendall(encode(StopCommand(1), (b"x",)) + struct.pack("<II", 1000, 0))
        frame = receive_frame(parent, deadline=time.monotonic() + 60)
        assert frame is not None
        assert StopCommand.from_frame(frame).number == 1
        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            started_at = time.monotonic()
            with pytest.raises(TimeoutError):
                receive_frame(parent, deadline=started_at + 0.3)
            assert time.monotonic() - started_at < 10
        finally:
            is_over.set()
            thread.join()


# --- batches and reports -------------------------------------------------------------------------

ANSWER = Answer(
    "PNG",
    5,
    4,
    0.5,
    0.25,
    -3.5,
    memoryview(bytes(12)).cast("f"),
    memoryview(bytes(12)).cast("i"),
    ImageTiming(1.0, 0.5, 2.0, 0.25, 2),
    memoryview(bytes(8)).cast("f"),
    [ImageWarning("end_missing", "the end is missing")],
)


@pytest.mark.parametrize("large_size", [1, MAX_PIECE_BYTES + 1])
def test_batch_survives_its_encoding(large_size: int) -> None:
    images: list[Item] = [
        b"first",
        SharedRef(4096, 10),
        ImageRequest(b"x" * large_size, include_logits=True),
        ImageRequest(SharedRef(1, 2), "input"),
        ImageRequest(b"y", include_embedding=True),
        ImageRequest(SharedRef(3, 4), include_embedding=True, boxes=((0, 0, 5, 5), (1, 2, 3, 4))),
        ImageRequest(b"z", boxes=()),
    ]
    batch = Batch(7, 3, images, [None, 1.5, None, None, None, None, 2.5], True, False, 9)
    (frame,) = decode_pieces([bytes(piece) for piece in batch.to_pieces()])
    assert Batch.from_frame(frame) == batch


def test_empty_and_mixed_reports_survive_their_encoding() -> None:
    with_embedding = ANSWER._replace(embedding=memoryview(bytes(range(20))).cast("f"))
    warnings = [ImageWarning("several", "two pictures")]
    boxes = BoxAnswers([ANSWER, with_embedding], "JPEG", 640, 480, warnings)
    no_boxes = BoxAnswers([], "PNG", 3, 2, [])
    cases: list[list[Answer | BoxAnswers | RequestError]] = [
        [boxes],
        [no_boxes],
        [ANSWER, boxes, BadImage("cut"), no_boxes, with_embedding, boxes, boxes],
        [],
        [BadImage("cut")],
        [ANSWER, BadImage("cut"), ANSWER],
        [ANSWER, BadImage("cut"), with_embedding, ANSWER, with_embedding],
    ]
    for answers in cases:
        report = BatchReport(answers, [0.5] * len(answers), 0.25, len(answers), 7)
        (frame,) = decode_pieces([report.to_bytes()])
        decoded = BatchReport.from_frame(frame)
        assert decoded._replace(answers=[]) == report._replace(answers=[])
        for one, expected in zip(decoded.answers, answers, strict=True):
            assert type(one) is type(expected)
            assert str(one) == str(expected) if isinstance(expected, RequestError) else one == expected


@settings(max_examples=300)
@given(
    st.sampled_from(
        [
            *("answers", "decode", "inference", "batch", "number", "logits"),
            *("embeddings", "embedding_rows", "boxes", "content"),
        ]
    ),
    st.data(),
)
def test_damaged_report_is_an_error_or_has_all_its_answers(name: str, data: st.DataObject) -> None:
    (frame,) = decode_pieces([BatchReport([ANSWER, BadImage("cut")], [0.5, 0.5], 0.25, 2, 7).to_bytes()])
    if name == "content":
        frame = frame._replace(content=memoryview(data.draw(st.binary(max_size=80))))
    elif name == "answers" and data.draw(st.booleans()):
        head = frame.values["answers"][0]
        head[data.draw(st.integers(0, len(head) - 1))] = data.draw(JSON)
    else:
        frame.values[name] = data.draw(JSON)
    try:
        report = BatchReport.from_frame(frame)
    except FrameError as error:
        assert str(error).startswith("sent a report that cannot be read")
        return
    assert all(isinstance(one, Answer | BoxAnswers | RequestError) for one in report.answers)


@pytest.mark.parametrize(
    "groups",
    [
        [[0, 2, "JPEG", 1, 1, []]],  # the second answer is an error
        [[0, 4, "JPEG", 1, 1, []]],
        [[2, 2, "JPEG", 1, 1, []]],
        [[-1, 1, "JPEG", 1, 1, []]],
        [[0, -1, "JPEG", 1, 1, []]],
        [[5, 0, "JPEG", 1, 1, []]],
        [[0, 1, "JPEG", 1, 1, []], [0, 1, "JPEG", 1, 1, []]],
        [[2, 1, "JPEG", 1, 1, []], [0, 1, "JPEG", 1, 1, []]],
        [[0, 1, "JPEG", 1, 1, [["code"]]]],
        [[0, 1.0, "JPEG", 1, 1, []]],
        [[0, 1]],
        [0],
        "boxes",
        7,
    ],
)
def test_boxes_without_their_answers_are_an_error(groups: Any) -> None:
    report = BatchReport([ANSWER, BadImage("cut"), ANSWER], [0.5] * 3, 0.25, 2, 7)
    (frame,) = decode_pieces([report.to_bytes()])
    frame.values["boxes"] = groups
    with pytest.raises(FrameError, match="cannot be read"):
        BatchReport.from_frame(frame)


@pytest.mark.parametrize(
    ("size", "rows"),
    [(20, [0, 1]), (20, [1]), (20, [5]), (20, [-2]), (20, []), (0, [0]), (21, [0]), (-4, [0]), (400, [0])],
)
def test_embeddings_of_another_size_or_of_no_answer_are_an_error(size: int, rows: list[int]) -> None:
    answer = ANSWER._replace(embedding=memoryview(bytes(20)).cast("f"))
    (frame,) = decode_pieces([BatchReport([answer, BadImage("cut")], [0.5, 0.5], 0.25, 2, 7).to_bytes()])
    frame.values["embeddings"], frame.values["embedding_rows"] = size, rows
    with pytest.raises(FrameError, match="cannot be read"):
        BatchReport.from_frame(frame)


def test_value_without_a_form_in_json_is_not_sent() -> None:
    with pytest.raises(TypeError):
        list(encode_frame("Kind", {"value": object()}))
