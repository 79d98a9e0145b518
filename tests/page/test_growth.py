"""The animation in which a map grows, place by place, under the window that slides."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, expect

from tests.page.test_layers import PIXELS
from tests.page.test_use import assert_fits, find_serious_faults, tab_to
from tests.page.views import SHIP, View, read_number, read_numbers
from tests.servers import Server

pytestmark = pytest.mark.long

PLACE_MILLISECONDS = 2000
"""Time from place to place before somebody changes the speed."""


@pytest.fixture
def teaching_view(view: View) -> View:
    """The page with the teaching model and an open photo."""
    view.select_model("tiny_vgg")
    view.pick_files(SHIP)
    return view


@pytest.fixture
def timed_view(browser: Browser, page_server: Server) -> Iterator[View]:
    """The same, with a clock that stands still."""
    page = browser.new_page(reduced_motion="reduce")
    page.clock.install()
    view = View(page, page_server)
    view.open()
    view.select_model("tiny_vgg")
    view.pick_files(SHIP)
    view.inspect_map(view.tensor_name("Conv"))
    expect(button(view, "Play")).to_be_visible()
    page.clock.pause_at("2100-01-01")
    yield view
    page.close()


def button(view: View, name: str) -> Locator:
    return view.page.locator(".player").get_by_role("button", name=name)


def step(view: View, count: int = 1) -> None:
    for _ in range(count):
        button(view, "Step ›").click()


def place(view: View) -> Locator:
    return view.page.locator("#detail .place")


def is_drawn(view: Locator, row: int, column: int) -> bool:
    """Return whether a map has the colour of its value at a place, and is not hatched there."""
    canvas = view.locator("canvas").first
    height, width = canvas.evaluate("(canvas) => [canvas.height, canvas.width]")
    values = np.array(canvas.evaluate(PIXELS)).reshape(height, width, 4)
    with Image.open(BytesIO(canvas.screenshot())) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    y = int((row + 0.5) * pixels.shape[0] / height)
    x = int((column + 0.5) * pixels.shape[1] / width)
    return bool(np.abs(pixels[y, x] - values[row, column, :3]).max() <= 2)


@pytest.mark.parametrize("kind", ["Conv", "Relu", "MaxPool"])
def test_map_grows_place_by_place(teaching_view: View, kind: str) -> None:
    view = teaching_view
    tensor = view.tensor_name(kind)
    values = view.fetch_maps(tensor)[2]
    detail = view.inspect_map(tensor, 2)
    map_view = detail.locator(".chooser .mapview")
    assert is_drawn(map_view, 4, 4)
    for column in range(4):
        step(view)
        expect(place(view)).to_have_text(f"row 0, column {column}")
        shown = read_number(detail.locator(".equation"), "shown")
        assert shown == pytest.approx(float(values[0, column]), abs=1e-5)
    later_places = [(0, 4), (0, 5), (1, 0), (4, 4), (9, 9)]
    assert [is_drawn(map_view, 0, column) for column in range(3)] == [True] * 3  # a frame is around the last
    assert [is_drawn(map_view, *later) for later in later_places] == [False] * 5
    assert map_view.locator(".strip").evaluate("(strip) => getComputedStyle(strip).clipPath") == "none"
    step(view, values.shape[1] - 2)
    expect(place(view)).to_have_text("row 1, column 1")
    assert is_drawn(map_view, 0, values.shape[1] - 1)
    assert is_drawn(map_view, 1, 0)
    assert not is_drawn(map_view, 1, 2)
    button(view, "One step back").click()
    expect(place(view)).to_have_text("row 1, column 0")
    assert not is_drawn(map_view, 1, 1)
    map_view.locator(".area").click(position={"x": 100, "y": 100})
    assert is_drawn(map_view, 1, 1)
    assert is_drawn(map_view, 9, 9)


def test_step_shows_the_products_and_the_sum_of_its_place(teaching_view: View) -> None:
    view = teaching_view
    tensor = view.tensor_name("Conv")
    pixels, kernel = view.fetch_maps(view.tensor_name("Input")), view.fetch_weights(tensor, 1)
    values = view.fetch_maps(tensor)[1]
    terms = view.inspect_map(tensor, 1).locator(".terms .term")
    for column in range(3):
        step(view)
        expect(place(view)).to_have_text(f"row 0, column {column}")
        window = pixels[:, 0:3, column : column + 3].astype(float)
        for index, term in enumerate(terms.all()):
            products = read_numbers(term.locator(".products td"))
            assert products == pytest.approx((window[index] * kernel[index]).ravel().tolist(), abs=1e-5)
            assert read_number(term.locator(".sum")) == pytest.approx(sum(products), abs=1e-9)
            assert is_drawn(term.locator(".grows"), 0, 0) == (column > 0)  # else a frame is there
            assert not is_drawn(term.locator(".grows"), 9, 9)
        equation = view.detail.locator(".equation")
        assert read_number(equation, "total") == pytest.approx(float(values[0, column]), abs=1e-4)
        bias = read_number(equation.locator(".bias"))
        assert read_number(equation, "total") == pytest.approx(
            float((window * kernel).sum()) + bias, abs=1e-4
        )


def test_play_and_pause(timed_view: View) -> None:
    view = timed_view
    expect(place(view)).to_have_text("row 15, column 15")  # nothing begins by itself
    button(view, "Play").click()
    expect(place(view)).to_have_text("row 0, column 0")
    view.page.clock.run_for(PLACE_MILLISECONDS)
    expect(place(view)).to_have_text("row 0, column 1")
    view.page.clock.run_for(3 * PLACE_MILLISECONDS)
    expect(place(view)).to_have_text("row 0, column 4")
    button(view, "Pause").click()
    view.page.clock.run_for(60_000)
    expect(place(view)).to_have_text("row 0, column 4")
    step(view)
    expect(place(view)).to_have_text("row 0, column 5")
    view.page.clock.run_for(60_000)
    expect(place(view)).to_have_text("row 0, column 5")
    button(view, "Play").click()
    expect(place(view)).to_have_text("row 0, column 6")
    view.page.locator(".chooser .area").hover(position={"x": 100, "y": 100})
    expect(place(view)).to_have_text("row 0, column 6")
    button(view, "From the start").click()
    expect(place(view)).to_have_text("row 0, column 0")
    expect(button(view, "Play")).to_be_visible()


@pytest.mark.parametrize(("speed", "places"), [("0", 0.25), ("3", 3), ("5", 30), ("7", 300)])
def test_speed(timed_view: View, speed: str, places: float) -> None:
    view = timed_view
    slider = view.page.get_by_role("slider", name="Speed")
    button(view, "Play").click()
    slider.fill(speed)  # while the map grows
    text = f"{places} places a second" if places >= 1 else f"1 place in {1 / places:g} s"
    expect(slider).to_have_attribute("aria-valuetext", text)
    button(view, "From the start").click()
    button(view, "Play").click()
    view.page.clock.run_for(4001)
    if 4 * places < 900:
        expect(place(view)).to_have_text(f"row {(4 * places + 1) // 30:g}, column {(4 * places + 1) % 30:g}")
        expect(button(view, "Pause")).to_be_visible()
    else:
        expect(place(view)).to_have_text("row 29, column 29")
        expect(button(view, "Play")).to_be_visible()  # the map is whole
        button(view, "Play").click()
        expect(place(view)).to_have_text("row 0, column 9")  # ten places in each of 30 pictures


def test_growth_ends_with_its_map(timed_view: View) -> None:
    view = timed_view
    button(view, "Play").click()
    view.page.get_by_role("button", name="The next one").click()
    expect(view.detail.locator("h3")).to_contain_text("map 2 of")
    expect(place(view)).to_have_text("row 0, column 0")
    view.page.clock.run_for(60_000)
    expect(place(view)).to_have_text("row 0, column 0")
    assert is_drawn(view.detail.locator(".chooser .mapview"), 9, 9)


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_products_come_one_by_one_unless_motion_is_unwanted(teaching_view: View, motion: str) -> None:
    view = teaching_view
    view.page.emulate_media(reduced_motion=motion)  # type: ignore[arg-type]
    view.inspect_map(view.tensor_name("Conv"))
    step(view)
    count = view.page.evaluate("document.getAnimations().length")
    assert (count == 0) == (motion == "reduce")


def test_keyboard_lets_a_map_grow(teaching_view: View) -> None:
    view, page = teaching_view, teaching_view.page
    view.inspect_map(view.tensor_name("Conv"))
    expect(button(view, "Play")).to_be_visible()
    page.locator(".chooser .area").focus()
    for _ in range(4):  # the fourth button, for one step
        tab_to(page, ".player button")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(place(view)).to_have_text("row 0, column 1")
    expect(page.locator("#said")).to_contain_text("Row 0, column 1: ")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("slider", name="Speed")).to_have_attribute("aria-valuetext", "1 place a second")
    assert find_serious_faults(page) == []


@pytest.mark.parametrize(("width", "theme"), [(320, "light"), (768, "dark")])
def test_growing_map_fits_narrow_screens(teaching_view: View, width: int, theme: str) -> None:
    view, page = teaching_view, teaching_view.page
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": width, "height": 760})
    for kind in ("Conv", "MaxPool"):
        view.inspect_map(view.tensor_name(kind))
        step(view, 2)
        expect(place(view)).to_have_text("row 0, column 1")
        assert_fits(page, width)
        assert find_serious_faults(page) == []


def test_player_is_loaded_when_a_map_is_opened(view: View) -> None:
    urls: list[str] = []
    view.page.on("request", lambda request: urls.append(request.url))
    view.pick_files(SHIP)
    view.column(view.tensor_name("Conv"))
    assert not [url for url in urls if "/growth/" in url]
    view.inspect_map(view.tensor_name("Conv"))
    expect(button(view, "Play")).to_be_visible()
    assert len([url for url in urls if "/growth/" in url]) == 3
