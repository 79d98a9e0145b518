"""Images by URL, from the request to the answer: a real service in this process, and a real web server."""

from __future__ import annotations

import asyncio
import base64
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from prometheus_client import CollectorRegistry, generate_latest

from fovea.service.app import Application, create_app
from fovea.service.http.listener import Listener
from fovea.service.http.server import Server as HttpServer
from fovea.service.settings import Settings
from tests.pictures import make_jpeg
from tests.servers import Server, sum_samples, wait_until
from tests.service.remote.test_guarded_https import PUBLIC_ADDRESS, Web

HOST = "https://photos.example.com"
ADDRESSES = {
    "loopback": "127.0.0.1",
    "metadata": "169.254.169.254",
    "private": "10.0.0.7",
    "mapped": "::ffff:127.0.0.1",
    "local": "fe80::1",
    "nat64": "64:ff9b::a00:1",
}


@dataclass
class Service:
    """A service in this process, with a client."""

    app: Application
    registry: CollectorRegistry
    client: httpx.Client

    def classify(self, *urls: str, **options: Any) -> httpx.Response:
        return self.client.post("/v1/classify", json={"images": [{"url": url} for url in urls], **options})

    def count(self, result: str) -> float:
        metrics = generate_latest(self.registry).decode()
        return sum_samples(metrics, "fovea_url_fetches_total", result=result)


@contextmanager
def run_service(web: Web, models: Path, max_bytes: int, seconds: float, **options: Any) -> Iterator[Service]:
    """Yield a service whose client for URLs asks `web` in place of the internet."""
    hosts = ("photos.example.com", *(f"{name}.example.com" for name in ADDRESSES))
    for name, address in ADDRESSES.items():
        web.addresses[f"{name}.example.com"] = [[address]]
    settings = Settings(
        models=models, runners=1, url_hosts=hosts, url_seconds=seconds, url_bytes=max_bytes,
        drain_grace=0, watch=0, **options,
    )  # fmt: skip
    structlog.configure(
        wrapper_class=structlog.stdlib.BoundLogger, logger_factory=structlog.stdlib.LoggerFactory()
    )
    registry = CollectorRegistry()
    limits: dict[str, Any] = {"max_bytes": max_bytes, "seconds": seconds, "bytes_setting": "FOVEA_URL_BYTES"}
    app = create_app(settings, registry=registry, https=web.guard(*hosts, **limits))
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(Listener(bound, 100, lambda: None), on_listening=ready.set)

    with socket.create_server(("127.0.0.1", 0)) as bound:
        server = HttpServer(
            app.asgi, app.fast_app, settings,
            body_memory=app.classifier.body_memory, observer=app.observer, lifecycle=app.lifecycle,
        )  # fmt: skip
        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        try:
            assert ready.wait(60)
            url = f"http://127.0.0.1:{bound.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=30) as client:
                yield Service(app, registry, client)
        finally:
            loops[0].call_soon_threadsafe(server.handle_signal, signal.SIGINT)
            thread.join(30)
            structlog.reset_defaults()


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    web = Web(tmp_path_factory.mktemp("web"))
    yield web
    web.close()


@pytest.fixture(scope="module")
def service(web: Web, small_zoo: Path) -> Iterator[Service]:
    with run_service(web, small_zoo, max_bytes=1_000_000, seconds=2.0) as service:
        yield service
        assert service.app.classifier.body_memory.used_bytes in (0, len(make_jpeg()))  # one may be kept


def error_code(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


# --- images --------------------------------------------------------------------------------------


def test_image_by_url_gets_the_answer_of_the_image(service: Service, web: Web) -> None:
    before = service.count("ok")
    direct = service.client.post("/v1/classify", content=make_jpeg()).json()
    answer = service.classify(f"{HOST}/cat.jpg?signature=a,b&x=%2F")
    assert answer.status_code == 200, answer.text
    assert answer.json()["predictions"] == direct["predictions"]
    assert web.connections[-1] == (PUBLIC_ADDRESS, 443)
    redirected = service.classify(f"{HOST}/redirect/~cat.jpg")
    assert redirected.json()["predictions"] == direct["predictions"]
    chunked = service.client.post(  # over ASGI
        "/v1/classify",
        content=iter([b'{"images": [{"url": "' + HOST.encode() + b'/cat.jpg"}]}']),
        headers={"Content-Type": "application/json"},
    )
    assert chunked.json()["predictions"] == direct["predictions"]
    assert service.count("ok") == before + 3


def test_failed_image_of_several_has_its_own_error(service: Service) -> None:
    b64 = base64.b64encode(make_jpeg()).decode()
    images = [
        {"url": f"{HOST}/status/404"},
        {"url": f"{HOST}/cat.jpg", "boxes": [[0, 0, 20, 20], [5, 5, 30, 30]]},
        {"b64": b64},
        {"url": "https://elsewhere.example.com/cat.jpg"},
    ]
    answer = service.client.post("/v1/classify", json={"images": images})
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert results[0]["error"]["code"] == "url_failed"
    assert len(results[1]["boxes"]) == 2
    assert "predictions" in results[2]
    assert results[3]["error"]["code"] == "url_refused"
    failed = service.classify(f"{HOST}/status/404", f"{HOST}/status/500").json()["results"]
    assert [one["error"]["code"] for one in failed] == ["url_failed", "url_failed"]


def test_explanation_takes_a_url(service: Service) -> None:
    body = {"images": [{"url": f"{HOST}/cat.jpg"}]}
    answer = service.client.post("/v1/models/small/explain?samples=16", json=body)
    assert answer.status_code == 200, answer.text
    refused = service.client.post(
        "/v1/models/small/explain", json={"images": [{"url": f"{HOST}/status/404"}]}
    )
    assert (refused.status_code, error_code(refused)) == (424, "url_failed")


def test_url_is_refused_without_a_list_of_hosts(server: Server) -> None:
    answer = server.client.post("/v1/classify", json={"images": [{"url": f"{HOST}/cat.jpg"}]})
    assert (answer.status_code, error_code(answer)) == (403, "url_refused")
    assert "FOVEA_URL_HOSTS" in answer.json()["error"]["message"]


def test_image_has_one_source(service: Service) -> None:
    for image in ({}, {"b64": "", "url": HOST}, {"url": None}, {"url": 3}, {"url": "x" * 5000}):
        answer = service.client.post("/v1/classify", json={"images": [image]})
        assert (answer.status_code, error_code(answer)) == (400, "bad_request"), image


# --- the guard -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "status", "code", "message"),
    [
        ("http://photos.example.com/cat.jpg", 403, "url_refused", "only https:// is allowed"),
        ("file:///etc/passwd", 403, "url_refused", "not a URL"),
        ("https://127.0.0.1/cat.jpg", 403, "url_refused", "not in the list"),
        ("https://[::ffff:127.0.0.1]/cat.jpg", 403, "url_refused", "not in the list"),
        ("https://elsewhere.example.com/cat.jpg", 403, "url_refused", "not in the list"),
        ("https://user:secret@photos.example.com/cat.jpg", 403, "url_refused", "a user name or a password"),
        ("https://photos.example.com:8443/cat.jpg", 403, "url_refused", "not in the list"),
        ("https://photos.example.com:x/cat.jpg", 403, "url_refused", "not a URL"),
        ("https://photos.example.com\\@elsewhere/", 403, "url_refused", "not a URL"),
        ("", 403, "url_refused", "not a URL"),
        *(
            (f"https://{name}.example.com/cat.jpg", 403, "url_refused", "private or reserved")
            for name in ADDRESSES
        ),
        (
            f"{HOST}/redirect/http:~~photos.example.com~cat.jpg",
            403,
            "url_refused",
            "only https:// is allowed",
        ),
        (f"{HOST}/redirect/https:~~127.0.0.1~", 403, "url_refused", "not in the list"),
        (f"{HOST}/redirect/https:~~loopback.example.com~", 403, "url_refused", "private or reserved"),
        (f"{HOST}/redirect/~redirect~", 424, "url_failed", "redirects"),
        (f"{HOST}/status/403", 424, "url_failed", "the host answered 403"),
        (f"{HOST}/gzip", 424, "url_failed", "the encoding 'gzip'"),
        (f"{HOST}/cut", 424, "url_failed", "3 of 1000 bytes"),
        (f"{HOST}/declared/1000001", 413, "body_too_large", "1000000 bytes (FOVEA_URL_BYTES)"),
        (f"{HOST}/endless", 413, "body_too_large", "1000000 bytes (FOVEA_URL_BYTES)"),
        (f"{HOST}/slow-headers", 424, "url_timeout", "in time (FOVEA_URL_SECONDS)"),
        (f"{HOST}/slow-body", 424, "url_timeout", "in time (FOVEA_URL_SECONDS)"),
        (f"{HOST}/host", 415, "unsupported_format", ""),
    ],
)
def test_bad_url_has_its_own_error(service: Service, url: str, status: int, code: str, message: str) -> None:
    if url.endswith("~redirect~"):
        url = f"{HOST}/redirect/" + "~redirect~".join([""] * 6)
    answer = service.classify(url)
    assert (answer.status_code, error_code(answer)) == (status, code), answer.text
    assert message in answer.json()["error"]["message"]
    assert "secret" not in answer.text


def test_name_that_changes_its_address_gains_nothing(service: Service, web: Web) -> None:
    web.addresses["photos.example.com"] = [[PUBLIC_ADDRESS], ["127.0.0.1"]]
    try:
        count = len(web.connections)
        assert service.classify(f"{HOST}/cat.jpg").status_code == 200
        assert web.connections[count:] == [(PUBLIC_ADDRESS, 443)]
        assert error_code(service.classify(f"{HOST}/cat.jpg")) == "url_refused"
        web.addresses["photos.example.com"] = [[PUBLIC_ADDRESS, "192.168.0.1"]]
        assert error_code(service.classify(f"{HOST}/cat.jpg")) == "url_refused"
        assert len(web.connections) == count + 1
    finally:
        del web.addresses["photos.example.com"]


# --- limits --------------------------------------------------------------------------------------


def test_fetch_ends_with_its_caller_and_makes_room(web: Web, small_zoo: Path) -> None:
    limits = {"url_fetches": 1, "body_bytes": 1 << 20, "bodies_bytes": 4 << 20}
    with run_service(web, small_zoo, max_bytes=1 << 30, seconds=20.0, **limits) as service:
        with pytest.raises(httpx.ReadTimeout):
            service.client.post("/v1/classify", json={"images": [{"url": f"{HOST}/slow-body"}]}, timeout=0.5)
        with pytest.raises(httpx.ReadTimeout):
            service.client.post("/v1/images", json={"url": f"{HOST}/slow-body"}, timeout=0.5)
        wait_until(lambda: service.count("client_left") == 2)
        # The only place is free again long before the slow host would have ended.
        assert service.classify(f"{HOST}/cat.jpg").status_code == 200
        # A deadline ends a fetch too.
        late = service.client.post(
            "/v1/classify",
            json={"images": [{"url": f"{HOST}/slow-body"}]},
            headers={"X-Deadline-Ms": "200"},
        )
        assert error_code(late) == "deadline_exceeded"
        assert service.client.get("/health/live").status_code == 200
        # A fetched image counts as a body: the memory of all bodies is a limit too.
        refused = service.classify(f"{HOST}/endless")
        assert (refused.status_code, error_code(refused)) == (503, "overloaded")
        assert "FOVEA_BODIES_BYTES" in refused.text
        wait_until(lambda: service.app.classifier.body_memory.used_bytes == 0)
        assert service.classify(f"{HOST}/cat.jpg", f"{HOST}/cat.jpg", f"{HOST}/cat.jpg").status_code == 200
        assert service.count("overloaded") == 1


def test_callers_have_turns_for_the_places(web: Web, small_zoo: Path) -> None:
    """Slow hosts of one caller would keep all places from others."""
    with run_service(
        web, small_zoo, max_bytes=1 << 20, seconds=20.0, url_fetches=1, trusted_proxies=("127.0.0.1",)
    ) as service:

        async def run() -> int:
            async with httpx.AsyncClient(base_url=service.client.base_url, timeout=60) as client:

                async def ask(path: str, caller: str) -> asyncio.Task[httpx.Response]:
                    body, sender = {"images": [{"url": HOST + path}]}, {"X-Forwarded-For": caller}
                    task = asyncio.create_task(client.post("/v1/classify", json=body, headers=sender))
                    await asyncio.sleep(0.3)
                    return task

                greedy = [await ask("/slow-body", "192.0.2.1") for _ in range(4)]
                polite = await ask("/cat.jpg", "192.0.2.2")
                for task in greedy[:2]:  # the second has the place by now
                    task.cancel()
                    await asyncio.sleep(0.3)
                reply = await asyncio.wait_for(polite, 10)
                for task in greedy:
                    task.cancel()
                return reply.status_code

        assert asyncio.run(run()) == 200


# --- images that are kept ------------------------------------------------------------------------


def test_image_by_url_is_fetched_once_and_asked_about_many_times(service: Service, web: Web) -> None:
    before = service.count("ok")
    kept = service.client.post("/v1/images", json={"url": f"{HOST}/cat.jpg"})
    assert kept.status_code == 200, kept.text
    sent = service.client.post("/v1/images", content=make_jpeg()).json()
    assert kept.json() == sent
    direct = service.client.post("/v1/classify", content=make_jpeg()).json()
    for _ in range(2):
        assert service.classify(kept.json()["url"]).json()["predictions"] == direct["predictions"]
    assert service.count("ok") == before + 1


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"url": f"{HOST}/status/404"}, 424, "url_failed"),
        ({"url": "https://elsewhere.example.com/cat.jpg"}, 403, "url_refused"),
        ({"url": "https://private.example.com/cat.jpg"}, 403, "url_refused"),
        ({"url": "http://photos.example.com/cat.jpg"}, 403, "url_refused"),
        ({"url": "x" * 5000}, 400, "bad_request"),
        ({"url": f"{HOST}/cat.jpg", "top_k": 1}, 400, "bad_request"),
        ({}, 400, "bad_request"),
        ([f"{HOST}/cat.jpg"], 400, "bad_request"),
    ],
)
def test_image_that_cannot_be_had_is_not_kept(service: Service, body: Any, status: int, code: str) -> None:
    answer = service.client.post("/v1/images", json=body)
    assert (answer.status_code, error_code(answer)) == (status, code), answer.text


def test_image_is_kept_by_url_only_with_a_list_of_hosts(server: Server) -> None:
    answer = server.client.post("/v1/images", json={"url": f"{HOST}/cat.jpg"})
    assert (answer.status_code, error_code(answer)) == (403, "url_refused")


def test_fetched_image_has_the_limit_of_kept_images(web: Web, small_zoo: Path) -> None:
    limits = {"bodies_bytes": 8000, "body_bytes": 4000}
    with run_service(web, small_zoo, max_bytes=1_000_000, seconds=2.0, **limits) as service:
        answer = service.client.post("/v1/images", json={"url": f"{HOST}/cat.jpg"})
        assert (answer.status_code, error_code(answer)) == (413, "body_too_large"), answer.text
        assert service.app.classifier.body_memory.used_bytes == 0
