"""The way from a label back to the photo: operands are links, and the features that speak for a label."""

from __future__ import annotations

import numpy as np
import pytest
from playwright.sync_api import Locator, expect

from tests.page.test_use import assert_fits, find_serious_faults
from tests.page.views import SHIP, TRUCK, View, read_number, read_numbers

pytestmark = pytest.mark.long

SHIP_INDEX = 8


def find_features(view: View) -> Locator:
    """Return the features of the explained label once they are shown."""
    expect(view.page.locator("#features > div")).to_have_attribute("aria-busy", "false")
    return view.page.locator("#features li")


def fetch_weights(view: View, tensor: str, label: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return the weights of a label."""
    source = f"/v1/models/{view.model}/weights?tensor={tensor}&part=weight&first={label}&count=1"
    values = view.page.evaluate(
        """async (url) => {
          const {readNpy} = await import("/page/npy.js");
          return [...readNpy(await (await fetch(url)).arrayBuffer()).values];
        }""",
        source,
    )
    return np.array(values, np.float32)


def is_painted(canvas: Locator) -> bool:
    """Return True if a canvas has more than one colour."""
    colours = canvas.evaluate(
        """(canvas) => {
          const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          return new Set(new Uint32Array(data.buffer)).size;
        }"""
    )
    return int(colours) > 1


@pytest.mark.parametrize("model", ["float", "tiny_vgg"])
def test_features_are_the_maps_that_add_most_to_the_score(view: View, model: str) -> None:
    """The head reads pooled maps in one model, and flattened maps in the other."""
    view.select_model(model)
    view.pick_files(SHIP)
    features = find_features(view)
    gemm = view.find_layer(view.tensor_name("Gemm"))
    inputs = view.fetch_maps(gemm["sources"][0]).ravel()
    products = inputs * fetch_weights(view, gemm["tensor"], SHIP_INDEX).ravel()
    maps = view.find_layer(str(features.first.get_attribute("data-tensor")))["shape"][0]
    sums = products.reshape(maps, -1).sum(axis=1)
    best = [place for place in np.argsort(-sums)[:5] if sums[place] > 0]
    assert len(best) >= 3
    assert [int(item.get_attribute("data-index") or -1) for item in features.all()] == best
    assert read_numbers(features) == pytest.approx(sums[best].tolist(), rel=1e-4, abs=1e-5)


def test_patch_of_a_feature_lies_where_its_map_is_strongest(view: View) -> None:
    view.select_model("tiny_vgg")
    view.pick_files(SHIP)
    feature = find_features(view).first
    tensor, index = feature.get_attribute("data-tensor"), int(feature.get_attribute("data-index") or -1)
    layer = view.find_layer(str(tensor))
    gemm = view.find_layer(view.tensor_name("Gemm"))
    weights = fetch_weights(view, gemm["tensor"], SHIP_INDEX).reshape(layer["shape"])
    row, column = np.unravel_index(
        int((view.fetch_maps(str(tensor)) * weights)[index].argmax()), layer["shape"][1:]
    )
    patch = feature.locator("canvas.patch")
    jump, low, high = layer["field"]["rows"]
    centre = jump * int(row) + (low + high + 1) / 2
    top, bottom = (read_number(patch, side) for side in ("top", "bottom"))
    assert top <= min(max(centre, 0), 32) <= bottom
    assert bottom - top < 32
    assert is_painted(patch)
    feature.locator("button").click()
    expect(view.detail.locator("h3")).to_contain_text(f"map {index + 1} of {layer['shape'][0]}")
    expect(view.detail.locator(".place")).to_have_text(f"row {row}, column {column}")
    expect(view.page.locator(f'.map[data-tensor="{tensor}"][data-index="{index}"]')).to_have_attribute(
        "aria-current", "true"
    )


def test_features_follow_the_label_and_the_photo(view: View) -> None:
    view.pick_files(SHIP)
    expect(view.page.locator("#features p")).to_contain_text("the score of “ship”")
    view.page.locator('.bars [data-label="bird"] button').click()
    expect(view.page.locator("#features p")).to_contain_text("the score of “bird”")
    view.pick_files(TRUCK)
    expect(view.page.locator("#features p")).to_contain_text("the score of “truck”")
    assert len(find_features(view).all()) == 5


def test_features_are_hidden_where_the_layers_cannot_be_shown(view: View) -> None:
    view.select_model("closed")
    view.pick_files(SHIP)
    expect(view.page.locator("#layers-text")).to_contain_text("Their maps cannot be shown: ")
    expect(view.page.locator("#features")).not_to_be_visible()
    view.select_model("small")
    expect(view.page.locator("#features p")).to_be_visible()


def test_features_of_hidden_values_lead_to_these_values(view: View) -> None:
    """The last linear layer reads values that are made of many maps each."""
    view.select_model("varied")
    view.pick_files(SHIP)
    feature = find_features(view).first
    expect(feature.locator("canvas")).to_have_count(0)
    index = int(feature.get_attribute("data-index") or -1)
    feature.locator("button").click()
    expect(view.detail.locator("h3")).to_contain_text(f"value {index + 1} of 12")


def test_links_lead_from_a_label_through_its_features_to_the_input(view: View) -> None:
    view.select_model("tiny_vgg")
    view.pick_files(SHIP)
    detail = view.inspect_map(view.tensor_name("Softmax"), SHIP_INDEX)
    detail.locator(".ranking .chosen .maplink").click()
    expect(view.detail.locator("h3")).to_contain_text("Linear layer")
    expect(view.detail.locator("h3")).to_contain_text("ship")
    link = view.detail.locator(".ranking .maplink").first
    assert is_painted(link.locator("canvas"))
    link.click()
    expect(view.detail.locator("h3")).to_contain_text("map")
    for _ in range(12):  # back to the input, layer by layer
        if "Input" in (view.detail.locator("h3").text_content() or ""):
            break
        link = view.detail.locator(".maplink").first
        target = str(link.get_attribute("data-tensor"))
        assert is_painted(link.locator("canvas"))
        link.press("Enter")
        expect(view.page.locator(f'.map[data-tensor="{target}"][aria-current]')).to_be_attached()
        expect(view.detail.locator("h3")).to_be_focused()
    expect(view.detail.locator("h3")).to_contain_text("Input")


@pytest.mark.parametrize(
    ("kind", "links"),
    [("Conv", 2), ("BatchNormalization", 1), ("Add", 2), ("Mul", 2), ("Clip", 1), ("AveragePool", 1)],
)
def test_each_operand_is_a_link_to_its_map(view: View, kind: str, links: int) -> None:
    view.select_model("varied")
    view.pick_files(SHIP)
    layer = view.find_layer(view.tensor_name(kind))
    detail = view.inspect_map(layer["tensor"], 1)
    found = detail.locator(".maplink")
    for link in found.all():
        assert is_painted(link.locator("canvas"))
    assert found.count() >= links
    assert {link.get_attribute("data-tensor") for link in found.all()} == set(layer["sources"])


@pytest.mark.parametrize("width", [320, 1366])
def test_features_fit_and_have_no_serious_fault(view: View, width: int) -> None:
    view.page.set_viewport_size({"width": width, "height": 768})
    view.pick_files(SHIP)
    expect(find_features(view)).to_have_count(5)
    view.inspect_map(view.tensor_name("Gemm"), SHIP_INDEX)
    assert_fits(view.page, width)
    assert find_serious_faults(view.page) == []
