"""Cached replies about models are the same as fresh ones, and never older than the models."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.raw import Wire
from tests.servers import Server

PATHS = [
    "/",
    "/docs",
    "/models",
    "/models/small",
    "/models/small/all",
    "/models/small/1",
    "/openapi.json",
    "/page/main.js",
    "/v1/models",
    "/v1/models/small",
    "/v1/models/small/contract",
    "/v1/models/small/metadata",
    "/v1/models/small/versions/1",
    "/v1/models/small/versions/1/contract",
    "/v1/models/small/versions/1/metadata",
    "/v2",
    "/v2/",
    "/v2/models/small",
    "/v2/models/small/config",
    "/v2/models/small/versions/1",
    "/v2/models/small/versions/1/config",
]


@pytest.fixture(scope="module")
def server_and_zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    root = add_to_repository(build_model(), tmp_path_factory.mktemp("zoo"))
    add_to_repository(build_model(seed=1), root, name="other")
    settings = {"FOVEA_MANAGEMENT": "true", "FOVEA_DEFAULT_MODEL": "small", "FOVEA_WATCH": "0"}
    with Server(FOVEA_MODELS=str(root), **settings) as server:
        yield server, root
    assert "Traceback" not in server.log


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
@pytest.mark.parametrize("path", PATHS)
def test_cached_reply_equals_first_reply(
    server_and_zoo: tuple[Server, Path], path: str, encoding: str
) -> None:
    server, _ = server_and_zoo
    headers = {"Accept-Encoding": encoding}
    count_before = server.read_metric("fovea_requests_total", status="200")
    first_reply, *later_replies = [
        server.client.get(path, headers={**headers, "X-Request-Id": str(n)}) for n in range(5)
    ]
    for number, reply in enumerate(later_replies, 1):
        assert reply.content == first_reply.content
        assert reply.status_code == first_reply.status_code == 200
        assert reply.headers["x-request-id"] == str(number)
        assert _stable_headers(reply) == _stable_headers(first_reply)
    assert first_reply.headers.get("content-encoding", "identity") in (encoding, "identity")
    head_reply = server.client.head(path, headers=headers)
    assert head_reply.headers["content-length"] == str(first_reply.num_bytes_downloaded)
    # five GET requests, one HEAD request and the first scrape
    assert server.read_metric("fovea_requests_total", status="200") == count_before + 7


def test_cached_reply_honours_etag_and_range(server_and_zoo: tuple[Server, Path]) -> None:
    server, _ = server_and_zoo
    for _ in range(3):
        page = server.client.get("/page/main.js")
    unchanged_reply = server.client.get("/page/main.js", headers={"If-None-Match": page.headers["etag"]})
    assert (unchanged_reply.status_code, unchanged_reply.content) == (304, b"")
    assert server.client.get("/page/main.js").content == page.content
    assert server.client.get("/page/main.js", headers={"Range": "bytes=0-9"}).content == page.content[:10]
    assert server.client.get("/page/main.js").content == page.content


def test_cached_reply_has_the_encoding_that_its_request_takes(server_and_zoo: tuple[Server, Path]) -> None:
    server, _ = server_and_zoo
    for path in ("/", "/page/main.js", "/openapi.json", "/v1/models/small/contract"):
        contents = set()
        for encoding in ("gzip", "identity", "gzip", "identity", "gzip;q=0, br"):
            reply = server.client.get(path, headers={"Accept-Encoding": encoding})
            assert reply.headers.get("content-encoding", "identity") == encoding.replace(
                "gzip;q=0, br", "identity"
            )
            assert reply.headers["vary"] == "Accept-Encoding"
            contents.add(reply.content)
        assert len(contents) == 1


@pytest.mark.long
def test_model_change_is_visible_at_once(server_and_zoo: tuple[Server, Path]) -> None:
    server, root = server_and_zoo

    def read_names(path: str) -> set[str]:
        return {model["name"] for model in server.client.get(path).json()["models"]}

    for version in range(2, 6):
        for _ in range(3):
            assert read_names("/v1/models") == {"small", "other"}
            assert server.client.get("/v2/models/other").status_code == 200
        assert server.client.post("/v2/repository/models/other/unload").status_code == 200
        assert read_names("/v1/models") == {"small"}
        for path in ("/v2/models/other", "/v1/models/other/contract", "/models/other", "/v1/models/other"):
            assert server.client.get(path).status_code == 404
        add_to_repository(build_model(seed=version), root, name="other", version=str(version))
        assert server.client.post("/v2/repository/models/other/load").status_code == 200
        contract = server.client.get("/v1/models/other/contract").json()
        assert contract["version"] == str(version)
        assert str(version) in server.client.get("/v2/models/other").json()["versions"]


def test_cached_replies_are_pipelined_in_order(server_and_zoo: tuple[Server, Path]) -> None:
    server, _ = server_and_zoo
    contract = server.client.get("/v1/models/small/contract").content
    models = server.client.get("/v1/models").content
    with Wire(server.url) as wire:
        gets = [
            b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path
            for path in (b"/v1/models/small/contract", b"/v1/models")
        ]
        wire.send(b"".join(gets) * 20)
        for _ in range(20):
            assert wire.read_response().body == contract
            assert wire.read_response().body == models


def test_errors_and_queries_are_not_cached(server_and_zoo: tuple[Server, Path]) -> None:
    server, _ = server_and_zoo
    for _ in range(3):
        assert server.client.get("/v1/models/none/contract").status_code == 404
        first_page = server.client.get("/models", params={"limit": 1}).json()
        assert len(first_page["models"]) == 1
        assert len(server.client.get("/models").json()["models"]) == 2


def test_concurrent_scrapes_include_the_last_request(server_and_zoo: tuple[Server, Path]) -> None:
    """A client that has its answer finds the request in the next scrape, however many scrapes run."""
    server, _ = server_and_zoo

    def is_request_counted(_: int) -> bool:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            count_before = _count_requests(client)
            client.post("/v1/classify", content=make_jpeg())
            return _count_requests(client) > count_before

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(is_request_counted, range(24)))
    text = server.client.get(
        "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    ).text
    assert text.endswith("# EOF\n")


def _stable_headers(reply: httpx.Response) -> dict[str, str]:
    """Return the headers that do not belong to one request."""
    return {name: value for name, value in reply.headers.items() if name not in ("date", "x-request-id")}


def _count_requests(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("fovea_requests_total"))
