"""Paths as careless clients write them, and what leads back to them behind a proxy."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.raw import Wire
from tests.servers import Server
from tests.service.api.test_protocols import ASKED, error_code

CARELESS = ("/{}", "{}/", "//{}//", "//{}")
"""Around a path that begins with a slash."""


def careless_forms(path: str) -> list[str]:
    return [form.format(path) for form in CARELESS] + [
        path.replace("/", "//"),
        path.replace("/", "///") + "/",
    ]


@pytest.mark.parametrize("protocol", ASKED)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_slashes_too_many_change_nothing(server: Server, protocol: str, is_chunked: bool) -> None:
    """This holds with and without ASGI. A redirect would lose the body, or a proxy's scheme and prefix."""
    path, body = ASKED[protocol]
    path = path.format("small")
    request = server.client.build_request(
        "POST", path, **({"content": body} if isinstance(body, bytes) else {"json": body})
    )
    expected = server.client.send(request).json()
    content, headers = request.content, {"Content-Type": request.headers.get("Content-Type", "")}
    for other in careless_forms(path):
        sent: Any = iter([content]) if is_chunked else content
        reply = server.client.post(f"{server.url}{other}?", content=sent, headers=headers)
        assert (reply.status_code, reply.json()) == (200, expected), other


def test_nor_for_what_is_asked_by_get(server: Server) -> None:
    """Every route of every protocol that needs no parameter but the model's name and version."""
    document = server.client.get("/openapi.json").json()
    paths = [path for path, operations in document["paths"].items() if "get" in operations]
    asked = [path.format(name="small", version="1") for path in paths if "weights" not in path]
    assert len(asked) > 20
    for path in (*asked, "/docs", "/page/base.css", "/docs/swagger/start.js"):
        plain = server.client.get(path)
        assert plain.status_code == 200
        for other in careless_forms(path):
            reply = server.client.get(f"{server.url}{other}", follow_redirects=False)
            assert reply.status_code == 200, other
            if path not in ("/metrics", "/docs") and "stats" not in path:
                assert reply.content == plain.content, other


def test_they_are_counted_as_the_route(server: Server) -> None:
    labels = {"route": "/ping", "protocol": "torchserve"}
    before = server.read_metric("fovea_requests_total", **labels)
    server.client.get("/ping/")
    assert server.read_metric("fovea_requests_total", **labels) == before + 1


@pytest.mark.parametrize("path", ["/nothing/", "//nothing", "/page", "/page/", "/docs/swagger/"])
def test_nothing_is_redirected(server: Server, path: str) -> None:
    reply = server.client.get(f"{server.url}{path}", follow_redirects=False)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
    assert "location" not in reply.headers


def test_an_error_there_has_the_protocol_s_shape(server: Server) -> None:
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
def test_no_link_begins_at_the_root_of_the_host(server: Server, path: str) -> None:
    linked = re.findall(r'(?:href|src)="([^"]+)"', server.client.get(path).text)
    assert linked
    assert all(link.startswith(("./", "#")) for link in linked)


def test_the_documentation_s_links_hold_with_a_slash_at_the_end(server: Server) -> None:
    for path in ("/docs", "/docs/"):
        for link in re.findall(r'(?:href|src)="([^"]+)"', server.client.get(path).text):
            assert server.client.get(f"{server.url}{path}").url.join(link).path.startswith("/docs/swagger/")


def test_the_document_s_server_is_relative_to_the_document(server: Server) -> None:
    for path in ("/openapi.json", "/openapi.json/"):
        reply = server.client.get(path)
        (one,) = reply.json()["servers"]
        assert reply.url.join(one["url"]).path == "/"
