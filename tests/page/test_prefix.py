"""The page and the documentation behind a proxy that serves them below a path."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.page.views import View
from tests.servers import Server

pytestmark = pytest.mark.long

PREFIX = "/vision"


@contextmanager
def run_ingress(server: Server, paths: list[str]) -> Iterator[str]:
    """Run a proxy that removes the prefix, like an ingress with a rewrite; other paths are 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            if self.path != PREFIX and not self.path.startswith(f"{PREFIX}/"):
                self.send_error(404)
                return
            length = int(self.headers.get("Content-Length", 0))
            forwarded_headers = {"X-Forwarded-Prefix": PREFIX, "X-Forwarded-Proto": "https"}
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            reply = httpx.request(
                self.command,
                f"{server.url}{self.path.removeprefix(PREFIX) or '/'}",
                headers={**headers, **forwarded_headers},
                content=self.rfile.read(length),
                timeout=60,
            )
            self.send_response(reply.status_code)
            for name in ("Content-Type", "Content-Security-Policy", "X-Channels", "X-Lowest", "X-Highest"):
                if name in reply.headers:
                    self.send_header(name, reply.headers[name])
            self.send_header("Content-Length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{proxy.server_port}{PREFIX}"
        finally:
            proxy.shutdown()
            thread.join()


@pytest.fixture(params=["", "127.0.0.1"], ids=["unknown", "trusted"])
def proxied_page(
    page: Page, page_server: Server, request: pytest.FixtureRequest
) -> Iterator[tuple[View, str, list[str]]]:
    """A view, its URL behind a proxy that the service does not know or trusts, and the requested paths."""
    paths: list[str] = []
    if not request.param:
        with run_ingress(page_server, paths) as url:
            yield View(page, page_server), url, paths
        return
    with (
        Server(FOVEA_TRUSTED_PROXIES=request.param, FOVEA_EXPLAIN_SECONDS="0.3") as server,
        run_ingress(server, paths) as url,
    ):
        yield View(page, server), url, paths


def test_page_works_below_a_prefix(proxied_page: tuple[View, str, list[str]]) -> None:
    view, url, paths = proxied_page
    view.page.goto(f"{url}/")
    expect(view.page.locator("#model")).to_be_enabled()
    view.page.locator(".samples img").nth(1).click()
    expect(view.top_label).to_have_attribute("data-label", "ship")
    expect(view.page.locator("#heat-text")).to_contain_text("“ship”")
    view.inspect_map(view.tensor_name("Conv"))
    view.page.get_by_role("link", name="API").click()
    expect(view.page.locator(".opblock").first).to_be_visible()
    assert paths
    assert {path for path in paths if not path.startswith(f"{PREFIX}/")} <= {"/favicon.ico"}


@pytest.mark.parametrize("proxied_page", [""], indirect=True)
def test_documentation_sends_requests_below_the_prefix(proxied_page: tuple[View, str, list[str]]) -> None:
    view, url, paths = proxied_page
    for path in ("/docs", "/docs/"):
        view.page.goto(f"{url}{path}")
        block = view.page.locator("#operations-operations-live_health_live_get")
        block.click()
        block.get_by_role("button", name="Try it out").click()
        block.get_by_role("button", name="Execute").click()
        expect(block.locator(".live-responses-table")).to_contain_text('"live"')
    assert paths.count(f"{PREFIX}/health/live") == 2


@pytest.mark.parametrize("proxied_page", ["127.0.0.1"], indirect=True)
def test_page_works_without_a_slash_behind_a_trusted_proxy(proxied_page: tuple[View, str, list[str]]) -> None:
    """The browser's address ends in the prefix: only the proxy knows the right start of links."""
    view, url, paths = proxied_page
    view.page.goto(url)
    expect(view.page.locator("#model")).to_be_enabled()
    assert any(re.fullmatch(rf"{PREFIX}/page/v-\w+/main\.js", path) for path in paths)
