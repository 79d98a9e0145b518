"""The clients' requests, retries and errors, against a server that answers as a test wants it."""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

import fovea
from fovea.errors import (
    AnswerTimeout,
    BodyTooLarge,
    ConnectionFailed,
    DeadlineExceeded,
    Draining,
    FoveaError,
    Overloaded,
    UnexpectedReply,
)
from tests.pictures import make_jpeg
from tests.servers import ROOT, Server, wait_until

PHOTO = make_jpeg()


def render_image(label: str = "cat") -> dict[str, Any]:
    """Return one image's part of a native reply."""
    prediction = {"label": label, "index": 0, "probability": 0.75}
    return {"predictions": [prediction], "image": {"format": "JPEG", "width": 64, "height": 48}}


@dataclass(frozen=True)
class StubReply:
    """A reply of the stub; without a status the connection ends without one."""

    status: int | None = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    release: threading.Event | None = None
    """Event for which the reply waits."""


OK = StubReply(200, {"model": {"name": "pets", "version": "3"}, **render_image()})


def make_refusal(status: int, code: str, **headers: str) -> StubReply:
    """Return an error of Fovea."""
    error = {"code": code, "message": f"the reason of {code}", "request_id": "r1"}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return StubReply(status, {"error": error}, {"X-Request-ID": "r1", **names})


BUSY = make_refusal(503, "overloaded", Retry_After="0")
LOST = StubReply(None)


@dataclass(frozen=True)
class StubRequest:
    """A request that the stub received."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    port: int
    """Port of the client's end of the connection."""


class Stub:
    """An HTTP server that gives the `replies` in order, and the last one again and again."""

    def __init__(self) -> None:
        self.replies: list[StubReply] = [OK]
        self.requests: list[StubRequest] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                stub.requests.append(StubRequest(self.path, dict(self.headers), body, self.client_address[1]))
                reply = stub.replies.pop(0) if len(stub.replies) > 1 else stub.replies[0]
                if reply.release:
                    reply.release.wait(60)
                if reply.status is None:
                    self.close_connection = True
                    return
                content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                """Write nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def stub() -> Iterator[Stub]:
    instance = Stub()
    yield instance
    instance.close()


Classify = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def classify(request: pytest.FixtureRequest) -> Classify:
    """Return a function that classifies with a new client of either kind, created with `options`."""

    def classify_sync(url: str, images: Any, *, options: Mapping[str, Any] | None = None, **call: Any) -> Any:
        with fovea.Client(url, **(options or {})) as client:
            return client.classify(images, **call)

    def classify_async(
        url: str, images: Any, *, options: Mapping[str, Any] | None = None, **call: Any
    ) -> Any:
        async def run() -> Any:
            async with fovea.AsyncClient(url, **(options or {})) as client:
                return await client.classify(images, **call)

        return asyncio.run(run())

    return classify_sync if request.param == "sync" else classify_async


def test_request_carries_image_options_and_time_limit(stub: Stub, classify: Classify) -> None:
    result = classify(
        stub.url + "/behind/proxy",
        PHOTO,
        options={"timeout": 2.5, "headers": {"Authorization": "Bearer key"}},
        top_k=3,
        coverage=0.9,
        model="a b/c",
        version=3,
    )
    assert (result.label, result.probability, result.model.version) == ("cat", 0.75, "3")
    (request,) = stub.requests
    assert request.path == "/behind/proxy/v1/models/a%20b%2Fc/versions/3/classify?top_k=3&coverage=0.9"
    assert request.body == PHOTO
    assert request.headers["X-Deadline-Ms"] == "2500"
    assert request.headers["Authorization"] == "Bearer key"


def test_busy_service_is_asked_again(stub: Stub, classify: Classify) -> None:
    stub.replies = [
        BUSY,
        make_refusal(503, "draining"),
        StubReply(429, b"slow down", {"Retry-After": "0"}),
        OK,
    ]
    assert classify(stub.url, PHOTO).label == "cat"
    assert [request.body for request in stub.requests] == 4 * [PHOTO]


def test_retry_waits_as_long_as_the_reply_says(stub: Stub, classify: Classify) -> None:
    stub.replies = [make_refusal(503, "overloaded", Retry_After="1"), OK]
    started_at = time.monotonic()
    assert classify(stub.url, [PHOTO])[0].label == "cat"
    assert time.monotonic() - started_at >= 1


def test_no_retry_outlasts_the_time_for_retries(stub: Stub, classify: Classify) -> None:
    stub.replies = [make_refusal(503, "overloaded", Retry_After="100")]
    with pytest.raises(Overloaded, match="the reason of overloaded") as failure:
        classify(stub.url, PHOTO, options={"retry_seconds": 20})
    assert len(stub.requests) == 1
    error = failure.value
    assert (error.code, error.status, error.retry_after) == ("overloaded", 503, 100)
    assert (error.message, error.request_id) == ("the reason of overloaded", "r1")
    stub.replies = [make_refusal(503, "draining", Retry_After="0")]
    with pytest.raises(Draining):
        classify(stub.url, PHOTO, options={"retry_seconds": 0})
    assert len(stub.requests) == 2


def test_each_batch_has_its_own_time_for_retries(stub: Stub, classify: Classify) -> None:
    busy = make_refusal(503, "overloaded", Retry_After="1")
    stub.replies = [busy, OK, busy, OK]
    assert len(classify(stub.url, 2 * [PHOTO], options={"batch_size": 1, "retry_seconds": 1.9})) == 2


def test_lost_connection_is_retried(stub: Stub, classify: Classify) -> None:
    stub.replies = [LOST, LOST, OK]
    assert classify(stub.url, PHOTO).label == "cat"
    stub.replies = [LOST]
    with pytest.raises(
        ConnectionFailed, match=r"no answer from http://127\.0\.0\.1:\d+/v1/classify: "
    ) as failure:
        classify(stub.url, PHOTO)
    assert isinstance(failure.value, ConnectionError)
    assert len(stub.requests) == 3 + 5


def test_missing_service_is_one_error(stub: Stub, classify: Classify) -> None:
    stub.close()
    for options in ({"retry_seconds": 0}, {}):
        with pytest.raises(ConnectionFailed, match="no answer from"):
            classify(stub.url, [PHOTO, PHOTO], options=options, on_error="return")
    stub._server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # for the fixture
    stub._thread = threading.Thread(target=stub._server.serve_forever, daemon=True)
    stub._thread.start()


def test_late_answer_is_not_asked_for_again(stub: Stub, classify: Classify) -> None:
    release = threading.Event()
    stub.replies = [StubReply(200, OK.body, release=release), OK]
    with pytest.raises(AnswerTimeout, match="the service did not answer in time") as failure:
        classify(stub.url, PHOTO, options={"timeout": 0.6})
    wait_until(lambda: stub.requests)
    release.set()
    assert isinstance(failure.value, TimeoutError)
    assert len(stub.requests) == 1
    stub.replies = [make_refusal(504, "deadline_exceeded")]
    with pytest.raises(DeadlineExceeded):
        classify(stub.url, PHOTO)
    assert len(stub.requests) == 2


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (StubReply(502, b"<html>Bad Gateway</html>"), 502),
        (StubReply(503, b"no backend", {"Retry-After": "1000"}), 503),
        (StubReply(302, b"", {"Location": "http://127.0.0.1:1/"}), 302),
        (StubReply(200, b"<html>Welcome</html>"), 200),
        (StubReply(200, b"[1, 2]"), 200),
        (StubReply(200, {"model": {"name": "pets", "version": "3"}}), 200),
        (StubReply(200, {**OK.body, "predictions": 3}), 200),
        (StubReply(400, {"error": "flat"}), 400),
        (StubReply(418, {"error": {"code": "teapot", "message": "no"}}), 418),
    ],
)
def test_reply_that_is_not_foveas_is_an_error_with_its_status(
    reply: StubReply, status: int, stub: Stub, classify: Classify
) -> None:
    stub.replies = [reply]
    with pytest.raises(UnexpectedReply, match=f"status {status}, and no reply of Fovea") as failure:
        classify(stub.url, PHOTO, on_error="return")
    assert failure.value.status == status
    assert failure.value.retry_after == (1000 if status == 503 else None)
    assert len(str(failure.value)) < 300


def test_wrong_number_of_results_is_no_answer(stub: Stub, classify: Classify) -> None:
    stub.replies = [StubReply(200, {"model": OK.body["model"], "results": [render_image()]})]
    with pytest.raises(UnexpectedReply):
        classify(stub.url, [PHOTO, PHOTO])


@pytest.mark.parametrize(
    "answered",
    [[], [(0, 0, 9, 9)], [(0, 0, 9, 9), (1, 1, 5, 5), (1, 1, 5, 5)], [(1, 1, 5, 5), (0, 0, 9, 9)], None],
    ids=["none", "too few", "too many", "other order", "no boxes"],
)
def test_answers_of_other_boxes_are_no_answer(
    stub: Stub, classify: Classify, answered: list[tuple[int, ...]] | None
) -> None:
    boxes = [[0, 0, 9, 9], [1, 1, 5, 5]]
    image = render_image()

    def reply_with(answers: Iterable[Iterable[int]]) -> StubReply:
        parts = [{"box": list(box), "predictions": image["predictions"]} for box in answers]
        return StubReply(200, {"model": OK.body["model"], "boxes": parts, "image": image["image"]})

    stub.replies = [OK if answered is None else reply_with(answered), reply_with(boxes)]
    with pytest.raises(UnexpectedReply):
        classify(stub.url, PHOTO, boxes=boxes)
    assert [list(one.box) for one in classify(stub.url, PHOTO, boxes=boxes)] == boxes


def make_batch_reply(count: int) -> StubReply:
    """Return a reply with `count` results."""
    return StubReply(200, {"model": OK.body["model"], "results": count * [render_image()]})


def test_lists_are_sent_in_batches(stub: Stub, classify: Classify) -> None:
    stub.replies = [make_batch_reply(3), make_batch_reply(3), OK]
    assert len(classify(stub.url, 7 * [PHOTO], options={"batch_size": 3})) == 7
    assert [request.body.count(PHOTO) for request in stub.requests] == [3, 3, 1]


def test_batch_has_a_limit_in_bytes(stub: Stub, classify: Classify) -> None:
    large = PHOTO + bytes(9 << 20)
    stub.replies = [make_batch_reply(2), make_batch_reply(2)]
    assert len(classify(stub.url, 4 * [large])) == 4
    assert [request.body.count(PHOTO) for request in stub.requests] == [2, 2]


def test_batch_that_is_too_large_is_sent_in_parts(stub: Stub, classify: Classify) -> None:
    too_large = make_refusal(413, "body_too_large")
    stub.replies = [too_large, make_batch_reply(2), too_large, too_large, OK]
    outcomes = classify(stub.url, 4 * [PHOTO], on_error="return")
    assert [request.body.count(PHOTO) for request in stub.requests] == [4, 2, 2, 1, 1]
    assert [type(one) for one in outcomes] == [fovea.Result, fovea.Result, BodyTooLarge, fovea.Result]
    stub.replies = [too_large]
    with pytest.raises(BodyTooLarge, match=r"images\[0\]: the reason of body_too_large"):
        classify(stub.url, [PHOTO])


def test_images_that_cannot_be_read_are_not_sent(stub: Stub, classify: Classify) -> None:
    outcomes = classify(stub.url, ["nowhere.jpg", PHOTO, b""], on_error="return")
    assert [getattr(one, "code", None) for one in outcomes] == ["unreadable_file", None, "bad_request"]
    assert [request.body for request in stub.requests] == [PHOTO]
    assert classify(stub.url, [], on_error="return") == []
    with pytest.raises(fovea.FileError, match=r"^nowhere\.jpg: the file cannot be read"):
        classify(stub.url, "nowhere.jpg")
    with pytest.raises(TypeError, match=r"images\[1\]"):
        classify(stub.url, [PHOTO, 5])
    with pytest.raises(ValueError, match="on_error is 'skip'"):
        classify(stub.url, PHOTO, on_error="skip")
    assert len(stub.requests) == 1


def test_unknown_error_of_an_image_keeps_its_words(stub: Stub, classify: Classify) -> None:
    newer = {"error": {"code": "too_odd", "message": "it is odd"}}
    stub.replies = [StubReply(200, {"model": OK.body["model"], "results": [render_image(), newer]})]
    _, error = classify(stub.url, [PHOTO, PHOTO], on_error="return")
    assert isinstance(error, FoveaError)
    assert str(error) == "too_odd: it is odd"


def test_ready_follows_the_service(stub: Stub) -> None:
    with fovea.Client(stub.url) as client:
        for reply, expected in ((OK, True), (make_refusal(503, "not_ready"), False), (LOST, False)):
            stub.replies = [reply]
            assert client.ready() is expected
        assert len(stub.requests) == 3
        stub.replies = [StubReply(404, b"what?")]
        with pytest.raises(UnexpectedReply):
            client.ready()

    async def ask() -> bool:
        stub.replies = [OK]
        async with fovea.AsyncClient(stub.url) as client:
            return await client.ready()

    assert anyio.run(ask)


def test_ready_of_a_real_server(server: Server) -> None:
    with fovea.Client(server.url + "/") as client:
        assert client.ready() is True


def test_closed_clients_refuse_to_work(stub: Stub) -> None:
    client = fovea.Client(stub.url)
    client.classify(PHOTO)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="the client is closed"):
        client.classify(PHOTO)

    async def classify_after_close() -> None:
        asynchronous = fovea.AsyncClient(stub.url)
        await asynchronous.classify(PHOTO)
        await asynchronous.aclose()
        await asynchronous.classify(PHOTO)

    with pytest.raises(RuntimeError, match="the client is closed"):
        asyncio.run(classify_after_close())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_opens_connections_of_its_own(stub: Stub) -> None:
    """Two processes that use one connection would get each other's replies."""
    with fovea.Client(stub.url) as client:
        client.classify(PHOTO)
        child = multiprocessing.get_context("fork").Process(target=client.classify, args=(PHOTO,))
        child.start()
        child.join()
        client.classify(PHOTO)
    parent_port, child_port, later_port = (request.port for request in stub.requests)
    assert parent_port == later_port != child_port


def test_connections_are_used_again(server: Server) -> None:
    with fovea.Client(server.url) as client:
        for _ in range(3):
            client.classify(PHOTO)
        pool = client._http._transport._pool
        assert len(pool.connections) == 1


def test_cancelled_call_leaves_the_client_usable(stub: Stub) -> None:
    release = threading.Event()

    async def run() -> Any:
        async with fovea.AsyncClient(stub.url) as client:
            stub.replies = [StubReply(200, OK.body, release=release), OK]
            call = asyncio.create_task(client.classify(PHOTO))
            while not stub.requests:
                await asyncio.sleep(0.001)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            release.set()
            return await asyncio.gather(*(client.classify(PHOTO) for _ in range(4)))

    assert [one.label for one in asyncio.run(run())] == 4 * ["cat"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"url": "127.0.0.1:8000"}, "url is '127.0.0.1:8000'; it must start with http:// or https://"),
        ({"url": "http://host:port"}, "url is 'http://host:port': Invalid port"),
        ({"timeout": 0}, "timeout is 0; it must be more than 0, and finite"),
        ({"timeout": math.inf}, "timeout is inf; it must be more than 0, and finite"),
        ({"retry_seconds": -1}, "retry_seconds is -1; it must be at least 0, and finite"),
        ({"retry_seconds": math.nan}, "retry_seconds is nan; it must be at least 0, and finite"),
        ({"batch_size": 0}, "batch_size is 0; it must be more than 0, and finite"),
    ],
)
def test_wrong_options_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    for client_type in (fovea.Client, fovea.AsyncClient):
        with pytest.raises(ValueError, match=sentence):
            client_type(**arguments)


def test_missing_httpx_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "httpx.py").write_text("raise ImportError('no httpx')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fovea; fovea.Client"
    command = [sys.executable, "-c", f"{code}; fovea.Client()"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.stderr.splitlines()[-1] == "ImportError: the client needs a package: pip install httpx"
    assert "During handling" not in process.stderr


def test_unreachable_host_is_a_connection_error(classify: Classify) -> None:
    with socket.socket() as listener:  # a port that nobody listens on
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        with pytest.raises(ConnectionFailed) as failure:
            classify(f"http://127.0.0.1:{port}", PHOTO, options={"retry_seconds": 0})
    assert isinstance(failure.value.__cause__, httpx.ConnectError)


@pytest.mark.long
def test_overloaded_server_answers_every_image_in_the_end(small_zoo: Path) -> None:
    images = [make_jpeg(1200, 900, seed) for seed in range(24)]
    limits = {"FOVEA_QUEUE_IMAGES": "2", "FOVEA_REQUEST_IMAGES": "2"}
    with (
        Server(FOVEA_MODELS=str(small_zoo), **limits) as server,
        fovea.Client(server.url, retry_seconds=60) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        results = list(pool.map(client.classify, images))
        assert server.read_metric("fovea_errors_total", reason="overloaded") > 0
    assert results == fovea.load(small_zoo).classify(images)
