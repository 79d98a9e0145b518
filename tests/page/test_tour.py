"""The tour of six steps that the first visit offers."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.page.test_use import assert_fits, find_serious_faults
from tests.page.views import TRUCK, View

pytestmark = pytest.mark.long

PARTS = ["#intake", "#opened .answer", "#opened .looked", "#network", "#detail", "header .controls"]


def test_tour_shows_six_parts_of_the_page_and_is_remembered(view: View) -> None:
    page = view.page
    page.get_by_role("button", name="Take a tour in six steps").click()
    card = page.get_by_role("dialog")
    for number, part in enumerate(PARTS, start=1):
        expect(card.locator("h2")).to_contain_text(f"{number} of 6")
        expect(page.locator(".toured")).to_have_count(1)
        expect(page.locator(f"{part}.toured")).to_be_in_viewport()
        expect(card.locator("h2")).to_be_focused()
        if number == 5:
            expect(view.detail.locator("h3")).to_contain_text("Convolution")
        card.get_by_role("button", name="Finish" if number == 6 else "Next").click()
    expect(card).to_have_count(0)
    expect(page.locator(".toured")).to_have_count(0)
    page.reload()
    expect(page.locator("#model")).to_be_enabled()
    expect(page.locator("#tour")).not_to_be_visible()


@pytest.mark.parametrize("way", ["Skip the tour", "Escape", "No, thanks"])
def test_tour_can_be_skipped_and_is_not_offered_again(view: View, way: str) -> None:
    page = view.page
    if way == "No, thanks":
        page.get_by_role("button", name=way).click()
    else:
        page.get_by_role("button", name="Take a tour in six steps").click()
        page.get_by_role("button", name="Next").click()
        card = page.get_by_role("dialog")
        expect(card.locator("h2")).to_contain_text("2 of 6")
        card.get_by_role("button", name="Back").click()
        expect(card.locator("h2")).to_contain_text("1 of 6")
        if way == "Escape":
            page.keyboard.press("Escape")
        else:
            card.get_by_role("button", name=way).click()
        expect(card).to_have_count(0)
    page.reload()
    expect(page.locator("#model")).to_be_enabled()
    expect(page.locator("#tour")).not_to_be_visible()
    page.get_by_role("link", name="Learn").click()
    page.get_by_role("button", name="Take the tour").click()  # it is there for whoever asks
    expect(page.get_by_role("dialog").locator("h2")).to_contain_text("1 of 6")


def test_tour_keeps_the_open_photo(view: View) -> None:
    view.pick_files(TRUCK)
    expect(view.top_label).to_be_visible()
    view.page.get_by_role("link", name="Learn").click()
    view.page.get_by_role("button", name="Take the tour").click()
    expect(view.page.get_by_role("dialog").locator("h2")).to_be_focused()
    expect(view.page.locator("#gallery li")).to_have_count(1)


def test_tour_has_no_serious_fault_and_fits_phones(view: View) -> None:
    page = view.page
    page.get_by_role("button", name="Take a tour in six steps").click()
    page.get_by_role("button", name="Next").click()
    expect(view.top_label).to_be_visible()
    assert find_serious_faults(page) == []
    for width in (320, 390):
        page.set_viewport_size({"width": width, "height": 760})
        assert_fits(page, width)
