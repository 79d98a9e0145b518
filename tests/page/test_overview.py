"""The overview of a network: blocks, numbers and names of layers, and the ways to any of them."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from playwright.sync_api import Locator, Route, expect

from tests.page.views import SHIP, View, read_number
from tests.servers import wait_until

pytestmark = pytest.mark.long


def test_layers_without_names_fold_by_structure(view: View) -> None:
    view.select_model("unnamed")
    view.pick_files(SHIP)
    layers = view.fetch_layers()
    assert {layer["name"] for layer in layers[1:-1]} == {""}  # Fovea adds the softmax
    brackets = view.page.locator(".bracket .name")
    stages = [
        [f"stage {stage}", *(f"block {4 * stage + number - 4}" for number in range(1, 5))] for stage in (1, 2)
    ]
    expect(brackets).to_have_text([*stages[0], *stages[1]])
    # the input, ten folded blocks, the average, the linear layer and the softmax
    expect(view.page.locator(".column")).to_have_count(14)
    view.page.locator('.bracket[data-block="block 2"]').click()
    expect(view.page.locator(".column")).to_have_count(14 + 5)


def test_columns_have_numbers_and_the_names_of_the_field(view: View) -> None:
    view.select_model("unnamed")
    view.pick_files(SHIP)
    numbers = view.page.locator(".column .number")
    expect(numbers.nth(1)).to_have_text("2–3")
    view.page.locator('.bracket[data-block="block 1"]').click()
    titles = view.page.locator(".column .title strong")
    expect(titles.nth(2)).to_have_text("Convolution")
    expect(titles.nth(3)).to_have_text("ReLU6")
    expect(titles.nth(4)).to_have_text("Depthwise convolution")
    expect(numbers.nth(4)).to_have_text("6")
    expect(view.page.get_by_role("group", name="Layer 6: Depthwise convolution")).to_be_attached()
    count = len(view.fetch_layers())
    expect(numbers.last).to_have_text(str(count))
    detail = view.inspect_map("0.0.depthwise")
    expect(detail.locator(".kind")).to_have_text("Depthwise convolution")
    detail = view.inspect_map("0.0.depthwise.act")
    expect(view.page.locator("#lens .words")).to_contain_text("A ReLU that ends at 6")


@pytest.mark.parametrize("width", [1440, 2560])
def test_network_uses_the_whole_window(view: View, width: int) -> None:
    view.page.set_viewport_size({"width": width, "height": 900})
    view.select_model("deep")
    view.pick_files(SHIP)
    expect(view.page.locator(".column").first).to_be_attached()
    layers = view.page.locator("#layers").bounding_box()
    assert layers
    assert layers["width"] >= width - 60
    network = view.page.locator("#network").bounding_box()
    assert network
    assert network["x"] + network["width"] >= width - 30


def test_sixteen_columns_fit_at_1440_pixels(view: View) -> None:
    view.page.set_viewport_size({"width": 1440, "height": 900})
    view.pick_files(SHIP)  # 26 layers, of which the first 16 must be in view
    expect(view.page.locator(".column")).to_have_count(26)
    assert count_columns_in_view(view) >= 16
    for name in (".title strong", ".pager", ".scale"):
        assert_no_overlap(view, name)


def count_columns_in_view(view: View) -> int:
    """Return the number of columns that are not cut at a side."""
    count = view.page.evaluate(
        """() => {
          const place = document.querySelector("#network").getBoundingClientRect();
          return [...document.querySelectorAll(".column")].map((one) => one.getBoundingClientRect())
            .filter(({left, right}) => left >= place.left && right <= place.right).length;
        }"""
    )
    return int(count)


def assert_no_overlap(view: View, selector: str) -> None:
    """Check that these parts of neighbouring columns do not lie over each other."""
    boxes = [one.bounding_box() for one in view.page.locator(f".column {selector}").all()]
    edges = [(box["x"], box["x"] + box["width"]) for box in boxes if box and box["width"]]
    assert all(right <= left + 1 for (_, right), (left, _) in pairwise(edges)), selector


def test_pairs_fold_into_one_column(view: View) -> None:
    view.page.set_viewport_size({"width": 1440, "height": 900})
    view.pick_files(SHIP)
    layers = view.fetch_layers()
    followers = {"Gelu", "BatchNormalization"}
    columns = view.page.locator(".column")
    expect(columns).to_have_count(len(layers))
    fold = view.page.get_by_role("button", name="Fold pairs")
    fold.click()
    expect(columns).to_have_count(len([layer for layer in layers if layer["kind"] not in followers]))
    assert count_columns_in_view(view) == len(columns.all())
    first = columns.nth(1).locator(".title")
    expect(first).to_contain_text("2–3")
    expect(first).to_contain_text("+ GELU")
    expect(view.page.get_by_role("group", name="Layers 2–3: Convolution and GELU")).to_be_attached()
    gelu = view.tensor_name("Gelu")
    view.column(gelu).locator(".map").first.hover()
    sources = view.page.locator(".edges .strong").get_attribute("d") or ""
    assert sources.count("M") > 3  # from three colours, through the convolution
    view.photo_item("ship.jpg").locator(".remove").click()
    view.pick_files(SHIP)
    expect(fold).to_have_attribute("aria-pressed", "true")  # the choice stays
    fold.click()
    expect(columns).to_have_count(len(layers))


def test_minimap_has_a_bar_for_each_layer_and_jumps(view: View) -> None:
    view.page.set_viewport_size({"width": 1000, "height": 900})
    view.select_model("unnamed")
    view.pick_files(SHIP)
    layers = view.fetch_layers()
    minimap = view.page.get_by_role("slider", name="All layers")
    bars = minimap.locator("i")
    expect(bars).to_have_count(len(layers))
    view.page.get_by_role("button", name="Unfold all").click()
    part = minimap.locator(".part")
    expect(part).to_have_attribute("data-first", "1")
    bars.nth(40).click()
    assert is_in_view(view, str(layers[40]["tensor"]))
    expect(minimap).to_have_attribute("aria-valuenow", "41")
    minimap.press("ArrowRight")
    expect(minimap).to_have_attribute("aria-valuetext", re.compile("^Layer 42: "))
    minimap.press("End")
    expect(part).to_have_attribute("data-last", str(len(layers)))
    minimap.press("Home")
    expect(part).to_have_attribute("data-first", "1")
    minimap.press("PageDown")
    expect(minimap).to_have_attribute("aria-valuenow", "11")
    minimap.press("Enter")
    expect(view.page.locator(f'.map[data-tensor="{layers[10]["tensor"]}"][data-index="0"]')).to_be_focused()


def is_in_view(view: View, tensor: str) -> bool:
    """Return whether the middle of a layer's column is in view."""
    column = view.page.locator(f'.column[data-tensor="{tensor}"]').bounding_box()
    network = view.page.locator("#network").bounding_box()
    assert column
    assert network
    middle = column["x"] + column["width"] / 2
    return network["x"] <= middle <= network["x"] + network["width"]


def test_button_leads_to_the_answer(view: View) -> None:
    view.page.set_viewport_size({"width": 800, "height": 900})
    view.pick_files(SHIP)
    softmax = view.tensor_name("Softmax")
    assert not is_in_view(view, softmax)
    view.page.get_by_role("button", name="To the answer").click()
    expect(view.page.locator(f'.map[data-tensor="{softmax}"]').first).to_be_focused()
    assert is_in_view(view, softmax)


def test_layer_is_found_by_its_name(view: View) -> None:
    view.page.set_viewport_size({"width": 1000, "height": 900})
    view.select_model("deep")
    view.pick_files(SHIP)
    field = view.page.get_by_role("combobox", name="Find a layer")
    field.fill("blocks.7.conv")
    found = view.page.locator(".finder .found")
    expect(found).to_have_text("1 found")
    field.press("Enter")
    expect(found).to_have_text("1 of 1")
    expect(view.page.locator('.column.sought[data-tensor="blocks.7.conv"]')).to_be_attached()  # unfolded
    assert is_in_view(view, "blocks.7.conv")
    field.fill("addition")
    field.press("Enter")
    field.press("Enter")
    expect(found).to_have_text("2 of 12")
    field.press("Shift+Enter")
    expect(found).to_have_text("1 of 12")
    expect(view.page.locator('.column.sought[data-tensor="blocks.0.sum"]')).to_be_attached()
    field.fill("5")
    field.press("Enter")
    number = view.page.locator(".column.sought .number")
    expect(number).to_have_text("5")
    field.fill("no such layer")
    expect(found).to_have_text("none")
    view.page.evaluate(
        """() => { const field = document.querySelector(".finder input");
          field.value = document.querySelector("#layer-names option:last-child").value;
          field.dispatchEvent(new InputEvent("input")); }"""
    )  # a suggestion was chosen
    expect(found).to_have_text("1 of 1")


def test_home_and_end_go_to_the_ends_of_the_network(view: View) -> None:
    view.page.set_viewport_size({"width": 800, "height": 900})
    view.pick_files(SHIP)
    conv, softmax = view.tensor_name("Conv"), view.tensor_name("Softmax")
    view.column(conv).locator(".map").nth(2).focus()
    view.page.keyboard.press("End")
    expect(view.page.locator(f'.map[data-tensor="{softmax}"]').nth(2)).to_be_focused()
    view.page.keyboard.press("Home")
    expect(view.page.locator('.column[data-kind="Input"] .map').nth(2)).to_be_focused()


def test_wheel_scrolls_sideways_and_then_the_page(view: View) -> None:
    page = view.page
    page.set_viewport_size({"width": 1100, "height": 768})
    view.pick_files(SHIP)
    view.column(view.tensor_name("Conv"))
    page.evaluate("document.querySelector('#network').scrollIntoView({block: 'end'})")
    page.evaluate("document.querySelector('#network').scrollTo({left: 0})")
    network = page.locator("#network")
    box = network.bounding_box()
    assert box
    page.mouse.move(box["x"] + 300, 400)

    def is_moved_sideways() -> bool:
        page.mouse.wheel(0, 20)
        return bool(network.evaluate("(element) => element.scrollLeft"))

    wait_until(is_moved_sideways)  # not at once: the page has just moved
    before = page.evaluate("scrollY")
    page.mouse.wheel(0, 200)
    wait_until(lambda: network.evaluate("(element) => element.scrollLeft") >= 200)
    assert page.evaluate("scrollY") == before
    network.evaluate("(element) => element.scrollTo({left: element.scrollWidth})")
    page.evaluate("scrollBy(0, -30)")  # what is below the network can be scrolled to
    before = page.evaluate("scrollY")
    page.mouse.wheel(0, 200)
    wait_until(lambda: page.evaluate("scrollY") > before)


def test_wheel_does_not_stop_a_page_that_is_moving(view: View) -> None:
    view.page.set_viewport_size({"width": 1100, "height": 768})
    view.pick_files(SHIP)
    view.column(view.tensor_name("Conv"))
    handled = """([isMoving, deltaY]) => {
      const network = document.querySelector("#network");
      network.scrollIntoView({block: "center"});
      network.scrollTo({left: 300});
      return new Promise((resolve) => setTimeout(() => {
        if (isMoving) document.dispatchEvent(new Event("scroll"));
        const event = new WheelEvent("wheel", {deltaY, bubbles: true, cancelable: true});
        network.dispatchEvent(event);
        resolve(event.defaultPrevented);
      }, 400));
    }"""
    assert view.page.evaluate(handled, [False, 100])
    assert view.page.evaluate(handled, [False, -100])
    assert not view.page.evaluate(handled, [True, 100])


@pytest.mark.parametrize("row", [0, 9])
def test_clicked_map_stays_in_view(view: View, row: int) -> None:
    view.page.set_viewport_size({"width": 1366, "height": 768})
    view.pick_files(SHIP)
    tensor = view.tensor_name("Conv", 1)
    view.inspect_map(tensor, row)
    chosen = view.page.locator(f'.map[data-tensor="{tensor}"][aria-current]')
    expect(chosen).to_have_attribute("data-row", str(row))
    wait_until(lambda: is_uncovered(chosen))
    view.page.locator('[data-go="1"]').click()
    expect(view.page.locator(".map[aria-current]")).to_have_attribute("data-index", str(row + 1))
    wait_until(lambda: is_uncovered(view.page.locator(".map[aria-current]")))
    expect(view.page.locator("#detail .heading")).to_be_in_viewport(ratio=1)
    expect(view.page.locator("#detail .equation")).to_be_in_viewport()


def is_uncovered(element: Locator) -> bool:
    """Return whether nothing lies over an element, and all of it is in the window."""
    return bool(
        element.evaluate(
            """(element) => {
              const {left, top, right, bottom} = element.getBoundingClientRect();
              const corners = [[left + 2, top + 2], [right - 2, bottom - 2]];
              return corners.every(([x, y]) => element.contains(document.elementFromPoint(x, y)));
            }"""
        )
    )


def test_columns_are_arranged_anew_for_another_width(view: View) -> None:
    view.page.set_viewport_size({"width": 1000, "height": 800})
    view.select_model("tiny_vgg")
    view.pick_files(SHIP)
    first = view.column(view.tensor_name("Conv")).locator(".map").first
    first.focus()
    assert count_columns_in_view(view) < 14
    view.page.set_viewport_size({"width": 1500, "height": 800})
    expect(view.page.locator(".column").last).to_be_in_viewport(ratio=0.5)
    assert count_columns_in_view(view) == 14
    expect(first).to_be_focused()


def test_scrolling_networks_have_narrow_columns_and_readable_labels(view: View) -> None:
    view.page.set_viewport_size({"width": 1366, "height": 768})
    view.pick_files(SHIP)
    widths = {}
    for kind in ("Conv", "Softmax"):
        box = view.column(view.tensor_name(kind)).bounding_box()
        assert box
        widths[kind] = box["width"]
    assert widths["Conv"] < 70
    assert widths["Softmax"] > 150


def test_maps_are_larger_in_a_tall_window(view: View) -> None:
    view.select_model("tiny_vgg")
    view.pick_files(SHIP)
    first_map = view.page.locator('.column[data-kind="Conv"] .map').first
    for height, side in ((800, 44), (1300, 64)):
        view.page.set_viewport_size({"width": 2560, "height": height})
        expect(first_map).to_have_css("width", f"{side}px")
        assert count_columns_in_view(view) == 14


def test_layer_of_ten_maps_shows_all(view: View) -> None:
    view.select_model("unnamed")
    view.pick_files(SHIP)
    view.page.get_by_role("button", name="Unfold all").click()
    expect(view.column("0.down").locator(".map")).to_have_count(4)
    expect(view.column("0.0.expand").locator(".map")).to_have_count(10)
    expect(view.column("0.0.expand").locator(".pager")).to_contain_text("2 more")
    view.select_model("tiny_vgg")
    expect(view.column(view.tensor_name("Gemm")).locator(".map")).to_have_count(10)


def read_indices(column: Locator, count: int) -> list[int]:
    """Return which maps a column shows, once it shows `count` of them."""
    expect(column.locator(".map")).to_have_count(count)
    return [int(one.get_attribute("data-index") or "") for one in column.locator(".map").all()]


def test_maps_are_ordered_by_strength(view: View) -> None:
    view.pick_files(SHIP)
    tensor = view.tensor_name("Conv", 1)
    maps = view.fetch_maps(tensor)
    strengths = np.abs(maps).mean(axis=(1, 2))
    view.page.get_by_label("Order maps").select_option("strength")
    column = view.column(tensor)
    expect(column.locator(".map .colour").first).to_have_text(str(int(strengths.argmax()) + 1))
    order = [int(index) for index in np.argsort(-strengths, kind="stable")]
    assert read_indices(column, 10) == order[:10]
    column.get_by_role("button", name="more maps").click()
    expect(column.locator(f'.map[data-index="{order[10]}"]')).to_be_visible()
    assert read_indices(column, 10) == order[10:20]
    column.locator(".map").nth(1).click()
    equation = view.detail.locator(".equation")
    assert read_number(equation, "shown") == pytest.approx(float(maps[order[11], 15, 15]), abs=1e-5)
    view.page.locator('[data-go="-1"]').click()  # to the map before in the network, on whatever page it is
    expect(column.locator(f'.map[data-index="{order[11] - 1}"]')).to_have_attribute("aria-current", "true")


def test_maps_are_ordered_by_contribution_to_the_chosen_label(view: View) -> None:
    view.select_model("float")
    view.pick_files(SHIP)
    expect(view.top_label).to_be_visible()
    view.page.get_by_label("Order maps").select_option("contribution")
    last_maps, head = view.tensor_name("Pow"), view.tensor_name("Gemm")
    means = view.fetch_maps(last_maps).mean(axis=(1, 2))
    for label in (8, 2):
        weights = view.fetch_weights(head, label)
        order = [int(index) for index in np.argsort(-means * weights, kind="stable")[:10]]
        column = view.column(last_maps)
        expect(column.locator(".map").first).to_have_attribute("data-index", str(order[0]))
        assert read_indices(column, 10) == order
        assert read_indices(view.column(view.tensor_name("ReduceMean")), 10) == order
        view.page.locator('.bars [data-label="bird"] button').click()
    expect(view.page.locator('option[value="contribution"]')).to_have_text("by contribution to “bird”")
    assert read_indices(view.column(view.tensor_name("Conv")), 10) == list(range(10))


def test_contribution_that_cannot_be_computed_is_disabled_with_a_reason(view: View) -> None:
    def hide_weights(route: Route) -> None:
        description = route.fetch().json()
        for layer in description["layers"]:
            layer["weights"] = []
        route.fulfill(json=description)

    view.page.route("**/layers", hide_weights)
    view.select_model("small")
    view.pick_files(SHIP)
    option = view.page.locator('option[value="contribution"]')
    expect(option).to_be_disabled()
    expect(option).to_contain_text("not here, the network does not end in a linear layer")
