"""The page asks for an API key, and keeps it in the tab."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from fovea.service.access.caller import Scope
from fovea.service.access.key_editor import add_key
from tests.page.test_use import assert_fits, find_serious_faults
from tests.page.views import SHIP, View
from tests.servers import Server

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def key_and_server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Server]]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    key = add_key(file, "page", frozenset({Scope.CLASSIFY, Scope.EXPLAIN}))
    with Server(FOVEA_MODELS=str(models), FOVEA_KEYS=str(file), FOVEA_EXPLAIN_SECONDS="0.3") as server:
        server.client.headers["X-API-Key"] = key
        yield key, server


def test_page_asks_for_a_key_and_forgets_it_with_the_tab(
    page: Page, key_and_server: tuple[str, Server]
) -> None:
    key, server = key_and_server
    page.goto(server.url)
    dialog = page.get_by_role("dialog", name="This service needs an API key")
    field = dialog.get_by_label("API key")
    expect(field).to_be_focused()
    expect(dialog).to_contain_text("Whoever runs this service gives out the keys.")
    assert find_serious_faults(page) == []
    page.keyboard.type("no key")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("without spaces")
    field.fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("the API key is not known")
    field.fill(f" {key} ")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#model")).to_be_enabled()
    view = View(page, server)
    view.pick_files(SHIP)
    expect(view.top_label).to_have_attribute("data-label", "ship")
    assert page.evaluate("sessionStorage.getItem('fovea-key')") == key
    assert key not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
    page.reload()
    expect(page.locator("#model")).to_be_enabled()  # without a question
    expect(dialog).to_be_hidden()
    page.evaluate("sessionStorage.clear()")


def test_cancelled_question_shows_the_error_and_asks_again(
    page: Page, key_and_server: tuple[str, Server]
) -> None:
    key, server = key_and_server
    page.goto(server.url)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.locator("#fault-text")).to_contain_text(re.compile("API key"))
    page.get_by_role("button", name="Try again").click()
    dialog.get_by_label("API key").fill(key)
    dialog.get_by_role("button", name="Use this key").click()
    expect(page.locator("#model")).to_be_enabled()
    page.evaluate("sessionStorage.clear()")


def test_key_without_a_scope_can_be_replaced(page: Page, models: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    narrow_key = add_key(file, "narrow", frozenset({Scope.CLASSIFY}))
    key = add_key(file, "page", frozenset({Scope.CLASSIFY, Scope.EXPLAIN}))
    with Server(FOVEA_MODELS=str(models), FOVEA_KEYS=str(file), FOVEA_EXPLAIN_SECONDS="0.3") as server:
        view = View(page, server)
        page.goto(server.url)
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("API key").fill(narrow_key)
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_be_enabled()
        view.pick_files(SHIP)
        expect(view.top_label).to_have_attribute("data-label", "ship")
        expect(page.locator("#heat-text")).to_contain_text("scope")
        expect(page.locator("#layers-text")).to_contain_text("cannot be shown")
        page.set_viewport_size({"width": 320, "height": 760})
        assert_fits(page, 320)
        button = page.get_by_role("button", name="Change the API key")
        button.click()
        page.keyboard.press("Escape")
        expect(button).to_be_focused()
        assert page.evaluate("sessionStorage.getItem('fovea-key')") == narrow_key
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("asks about your photos again")
        dialog.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#heat-text")).to_contain_text("“ship”")
        expect(page.locator(".column").first).to_be_attached()
        expect(page.locator("#gallery li")).to_have_count(1)
        assert find_serious_faults(page) == []
        page.evaluate("sessionStorage.clear()")


def test_service_without_keys_has_no_button_for_them(view: View) -> None:
    expect(view.page.locator("#change-key")).to_be_hidden()
