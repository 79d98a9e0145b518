"""What cannot be shown is said in words, and all else goes on."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Page, expect

from tests.graphs import closed, publish
from tests.page.views import SHIP, View
from tests.servers import Server


def test_a_graph_that_cannot_be_opened_still_answers_and_has_a_heat_map(page: Page, tmp_path: Path) -> None:
    with Server(FOVEA_MODELS=str(publish(closed(), tmp_path)), FOVEA_EXPLAIN_SECONDS="0.3") as running:
        opened(page, running)
        expect(page.locator("#heat-text")).to_contain_text("masked photos were classified")
        expect(page.locator("canvas.heat")).to_be_visible()
        expect(page.locator("#layers-text")).to_contain_text("Their maps cannot be shown: ")
        expect(page.locator(".column")).to_have_count(0)


def test_explanations_that_are_switched_off_are_said_to_be(page: Page, small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_EXPLAIN="false") as running:
        opened(page, running)
        expect(page.locator("#heat-text")).to_contain_text("There is no heat map: ")
        expect(page.locator("#layers-text")).to_contain_text("The layers cannot be shown: ")


def opened(page: Page, running: Server) -> None:
    """Its page, with the answer to a photo."""
    view = View(page, running)
    view.open()
    view.pick(SHIP)
    expect(view.verdict).to_be_visible()
