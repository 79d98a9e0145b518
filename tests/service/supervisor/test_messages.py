"""Messages between supervisor and workers: a packet is the exact message or an error, and never a wait."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fovea.service.artifact.repository import ModelConfig, ModelVersion, RefusedVersion, ServingState
from fovea.service.errors import (
    ContractError,
    Draining,
    GoldenError,
    Internal,
    Interrupted,
    ModelError,
    ModelNotFound,
    RequestError,
    SwapRefused,
    Unproven,
)
from fovea.service.runners.frames import FrameError, encode_frame
from fovea.service.runners.messages import Message
from fovea.service.supervisor.channel import Channel
from fovea.service.supervisor.messages import (
    SUPERVISOR_MESSAGES,
    WORKER_MESSAGES,
    AbandonCommand,
    ChangeReply,
    ConnectionReport,
    ErrorValues,
    LoadModelRequest,
    LostModelReport,
    NoMoreConnections,
    PassedConnection,
    PrepareReply,
    PrepareRequest,
    ReadyReport,
    RefusedVersionReport,
    ServeCommand,
    StartFailure,
    StartingHeartbeat,
    StopSignal,
    UnloadModelRequest,
    VersionValues,
)

CONFIG = ModelConfig(queue_images=5, threads=2, provider="cpu")
VERSION = ModelVersion(Path("zoo/a/10/model.onnx"), "a", "10", (1, 2, 3), CONFIG)
FILE = ModelVersion(Path("model.onnx"), None, None, (1, 2, 3))
VALUES = VersionValues.from_version(VERSION)
STATES = [
    ServingState({}, None, (), is_empty=True),
    ServingState({None: (FILE,)}, None),
    ServingState(
        {"null": (ModelVersion(Path("b"), "null", "2", ()),), "a": (VERSION, replace(VERSION, version="11"))},
        "a",
        (RefusedVersion("a", "11", "too many flips"), RefusedVersion("c", "", "no version", is_pinned=True)),
    ),
]

MESSAGES: list[Message] = [
    PassedConnection(),
    StopSignal(15),
    *map(ServeCommand.from_state, STATES),
    PrepareRequest(1, "a", [VALUES, VALUES], True),
    PrepareRequest(2, None, [], False),
    AbandonCommand(None),
    ChangeReply(3, None),
    ChangeReply(4, ErrorValues("SwapRefused", "too slow")),
    StartingHeartbeat(),
    StartFailure("no memory"),
    ReadyReport("a version 10 on cpu", "/v1/classify"),
    ConnectionReport(3, 1, [0, 2]),
    NoMoreConnections(),
    PrepareReply(1, None),
    PrepareReply(1, ErrorValues("GoldenError", "not reproduced")),
    LoadModelRequest(5, "a", None),
    UnloadModelRequest(6, "a"),
    LostModelReport("a", is_lost=True),
    RefusedVersionReport(VALUES, "bad", is_lasting=False),
    AbandonCommand("x" * 200_000),
]
ALL_TYPES = (*SUPERVISOR_MESSAGES, *WORKER_MESSAGES)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def create_reader() -> Channel[Message]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as unused:
        return Channel(unused, ALL_TYPES)


def split(message: Message) -> list[bytes]:
    encoded = message.to_bytes()
    return [encoded[start : start + (1 << 16)] for start in range(0, len(encoded), 1 << 16)]


def encode_values(message: Message, values: dict[str, Any]) -> bytes:
    return b"".join(encode_frame(type(message).__name__, values))


def check_exact(reader: Channel[Message], message: Message) -> None:
    *first, last = map(reader.decode, split(message))
    assert first == [None] * len(first)
    assert type(last) is type(message)
    assert last.to_bytes() == message.to_bytes()


def test_every_message_is_tested_and_has_one_direction() -> None:
    assert {type(one) for one in MESSAGES} == set(ALL_TYPES)
    assert len(set(ALL_TYPES)) == len(ALL_TYPES)


def test_messages_survive_their_encoding() -> None:
    reader = create_reader()
    for message in MESSAGES * 2:
        check_exact(reader, message)


@pytest.mark.parametrize("state", STATES, ids=["empty", "file", "models"])
def test_state_survives_its_message(state: ServingState) -> None:
    restored = ServeCommand.from_state(state).to_state()
    assert restored == state
    assert list(restored.versions_by_model) == list(state.versions_by_model)


def test_settings_that_cannot_be_read_are_a_frame_error() -> None:
    values = VersionValues("a", "a", "1", [], {"threads": "many"})
    with pytest.raises(FrameError, match="sent settings that cannot be read"):
        ServeCommand([values], None, [], False).to_state()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Interrupted("bad"), Interrupted),
        (Unproven("bad"), Unproven),
        (GoldenError("bad"), GoldenError),
        (ModelError("bad"), ModelError),
        (ContractError("bad"), ModelError),
        (SwapRefused("bad"), SwapRefused),
        (ModelNotFound("bad"), ModelNotFound),
        (Internal("bad"), Internal),
        (Draining("bad", retry_after=1.0), Internal),
    ],
)
def test_error_survives_its_message(error: ModelError | RequestError, expected: type[Exception]) -> None:
    restored = ErrorValues.from_exception(error).to_exception()
    assert (type(restored), str(restored)) == (expected, "bad")


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_message_without_a_field_is_refused(message: Message) -> None:
    for name in vars(message):
        _, values = orjson.loads(message.to_bytes()[8:])
        del values[name]
        with pytest.raises(FrameError):
            create_reader().decode(encode_values(message, values))


@pytest.mark.long
@settings(max_examples=500)
@given(st.sampled_from(MESSAGES), st.data())
def test_message_with_a_wrong_field_is_refused_or_exact(message: Message, data: st.DataObject) -> None:
    _, values = orjson.loads(message.to_bytes()[8:])
    name = data.draw(st.sampled_from([*values, "more"]))
    values[name] = data.draw(JSON)
    reader = create_reader()
    try:
        decoded = reader.decode(encode_values(message, values))
    except FrameError as error:
        assert str(error).startswith("sent ")
    else:
        assert name != "more"
        assert decoded is not None
        assert decoded.to_bytes() == encode_values(message, values)
    check_exact(reader, message)


@pytest.mark.long
@settings(max_examples=500)
@given(st.sampled_from(MESSAGES), st.sampled_from(MESSAGES), st.data())
def test_damaged_packet_is_an_error_or_a_message_and_damages_no_later_message(
    message: Message, next_message: Message, data: st.DataObject
) -> None:
    packets = split(message)
    number = data.draw(st.integers(0, len(packets) - 1))
    packet = bytearray(packets[number])
    place = data.draw(st.integers(0, len(packet)))
    damage = data.draw(st.binary(max_size=12))
    packet[place : place + data.draw(st.integers(0, 12))] = damage
    packets[number] = bytes(packet[: 1 << 16])
    reader = create_reader()
    for one in packets:
        with contextlib.suppress(FrameError):
            decoded = reader.decode(one)
            assert decoded is not None or len(one) == 1 << 16
    if packets[-1:] == [b""] or len(packets[-1]) == 1 << 16:
        return  # the reader waits for the rest, and the next packet is taken for it
    check_exact(reader, next_message)


def test_packet_ends_exactly_one_message() -> None:
    reader = create_reader()
    packet = StartingHeartbeat().to_bytes()
    for wrong_packet in (packet + b"x", packet * 2, packet[:-1], packet[:3], b""):
        with pytest.raises(FrameError, match="sent a packet that ends"):
            reader.decode(wrong_packet)
        check_exact(reader, MESSAGES[0])


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_noise_is_an_error_and_damages_no_later_message(packets: list[bytes]) -> None:
    reader = create_reader()
    for packet in packets:
        with pytest.raises(FrameError):
            reader.decode(packet)
    check_exact(reader, MESSAGES[0])
