"""The limits of callers in a real service: replies, what ends a place, proxies, workers and fairness."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from fovea.service.access.caller import Scope
from fovea.service.access.keys_file import ApiKey, hash_key
from fovea.service.observability.metrics import CLIENT_LEFT
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.raw import CLASSIFY_HEAD, Wire, classify_request
from tests.servers import Server, list_children, wait_until
from tests.service.api.test_protocols import ASKED, error_code, post_request

IMAGE = make_jpeg()
PROXY = {"FOVEA_TRUSTED_PROXIES": "127.0.0.1"}


def send_as(server: Server, address: str, image: bytes = IMAGE, **headers: str) -> httpx.Response:
    """Send an image as a trusted proxy would forward it from this address."""
    return server.client.post("/v1/classify", content=image, headers={"X-Forwarded-For": address, **headers})


@contextmanager
def stop_runners(server: Server) -> Iterator[None]:
    """Stop the runners inside the block, so that images wait."""
    pids = server.runner_pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def rate_server(small_zoo: Path) -> Iterator[Server]:
    """A server in which each caller may send two images at once, and one more in 100 s."""
    settings = {"FOVEA_CALLER_RATE": "0.01", "FOVEA_CALLER_BURST": "2"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings, **PROXY) as server:
        yield server


@pytest.fixture(scope="module")
def places_server(small_zoo: Path) -> Iterator[Server]:
    """A server in which each caller may have two images in flight."""
    settings = {"FOVEA_CALLER_IMAGES": "2", "FOVEA_BODY_TIMEOUT": "0.3"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings, **PROXY) as server:
        yield server


# --- replies ---


@pytest.mark.parametrize(("number", "protocol"), list(enumerate(ASKED)))
def test_refusal_has_the_shape_of_each_protocol(rate_server: Server, number: int, protocol: str) -> None:
    headers = {"X-Forwarded-For": f"192.0.2.{number}"}
    for _ in range(2):
        assert post_request(rate_server.url, protocol, **headers).status_code == 200
    counted = rate_server.read_metric("fovea_errors_total", reason="rate_limited")
    for extra in ({}, {"Content-Encoding": "identity"}):  # with and without ASGI
        reply = post_request(rate_server.url, protocol, **headers, **extra)
        assert (reply.status_code, error_code(reply, protocol)) == (429, "rate_limited")
        assert 0 < int(reply.headers["retry-after"]) <= 100
    assert rate_server.read_metric("fovea_errors_total", reason="rate_limited") == counted + 2


@pytest.mark.parametrize(
    ("address", "headers"),
    [("192.0.2.101", {}), ("192.0.2.102", {"Content-Encoding": "identity"})],  # with and without ASGI
    ids=["fast", "asgi"],
)
def test_many_refusals_of_a_caller_are_delayed(
    rate_server: Server, address: str, headers: dict[str, str]
) -> None:
    started_at = time.monotonic()
    statuses = [send_as(rate_server, address, IMAGE, **headers).status_code for _ in range(2 + 20 + 10)]
    assert statuses == [200] * 2 + [429] * 30
    assert time.monotonic() - started_at > 0.4  # 20 refusals are immediate, and 10 leave at 20 per second


def test_delayed_refusal_ends_when_its_client_leaves(rate_server: Server) -> None:
    """Otherwise connections that come and go at once would leave seconds of work behind."""
    counted = rate_server.read_metric("fovea_errors_total", reason=CLIENT_LEFT)
    with ExitStack() as stack:
        for _ in range(300):  # the last ones would wait for four seconds
            wire = stack.enter_context(Wire(rate_server.url))
            wire.send(CLASSIFY_HEAD, b"X-Forwarded-For: 192.0.2.103\r\nTransfer-Encoding: chunked\r\n\r\n")
        wait_until(wire.is_all_read)
    wait_until(lambda: rate_server.read_metric("fovea_errors_total", reason=CLIENT_LEFT) > counted)


def test_explanations_and_questions_about_layers_count_as_images(rate_server: Server) -> None:
    client, headers = rate_server.client, {"X-Forwarded-For": "192.0.2.100"}
    assert client.post("/v1/explain", content=IMAGE, headers=headers).status_code == 200
    assert client.get("/v1/models/small/layers", headers=headers).status_code == 200
    for reply in (
        client.post("/v1/explain", content=IMAGE, headers=headers),
        client.get("/v1/models/small/layers", headers=headers),
        send_as(rate_server, "192.0.2.100"),
    ):
        assert (reply.status_code, error_code(reply, "native")) == (429, "rate_limited")
    # Everything that needs no runner stays open.
    for path in ("/health/ready", "/v1/models", "/metrics", "/"):
        assert client.get(path, headers=headers).status_code == 200


def test_boxes_count_as_images(places_server: Server) -> None:
    boxes = [[0, 0, 20, 20], [0, 0, 30, 30], [5, 5, 40, 40]]
    body = {"images": [{"b64": ASKED["native"][1]["images"][0]["b64"], "boxes": boxes[:2]}]}
    assert places_server.client.post("/v1/classify", json=body).status_code == 200
    body["images"][0]["boxes"] = boxes
    reply = places_server.client.post("/v1/classify", json=body)
    assert (reply.status_code, error_code(reply, "native")) == (400, "bad_request")
    assert "FOVEA_CALLER_IMAGES" in reply.text


def test_images_by_url_count_before_they_are_fetched(small_zoo: Path) -> None:
    settings = {"FOVEA_CALLER_IMAGES": "2", "FOVEA_CALLER_RATE": "0.01", "FOVEA_CALLER_BURST": "3"}
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_URL_HOSTS="images.invalid", **settings) as server:

        def send(count: int, **headers: str) -> httpx.Response:
            body = {"images": count * [{"url": "https://images.invalid/a.jpg"}]}
            return server.client.post("/v1/classify", json=body, headers=headers)

        for extra in ({}, {"Content-Encoding": "identity"}):  # with and without ASGI
            reply = send(3, **extra)
            assert (reply.status_code, error_code(reply, "native")) == (400, "bad_request")
        assert send(1).status_code == 424
        assert send(1).status_code == 429
        assert server.read_metric("fovea_url_fetches_total") == 1


# --- what ends a place ---


def has_answer(wire: Wire) -> bool:
    return bool(select.select([wire.socket], [], [], 0)[0])


def has_settled(server: Server, wire: Wire, count: int) -> bool:
    """Return whether a request is answered, or waits as one of `count` images."""
    return has_answer(wire) or server.read_metric("fovea_images_in_flight") == count


def count_places(server: Server, address: str) -> int:
    """Return the number of requests that a caller can have in flight now."""
    with ExitStack() as stack, stop_runners(server):
        for count in range(10):
            wire = stack.enter_context(Wire(server.url))
            wire.send(classify_request(IMAGE, b"X-Forwarded-For: " + address.encode()))
            wait_until(partial(has_settled, server, wire, count + 1))
            if not has_answer(wire):
                continue  # it waits
            response = wire.read_response()
            assert (response.status, response.error_code) == (429, "too_many_in_flight")
            assert response.headers["retry-after"] == "1"
            return count
    raise AssertionError("there is no limit")


def leave_early(server: Server, head: bytes) -> None:
    """Send a request whose body never comes, and reset the connection."""
    with Wire(server.url) as wire:
        wire.send(head, b"Content-Length: 1000\r\n\r\nhalf")
        wait_until(wire.is_all_read)
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


WAYS_OUT = ("answer", "bad image", "too large", "bad json", "hang-up", "waiting hang-up", "deadline",
            "body timeout", "chunked hang-up")  # fmt: skip


@pytest.mark.parametrize("way_out", WAYS_OUT)
def test_place_is_free_after_every_end_of_a_request(places_server: Server, way_out: str) -> None:
    server, address = places_server, f"198.51.100.{WAYS_OUT.index(way_out)}"
    head = CLASSIFY_HEAD + f"X-Forwarded-For: {address}\r\n".encode()
    for _ in range(4):  # twice as many as there are places
        if way_out == "answer":
            assert send_as(server, address).status_code == 200
        elif way_out == "bad image":
            assert send_as(server, address, IMAGE[:400]).status_code == 422
        elif way_out == "too large":
            with Wire(server.url) as wire:
                wire.send(head, b"Content-Length: 100000000\r\n\r\n")
                assert wire.read_response().status == 413
        elif way_out == "bad json":
            reply = send_as(server, address, b"{", **{"Content-Type": "application/json"})
            assert reply.status_code == 400
        elif way_out == "hang-up":
            leave_early(server, head)
        elif way_out == "chunked hang-up":
            with Wire(server.url) as wire:
                wire.send(head, b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
                wait_until(wire.is_all_read)
        elif way_out == "waiting hang-up":
            with stop_runners(server):
                with Wire(server.url) as wire:
                    wire.send(classify_request(IMAGE, f"X-Forwarded-For: {address}".encode()))
                    server.wait_for_metric(1, "fovea_images_in_flight")
                server.wait_for_metric(0, "fovea_images_in_flight")
        elif way_out == "deadline":
            with stop_runners(server):
                reply = send_as(server, address, IMAGE, **{"X-Deadline-Ms": "50"})
            assert reply.status_code == 504
        else:
            with Wire(server.url) as wire:
                wire.send(head, b"Content-Length: 1000\r\n\r\nhalf")
                assert wire.read_response().status == 408
        server.wait_for_metric(1, "fovea_requests_in_flight")  # the scrape
    assert count_places(server, address) == 2


# --- who is the caller ---


def test_forwarded_address_counts_behind_a_trusted_proxy(rate_server: Server) -> None:
    statuses = [send_as(rate_server, "203.0.113.1").status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    assert send_as(rate_server, "203.0.113.2").status_code == 200
    # The part that the client itself has written stands to the left of its address.
    assert send_as(rate_server, "198.18.0.1, 203.0.113.1").status_code == 429


def test_addresses_of_one_ipv6_network_are_one_caller(rate_server: Server) -> None:
    replies = [send_as(rate_server, f"2001:db8:77::{number:x}") for number in range(1, 6)]
    assert [reply.status_code for reply in replies] == [200, 200, 429, 429, 429]
    assert send_as(rate_server, "2001:db8:78::1").status_code == 200


@pytest.mark.long
def test_forged_address_does_not_help_without_trusted_proxies(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_CALLER_RATE="0.01", FOVEA_CALLER_BURST="3") as server:
        statuses = [send_as(server, f"203.0.113.{number}").status_code for number in range(5)]
        assert statuses == [200, 200, 200, 429, 429]


def test_key_counts_and_not_the_address(small_zoo: Path, tmp_path: Path) -> None:
    keys = [ApiKey(name, frozenset(Scope), hash_key(name.encode())) for name in ("anne", "ben")]
    (tmp_path / "keys").write_text("".join(f"{key.to_line()}\n" for key in keys))
    settings = {"FOVEA_KEYS": str(tmp_path / "keys"), "FOVEA_CALLER_RATE": "0.01", "FOVEA_CALLER_BURST": "2"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings, **PROXY) as server:
        statuses = [
            send_as(server, f"203.0.113.{number}", Authorization="Bearer anne").status_code
            for number in range(4)
        ]
        assert statuses == [200, 200, 429, 429]
        assert send_as(server, "203.0.113.3", Authorization="Bearer ben").status_code == 200
        # A wrong key is refused before it counts.
        assert send_as(server, "203.0.113.3", Authorization="Bearer carl").status_code == 401


# --- fairness ---


def flood(server: Server, stack: ExitStack, address: str, count: int) -> list[Wire]:
    """Send images from this address on connections of their own."""
    wires = []
    for _ in range(count):
        wire = stack.enter_context(Wire(server.url))
        wire.send(classify_request(IMAGE, b"X-Forwarded-For: " + address.encode()))
        wires.append(wire)
    return wires


@pytest.mark.long
@pytest.mark.parametrize("has_shares", [pytest.param(False, marks=pytest.mark.long), True])
def test_caller_is_served_beside_a_flood(small_zoo: Path, has_shares: bool) -> None:
    settings: dict[str, Any] = {
        "FOVEA_QUEUE_IMAGES": "40",
        "FOVEA_REQUEST_IMAGES": "1",
        "FOVEA_RUNNERS": "1",
        "FOVEA_CALLER_SHARES": str(has_shares),
    }
    with Server(FOVEA_MODELS=str(small_zoo), **settings, **PROXY) as server, ExitStack() as stack:
        with stop_runners(server):
            wires = flood(server, stack, "192.0.2.1", 60)
            reason = "share_exceeded" if has_shares else "overloaded"
            refused = 40 if has_shares else 20
            server.wait_for_metric(refused, "fovea_errors_total", reason=reason)
            (other,) = flood(server, stack, "192.0.2.2", 1)
            if has_shares:
                server.wait_for_metric(21, "fovea_images_in_flight")
            else:
                assert other.read_response().status == 503
        if has_shares:
            assert other.read_response().status == 200
            wait_until(lambda: server.read_metric("fovea_images_in_flight") == 0)
        statuses = [wire.read_response().status for wire in wires]
        assert statuses.count(200) == 60 - refused
        assert set(statuses) == {200, 429 if has_shares else 503}
    assert "Traceback" not in server.log


# --- several workers ---


def has_workers(server: Server, count: int) -> bool:
    """Return whether so many workers answer."""
    try:
        return server.read_metric("fovea_workers") == count
    except httpx.TransportError:  # the worker of the connection has died
        return False


def is_replaced(server: Server, pid: int) -> bool:
    """Return whether a worker has ended, and another one answers in its place."""
    return pid not in list_children(server.process.pid) and has_workers(server, 2)


@pytest.mark.long
def test_workers_share_the_limits_of_a_caller(small_zoo: Path) -> None:
    settings = {"FOVEA_WORKERS": "2", "FOVEA_CALLER_RATE": "0.01", "FOVEA_CALLER_BURST": "6"}
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="1", **settings) as server:
        statuses = []
        for _ in range(12):  # each connection goes to another worker
            with Wire(server.url) as wire:
                wire.send(classify_request(IMAGE))
                statuses.append(wire.read_response().status)
        assert statuses == [200] * 6 + [429] * 6


@pytest.mark.long
def test_places_of_a_dead_worker_are_free(small_zoo: Path) -> None:
    settings = {"FOVEA_WORKERS": "2", "FOVEA_CALLER_IMAGES": "2"}
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="1", **settings) as server:
        with ExitStack() as stack:
            for _ in range(2):
                wire = stack.enter_context(Wire(server.url))
                wire.send(CLASSIFY_HEAD, b"Content-Length: 1000\r\n\r\nhalf")
                wait_until(wire.is_all_read)
            wait_until(lambda: post_request(server.url, "native").status_code == 429)
            for pid in list_children(server.process.pid):
                os.kill(pid, signal.SIGKILL)
                wait_until(partial(is_replaced, server, pid))
        assert post_request(server.url, "native").status_code == 200


@pytest.mark.long
def test_caller_beyond_its_rate_loads_no_model(tmp_path: Path) -> None:
    for name in ("one", "two"):
        add_to_repository(build_model(), tmp_path, name)
    limits = {"FOVEA_CALLER_RATE": "0.01", "FOVEA_CALLER_BURST": "1", "FOVEA_CALLER_IMAGES": "1"}
    settings = {"FOVEA_MODELS_LOADED": "1", "FOVEA_DEFAULT_MODEL": "one"}
    with Server(FOVEA_MODELS=str(tmp_path), **limits, **settings) as server:
        assert server.client.get("/v1/models/none/layers").status_code == 404  # releases its place
        reply = server.client.get("/v1/models/two/layers")
        assert (reply.status_code, error_code(reply, "native")) == (429, "rate_limited")
        assert server.read_metric("fovea_model_info", model="two") == 0
        assert server.read_metric("fovea_model_info", model="one") == 1


@pytest.mark.long
def test_place_is_free_after_waiting_for_a_model(tmp_path: Path) -> None:
    for name in ("one", "two"):
        add_to_repository(build_model(), tmp_path, name)
    settings = {"FOVEA_MODELS_LOADED": "1", "FOVEA_CALLER_IMAGES": "1", "FOVEA_DEFAULT_MODEL": "one"}
    with Server(FOVEA_MODELS=str(tmp_path), **settings) as server:
        statuses = [
            post_request(server.url, "native", name, **{"X-Deadline-Ms": "1"}).status_code
            for name in ("two", "one", "two", "one")
        ]
        assert set(statuses) <= {200, 504}
        assert 504 in statuses
        for name in ("one", "two"):
            assert post_request(server.url, "native", name).status_code == 200
