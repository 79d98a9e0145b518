"""The page before its modules have loaded, and what a visit transfers."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.page.slow_line import SlowVisit
from tests.page.views import SHIP, TRUCK, View
from tests.servers import Server

pytestmark = pytest.mark.long

SEND_FILE = """async ([event, name]) => {
  const transfer = new DataTransfer();
  const photo = document.querySelector('[data-photo$="ship.jpg"]').dataset.photo;
  transfer.items.add(new File([await (await fetch(photo)).blob()], name, {type: "image/jpeg"}));
  const init = {bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer};
  const sent = event === "paste" ? new ClipboardEvent(event, init) : new DragEvent(event, init);
  document.body.dispatchEvent(sent);
  return sent.defaultPrevented;
}"""


def open_early(view: View, module: str = "main.js") -> list[Route]:
    """Open the page while a module does not arrive; return its request."""
    held_routes: list[Route] = []
    view.page.route(f"**/{module}", lambda route: held_routes.append(route))
    view.page.goto(view.url, wait_until="commit")
    expect(view.page.locator(".samples button").last).to_be_visible()
    view.page.wait_for_function("document.readyState !== 'loading'")
    return held_routes


def let_pass(held_routes: list[Route]) -> None:
    for route in held_routes:
        route.continue_()


@pytest.fixture
def unopened_view(page: Page, page_server: Server) -> View:
    return View(page, page_server)


def test_early_click_on_a_sample_is_not_lost(unopened_view: View) -> None:
    view = unopened_view
    held_routes = open_early(view)
    sample = view.page.locator(".samples button").nth(1)
    sample.click()
    sample.click()
    expect(sample).to_have_attribute("aria-busy", "true")
    let_pass(held_routes)
    expect(view.top_label).to_have_attribute("data-label", "ship")
    expect(sample).not_to_have_attribute("aria-busy", "true")
    expect(view.page.locator("#gallery li")).to_have_count(1)


def test_early_files_are_not_lost(unopened_view: View) -> None:
    view = unopened_view
    held_routes = open_early(view)
    assert view.page.evaluate(SEND_FILE, ["drop", "dropped.jpg"])  # or the browser opens the file
    view.page.evaluate(SEND_FILE, ["paste", "image.png"])
    with view.page.expect_file_chooser() as chooser:
        view.page.get_by_role("button", name="Choose photos").click()
    chooser.value.set_files([str(SHIP), str(TRUCK)])
    let_pass(held_routes)
    for name in ("dropped.jpg", "image.png", "ship.jpg", "truck.png"):
        expect(view.photo_item(name).locator(".told")).to_contain_text("%")
    expect(view.page.locator("#gallery li")).to_have_count(4)


def test_early_click_opens_the_camera(unopened_view: View) -> None:
    view = unopened_view
    held_routes = open_early(view)
    view.page.get_by_role("button", name="Use the camera").click()
    let_pass(held_routes)
    expect(view.page.locator("dialog.camera")).to_be_visible()


def test_clicks_and_files_count_once_when_the_page_works(unopened_view: View) -> None:
    view = unopened_view
    view.open()
    view.page.evaluate(SEND_FILE, ["drop", "dropped.jpg"])
    view.pick_files(SHIP)
    for name in ("dropped.jpg", "ship.jpg"):
        expect(view.photo_item(name).locator(".told")).to_contain_text("%")
    expect(view.page.locator("#gallery li")).to_have_count(2)


def test_photo_is_classified_while_the_rest_of_the_page_loads(unopened_view: View) -> None:
    view = unopened_view
    held_routes = open_early(view, "view.js")
    expect(view.page.locator("#model")).to_be_enabled()
    view.pick_files(SHIP)
    expect(view.photo_item("ship.jpg").locator(".told")).to_contain_text("ship")
    expect(view.top_label).to_have_count(0)
    let_pass(held_routes)
    expect(view.top_label).to_have_attribute("data-label", "ship")
    expect(view.page.locator("#heat-text")).to_contain_text("“ship”")
    for name in ("photo", "network", "detail"):
        expect(view.page.locator(f'link[href$="{name}.css"]')).to_have_attribute("media", "all")


def test_page_says_when_a_part_of_it_does_not_load(unopened_view: View) -> None:
    view = unopened_view
    view.page.route("**/view.js", lambda route: route.abort())
    view.open()
    expect(view.page.locator("#fault-text")).to_contain_text("could not be loaded; reload the page")


def _sum_early_bytes(server: Server, visit: SlowVisit) -> int:
    """Return the bytes of the files that the page needs to work, without those that it loads afterwards."""
    links = re.findall(r"<link [^>]*>", server.client.get("/").text)
    later = [link for link in links if 'fetchpriority="low"' in link or 'class="later"' in link]
    paths = {match[1] for link in later if (match := re.search(r'href="\./([^"]+)"', link))}
    assert len(paths) > 20
    # A later module loads the colours.
    paths |= {url.split("/", 3)[3] for url in visit.sizes if url.endswith("/colours.json")}
    return sum(size for url, size in visit.sizes.items() if url.split("/", 3)[3] not in paths)


def test_visit_transfers_little_and_the_next_one_only_what_may_have_changed(
    browser: Browser, page_server: Server
) -> None:
    context = browser.new_context()
    first_visit = SlowVisit(context, kilobits=100_000, latency=0)
    first_visit.open(page_server)
    assert _sum_early_bytes(page_server, first_visit) < 60_000
    first_visit.wait_until_idle()
    assert first_visit.bytes < 180_000
    first_visit.page.close()
    second_visit = SlowVisit(context, kilobits=100_000, latency=0)
    second_visit.open(page_server)
    second_visit.wait_until_idle()
    assert second_visit.bytes < 15_000
    changing_paths = {re.sub(r"^https?://[^/]+|\d+(?=/contract)", "", url) for url in second_visit.sizes}
    assert changing_paths == {"/", "/v1/models", "/v1/models/cifar10/versions//contract"}
    context.close()


def test_page_asks_for_the_models_in_advance_unless_that_needs_a_key(page_server: Server) -> None:
    assert (
        '<link rel="preload" as="fetch" crossorigin="anonymous" href="./v1/models">'
        in page_server.client.get("/").text
    )


@pytest.mark.parametrize("sign", ["click", "hover", "focus", "drag"])
def test_network_is_read_before_the_photo_comes(page_server: Server, browser: Browser, sign: str) -> None:
    """The service takes a second or more to read a large network for the first time."""
    page = browser.new_page()
    view = View(page, page_server)
    view.open()
    layers = re.compile("/layers$")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    with page.expect_response(layers):
        if sign == "click":
            with page.expect_file_chooser():
                page.locator("#choose").click()
        elif sign == "hover":
            page.locator(".samples button").first.hover()
        elif sign == "focus":
            page.locator(".samples button").last.focus()
        else:
            page.evaluate(
                """() => {
                    const dataTransfer = new DataTransfer();
                    dataTransfer.items.add(new File(["x"], "photo.jpg", { type: "image/jpeg" }));
                    document.body.dispatchEvent(new DragEvent("dragenter", { dataTransfer, bubbles: true }));
                }"""
            )
    view.pick_files(SHIP)
    expect(page.locator(".column .strip").first).to_be_attached()
    assert len([url for url in requests if layers.search(url)]) == 1
    page.close()
