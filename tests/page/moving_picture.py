"""The moving picture of the page in README.md: `make moving-picture`.

The script uses the page in Chromium as a visitor would, takes a picture of each moment, and writes the
pictures with their times into one animated WebP. The mouse and a line of words are drawn in afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Locator, Page, ViewportSize, expect

from tests.page.browsers import launch_chromium
from tests.page.views import View
from tests.servers import ROOT, Server

PATH: Final = ROOT / "docs" / "page.webp"
MAX_BYTES: Final = 1_500_000
SECONDS: Final = (18, 22)
"""Shortest and longest time that the picture may take."""

WINDOW: Final[ViewportSize] = {"width": 1440, "height": 900}
SIZE: Final = (960, 600)
"""Size of a picture of the window, in pixels."""

WORDS_HEIGHT: Final = 44
"""Height of the line of words below it, in pixels."""

STEP: Final = 80
"""Milliseconds between two pictures of something that moves."""

ENCODING: Final[dict[str, Any]] = {"loop": 0, "quality": 60, "method": 6, "kmin": 999, "kmax": 1000}
"""Options of Pillow for WebP. Key frames would only help players that jump to a time."""

ARROW: Final = ((0, 0), (0, 17), (4, 13.5), (6.8, 19.5), (9.2, 18.4), (6.5, 12.6), (12, 12.2))
"""Outline of the mouse pointer, in pixels."""

ADVANCE_ANIMATIONS: Final = """(milliseconds) => {
  window.running ??= new Set();
  for (const animation of document.getAnimations()) {
    if (window.running.has(animation)) animation.currentTime += milliseconds;
    else window.running.add(animation.pause() ?? animation);
  }
}"""
"""Stops the animations of the style sheets, and moves them on by a time."""


@dataclass
class Film:
    """Pictures of a page, with the milliseconds that each is shown."""

    page: Page
    words: str = ""
    mouse: tuple[float, float] = (640.0, 620.0)
    pictures: list[Image.Image] = field(default_factory=list)
    durations: list[int] = field(default_factory=list)

    def take(self, milliseconds: int) -> None:
        """Take a picture, unless it is the same as the last one, and show it for this time."""
        with Image.open(BytesIO(self.page.screenshot(animations="allow"))) as screenshot:
            window = screenshot.convert("RGB").resize(SIZE, Image.Resampling.LANCZOS)
        picture = Image.new("RGB", (SIZE[0], SIZE[1] + WORDS_HEIGHT), "#12141a")
        picture.paste(window)
        brush = ImageDraw.Draw(picture)
        scale = SIZE[0] / WINDOW["width"]
        at = [(self.mouse[0] * scale + x, self.mouse[1] * scale + y) for x, y in ARROW]
        brush.polygon(at, fill="black", outline="white", width=1)
        middle = (SIZE[0] / 2, SIZE[1] + WORDS_HEIGHT / 2)
        brush.text(middle, self.words, fill="#e9e8e3", anchor="mm", font=ImageFont.load_default(20))
        if self.pictures and self.pictures[-1].tobytes() == picture.tobytes():
            self.durations[-1] += milliseconds
            return
        self.pictures.append(picture)
        self.durations.append(milliseconds)

    def hold(self, seconds: float) -> None:
        """Show the page as it is for a while."""
        self.page.wait_for_timeout(300)  # for what is still being drawn
        self.take(round(1000 * seconds))

    def point(self, place: Locator, seconds: float = 0.5, x: float = 0.5, y: float = 0.5) -> None:
        """Move the mouse to a place; `x` and `y` are shares of its width and height."""
        box = place.bounding_box()
        if box is None:
            raise RuntimeError(f"{place} is not on the page")
        start, end = self.mouse, (box["x"] + x * box["width"], box["y"] + y * box["height"])
        for share in _eased_steps(seconds):
            self.mouse = (start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]))
            self.page.mouse.move(*self.mouse)
            self.take(STEP)

    def click(self, place: Locator, seconds: float = 0.5, x: float = 0.5, y: float = 0.5) -> None:
        """Move the mouse to a place, and click."""
        self.point(place, seconds, x, y)
        self.page.mouse.click(*self.mouse)

    def scroll(self, selector: str, seconds: float = 0.6, margin: float = 10) -> None:
        """Scroll to an element."""
        start, target = self.page.evaluate(
            "(selector) => [scrollY, scrollY + document.querySelector(selector).getBoundingClientRect().top]",
            selector,
        )
        for share in _eased_steps(seconds):
            self.page.evaluate("(y) => scrollTo(0, y)", start + share * (target - margin - start))
            self.take(STEP)

    def run(self, seconds: float, step: int = STEP) -> None:
        """Let the page's clock run, which stands still otherwise, and its animations with it."""
        for _ in range(round(1000 * seconds / step)):
            self.page.evaluate(ADVANCE_ANIMATIONS, step)
            self.take(step)
            self.page.clock.run_for(step)

    def save(self) -> None:
        """Write the pictures into one file.

        Raises `RuntimeError` if the file is too large, or the film too short or too long.
        """
        first, *others = self.pictures
        first.save(PATH, save_all=True, append_images=others, duration=self.durations, **ENCODING)
        size, seconds = PATH.stat().st_size, sum(self.durations) / 1000
        count = len(self.pictures)
        print(f"{PATH.relative_to(ROOT)}: {count} pictures, {seconds:.1f} s, {size / 1000:,.0f} kB")
        if size > MAX_BYTES or not SECONDS[0] <= seconds <= SECONDS[1]:
            raise RuntimeError(f"it must have {MAX_BYTES / 1000:,.0f} kB at most, and take {SECONDS} seconds")


def _eased_steps(seconds: float) -> list[float]:
    """Return shares of a way that begins and ends slowly."""
    count = max(1, round(1000 * seconds / STEP))
    return [(at / count) ** 2 * (3 - 2 * at / count) for at in range(1, count + 1)]


def main() -> None:
    """Use the page, and write the moving picture."""
    with Server(FOVEA_MODELS=str(ROOT / "zoo")) as server, launch_chromium() as browser:
        page = browser.new_page(viewport=WINDOW, color_scheme="light", reduced_motion="no-preference")
        page.clock.install()
        view = View(page, server)
        server.client.post("/v1/explain", content=(ROOT / "samples" / "ship.jpg").read_bytes())
        view.open()
        film = Film(page)
        show_answer(film, view)
        show_layers(film, view)
        show_growth(film, view)
        film.save()


def show_answer(film: Film, view: View) -> None:
    """Choose a sample, and ask about two labels."""
    page = view.page
    film.words = "Show it a photo"
    film.hold(0.7)
    film.click(page.locator(".samples button").nth(1), 0.6)
    expect(page.locator("#heat-text")).to_contain_text("“ship”")
    film.words = "You get the answer, and what in the photo it rests on"
    film.hold(1.8)
    film.words = "Ask about any label"
    film.click(page.locator('.bars [data-label="truck"] button'), 0.6)
    expect(page.locator("#heat-text")).to_contain_text("“truck”")
    film.hold(1.2)
    film.click(page.locator('.bars [data-label="ship"] button'), 0.3)
    expect(page.locator("#heat-text")).to_contain_text("“ship”")
    film.words = "Which features did it"
    film.scroll("#features")
    film.hold(1.1)


def show_layers(film: Film, view: View) -> None:
    """Point at some maps of the network."""
    film.words = "Every layer of the network, and what each pixel of a map sees"
    view.column(view.tensor_name("Conv"))  # the maps in view are loaded
    film.scroll("#layers")
    film.hold(0.7)
    film.point(view.column(view.tensor_name("Conv", 1)).locator(".map").nth(5), 0.6)
    film.hold(0.5)
    film.point(view.column(view.tensor_name("Conv", 2)).locator(".map").nth(2), 0.5, 0.7, 0.4)
    film.hold(0.7)
    film.words = "A small model to learn with: all layers on one screen"
    view.select_model("tiny_vgg")
    expect(view.page.locator(".column")).to_have_count(len(view.fetch_layers()))
    expect(view.page.locator("#heat-text")).to_contain_text("masked photos")
    view.page.locator("#layers").evaluate("(section) => section.scrollIntoView()")
    film.hold(1.2)


def show_growth(film: Film, view: View) -> None:
    """Open a convolution, and let its map grow."""
    page = view.page
    film.words = "Every product and every sum, with the real numbers"
    film.click(view.column(view.tensor_name("Conv")).locator(".map").nth(2), 0.6)
    expect(view.detail.get_by_role("button", name="Step ›")).to_be_visible()
    view.detail.evaluate("(panel) => panel.scrollTo(0, 72)")
    film.hold(0.6)
    film.point(view.detail.get_by_role("button", name="Step ›"))
    page.clock.pause_at("2100-01-01")
    for _ in range(2):
        page.mouse.click(*film.mouse)
        film.run(1.6)
    film.words = "Let a map grow under its kernel"
    page.get_by_role("slider", name="Speed").fill("7")
    film.click(view.detail.get_by_role("button", name="Play"), 0.3)
    film.run(3.1, 100)
    film.take(1400)


if __name__ == "__main__":
    main()
