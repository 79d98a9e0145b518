"""All protocols are served by one endpoint and one router, over ASGI and without it."""

from __future__ import annotations

import asyncio
import base64
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import orjson
import pytest
import structlog
from PIL import Image
from prometheus_client import CollectorRegistry

from fovea.service.api.endpoint import FastHandler
from fovea.service.api.router import MAX_CACHED_URL_BYTES, MAX_CACHED_URLS, Router
from fovea.service.app import Application, create_app
from fovea.service.http.fast_path import Exchange
from fovea.service.http.request_record import RequestRecord
from fovea.service.serving.admission import Admission
from fovea.service.settings import Settings
from tests.graphs import add_to_repository, build_model
from tests.pictures import encode_image, make_jpeg
from tests.servers import ROOT, Server

IMAGE = make_jpeg()
OTHER_IMAGE = make_jpeg(seed=1)
WARNING_IMAGE = encode_image(Image.new("RGBA", (40, 40), (200, 30, 40, 0)), "PNG")
"""A fully transparent image."""

RAW_URLS = {
    "native": "/v1/classify",
    "torchserve": "/predictions/small",
    "huggingface": "/models/small",
}
"""A route of each protocol that takes raw images."""


def encode_base64(image: bytes) -> str:
    return base64.b64encode(image).decode()


def make_json_body(protocol: str, images: list[bytes]) -> Any:
    """Return a request in JSON with these images."""
    texts = [encode_base64(image) for image in images]
    if protocol == "native":
        return {"images": [{"b64": text} for text in texts], "top_k": 3}
    if protocol == "oip":
        return {"inputs": [{"name": "image", "shape": [len(texts)], "datatype": "BYTES", "data": texts}]}
    if protocol == "torchserve":
        return {"instances": texts}
    if protocol == "tensorflow":
        return {"instances": [{"b64": text} for text in texts]}
    return {"inputs": texts, "parameters": {"top_k": 2}}


JSON_URLS = {
    **RAW_URLS,
    "oip": "/v2/models/small/infer",
    "tensorflow": "/v1/models/small:predict",
}
"""A route of each protocol that takes JSON."""

FORM_URLS = {name: RAW_URLS[name] for name in ("native", "torchserve")}
"""A route of each protocol that takes forms."""

IMAGE_LISTS = {
    "one image": [IMAGE],
    "two images": [IMAGE, OTHER_IMAGE],
    "a warning": [IMAGE, WARNING_IMAGE],
    "a bad image": [b"nonsense"],
    "a bad image beside others": [IMAGE, b"nonsense", b"GIF89a"],
    "an empty image": [b""],
}


def build_requests() -> Iterator[tuple[str, httpx.Request]]:
    """Yield requests of all protocols and kinds of bodies, good and bad, by a name."""
    for protocol, url in JSON_URLS.items():
        for name, images in IMAGE_LISTS.items():
            yield f"{protocol}, JSON, {name}", build_request(url, json=make_json_body(protocol, images))
        for name, body in (("broken", b"{"), ("empty", b""), ("a list", b"[]")):
            yield (
                f"{protocol}, JSON, {name}",
                build_request(url, content=body, headers={"Content-Type": "application/json"}),
            )
        for query in ("top_k=x", "topk=2", "coverage=0.123", "top_k=2&top_k=2", "timing=maybe", "key=1"):
            body = make_json_body(protocol, [IMAGE])
            yield f"{protocol}, JSON, ?{query}", build_request(f"{url}?{query}", json=body)
        for name, headers in (
            ("no time", {"X-Deadline-Ms": "0.001"}),
            ("a bad deadline", {"X-Deadline-Ms": "soon"}),
        ):
            body = make_json_body(protocol, [IMAGE])
            yield f"{protocol}, JSON, {name}", build_request(url, json=body, headers=headers)
    for protocol, url in RAW_URLS.items():
        for name, (image, *_) in IMAGE_LISTS.items():
            yield f"{protocol}, raw, {name}", build_request(url, content=image)
        yield f"{protocol}, raw, a warning", build_request(url, content=WARNING_IMAGE)
        for query in ("top_k=0", "top_k=x", "topk=2", "coverage=0.9", "coverage=0.123", "key=1"):
            yield f"{protocol}, raw, ?{query}", build_request(f"{url}?{query}", content=IMAGE)
    for protocol, url in FORM_URLS.items():
        for name, images in IMAGE_LISTS.items():
            files = [("file", (f"{number}.jpg", image)) for number, image in enumerate(images)]
            yield f"{protocol}, form, {name}", build_request(url, files=files)
        yield (
            f"{protocol}, form, an option",
            build_request(url, files={"file": IMAGE}, data={"top_k": "2"}),
        )
    for name, url in (
        ("native", "/v1/models/absent/classify?top_k=x"),
        ("oip", "/v2/models/absent/infer?top_k=x"),
        ("torchserve", "/predictions/absent?top_k=x"),
        ("huggingface", "/models/absent?top_k=x"),
    ):
        yield f"{name}, an unknown model", build_request(url, content=IMAGE)


def build_request(url: str, **arguments: Any) -> httpx.Request:
    request = httpx.Request("POST", f"http://x{url}", **arguments)
    request.read()
    return request


REQUESTS = dict(build_requests())


def send_request(server: Server, request: httpx.Request, *, is_chunked: bool) -> tuple[Any, ...]:
    """Send a request, and return everything in the reply that does not differ between equal requests."""
    headers = {
        name: value for name, value in request.headers.items() if name not in ("host", "content-length")
    }
    content: Any = iter([request.content]) if is_chunked else request.content
    reply = server.client.post(request.url.raw_path.decode(), content=content, headers=headers)
    text = reply.text.replace(reply.headers["x-request-id"], "")
    return reply.status_code, text, reply.headers["content-type"], reply.headers.get("x-fovea-warnings")


@pytest.mark.parametrize("name", REQUESTS)
def test_both_paths_give_the_same_answer(server: Server, name: str) -> None:
    """A body of known length bypasses ASGI, and a chunked body does not."""
    fast_reply = send_request(server, REQUESTS[name], is_chunked=False)
    assert fast_reply == send_request(server, REQUESTS[name], is_chunked=True)
    assert fast_reply[0] != 500


@pytest.mark.parametrize("is_chunked", [False, True])
def test_bad_options_are_refused_after_an_unknown_model(server: Server, is_chunked: bool) -> None:
    for name, status in (("small", 400), ("absent", 404)):
        request = build_request(f"/v1/models/{name}/classify?topk=1", content=IMAGE)
        assert send_request(server, request, is_chunked=is_chunked)[0] == status


@pytest.mark.parametrize("is_chunked", [False, pytest.param(True, marks=pytest.mark.long)])
def test_long_reply_counts_towards_the_body_memory(tmp_path: Path, is_chunked: bool) -> None:
    add_to_repository(build_model(labels=[f"label {number}" for number in range(1000)]), tmp_path)
    limits = {"FOVEA_BODY_BYTES": "100000", "FOVEA_BODIES_BYTES": "100000"}
    with Server(FOVEA_MODELS=str(tmp_path), **limits) as server:
        for query, status in (("top_k=700", 200), ("top_k=0", 400)):
            request = build_request(f"/v1/classify?{query}", content=IMAGE)
            reply = send_request(server, request, is_chunked=is_chunked)
            assert reply[0] == status, reply
        assert "an answer with 1000 labels" in reply[1]


# --- a protocol of its own ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_server(small_zoo: Path) -> Iterator[Server]:
    """A server with the protocol of `own_protocol.py`."""
    arguments = {"args": [sys.executable, "-m", "tests.service.api.own_protocol"], "cwd": ROOT}
    with Server(arguments, FOVEA_MODELS=str(small_zoo), FOVEA_PROTOCOLS="native,own") as server:
        yield server


@pytest.mark.parametrize("is_chunked", [False, True])
def test_new_protocol_is_served_by_both_paths(own_server: Server, is_chunked: bool) -> None:
    reply = own_server.client.post("/v1/models/small/classify", content=IMAGE).json()
    label = reply["predictions"][0]["label"]
    requests: list[tuple[str, Mapping[str, Any], int, str]] = [
        ("/label/small", {"content": IMAGE}, 200, f"{label}\n"),
        ("/label/small", {"json": {"images": [encode_base64(IMAGE)] * 2}}, 200, f"{label}\n{label}\n"),
        ("/label/small/", {"content": WARNING_IMAGE}, 200, "\n"),
        ("/label/small?top_k=2", {"content": IMAGE}, 400, "top_k is an option of /v1/classify"),
        ("/label/absent", {"content": IMAGE}, 404, '"code":"model_not_found"'),
        ("/label/small", {"content": b"nonsense"}, 415, '"code":"unsupported_format"'),
        ("/label/small", {"json": {"images": [encode_base64(IMAGE), "AAAA"]}}, 415, "image 1: "),
    ]
    for url, arguments, status, text in requests:
        found = send_request(own_server, build_request(url, **arguments), is_chunked=is_chunked)
        assert (found[0], text in found[1]) == (status, True), found
        assert found[3] == ("almost_nothing_visible" if arguments.get("content") == WARNING_IMAGE else None)
    labels = {"protocol": "own", "route": "/label/{name}", "model": "small", "status": "200"}
    assert own_server.read_metric("fovea_requests_total", **labels) >= 3


# --- without ASGI ---------------------------------------------------------------------------------


@pytest.fixture
def application(small_zoo: Path) -> Iterator[Application]:
    """The application without a server."""
    structlog.configure(
        wrapper_class=structlog.stdlib.BoundLogger, logger_factory=structlog.stdlib.LoggerFactory()
    )
    yield create_app(Settings(models=small_zoo, runners=1), registry=CollectorRegistry())
    structlog.reset_defaults()


class ReplyWriter:
    """A connection that keeps the replies of its exchanges (`service.http.fast_path.ResponseWriter`)."""

    def __init__(self) -> None:
        self.replies: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()

    def respond(self, exchange: Exchange, status: int, content: bytes, *_: object) -> None:
        self.replies.put_nowait((status, content))

    def refuse_with_delay(self, exchange: Exchange, error: Any) -> None:
        exchange.refuse(error)


def test_raw_image_of_any_protocol_takes_no_task(application: Application) -> None:
    async def classify_images() -> None:
        await application.classifier.start()
        try:
            for url in RAW_URLS.values():
                writer = ReplyWriter()
                record = RequestRecord("POST", {})
                exchange = Exchange(writer, application.observer, record, len(IMAGE))
                tasks = asyncio.all_tasks()
                assert exchange.try_open(application.fast_app, b"POST", url.encode(), {})
                exchange.receive_body(IMAGE)
                exchange.complete_body()
                assert asyncio.all_tasks() == tasks, url
                status, content = await asyncio.wait_for(writer.replies.get(), 60)
                assert (status, bool(orjson.loads(content))) == (200, True)
        finally:
            await application.classifier.close()

    asyncio.run(classify_images())


def test_router_caches_a_limited_number_of_short_good_urls(application: Application) -> None:
    router = application.fast_app
    assert isinstance(router, Router)

    def is_cached(url: bytes) -> bool:
        route_match = router.find_match(b"POST", url)
        assert route_match is not None
        assert (route_match.route.path, route_match.address.name) == ("/models/{name}", "small")
        return router.find_match(b"POST", url) is route_match

    assert is_cached(b"/models/small?key=1")
    assert not is_cached(b"/models/small?top_k=1"), "the options are bad"
    assert not is_cached(b"/models/small?key=" + MAX_CACHED_URL_BYTES * b"1")
    first_match = router.find_match(b"POST", b"/models/small")
    for number in range(MAX_CACHED_URLS):
        assert is_cached(b"/models/small?key=%d" % number)
    assert router.find_match(b"POST", b"/models/small") is not first_match, "the cache has been emptied"
    for method, url in ((b"GET", b"/models/small"), (b"POST", b"/nothing"), (b"POST", b"http://[")):
        assert router.find_match(method, url) is None


class RecordingHandler(FastHandler):
    """A handler that records the order in which it cancels its jobs and releases its admission."""

    def __init__(self, *, fails: bool = False) -> None:
        self.events: list[str] = []
        self._fails = fails
        model: Any = SimpleNamespace(acquire=lambda: None, release=lambda: self.events.append("release"))
        body_memory = SimpleNamespace(release=lambda _size: None)
        classifier: Any = SimpleNamespace(body_memory=body_memory)
        endpoint: Any = SimpleNamespace(services=SimpleNamespace(classifier=classifier))
        exchange: Any = None
        super().__init__(endpoint, exchange, None, {}, Admission(classifier, model), None, 60)

    def _cancel_jobs(self) -> None:
        super()._cancel_jobs()
        self.events.append("cancel")
        if self._fails:
            raise ValueError


def close_handler(*, fails: bool = False) -> list[str]:
    """Close a handler on an event loop, and return its events."""

    async def close() -> list[str]:
        handler = RecordingHandler(fails=fails)
        with suppress(ValueError):
            handler.close()
        return handler.events

    return asyncio.run(close())


def test_jobs_are_cancelled_before_memory_is_released() -> None:
    assert close_handler() == ["cancel", "release"]


def test_memory_is_released_even_if_cancelling_fails() -> None:
    assert close_handler(fails=True) == ["cancel", "release"]
