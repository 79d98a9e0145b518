"""The pictures of the page in README.md and docs/explain.md: `make screenshots`."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Final, Literal

from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.page.browsers import launch_chromium
from tests.page.views import SHIP, TRUCK, View
from tests.servers import ROOT, Server

AIRPLANE: Final = ROOT / "samples" / "airplane.jpg"
WIDTH: Final = 1280
MARGIN: Final = 16
HEIGHT: Final = 2200
"""Height of the whole page, so that nothing scrolls away from under the mouse."""


def main() -> None:
    """Take all pictures."""
    with Server(FOVEA_MODELS=str(ROOT / "zoo")) as server, launch_chromium() as browser:
        save_screenshot(browser, server, "page-answer.png", "light", capture_answer)
        save_screenshot(browser, server, "page-layers.png", "dark", capture_layers)
        save_screenshot(browser, server, "page-convolution.png", "light", capture_convolution)


def save_screenshot(
    browser: Browser,
    server: Server,
    name: str,
    theme: Literal["light", "dark"],
    capture: Callable[[View], bytes],
) -> None:
    """Open the page with three photos, and write a picture of it into `docs/`."""
    context = browser.new_context(
        viewport={"width": WIDTH, "height": HEIGHT},
        color_scheme=theme,
        reduced_motion="reduce",
    )
    view = View(context.new_page(), server)
    view.open()
    view.client.post("/v1/classify", content=SHIP.read_bytes())  # the first request of a process takes longer
    for photo in (SHIP, TRUCK, AIRPLANE):  # one by one, so that the browser is idle when a time is measured
        view.pick_files(photo)
        expect(view.page.locator("#heat-text")).to_contain_text(f"“{photo.stem}”")
    with Image.open(BytesIO(capture(view))) as picture:
        picture.convert("RGB").save(ROOT / "docs" / name, optimize=True)
    context.close()


def capture_answer(view: View) -> bytes:
    """Return a picture of the photo with its heat map, the answer, and the model's input."""
    return capture_between(view.page, "header.top", "#opened")


def capture_layers(view: View) -> bytes:
    """Return a picture of the network, with the mouse on a map."""
    view.column(view.tensor_name("Gelu", 1))
    view.column(view.tensor_name("Conv", 1)).locator(".map").nth(6).hover(position={"x": 26, "y": 19})
    return capture_between(view.page, "#layers", "#network")


def capture_convolution(view: View) -> bytes:
    """Return a picture of the arithmetic of one pixel, on a page that is wide enough for its map."""
    view.page.set_viewport_size({"width": 1440, "height": HEIGHT})
    view.inspect_map(view.tensor_name("Conv"), 6)
    area = view.detail.locator(".chooser .area")
    for key in ["ArrowUp"] * 2 + ["ArrowRight"] * 3:
        area.press(key)
    view.page.evaluate("document.activeElement.blur()")
    return view.detail.screenshot()


def capture_between(page: Page, first: str, last: str) -> bytes:
    """Return a picture from the top of one element to the foot of another."""
    top, foot = (page.locator(selector).bounding_box() for selector in (first, last))
    if top is None or foot is None:
        raise RuntimeError(f"{first} or {last} is not on the page")
    start = max(0, top["y"] - MARGIN)
    height = foot["y"] + foot["height"] + MARGIN - start
    return page.screenshot(clip={"x": 0, "y": start, "width": WIDTH, "height": height})


if __name__ == "__main__":
    main()
