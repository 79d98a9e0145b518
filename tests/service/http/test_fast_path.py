"""Requests that bypass ASGI: their bodies in pieces and shared buffers, and the connection after them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from fovea.service.api.forms import FormCollector
from fovea.service.http.fast_path import Exchange, FastApp
from fovea.service.http.observer import Observer
from fovea.service.http.request_record import RequestRecord
from fovea.service.runners.shared_memory import SharedBodies
from tests.pictures import encode_image, make_jpeg
from tests.raw import CLASSIFY_HEAD, LIVE_REQUEST, Wire, classify_request
from tests.servers import Server, read_open_files

RANDOM = np.random.default_rng(0)
SMALL_IMAGE = make_jpeg()


def make_noise(side: int) -> bytes:
    """Return a PNG of random pixels, of about 3 bytes each."""
    return encode_image(Image.fromarray(RANDOM.integers(0, 256, (side, side, 3), np.uint8)), "PNG")


LARGE_IMAGE = make_noise(500)  # 750 KB: arrives in several pieces
MEDIUM_IMAGE = make_noise(160)  # 77 KB: uses a shared buffer, and mostly arrives in one piece


@pytest.fixture(scope="module")
def large_server(small_zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_BODY_TIMEOUT="1", FOVEA_LOG_LEVEL="debug") as server:
        yield server
    assert "Traceback" not in server.log


def read_probabilities(reply: object) -> list[float]:
    assert isinstance(reply, dict)
    return [prediction["probability"] for prediction in reply["predictions"]]


def test_image_gets_the_same_answer_for_every_framing(large_server: Server) -> None:
    """The framings: one piece, many pieces, chunks (through ASGI), behind another request, and a form."""
    client = large_server.client
    for image in (SMALL_IMAGE, MEDIUM_IMAGE, LARGE_IMAGE):
        single_reply = client.post("/v1/classify", content=image).json()
        pieces = (image[start : start + 50_000] for start in range(0, len(image), 50_000))
        chunked_reply = client.post("/v1/classify", content=pieces).json()
        with Wire(large_server.url) as wire:
            head, body = classify_request(image).split(b"\r\n\r\n", 1)
            wire.send(head, b"\r\n\r\n", body[:1])
            for start in range(1, len(body), 100_000):
                wire.send(body[start : start + 100_000])
                large_server.client.get("/health/live")  # the service has read the piece
            pieces_reply = wire.read_response().json
        with Wire(large_server.url) as wire:
            wire.send(classify_request(SMALL_IMAGE), classify_request(image), LIVE_REQUEST)
            wire.read_response()
            pipelined_reply = wire.read_response().json
            assert wire.read_response().status == 200
        form_reply = client.post("/v1/classify", files=[("a", ("a", image)), ("b", ("b", image))]).json()
        (first, second) = form_reply["results"]
        assert single_reply == chunked_reply == pieces_reply == pipelined_reply
        assert read_probabilities(first) == read_probabilities(second) == read_probabilities(single_reply)


def test_form_images_with_boundary_lookalikes_are_classified(large_server: Server) -> None:
    """The parts have several sizes, share one buffer, and contain bytes that look like a boundary."""
    images = [
        SMALL_IMAGE,
        LARGE_IMAGE,
        MEDIUM_IMAGE,
        SMALL_IMAGE,
        LARGE_IMAGE + b"\r\n--xy",
        SMALL_IMAGE + b"\r\n",
    ]
    expected = [large_server.client.post("/v1/classify", content=image).json() for image in images]
    files = [("f", (f"{number}.x", image)) for number, image in enumerate(images)]
    tricky = b"\r\n--x\r\n" * 20_000
    files.insert(2, ("f", ("tricky.x", tricky)))
    boundary = {"Content-Type": "multipart/form-data; boundary=xyz"}
    results = large_server.client.post("/v1/classify", files=files, headers=boundary).json()["results"]
    assert results.pop(2)["error"]["code"] == "unsupported_format"
    assert [read_probabilities(result) for result in results] == [
        read_probabilities(reply) for reply in expected
    ]


def test_connection_is_reused_after_a_large_body(large_server: Server) -> None:
    with Wire(large_server.url) as wire:
        for _ in range(3):
            head, body = classify_request(LARGE_IMAGE).split(b"\r\n\r\n", 1)
            wire.send(head + b"\r\n\r\n")
            wire.send(body)
            assert wire.read_response().status == 200
            wire.send(classify_request(SMALL_IMAGE))
            assert wire.read_response().status == 200
            wire.send(LIVE_REQUEST)
            assert wire.read_response().status == 200
        wire.send(classify_request(LARGE_IMAGE, b"Connection: close"))
        answer = wire.read_response()
        assert (answer.status, answer.is_closing) == (200, True)
        assert wire.is_closed()


def test_requests_right_after_a_large_body_are_answered(large_server: Server) -> None:
    with Wire(large_server.url) as wire:
        wire.send(classify_request(LARGE_IMAGE)[:-5])
        wire.send(
            classify_request(LARGE_IMAGE)[-5:],
            classify_request(SMALL_IMAGE),
            LIVE_REQUEST,
            classify_request(MEDIUM_IMAGE),
        )
        assert [wire.read_response().status for _ in range(4)] == [200, 200, 200, 200]


def test_expect_header_of_a_large_body_gets_100_continue(large_server: Server) -> None:
    with Wire(large_server.url) as wire:
        wire.send(CLASSIFY_HEAD, b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(LARGE_IMAGE))
        assert wire.socket.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.send(LARGE_IMAGE)
        assert wire.read_response().status == 200


@pytest.mark.long
def test_stalled_large_body_gets_408_and_is_released(large_server: Server) -> None:
    before = large_server.read_metric("fovea_errors_total", reason="body_timeout")
    for part in (0, 1000, 200_000):
        with Wire(large_server.url) as wire:
            wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(LARGE_IMAGE), LARGE_IMAGE[:part])
            answer = wire.read_response()
            assert (answer.status, answer.error_code) == (408, "body_timeout")
            wire.send(b"x" * 1000)  # these bytes are no request
            assert wire.is_closed()
    assert large_server.read_metric("fovea_errors_total", reason="body_timeout") == before + 3
    assert large_server.client.post("/v1/classify", content=LARGE_IMAGE).status_code == 200
    assert large_server.read_metric("fovea_requests_in_flight") == 1


def test_disconnect_during_a_large_body_is_counted(large_server: Server) -> None:
    def count_disconnects() -> float:
        return large_server.read_metric("fovea_errors_total", reason="client_left")

    # clients of another test may still be disconnecting
    large_server.wait_for_metric(1, "fovea_requests_in_flight")
    before = count_disconnects()
    for part in (0, 1000, 200_000):
        with Wire(large_server.url) as wire:
            wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(LARGE_IMAGE), LARGE_IMAGE[:part])
            large_server.wait_for_metric(2, "fovea_requests_in_flight")
        large_server.wait_for_metric(1, "fovea_requests_in_flight")
    assert count_disconnects() == before + 3


@pytest.mark.slow
def test_concurrent_large_bodies_are_not_mixed_up(large_server: Server) -> None:
    """Many clients send at once while others disconnect half way: each gets the answer to its own image."""
    images = [make_noise(180 + 20 * number) for number in range(8)]
    expected = [large_server.client.post("/v1/classify", content=image).json() for image in images]
    stop = threading.Event()

    def send_partial_bodies() -> None:
        while not stop.is_set():
            with Wire(large_server.url) as wire:
                wire.send(classify_request(LARGE_IMAGE)[:400_000])

    def is_answered_correctly(number: int) -> bool:
        reply = large_server.client.post("/v1/classify", content=images[number % 8]).json()
        return bool(reply == expected[number % 8])

    with ThreadPoolExecutor(6) as pool:
        disturbance = pool.submit(send_partial_bodies)
        try:
            assert all(pool.map(is_answered_correctly, range(200)))
        finally:
            stop.set()
        disturbance.result()


@pytest.mark.long
def test_more_large_bodies_than_buffers_are_answered(small_zoo: Path) -> None:
    """The requests without a buffer go through ASGI."""
    settings = {"FOVEA_QUEUE_IMAGES": "2", "FOVEA_REQUEST_IMAGES": "2"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
        wires = [Wire(server.url) for _ in range(5)]
        for wire in wires:
            wire.send(classify_request(LARGE_IMAGE)[:-1])
        server.wait_for_metric(6, "fovea_requests_in_flight")
        for wire in wires:
            wire.send(classify_request(LARGE_IMAGE)[-1:])
            assert wire.read_response().status == 200
            wire.socket.close()


def test_shared_buffers_are_released(large_server: Server) -> None:
    """The next request reuses the buffer, however a request ends, so one buffer's memory is enough.

    Each request is sent only after the one before it has ended, which is a moment after its reply.
    """
    files = read_open_files(large_server.process.pid)
    bodies = next(path for path, name in files.items() if "fovea-bodies" in name)
    large_server.wait_for_metric(1, "fovea_requests_in_flight")  # only the scrape itself is left
    size = bodies.stat().st_size
    os.truncate(bodies, 0)
    os.truncate(bodies, size)  # this discards the bytes of earlier tests
    requests: list[tuple[dict[str, Any], int]] = [
        ({"content": LARGE_IMAGE}, 200),
        ({"content": bytes(700_000)}, 415),
        ({"files": {"f": LARGE_IMAGE}}, 200),
    ]
    for _ in range(5):
        for arguments, status in requests:
            assert large_server.client.post("/v1/classify", **arguments).status_code == status
            large_server.wait_for_metric(1, "fovea_requests_in_flight")
        with Wire(large_server.url) as wire:
            wire.send(classify_request(LARGE_IMAGE)[:-1])
            # the request has to arrive before the client disconnects
            large_server.wait_for_metric(2, "fovea_requests_in_flight")
        large_server.wait_for_metric(1, "fovea_requests_in_flight")
    assert 0 < bodies.stat().st_blocks * 512 < 1.2 * len(LARGE_IMAGE)


class _Handler:
    """A request handler that records whether its buffer is still allocated when it is closed."""

    def __init__(self, bodies: SharedBodies) -> None:
        self.shared_bodies = bodies
        self.free_counts: list[int] = []

    def can_answer(self, url: bytes) -> bool:
        return False

    def open_request(self, exchange: Exchange, method: bytes, url: bytes, headers: object) -> _Handler:
        return self

    def count_bytes(self, size: int) -> None:
        pass

    def handle_body(self, body: object, size: int) -> None:
        pass

    def close(self) -> None:
        self.free_counts.append(self.shared_bodies.free_count)


class _Writer:
    def respond(self, *values: object) -> None:
        pass

    def refuse_with_delay(self, exchange: Exchange, error: object) -> None:
        pass


class _Observer:
    def start_request(self) -> None:
        pass

    def end_request(self, record: RequestRecord) -> None:
        pass

    def record_failure(self, record: RequestRecord, reason: str) -> None:
        pass


@pytest.mark.parametrize(
    "end", [lambda exchange: exchange.answer(b""), lambda exchange: exchange.disconnect()]
)
def test_handler_is_closed_before_its_buffer_is_released(end: Callable[[Exchange], None]) -> None:
    bodies = SharedBodies(1, 1 << 20)
    handler = _Handler(bodies)
    record = RequestRecord("POST", {})
    exchange = Exchange(_Writer(), cast(Observer, _Observer()), record, 1 << 20)
    assert exchange.try_open(cast(FastApp, handler), b"POST", b"/", {})
    assert bodies.free_count == 0
    end(exchange)
    assert handler.free_counts == [0], "the handler is closed once, while the buffer is still allocated"
    assert bodies.free_count == 1
    bodies.close()


def test_large_request_with_deadline_returns_all_labels(large_server: Server) -> None:
    reply = large_server.client.post(
        "/v1/classify?top_k=0", content=LARGE_IMAGE, headers={"X-Deadline-Ms": "30000"}
    )
    assert reply.status_code == 200
    assert len(reply.json()["predictions"]) == len(
        large_server.client.get("/v1/models/small/contract").json()["labels"]
    )


def test_every_stage_of_a_large_request_is_measured(large_server: Server) -> None:
    names = ("read", "queue", "decode", "inference", "encode")

    def read_counts() -> list[float]:
        return [large_server.read_metric("fovea_stage_seconds_count", stage=name) for name in names]

    before = read_counts()
    assert large_server.client.post("/v1/classify", content=LARGE_IMAGE).status_code == 200
    assert [new - old for new, old in zip(read_counts(), before, strict=True)] == [1, 1, 1, 1, 1]


def test_form_collector_counts_pieces_that_the_parser_copied() -> None:
    """Some versions of the parser copy bytes that looked like a boundary at first."""
    body = b"head\r\n--x and more\r\n-- tail"
    collector = FormCollector(body)
    callbacks = collector.callbacks()
    callbacks["on_part_begin"]()
    for event, text in (
        ("on_header_field", b"Content-Disposition"),
        ("on_header_value", b'form-data; name="f"; filename="a"'),
    ):
        callbacks[event](text, 0, len(text))
    callbacks["on_header_end"]()
    callbacks["on_part_data"](b"\r\n--x", 0, 5)
    callbacks["on_part_data"](body, 9, 18)
    callbacks["on_part_data"](b"\r\n--", 0, 4)
    callbacks["on_part_end"]()
    assert collector.file_ranges == [(4, 22)]
    assert body[4:22] == b"\r\n--x and more\r\n--"
