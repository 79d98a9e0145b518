"""Accessibility: keyboard, phones, dark and light themes, and the faults that axe-core knows."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.page.views import SHIP, TRUCK, View, make_upload

pytestmark = pytest.mark.long

BACKGROUND = "(element) => getComputedStyle(element).backgroundColor"


def test_axe_finds_no_serious_fault(view: View) -> None:
    assert find_serious_faults(view.page) == []
    view.pick_files(SHIP, make_upload("notes.txt", b"no image"))
    view.inspect_map(view.tensor_name("Conv", 1))
    assert find_serious_faults(view.page) == []
    view.inspect_map(view.tensor_name("Softmax"))
    assert find_serious_faults(view.page) == []
    view.photo_item("notes.txt").locator(".open").click()
    assert find_serious_faults(view.page) == []


def find_serious_faults(page: Page) -> list[str]:
    """Return the serious and critical faults that axe-core finds, and those of contrast in dark too."""
    page.emulate_media(color_scheme="light")
    violations = Axe().run(page).response["violations"]
    page.emulate_media(color_scheme="dark")
    violations += Axe().run(page, options={"runOnly": ["color-contrast"]}).response["violations"]
    return [
        f"{violation['id']}: {node['target']}"
        for violation in violations
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def test_page_is_usable_by_keyboard_alone(view: View) -> None:
    page = view.page
    # The browser reports its file choosers only some time after the first listener; a key can be faster.
    page.on("filechooser", lambda _: None)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()  # the browser moves the focus after the key
    page.keyboard.press("Tab")
    expect(page.locator("#choose")).to_be_focused()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files([str(SHIP), str(TRUCK)])
    expect(view.top_label).to_be_visible()
    expect(page.locator("#choose")).to_be_focused()
    tab_to(page, ".gallery .open")
    page.keyboard.press("ArrowRight")
    expect(view.photo_item("truck.png").locator(".open")).to_be_focused()
    expect(view.top_label).to_have_attribute("data-label", "truck")
    page.keyboard.press("ArrowLeft")
    expect(view.top_label).to_have_attribute("data-label", "ship")
    tab_to(page, '.bars [data-label="bird"] button')
    page.keyboard.press("Enter")
    expect(page.locator("#heat-text")).to_contain_text("“bird”")
    view.column(view.tensor_name("Input"))
    tab_to(page, ".map")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    tensor = view.tensor_name("Conv")
    second_map = page.locator(f'.map[data-tensor="{tensor}"][data-index="1"]')
    expect(second_map).to_be_focused()
    page.keyboard.press("Enter")
    expect(view.detail.locator("h3")).to_be_focused()
    tab_to(page, '[data-go="1"]')
    page.keyboard.press("Enter")
    expect(view.detail.locator("h3")).to_contain_text("map 3 of 24")
    expect(page.locator('[data-go="1"]')).to_be_focused()
    tab_to(page, ".chooser .area")
    page.keyboard.press("ArrowDown")
    expect(view.detail.locator(".place")).to_have_text("row 16, column 15")
    page.keyboard.press("Escape")
    expect(page.locator("#detail")).not_to_be_visible()
    expect(page.locator(f'.map[data-tensor="{tensor}"][data-index="2"]')).to_be_focused()


def tab_to(page: Page, selector: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"Tab never comes to {selector}")


@pytest.mark.parametrize("width", [320, 768])
def test_page_fits_narrow_screens(view: View, width: int) -> None:
    view.page.set_viewport_size({"width": width, "height": 760})
    assert_fits(view.page, width)
    view.pick_files(
        SHIP, TRUCK, make_upload("a name that is much longer than a phone is wide.txt", b"no image")
    )
    for kind in ("Conv", "MaxPool", "Gemm", "Softmax"):
        view.inspect_map(view.tensor_name(kind))
        assert_fits(view.page, width)


def assert_fits(page: Page, width: int) -> None:
    """Check that the page does not scroll sideways."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_theme_follows_the_system_until_one_is_chosen(view: View) -> None:
    page = view.page
    page.emulate_media(color_scheme="light")
    light_colour = read_background_colour(page)
    page.emulate_media(color_scheme="dark")
    dark_colour = read_background_colour(page)
    assert light_colour != dark_colour
    button = page.locator("#theme")
    expect(button).to_have_attribute("aria-label", "Colours: as the system has it")
    button.click()
    expect(button).to_have_attribute("aria-label", "Colours: light")
    assert read_background_colour(page) == light_colour
    page.reload()
    assert read_background_colour(page) == light_colour
    button.click()
    page.emulate_media(color_scheme="light")
    assert read_background_colour(page) == dark_colour
    button.click()
    expect(button).to_have_attribute("aria-label", "Colours: light")
    button.click()
    expect(button).to_have_attribute("aria-label", "Colours: as the system has it")
    button.click()  # the first click changes the colours, whatever theme the system has
    assert read_background_colour(page) == dark_colour


def read_background_colour(page: Page) -> str:
    return str(page.locator("html").evaluate(BACKGROUND))


def test_meaningful_colours_stay_in_forced_colours_mode(view: View) -> None:
    view.pick_files(SHIP)
    view.column(view.tensor_name("Softmax"))
    parts = [view.page.locator(selector).first for selector in (".bars .fill", ".stack span", ".swatch")]
    before = [part.evaluate(BACKGROUND) for part in parts]
    view.page.emulate_media(forced_colors="active")
    assert [part.evaluate(BACKGROUND) for part in parts] == before


def test_layout_does_not_shift_when_the_answer_arrives(view: View) -> None:
    """The cumulative layout shift (web.dev/cls) without direct effects of clicks: up to 0.1 is "good"."""
    view.page.evaluate(
        """() => { globalThis.shifts = 0; new PerformanceObserver((list) => {
          for (const one of list.getEntries()) if (!one.hadRecentInput) globalThis.shifts += one.value;
        }).observe({type: "layout-shift"}); }"""
    )
    view.pick_files(SHIP)
    expect(view.page.locator("#saw .steps li").first).to_be_visible()
    view.column(view.tensor_name("Conv"))
    opening_shift = view.page.evaluate("globalThis.shifts")
    view.photo_item("ship.jpg").locator(".open").click()
    expect(view.page.locator("#heat-text")).to_contain_text("activation map")
    assert view.page.evaluate("globalThis.shifts") - opening_shift < 0.02
    assert opening_shift < 0.1
