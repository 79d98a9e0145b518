"""A photo is sent to the service once, and asked about many times."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect

from tests.page.slow_line import SlowVisit
from tests.page.test_use import find_serious_faults
from tests.page.views import SHIP, TRUCK, View, make_upload, read_number
from tests.pictures import make_jpeg
from tests.servers import Server
from tests.service.api.test_url_images import HOST, run_service
from tests.service.remote.test_guarded_https import Web

pytestmark = pytest.mark.long


@pytest.fixture
def requests(page: Page) -> Iterator[list[tuple[str, str]]]:
    """The last part of the path and the content type of everything that the page sends."""
    requests: list[tuple[str, str]] = []

    def note_request(request: Request) -> None:
        if request.method == "POST":
            requests.append((urlsplit(request.url).path.rpartition("/")[2], request.headers["content-type"]))

    page.on("request", note_request)
    yield requests
    page.remove_listener("request", note_request)


def test_photo_is_sent_once_whatever_is_asked(view: View, requests: list[tuple[str, str]]) -> None:
    view.pick_files(SHIP)
    expect(view.page.locator("#heat-text")).to_contain_text("“ship”")
    view.page.locator("#answer li button").nth(1).click()
    expect(view.page.locator("#heat-text")).not_to_contain_text("“ship”")
    view.inspect_map(view.tensor_name("Conv"))
    view.select_model("float")
    expect(view.top_label).to_have_attribute("data-label", "ship")
    view.inspect_map(view.tensor_name("Conv", 1))
    view.pick_files(TRUCK)
    expect(view.top_label).to_have_attribute("data-label", "truck")
    view.photo_item("ship.jpg").locator(".open").click()
    expect(view.page.locator("#heat-text")).to_contain_text("“ship”")
    assert requests.count(("images", "application/octet-stream")) == 2
    questions = {one for one in requests if one[0] != "images"}
    assert questions == {(call, "application/json") for call in ("classify", "explain", "maps")}


def test_page_works_with_a_service_that_keeps_little(page: Page, models: Path) -> None:
    """There is room for the ship or a filler, and never for the truck."""
    settings = {"FOVEA_BODIES_BYTES": "300000", "FOVEA_BODY_BYTES": "150000", "FOVEA_EXPLAIN_SECONDS": "0.3"}
    with Server(FOVEA_MODELS=str(models), **settings) as server:
        view = View(page, server)
        view.open()
        with page.expect_request("**/v1/images"):
            view.pick_files(SHIP)
        expect(page.locator("#heat-text")).to_contain_text("“ship”")
        assert server.client.post("/v1/images", content=bytes(37_000)).status_code == 200
        with page.expect_request("**/v1/images"):
            page.locator("#answer li button").nth(1).click()
        expect(page.locator("#heat-text")).not_to_contain_text("“ship”")
        expect(page.locator("#heat-text")).to_contain_text("Light where")
        view.pick_files(TRUCK)
        expect(view.top_label).to_have_attribute("data-label", "truck")
        expect(page.locator("#heat-text")).to_contain_text("“truck”")
        view.inspect_map(view.tensor_name("Conv"))


def test_sending_can_be_cancelled_and_begun_again(view: View) -> None:
    held_routes: list[Route] = []
    view.page.route("**/v1/images", lambda route: held_routes.append(route))
    view.pick_files(SHIP)
    expect(view.page.locator("#answer")).to_contain_text("Sending the photo")
    expect(view.photo_item("ship.jpg").locator(".told")).to_contain_text("sending")
    view.page.get_by_role("button", name="Cancel").click()
    expect(view.page.locator("#answer .refusal")).to_contain_text("sending it was cancelled")
    view.page.unroute("**/v1/images")
    view.page.get_by_role("button", name="Ask again").click()
    expect(view.top_label).to_have_attribute("data-label", "ship")


def test_removing_a_photo_stops_sending_it(view: View) -> None:
    held_routes: list[Route] = []
    view.page.route("**/v1/images", lambda route: held_routes.append(route))
    view.pick_files(SHIP)
    expect(view.photo_item("ship.jpg").locator(".told")).to_contain_text("sending")
    with view.page.expect_event("requestfailed", lambda request: request.url.endswith("/v1/images")):
        view.page.get_by_role("button", name="Remove ship.jpg").click()
    expect(view.page.locator("#gallery li")).to_have_count(0)


def test_page_shows_how_much_has_been_sent(browser: Browser, page_server: Server) -> None:
    context = browser.new_context()
    visit = SlowVisit(context, kilobits=2000, latency=0)
    visit.open(page_server)
    photo = make_upload("large.jpg", SHIP.read_bytes() + bytes(700_000))
    visit.page.set_input_files("#files", files=[photo])
    expect(visit.page.locator("#answer")).to_contain_text(re.compile(r"Sending the photo: [1-9]\d?%"))
    expect(visit.page.locator("#gallery .told")).to_contain_text(re.compile(r"sending, [1-9]\d?%"))
    expect(visit.page.locator(".verdict")).to_have_attribute("data-label", "ship")
    context.close()


def test_photo_is_sent_before_anything_is_drawn(view: View) -> None:
    """Drawing takes longer than sending to a near service."""
    view.pick_files(TRUCK)
    expect(view.top_label).to_have_attribute("data-label", "truck")
    view.page.evaluate(
        """() => {
          const send = XMLHttpRequest.prototype.send;
          XMLHttpRequest.prototype.send = function (body) {
            window.drawn = [...document.querySelectorAll("#gallery li")].map(({ dataset }) => dataset.photo);
            XMLHttpRequest.prototype.send = send;
            send.call(this, body);
          };
        }"""
    )
    view.pick_files(SHIP)
    expect(view.top_label).to_have_attribute("data-label", "ship")
    assert view.page.evaluate("window.drawn") == ["truck.png"]


def test_service_fetches_a_picture_by_its_address(
    page: Page, models: Path, tmp_path: Path, requests: list[tuple[str, str]]
) -> None:
    """The page itself loads nothing from elsewhere, and shows what the model saw in place of the picture."""
    with (
        closing(Web(tmp_path)) as web,
        run_service(web, models, max_bytes=1_000_000, seconds=2.0) as service,
    ):
        view = View(page, service)
        view.open()
        expect(page.get_by_label("Address of a picture")).to_be_visible()
        assert find_serious_faults(page) == []
        page.get_by_label("Address of a picture").fill(f"{HOST}/cat.jpg?size=2")
        page.keyboard.press("Enter")
        answer = service.client.post("/v1/classify", content=make_jpeg()).json()
        expect(view.top_label).to_have_attribute("data-label", answer["predictions"][0]["label"])
        expect(view.photo_item("cat.jpg").locator(".told")).to_contain_text("%")
        expect(page.locator("#stage .substitute")).to_be_visible()
        equation = view.inspect_map(view.tensor_name("Conv")).locator(".equation")
        assert abs(read_number(equation, "total") - read_number(equation, "shown")) < 0.05
        assert requests.count(("images", "application/json")) == 1
        assert requests.count(("images", "application/octet-stream")) == 0
        page.evaluate(
            """(link) => {
              const clipboardData = new DataTransfer();
              clipboardData.setData("text/plain", link);
              document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData, bubbles: true}));
            }""",
            f"{HOST}/status/404",
        )
        expect(page.locator("#answer .refusal")).to_contain_text("404")
        expect(page.get_by_role("button", name="Ask again")).to_be_visible()


def test_page_offers_no_address_where_the_service_fetches_none(view: View) -> None:
    expect(view.page.locator("#address")).to_be_hidden()
