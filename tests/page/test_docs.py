"""Swagger UI at `/docs`."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect

from tests.page.views import SHIP
from tests.servers import Server

pytestmark = pytest.mark.long

TWINS = "the same for one version, or by PUT"


@pytest.fixture
def docs(page: Page, page_server: Server) -> Page:
    """The opened documentation."""
    page.goto(f"{page_server.url}/docs")
    expect(page.locator(".opblock").first).to_be_visible()
    return page


def test_documentation_takes_a_photo(docs: Page) -> None:
    block = docs.locator(".opblock").first
    expect(block.locator(".opblock-summary-path")).to_contain_text("/v1/classify")
    block.click()
    block.get_by_role("button", name="Try it out").click()
    block.locator("input[type=file]").set_input_files(str(SHIP))
    block.get_by_role("button", name="Execute").click()
    expect(block.locator(".live-responses-table")).to_contain_text('"ship"')


def test_documentation_links_to_the_page_and_has_an_icon(docs: Page, page_server: Server) -> None:
    icon = docs.locator('link[rel="icon"]').get_attribute("href")
    assert icon is not None
    assert page_server.client.get(icon.removeprefix(".")).headers["content-type"] == "image/svg+xml"
    document = docs.get_by_role("link", name="OpenAPI document").get_attribute("href")
    assert document is not None
    assert page_server.client.get(document.removeprefix(".")).json()["info"]["title"] == "Fovea"
    docs.get_by_role("link", name="The page with photos").click()
    expect(docs.locator("#model")).to_be_enabled()


def test_calls_that_repeat_others_are_folded(docs: Page) -> None:
    paths = docs.locator(".opblock-summary-path")
    expect(paths.filter(has_text="/v1/models/{name}/contract")).to_have_count(1)
    shown = [re.sub(r"\s|\u200b", "", text) for text in paths.all_inner_texts()]
    assert "/v1/models/{name}/classify" in shown
    assert not [path for path in shown if "{version}" in path]
    expect(docs.locator(".opblock-put")).to_have_count(0)
    docs.get_by_role("heading", name=TWINS).click()
    expect(paths.filter(has_text="/v1/models/{name}/versions/{version}/contract")).to_have_count(1)
    assert docs.locator(".opblock-put").count() > 1


def test_link_to_the_folded_calls_opens_them(page: Page, page_server: Server) -> None:
    page.goto(f"{page_server.url}/docs#/{quote(TWINS)}")
    expect(page.get_by_role("heading", name=TWINS)).to_be_visible()
    expect(page.locator(".opblock-put").first).to_be_visible()
