"""The page with ResNet-50: times from a photo to its layers, and from a click to the arithmetic of a value.

`make page-speed` prints them. The network has random weights, and 1,000 labels. Each round has a service of
its own, which has loaded nothing for explanations when the file dialog opens. The first photo is chosen one
second later, which is fast for a human.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Final

from playwright.sync_api import Browser, Page, expect

from fovea.bench.imported import import_network
from fovea.bench.mixed import describe_machine
from tests.page.browsers import launch_chromium
from tests.page.views import SHIP, TRUCK, View
from tests.servers import Server

_CLICKS: Final = (("Conv", 1), ("Conv", 20), ("Relu", 10), ("Conv", 45), ("Gemm", 0))
"""Layers whose maps are clicked: the kind, and the number among the layers of this kind."""

_FIRST_LAYERS: Final = 4
"""Number of layers behind the input that must be there: the ones that a window of 1440 px shows at least."""


_DIALOG_SECONDS: Final = 1.0
"""Time in seconds for which the file dialog is open."""

_TIMEOUT: Final = 60_000
"""Time limit of each wait, in ms."""


def main() -> None:
    """Print the medians and ranges over the rounds."""
    parser = argparse.ArgumentParser(prog="python -m tests.page.large_network", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="number of services (default: 3)")
    rounds = parser.parse_args().rounds
    repository = str(import_network("resnet50").repository)
    photos, further_photos, clicks = [], [], []
    with launch_chromium() as browser:
        for _ in range(rounds):
            with Server(FOVEA_MODELS=repository) as server:
                view = _open_page(browser, server)
                photos.append(_measure_photo(view, 0))
                further_photos.append(_measure_photo(view, 1))
                view.page.get_by_role("button", name="Unfold all").click()
                clicks += [_measure_click(view, kind, number) for kind, number in _CLICKS]
    print("| ResNet-50 | median s | range |")
    print("|---|---|---|")
    for name, seconds in (
        ("first photo of a service to its layers", photos),
        ("second photo to its layers", further_photos),
        ("click on a map to its arithmetic", clicks),
    ):
        print(f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} |")
    print(describe_machine())


def _open_page(browser: Browser, server: Server) -> View:
    page: Page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
    view = View(page, server)
    view.model = "network"
    view.open()
    return view


def _measure_photo(view: View, number: int) -> float:
    """Choose a photo, and return the seconds until its first layers have their maps."""
    view.page.evaluate("document.querySelectorAll('.column').forEach((column) => (column.dataset.old = ''))")
    with view.page.expect_file_chooser() as chooser:
        view.page.locator("#choose").click()
    time.sleep(_DIALOG_SECONDS)
    started = time.perf_counter()
    chooser.value.set_files((SHIP, TRUCK)[number])
    legends = view.page.locator(".column:not([data-old]) .strip")  # a column with values has one
    expect(legends.nth(_FIRST_LAYERS)).to_be_attached(timeout=_TIMEOUT)
    return time.perf_counter() - started


def _measure_click(view: View, kind: str, number: int) -> float:
    """Click the first map of a layer, and return the seconds until its arithmetic is there."""
    target = view.column(view.tensor_name(kind, number)).locator(".map").first
    target.scroll_into_view_if_needed()
    started = time.perf_counter()
    target.click()
    expect(view.page.locator("#detail .arithmetic")).to_have_attribute("aria-busy", "false", timeout=_TIMEOUT)
    seconds = time.perf_counter() - started
    view.page.keyboard.press("Escape")
    return seconds


if __name__ == "__main__":
    main()
