"""Links to what is shown, the browser's "back", and the table of many photos."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.page.test_features import find_features
from tests.page.test_use import assert_fits, find_serious_faults
from tests.page.views import SHIP, TRUCK, View, make_upload
from tests.servers import ROOT, Server

pytestmark = pytest.mark.long

AIRPLANE = ROOT / "samples" / "airplane.jpg"


def read_address(view: View) -> dict[str, str]:
    """Return the entries of the URL's fragment."""
    entries: dict[str, str] = view.page.evaluate(
        "() => Object.fromEntries(new URLSearchParams(location.hash.slice(1)))"
    )
    return entries


def test_address_names_model_label_and_map(view: View) -> None:
    view.pick_files(SHIP)
    find_features(view)
    assert read_address(view) == {"model": "cifar10", "version": "4", "label": "ship"}
    view.page.locator('.bars [data-label="bird"] button').click()
    tensor = view.tensor_name("Conv", 1)
    view.inspect_map(tensor, 2)
    assert read_address(view) == {
        "model": "cifar10",
        "version": "4",
        "label": "bird",
        "layer": tensor,
        "map": "3",
    }


def test_link_shows_the_finding_for_a_photo_of_the_one_who_opens_it(page: Page, page_server: Server) -> None:
    view = View(page, page_server)
    view.model = "float"
    tensor = view.tensor_name("Conv", 2)
    page.goto(f"{page_server.url}/#model=float&version=1&label=bird&layer={tensor}&map=12")
    expect(page.locator("#model option:checked")).to_have_text("float")
    expect(page.locator("#linked")).to_contain_text("the label “bird”, the model float")
    expect(page.locator("#linked")).to_contain_text("open it here, or try a sample")
    page.get_by_role("button", name="Try the ship").click()
    expect(page.locator("#heat-text")).to_contain_text("“bird”")
    expect(page.locator('.bars [data-label="bird"] button')).to_have_attribute("aria-pressed", "true")
    expect(view.detail.locator("h3")).to_contain_text("map 12 of")
    expect(page.locator(f'.map[data-tensor="{tensor}"][data-index="11"]')).to_have_attribute(
        "aria-current", "true"
    )
    assert read_address(view)["map"] == "12"
    view.pick_files(TRUCK)  # the finding was that of the first photo
    expect(page.locator("#heat-text")).to_contain_text("“truck”")
    expect(page.locator("#detail")).not_to_be_visible()


def test_link_outlives_a_file_that_is_no_image(page: Page, page_server: Server) -> None:
    view = View(page, page_server)
    page.goto(f"{page_server.url}/#model=float&version=1&label=bird")
    expect(page.locator("#model")).to_be_enabled()
    view.pick_files(make_upload("notes.txt", b"no image"))
    expect(page.locator("#answer .refusal")).to_be_visible()
    view.pick_files(SHIP)
    expect(page.locator("#heat-text")).to_contain_text("“bird”")


def test_link_to_a_label_that_the_model_lacks_shows_the_most_probable(
    page: Page, page_server: Server
) -> None:
    view = View(page, page_server)
    page.goto(f"{page_server.url}/#model=float&label=jellyfish")
    expect(page.locator("#knows")).to_contain_text("airplane")
    view.pick_files(SHIP)
    expect(page.locator("#heat-text")).to_contain_text("“ship”")
    assert read_address(view)["label"] == "ship"


def test_removed_photo_takes_its_map_out_of_the_address(view: View) -> None:
    view.pick_files(SHIP, TRUCK)
    find_features(view)
    view.inspect_map(view.tensor_name("Conv"), 1)
    view.page.get_by_role("button", name="Remove ship.jpg").click()
    expect(view.page.locator("#features p")).to_contain_text("“truck”")
    assert read_address(view) == {"model": "cifar10", "version": "4", "label": "truck"}


def test_link_to_an_unknown_model_says_so(page: Page, page_server: Server) -> None:
    page.goto(f"{page_server.url}/#model=gone&label=%3Cb%3Ex")
    expect(page.locator("#linked")).to_contain_text("the label “<b>x”")
    expect(page.locator("#linked")).to_contain_text("This service has no such model.")
    expect(page.locator("#model option:checked")).to_have_text("cifar10")


def test_link_to_another_version_leads_to_the_model(page: Page, page_server: Server) -> None:
    page.goto(f"{page_server.url}/#model=tiny_vgg&version=99")
    expect(page.locator("#model option:checked")).to_have_text("tiny_vgg")


def test_back_and_forward_lead_through_labels_maps_models_and_photos(view: View) -> None:
    page = view.page
    heat_text, detail = page.locator("#heat-text"), page.locator("#detail")
    view.pick_files(SHIP)
    expect(heat_text).to_contain_text("“ship”")
    page.locator('.bars [data-label="bird"] button').click()
    expect(heat_text).to_contain_text("“bird”")
    view.inspect_map(view.tensor_name("Conv"), 1)
    view.detail.locator('[data-go="1"]').click()
    expect(view.detail.locator("h3")).to_contain_text("map 3 of")
    view.pick_files(TRUCK)
    expect(heat_text).to_contain_text("“truck”")
    view.select_model("float")
    expect(page.locator("#answer .model")).to_contain_text("float")
    expect(heat_text).to_contain_text("“truck”")

    page.go_back()
    expect(page.locator("#answer .model")).to_contain_text("cifar10")
    expect(page.locator("#model option:checked")).to_have_text("cifar10")
    page.go_back()
    expect(view.photo_item("ship.jpg").locator(".open")).to_have_attribute("aria-current", "true")
    expect(heat_text).to_contain_text("“bird”")
    expect(view.detail.locator("h3")).to_contain_text("map 3 of")
    page.go_back()
    expect(view.detail.locator("h3")).to_contain_text("map 2 of")
    page.go_back()
    expect(detail).not_to_be_visible()
    expect(heat_text).to_contain_text("“bird”")
    page.go_back()
    expect(heat_text).to_contain_text("“ship”")
    page.go_forward()
    expect(heat_text).to_contain_text("“bird”")
    page.go_forward()
    expect(view.detail.locator("h3")).to_contain_text("map 2 of")
    view.detail.locator("h3").press("Escape")
    expect(detail).not_to_be_visible()
    page.go_back()
    expect(view.detail.locator("h3")).to_contain_text("map 2 of")


def test_followed_operands_can_be_walked_back(view: View) -> None:
    view.select_model("tiny_vgg")
    view.pick_files(SHIP)
    view.inspect_map(view.tensor_name("Gemm"), 8)
    view.detail.locator(".ranking .maplink").first.click()
    expect(view.detail.locator("h3")).to_contain_text("Max pooling")
    view.page.go_back()
    expect(view.detail.locator("h3")).to_contain_text("Linear layer")


def test_address_of_the_article_stays(view: View) -> None:
    view.page.get_by_role("link", name="Learn").click()
    expect(view.page.locator("#learn h2")).to_be_focused()
    view.pick_files(SHIP)
    find_features(view)
    assert view.page.evaluate("location.hash") == "#learn"


@pytest.mark.parametrize("has_clipboard", [True, False])
def test_link_is_copied(view: View, has_clipboard: bool) -> None:
    """Without a clipboard as on plain HTTP, where the browser has an older way."""
    view.page.evaluate(
        """(has) => {
          const write = (text) => { globalThis.copied = text; return Promise.resolve(); };
          Object.defineProperty(navigator, "clipboard", {value: has ? {writeText: write} : undefined});
          document.execCommand = () => { globalThis.copied = document.activeElement.value; return true; };
        }""",
        has_clipboard,
    )
    view.pick_files(SHIP)
    find_features(view)
    button = view.page.locator("#answer").get_by_role("button", name="Copy link")
    button.click()
    expect(view.page.locator("#said")).to_have_text("The link was copied")
    assert view.page.evaluate("copied") == f"{view.url}/#model=cifar10&version=4&label=ship"
    expect(view.page.locator("#answer .share-link")).to_be_focused()


def test_table_of_many_photos_is_saved_as_csv(view: View, tmp_path: Path) -> None:
    noise = make_upload('=1+1, or "noise".txt', b"no image")
    view.pick_files(SHIP, TRUCK, AIRPLANE, noise)
    for name in ("ship.jpg", "truck.png", "airplane.jpg"):
        expect(view.photo_item(name).locator(".told")).to_contain_text("%")
    table = view.page.locator("#table")
    expect(table).not_to_be_visible()
    view.page.get_by_role("button", name="Table").click()
    expect(table.locator("tbody tr")).to_have_count(4)
    expect(table.locator('[data-photo="ship.jpg"] td').first).to_have_text("ship")
    expect(table.locator("tbody tr").last.locator("td").first).to_contain_text("image")
    with view.page.expect_download() as download:
        view.page.get_by_role("button", name="Save as CSV").click()
    assert download.value.suggested_filename == "fovea.csv"
    path = tmp_path / "fovea.csv"
    download.value.save_as(path)
    rows = list(csv.DictReader(StringIO(path.read_text(), newline="")))
    assert [row["name"] for row in rows] == [
        "ship.jpg",
        "truck.png",
        "airplane.jpg",
        '\'=1+1, or "noise".txt',
    ]
    answer = view.client.post("/v1/classify", content=SHIP.read_bytes(), params={"top_k": 0}).json()
    for prediction in answer["predictions"]:
        assert float(rows[0][f"p({prediction['label']})"]) == pytest.approx(
            prediction["probability"], abs=1e-6
        )
    assert rows[0]["known"] == "true"
    assert float(rows[0]["known_score"]) == pytest.approx(answer["known_score"], abs=1e-4)
    assert (rows[0]["model"], rows[0]["version"], rows[0]["label"]) == ("cifar10", "4", "ship")
    assert rows[3]["error"]
    assert rows[3]["label"] == rows[3]["p(ship)"] == ""
    table.get_by_role("button", name="truck.png").click()
    expect(view.top_label).to_have_attribute("data-label", "truck")


def test_all_photos_are_removed_at_once(view: View) -> None:
    remove_all = view.page.get_by_role("button", name="Remove all")
    view.pick_files(SHIP)
    expect(view.top_label).to_be_visible()
    expect(remove_all).not_to_be_visible()
    view.pick_files(TRUCK)
    view.page.get_by_role("button", name="Table").click()
    remove_all.click()
    expect(view.page.locator("#gallery li")).to_have_count(0)
    expect(view.page.locator("#choose")).to_be_focused()
    expect(view.page.locator("#table")).not_to_be_visible()
    expect(view.page.locator("#layers")).not_to_be_visible()
    view.pick_files(SHIP)
    expect(view.top_label).to_have_attribute("data-label", "ship")


@pytest.mark.parametrize("width", [320, 1366])
def test_table_fits_and_has_no_serious_fault(view: View, width: int) -> None:
    view.page.set_viewport_size({"width": width, "height": 768})
    view.pick_files(SHIP, TRUCK, make_upload("a name much longer than a phone is wide.txt", b"no image"))
    view.page.get_by_role("button", name="Table").click()
    expect(view.page.locator("#table tbody tr")).to_have_count(3)
    find_features(view)
    assert_fits(view.page, width)
    assert find_serious_faults(view.page) == []
