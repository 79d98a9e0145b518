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
from tests.servers import Server

RANDOM = np.random.default_rng(0)
SMALL = make_jpeg()


def make_noise(side: int) -> bytes:
    """A PNG of 3 bytes a pixel: no two alike."""
    return encode_image(Image.fromarray(RANDOM.integers(0, 256, (side, side, 3), np.uint8)), "PNG")


LARGE = make_noise(500)  # 750 KB: comes in several pieces
MIDDLE = make_noise(160)  # 77 KB: a shared buffer, and mostly one piece


@pytest.fixture(scope="module")
def large_server(small_zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_BODY_TIMEOUT="1", FOVEA_LOG_LEVEL="debug") as running:
        yield running
    assert "Traceback" not in running.log


def read_probabilities(reply: object) -> list[float]:
    assert isinstance(reply, dict)
    return [one["probability"] for one in reply["predictions"]]


def test_an_image_has_the_same_answer_however_it_comes(large_server: Server) -> None:
    """Raw in one piece and in many, chunked (through ASGI), behind another request, in a form, as JSON."""
    client = large_server.client
    for image in (SMALL, MIDDLE, LARGE):
        whole = client.post("/v1/classify", content=image).json()
        pieces = (image[start : start + 50_000] for start in range(0, len(image), 50_000))
        chunked = client.post("/v1/classify", content=pieces).json()
        with Wire(large_server.url) as wire:
            head, body = classify_request(image).split(b"\r\n\r\n", 1)
            wire.send(head, b"\r\n\r\n", body[:1])
            for start in range(1, len(body), 100_000):
                wire.send(body[start : start + 100_000])
                large_server.client.get("/health/live")  # the service has read the piece
            dripped = wire.read_response().json
        with Wire(large_server.url) as wire:
            wire.send(classify_request(SMALL), classify_request(image), LIVE_REQUEST)
            wire.read_response()
            behind = wire.read_response().json
            assert wire.read_response().status == 200
        form = client.post("/v1/classify", files=[("a", ("a", image)), ("b", ("b", image))]).json()
        (first, second) = form["results"]
        assert whole == chunked == dripped == behind
        assert read_probabilities(first) == read_probabilities(second) == read_probabilities(whole)


def test_images_in_a_form_are_found_whatever_is_around_them(large_server: Server) -> None:
    """The parts have all sizes, share one buffer, and contain bytes that look like a boundary."""
    images = [SMALL, LARGE, MIDDLE, SMALL, LARGE + b"\r\n--xy", SMALL + b"\r\n"]
    wanted = [large_server.client.post("/v1/classify", content=one).json() for one in images]
    files = [("f", (f"{number}.x", image)) for number, image in enumerate(images)]
    tricky = b"\r\n--x\r\n" * 20_000
    files.insert(2, ("f", ("tricky.x", tricky)))
    boundary = {"Content-Type": "multipart/form-data; boundary=xyz"}
    results = large_server.client.post("/v1/classify", files=files, headers=boundary).json()["results"]
    assert results.pop(2)["error"]["code"] == "unsupported_format"
    assert [read_probabilities(one) for one in results] == [read_probabilities(one) for one in wanted]


def test_a_connection_goes_on_after_a_large_body(large_server: Server) -> None:
    with Wire(large_server.url) as wire:
        for _ in range(3):
            head, body = classify_request(LARGE).split(b"\r\n\r\n", 1)
            wire.send(head + b"\r\n\r\n")
            wire.send(body)
            assert wire.read_response().status == 200
            wire.send(classify_request(SMALL))
            assert wire.read_response().status == 200
            wire.send(LIVE_REQUEST)
            assert wire.read_response().status == 200
        wire.send(classify_request(LARGE, b"Connection: close"))
        answer = wire.read_response()
        assert (answer.status, answer.is_closing) == (200, True)
        assert wire.is_closed()


def test_what_follows_a_large_body_at_once_is_answered(large_server: Server) -> None:
    with Wire(large_server.url) as wire:
        wire.send(classify_request(LARGE)[:-5])
        wire.send(
            classify_request(LARGE)[-5:], classify_request(SMALL), LIVE_REQUEST, classify_request(MIDDLE)
        )
        assert [wire.read_response().status for _ in range(4)] == [200, 200, 200, 200]


def test_a_large_body_is_asked_for(large_server: Server) -> None:
    with Wire(large_server.url) as wire:
        wire.send(CLASSIFY_HEAD, b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(LARGE))
        assert wire.socket.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.send(LARGE)
        assert wire.read_response().status == 200


@pytest.mark.long
def test_a_large_body_that_stops_is_408_and_gives_all_back(large_server: Server) -> None:
    before = large_server.read_metric("fovea_errors_total", reason="body_timeout")
    for part in (0, 1000, 200_000):
        with Wire(large_server.url) as wire:
            wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(LARGE), LARGE[:part])
            answer = wire.read_response()
            assert (answer.status, answer.error_code) == (408, "body_timeout")
            wire.send(b"x" * 1000)  # is not taken for a request
            assert wire.is_closed()
    assert large_server.read_metric("fovea_errors_total", reason="body_timeout") == before + 3
    assert large_server.client.post("/v1/classify", content=LARGE).status_code == 200
    assert large_server.read_metric("fovea_requests_in_flight") == 1


def test_who_leaves_amid_a_large_body_is_counted(large_server: Server) -> None:
    def count_left() -> float:
        return large_server.read_metric("fovea_errors_total", reason="client_left")

    while (before := count_left()) != count_left():  # those of another test are still leaving
        pass
    for part in (0, 1000, 200_000):
        with Wire(large_server.url) as wire:
            wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(LARGE), LARGE[:part])
            large_server.wait_for_metric(2, "fovea_requests_in_flight")
        large_server.wait_for_metric(1, "fovea_requests_in_flight")
    assert count_left() == before + 3


@pytest.mark.slow
def test_no_body_gets_into_the_buffer_of_another(large_server: Server) -> None:
    """Many clients send at once while others leave half way: each gets the answer to its own image."""
    images = [make_noise(180 + 20 * number) for number in range(8)]
    wanted = [large_server.client.post("/v1/classify", content=image).json() for image in images]
    over = threading.Event()

    def disturb() -> None:
        while not over.is_set():
            with Wire(large_server.url) as wire:
                wire.send(classify_request(LARGE)[:400_000])

    def ask(number: int) -> bool:
        reply = large_server.client.post("/v1/classify", content=images[number % 8]).json()
        return bool(reply == wanted[number % 8])

    with ThreadPoolExecutor(6) as pool:
        disturbing = pool.submit(disturb)
        try:
            assert all(pool.map(ask, range(200)))
        finally:
            over.set()
        disturbing.result()


@pytest.mark.long
def test_more_large_bodies_than_buffers_are_answered(small_zoo: Path) -> None:
    """The requests without a buffer go through ASGI."""
    settings = {"FOVEA_QUEUE_IMAGES": "2", "FOVEA_REQUEST_IMAGES": "2"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running:
        wires = [Wire(running.url) for _ in range(5)]
        for wire in wires:
            wire.send(classify_request(LARGE)[:-1])
        running.wait_for_metric(6, "fovea_requests_in_flight")
        for wire in wires:
            wire.send(classify_request(LARGE)[-1:])
            assert wire.read_response().status == 200
            wire.socket.close()


def test_shared_buffers_are_released(large_server: Server) -> None:
    """However a request ends, the next request reuses its buffer, so that one buffer's memory is enough.

    Each request is sent only after the request before it has ended, which is a moment after its reply.
    """
    bodies = next(
        path
        for path in Path(f"/proc/{large_server.process.pid}/fd").iterdir()
        if "fovea-bodies" in str(path.readlink())
    )
    large_server.wait_for_metric(1, "fovea_requests_in_flight")  # the scrape itself: others have ended
    size = bodies.stat().st_size
    os.truncate(bodies, 0)
    os.truncate(bodies, size)  # what earlier tests have left is gone
    requests: list[tuple[dict[str, Any], int]] = [
        ({"content": LARGE}, 200),
        ({"content": bytes(700_000)}, 415),
        ({"files": {"f": LARGE}}, 200),
    ]
    for _ in range(5):
        for sent, status in requests:
            assert large_server.client.post("/v1/classify", **sent).status_code == status
            large_server.wait_for_metric(1, "fovea_requests_in_flight")
        with Wire(large_server.url) as wire:
            wire.send(classify_request(LARGE)[:-1])
            large_server.wait_for_metric(2, "fovea_requests_in_flight")  # it has come, before it goes
        large_server.wait_for_metric(1, "fovea_requests_in_flight")
    assert 0 < bodies.stat().st_blocks * 512 < 1.2 * len(LARGE)


class _Handler:
    """A handler of `exchange` that notes whether its buffer is still allocated when it is closed."""

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
def test_a_job_is_over_before_its_memory_is_released(end: Callable[[Exchange], None]) -> None:
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


def test_a_long_reply_and_a_deadline_go_past_asgi_too(large_server: Server) -> None:
    reply = large_server.client.post(
        "/v1/classify?top_k=0", content=LARGE, headers={"X-Deadline-Ms": "30000"}
    )
    assert reply.status_code == 200
    assert len(reply.json()["predictions"]) == len(
        large_server.client.get("/v1/models/small/contract").json()["labels"]
    )


def test_every_stage_of_a_large_request_is_measured(large_server: Server) -> None:
    names = ("read", "queue", "decode", "inference", "encode")

    def counts() -> list[float]:
        return [large_server.read_metric("fovea_stage_seconds_count", stage=name) for name in names]

    before = counts()
    assert large_server.client.post("/v1/classify", content=LARGE).status_code == 200
    assert [after - once for after, once in zip(counts(), before, strict=True)] == [1, 1, 1, 1, 1]


def test_pieces_that_the_parser_has_copied_count_too() -> None:
    """Some versions of it do so with what has looked like a boundary."""
    body = b"head\r\n--x and more\r\n-- tail"
    collector = FormCollector(body)
    tell = collector.callbacks()
    tell["on_part_begin"]()
    for event, text in (
        ("on_header_field", b"Content-Disposition"),
        ("on_header_value", b'form-data; name="f"; filename="a"'),
    ):
        tell[event](text, 0, len(text))
    tell["on_header_end"]()
    tell["on_part_data"](b"\r\n--x", 0, 5)
    tell["on_part_data"](body, 9, 18)
    tell["on_part_data"](b"\r\n--", 0, 4)
    tell["on_part_end"]()
    assert collector.file_ranges == [(4, 22)]
    assert body[4:22] == b"\r\n--x and more\r\n--"
