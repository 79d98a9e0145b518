"""Paths with extra slashes, as careless clients write them, and links that also work behind a proxy."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.raw import Wire
from tests.servers import Server
from tests.service.api.test_protocols import ASKED, error_code

CARELESS_FORMATS = ("/{}", "{}/", "//{}//", "//{}")
"""Formats for a path that begins with a slash."""


def make_careless_paths(path: str) -> list[str]:
    return [form.format(path) for form in CARELESS_FORMATS] + [
        path.replace("/", "//"),
        path.replace("/", "///") + "/",
    ]


@pytest.mark.parametrize("protocol", ASKED)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_extra_slashes_do_not_change_a_prediction(server: Server, protocol: str, is_chunked: bool) -> None:
    """This holds with and without ASGI. A redirect would lose the body, or a proxy's scheme and prefix."""
    path, body = ASKED[protocol]
    path = path.format("small")
    request = server.client.build_request(
        "POST", path, **({"content": body} if isinstance(body, bytes) else {"json": body})
    )
    expected = server.client.send(request).json()
    content, headers = request.content, {"Content-Type": request.headers.get("Content-Type", "")}
    for careless_path in make_careless_paths(path):
        payload: Any = iter([content]) if is_chunked else content
        reply = server.client.post(f"{server.url}{careless_path}?", content=payload, headers=headers)
        assert (reply.status_code, reply.json()) == (200, expected), careless_path


def test_extra_slashes_do_not_change_get_replies(server: Server) -> None:
    """The paths are those of every protocol that need no parameter but the model's name and version."""
    document = server.client.get("/openapi.json").json()
    paths = [path for path, operations in document["paths"].items() if "get" in operations]
    get_paths = [path.format(name="small", version="1") for path in paths if "weights" not in path]
    assert len(get_paths) > 20
    for path in (*get_paths, "/docs", "/page/base.css", "/docs/swagger/start.js"):
        plain_reply = server.client.get(path)
        assert plain_reply.status_code == 200
        for careless_path in make_careless_paths(path):
            reply = server.client.get(f"{server.url}{careless_path}", follow_redirects=False)
            assert reply.status_code == 200, careless_path
            if path not in ("/metrics", "/docs") and "stats" not in path:
                assert reply.content == plain_reply.content, careless_path


def test_path_with_extra_slash_is_counted_as_its_route(server: Server) -> None:
    labels = {"route": "/ping", "protocol": "torchserve"}
    before = server.read_metric("fovea_requests_total", **labels)
    server.client.get("/ping/")
    assert server.read_metric("fovea_requests_total", **labels) == before + 1


@pytest.mark.parametrize("path", ["/nothing/", "//nothing", "/page", "/page/", "/docs/swagger/"])
def test_unknown_path_gets_404_without_a_redirect(server: Server, path: str) -> None:
    reply = server.client.get(f"{server.url}{path}", follow_redirects=False)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
    assert "location" not in reply.headers


def test_errors_on_careless_paths_have_the_protocol_shape(server: Server) -> None:
    reply = server.client.delete(f"{server.url}//predict/")
    assert (reply.status_code, error_code(reply, "huggingface")) == (405, "method_not_allowed")
    reply = server.client.get(f"{server.url}//v2//nothing/")
    assert (reply.status_code, error_code(reply, "oip")) == (404, "not_found")
    with Wire(server.url) as wire:  # refused by the connection, before the application has seen the request
        wire.send(b"POST //predict/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n")
        answer = wire.read_response()
    assert (answer.status, answer.json["code"]) == (400, "bad_http")


# --- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_links_are_relative(server: Server, path: str) -> None:
    links = re.findall(r'(?:href|src)="([^"]+)"', server.client.get(path).text)
    assert links
    assert all(link.startswith(("./", "#")) for link in links)


def test_documentation_links_work_with_a_trailing_slash(server: Server) -> None:
    for path in ("/docs", "/docs/"):
        for link in re.findall(r'(?:href|src)="([^"]+)"', server.client.get(path).text):
            url = server.client.get(f"{server.url}{path}").url.join(link)
            assert server.client.get(url).status_code == 200


def test_openapi_server_url_is_relative_to_the_document(server: Server) -> None:
    for path in ("/openapi.json", "/openapi.json/"):
        reply = server.client.get(path)
        (entry,) = reply.json()["servers"]
        assert reply.url.join(entry["url"]).path == "/"
