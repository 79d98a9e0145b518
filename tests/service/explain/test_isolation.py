"""No caller gets any part of the reply to another caller's request."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fovea.service.artifact.repository import ModelVersion
from fovea.service.explain.client import ExplainerReply, _Process
from fovea.service.runners.frames import MAX_PIECE_BYTES, receive_message, send_message
from fovea.service.runners.load_messages import LoadCommand, LoadedModel, ProcessPlan
from fovea.service.serving.registry import LiveModel
from fovea.service.settings import Settings
from tests.graphs import add_to_repository, build_model, read_contract
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
        struct.pack("<II", 13, 0) + b"{}".ljust(13),  # a complete message
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
    model: LiveModel, serve_peer: Callable[[socket.socket], None], use_process: Callable[[_Process], Any]
) -> Any:
    """Run `use_process` on a process whose end of the socket `serve_peer` has, in a thread."""
    local_end, peer_end = socket.socketpair()
    local_end.setblocking(False)
    peer_end.settimeout(60)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = _Process(child, *await asyncio.open_connection(sock=local_end))
    try:
        peer_task = asyncio.create_task(asyncio.to_thread(serve_peer, peer_end))
        outcome = await use_process(process)
        await peer_task
        return outcome
    finally:
        peer_end.close()
        process.kill()
        child.communicate()


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


def test_stop_is_never_sent_within_an_image(model: LiveModel) -> None:
    image = b"x" * (20 * MAX_PIECE_BYTES)
    upload_started = threading.Event()

    def serve_peer(peer: socket.socket) -> None:
        assert upload_started.wait(60)  # `stop` was called, and most of the image was not read yet
        for expected in ({"number": 1}, {"stop": 1}, {"number": 2}):
            frame = receive_message(peer)
            assert frame is not None
            values, content = frame
            assert expected.items() <= values.items()
            assert bytes(content) == (image if "number" in expected else b"")
            if "number" in expected:
                send_message(peer, {"number": expected["number"], "stopped": True})

    async def work(process: _Process) -> list[ExplainerReply]:
        async def stop() -> None:
            process.stop()
            upload_started.set()

        stop_task = asyncio.create_task(stop())
        first_reply = await process.send_request(model, {"ask": "explain"}, image, lambda part: None)
        await stop_task
        process.stop()  # too late: no request is open
        return [first_reply, await process.send_request(model, {"ask": "explain"}, image, lambda part: None)]

    replies = asyncio.run(_run_exchange(model, serve_peer, work))
    assert [reply.values for reply in replies] == [{"stopped": True}] * 2


@pytest.mark.parametrize(
    "reply",
    [{"number": 2}, {"number": 0, "part": True}, {}, []],
    ids=["next", "part_of_another", "none", "no_object"],
)
def test_reply_to_another_request_is_refused(model: LiveModel, reply: Any) -> None:
    def serve_peer(peer: socket.socket) -> None:
        receive_message(peer)
        send_message(peer, reply)

    parts: list[Any] = []

    async def work(process: _Process) -> str:
        with pytest.raises(Exception, match=r"^a reply that") as refusal:
            await process.send_request(model, {"ask": "explain"}, b"", parts.append)
        assert process.is_busy  # so that it is not used again
        return type(refusal.value).__name__

    assert asyncio.run(_run_exchange(model, serve_peer, work)) == "_ProtocolError"
    assert not parts


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
