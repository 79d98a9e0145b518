"""No caller gets any part of the reply to another caller's request."""

from __future__ import annotations

import asyncio
import base64
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import Internal, NotReady, RequestError
from fovea.service.explain import client
from fovea.service.explain.client import ExplainerAnswer, ExplainerConnection, PendingQuestion
from fovea.service.explain.messages import (
    ContentPart,
    ExplainerReply,
    ExplainerRequest,
    HeatmapProgress,
    LayersQuestion,
    LayersResult,
    StopCommand,
    WeightsResult,
)
from fovea.service.resources.cgroup import Cgroup
from fovea.service.runners.child_process import ChildProcess
from fovea.service.runners.frames import MAX_PIECE_BYTES, FrameError, encode_frame, receive_frame
from fovea.service.runners.load_messages import LoadCommand, LoadedModel, ProcessPlan
from fovea.service.runners.messages import Failure, NumberedMessage
from fovea.service.serving.live_model import LiveModel
from fovea.service.settings import Settings
from tests.graphs import add_to_repository, build_model, read_contract
from tests.peers import replace_peer
from tests.pictures import encode_image, make_jpeg
from tests.poison import WRONG_NUMBER_IMAGE, BlockingImage, make_poison_environment
from tests.raw import Wire, classify_request
from tests.servers import Server, wait_until

pytestmark = pytest.mark.long

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}

_SIZE = 3 << 20
"""Size in bytes of an upload that exceeds every socket buffer."""

_NOISE = bytes(range(101, 122))


def _read_explained_colour(server: Server, colour: tuple[int, int, int]) -> tuple[int, ...]:
    reply = server.client.post("/v1/explain", content=encode_image(Image.new("RGB", (64, 64), colour), "PNG"))
    assert reply.status_code == 200, reply.text
    png = base64.b64decode(reply.json()["what_the_model_saw"]["png"])
    with Image.open(BytesIO(png)) as image:
        pixel = image.convert("RGB").getpixel((image.width // 2, image.height // 2))
    assert isinstance(pixel, tuple)
    return pixel


@pytest.mark.parametrize(
    "tail",
    [
        b"".join(encode_frame("StopCommand", {"number": 2})),  # a complete message
        struct.pack("<II", 200, 100 << 20) + b"x" * 13,  # the head of an endless message
        _NOISE,
    ],
    ids=["message", "endless", "noise"],
)
def test_aborted_upload_changes_no_later_answer(small_zoo: Path, tail: bytes) -> None:
    """The explaining process is stopped, so its socket is full when the deadline ends the request."""
    body = b"\x89PNG\r\n\x1a\n".ljust(_SIZE - len(tail), b"\0") + tail
    with Server(FOVEA_MODELS=str(small_zoo)) as server:
        assert _read_explained_colour(server, (255, 255, 255)) == (255, 255, 255)
        (pid,) = server.child_pids("explain.process")
        os.kill(pid, signal.SIGSTOP)
        late_reply = server.client.post("/v1/explain", content=body, headers={"X-Deadline-Ms": "300"})
        assert late_reply.status_code == 504
        os.kill(pid, signal.SIGCONT)
        for colour in COLOURS.values():
            assert _read_explained_colour(server, colour) == colour


def test_model_file_stays_open_until_process_has_read_it(tmp_path: Path) -> None:
    """The caller has left and the model is unloaded before the process begins with the request."""
    for name in ("small", "other"):
        add_to_repository(build_model(), tmp_path / "zoo", name)
    settings = {"FOVEA_MANAGEMENT": "true", "FOVEA_DEFAULT_MODEL": "small"}
    with Server(FOVEA_MODELS=str(tmp_path / "zoo"), **settings) as server:
        assert _read_explained_colour(server, COLOURS["red"]) == COLOURS["red"]
        (pid,) = server.child_pids("explain.process")
        os.kill(pid, signal.SIGSTOP)
        body = encode_image(Image.new("RGB", (64, 64)), "PNG")
        late_reply = server.client.post(
            "/v1/models/other/explain", content=body, headers={"X-Deadline-Ms": "300"}
        )
        assert late_reply.status_code == 504
        assert server.client.post("/v2/repository/models/other/unload").status_code == 200
        os.kill(pid, signal.SIGCONT)
        assert _read_explained_colour(server, COLOURS["blue"]) == COLOURS["blue"]
        assert server.child_pids("explain.process") == {pid}
    assert "could not be answered" not in server.log


# --- the explainer's stream, with the test as the process ----------------------------------------


async def _run_exchange(
    serve_peer: Callable[[socket.socket], None], use_connection: Callable[[ExplainerConnection], Any]
) -> Any:
    """Run `use_connection` on a process whose end of the socket `serve_peer` has, in a thread."""
    process = ChildProcess("explain.process")
    peer = replace_peer(process)
    connection = ExplainerConnection(process)
    await connection.connect()
    try:
        peer_task = asyncio.create_task(asyncio.to_thread(serve_peer, peer))
        outcome = await use_connection(connection)
        await peer_task
        return outcome
    finally:
        peer.close()
        connection.give_up()
        process.wait_exit()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    root = add_to_repository(build_model(), tmp_path_factory.mktemp("isolated") / "zoo")
    path = root / "small" / "1" / "model.onnx"
    version = ModelVersion.from_path(path, "small", "1")
    plan = ProcessPlan("cpu", 0, 1, 0, 1, 1 << 20, 1 << 20, 1)
    loaded_model = LoadedModel(read_contract(build_model()).to_json(), "cpu", 4, 1e6, 0.1, {})
    return LiveModel.from_load_result(
        version, LoadCommand(1, str(path), str(path), version.fingerprint, plan), loaded_model, Settings()
    )


def _send(peer: socket.socket, message: NumberedMessage, content: bytes = b"") -> None:
    for piece in message.to_pieces([content]):
        peer.sendall(piece)


def _make_reply(number: int) -> ExplainerReply:
    return ExplainerReply(number, LayersResult([], False, None), 0)


def test_stop_is_never_sent_within_an_image(model: LiveModel) -> None:
    image = b"x" * (20 * MAX_PIECE_BYTES)
    upload_started = threading.Event()

    def serve_peer(peer: socket.socket) -> None:
        assert upload_started.wait(60)  # the request was stopped, and most of the image was not read yet
        for expected in (ExplainerRequest, StopCommand, ExplainerRequest):
            frame = receive_frame(peer)
            assert frame is not None
            assert bytes(frame.content) == (image if expected is ExplainerRequest else b"")
            message = expected.from_frame(frame)
            if isinstance(message, ExplainerRequest):
                numbers.append(message.number)
                _send(peer, _make_reply(message.number))
            else:
                assert [message.number] == numbers

    numbers: list[int] = []

    async def work(connection: ExplainerConnection) -> list[ExplainerAnswer[LayersResult]]:
        async def stop() -> None:
            connection.stop_request()
            upload_started.set()

        stop_task = asyncio.create_task(stop())
        first_answer = await connection.send_request(PendingQuestion(model, LayersQuestion(), image))
        await stop_task
        connection.stop_request()  # too late: no request is open
        return [
            first_answer,
            await connection.send_request(PendingQuestion(model, LayersQuestion(), image)),
        ]

    answers = asyncio.run(_run_exchange(serve_peer, work))
    assert [answer.result for answer in answers] == [LayersResult([], False, None)] * 2
    assert numbers == [1, 2]


def test_cancelled_request_is_written_to_its_end(model: LiveModel) -> None:
    """Whoever cancels the waiting task, no frame begins within another one."""
    image = b"x" * (20 * MAX_PIECE_BYTES)
    is_cancelled = threading.Event()

    def serve_peer(peer: socket.socket) -> None:
        assert is_cancelled.wait(60)
        frame = receive_frame(peer)
        assert frame is not None
        assert ExplainerRequest.from_frame(frame).number == 1
        assert bytes(frame.content) == image

    async def work(connection: ExplainerConnection) -> None:
        task = asyncio.create_task(connection.send_request(PendingQuestion(model, LayersQuestion(), image)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert connection.is_busy  # so that nobody else uses it
        is_cancelled.set()

    asyncio.run(_run_exchange(serve_peer, work))


_PROGRESS = HeatmapProgress(1, 0.5, 16, None, None)

_WRONG_REPLIES = {
    "next": (_make_reply(2).to_bytes(), "answered question 2 instead of question 1"),
    "progress of another": (HeatmapProgress(0, 0.5, 1, None, None).to_bytes(), "answered question 0"),
    "failure of another": (Failure(7, "").to_bytes(), "answered question 7"),
    "no number": (b"".join(encode_frame("ExplainerReply", {})), "sent a dict instead of"),
    "no object": (struct.pack("<II", 2, 0) + b"[]", "sent a header that cannot be read"),
    "noise": (_NOISE, "sent a message of"),
    "another result": (ExplainerReply(1, WeightsResult(1), 0).to_bytes(), "sent a WeightsResult"),
    "stopped by itself": (ExplainerReply(1, None, 0).to_bytes(), "sent a NoneType instead of LayersResult"),
    "missing content": (ExplainerReply(1, LayersResult([], False, None), 1).to_bytes(), "sent 0 bytes"),
    "extra content": (
        b"".join([*ContentPart(1).to_pieces([b"xy"]), _make_reply(1).to_bytes()]),
        "sent 2 bytes instead of 0",
    ),
    "endless content": (b"".join(ContentPart(1).to_pieces([b"x" * 999])), "sent more than 998 bytes"),
    "request": (StopCommand(1).to_bytes(), "sent an unexpected message 'StopCommand'"),
    "extra field": (
        b"".join(encode_frame("Refusal", {"number": 1, "code": "", "message": "", "more": 1})),
        "sent a dict instead of",
    ),
    "end": (b"", "the process has ended"),
}


@pytest.mark.parametrize("name", _WRONG_REPLIES)
def test_wrong_reply_ends_the_process(model: LiveModel, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(client, "MAX_CONTENT_BYTES", 998)
    content, message = _WRONG_REPLIES[name]

    def serve_peer(peer: socket.socket) -> None:
        receive_frame(peer)
        peer.sendall(_PROGRESS.to_bytes() + content)
        if not content:
            peer.shutdown(socket.SHUT_RDWR)

    steps: list[HeatmapProgress] = []

    async def work(connection: ExplainerConnection) -> None:
        with pytest.raises((FrameError, EOFError), match=message):
            await connection.send_request(PendingQuestion(model, LayersQuestion(), b"", steps.append))
        assert connection.is_lost
        with pytest.raises(EOFError):  # a further request fails at once
            await connection.send_request(PendingQuestion(model, LayersQuestion(), b"", steps.append))
        assert not content or connection.process.wait_exit() == -signal.SIGKILL

    asyncio.run(_run_exchange(serve_peer, work))
    assert steps == [_PROGRESS]


@pytest.mark.parametrize("steps", [0, 5])
def test_silent_process_is_given_up(model: LiveModel, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Each message of the process extends the time limit."""
    monkeypatch.setattr(client, "_SILENCE_TIMEOUT", 1.0)
    has_ended = threading.Event()

    def serve_peer(peer: socket.socket) -> None:
        receive_frame(peer)
        for _ in range(steps):
            peer.sendall(_PROGRESS.to_bytes())
            assert not has_ended.wait(0.25)
        assert has_ended.wait(60)

    async def work(connection: ExplainerConnection) -> float:
        started_at = time.monotonic()
        with pytest.raises(TimeoutError):
            await connection.send_request(PendingQuestion(model, LayersQuestion()))
        has_ended.set()
        assert connection.is_lost
        return time.monotonic() - started_at

    assert 0.25 * steps + 0.7 < asyncio.run(_run_exchange(serve_peer, work)) < 60


@pytest.mark.parametrize(
    ("fault", "error_type"),
    [
        (signal.SIGKILL, NotReady),
        ("out of memory", Internal),
        (signal.SIGSEGV, Internal),
        ("error", Internal),
    ],
)
def test_only_a_kill_from_outside_is_no_failure(
    model: LiveModel, tmp_path: Path, fault: signal.Signals | str, error_type: type[RequestError]
) -> None:
    """Any other end may be due to the question, and another attempt would not help."""
    (tmp_path / "self").write_text("0::/")
    events = tmp_path / "memory.events"
    events.write_text("oom_kill 7\n")

    async def ask() -> None:
        explainer = client.ExplainerClient(idle_seconds=60, cgroup=Cgroup(tmp_path, tmp_path / "self"))
        await explainer.send_request(model, LayersQuestion())
        connection = explainer._connection
        assert connection
        os.kill(connection.process.pid, signal.SIGSTOP)
        if fault == "error":  # the process closes the stream, and ends some time later
            connection.send(encode_frame("Nonsense", {}))
        task = asyncio.create_task(explainer.send_request(model, LayersQuestion()))
        while not connection.is_busy:
            await asyncio.sleep(0)
        if fault == "out of memory":
            events.write_text("oom_kill 8\n")
        if fault != "error":
            os.kill(connection.process.pid, signal.SIGKILL if isinstance(fault, str) else fault)
        os.kill(connection.process.pid, signal.SIGCONT)
        with pytest.raises(error_type):
            await task
        await explainer.send_request(model, LayersQuestion())
        explainer.close()

    asyncio.run(ask())


def test_process_that_cannot_be_started_is_no_failure(model: LiveModel) -> None:
    async def ask() -> None:
        explainer = client.ExplainerClient(idle_seconds=60)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(NotReady, match="can be started"):
                await explainer.send_request(model, LayersQuestion())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await explainer.send_request(model, LayersQuestion())
        explainer.close()

    asyncio.run(ask())


# --- the runners' stream -------------------------------------------------------------------------


def test_runner_that_answers_wrong_batch_is_replaced(small_zoo: Path, tmp_path: Path) -> None:
    """The next runner answers the other images of the batch."""
    gate = BlockingImage(tmp_path / "gate")
    settings = {"FOVEA_MODELS": str(small_zoo), "FOVEA_RUNNERS": "1", **make_poison_environment(tmp_path)}
    with (
        Server(**settings) as server,
        Wire(server.url) as first,
        Wire(server.url) as second,
        Wire(server.url) as third,
    ):
        (pid,) = server.runner_pids
        first.send(classify_request(gate.image))
        wait_until(lambda: server.read_metric("fovea_images_in_flight") == 1)
        second.send(classify_request(WRONG_NUMBER_IMAGE))
        third.send(classify_request(make_jpeg()))
        server.wait_for_metric(3, "fovea_images_in_flight")
        gate.release()
        assert first.read_response().error_code == "unsupported_format"
        assert second.read_response().error_code == "internal"
        assert third.read_response().status == 200
        assert pid not in server.runner_pids
    assert "instead of batch 2; it is killed" in server.log
