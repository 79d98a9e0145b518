"""The model for teaching: the whole network on one screen, and arithmetic for every layer."""

from __future__ import annotations

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.page.views import SHIP, View, read_number

pytestmark = pytest.mark.long

KINDS = ["Input", *(["Conv", "Relu"] * 2 + ["MaxPool"]) * 2, "Flatten", "Gemm", "Softmax"]


@pytest.fixture
def tiny_view(view: View) -> View:
    """The page with the layers of the model for teaching, for the photo of a ship."""
    view.page.set_viewport_size({"width": 1366, "height": 768})
    view.select_model("tiny_vgg")
    view.pick_files(SHIP)
    expect(view.top_label).to_have_attribute("data-label", "ship")
    return view


@pytest.mark.parametrize("width", [1366, 1440])
def test_all_layers_and_maps_are_on_one_screen(tiny_view: View, width: int) -> None:
    page = tiny_view.page
    page.set_viewport_size({"width": width, "height": 768})
    tiny_view.photo_item("ship.jpg").locator(".remove").click()
    tiny_view.pick_files(SHIP)  # columns are arranged for the width at which they are made
    assert [layer["kind"] for layer in tiny_view.fetch_layers()] == KINDS
    expect(page.locator(".column")).to_have_count(len(KINDS))
    page.locator("#layers").evaluate("(section) => section.scrollIntoView()")
    for column in page.locator(".column").all():
        expect(column.locator(".strip")).to_be_in_viewport(ratio=1)
        expect(column.locator(".title strong")).to_be_in_viewport(ratio=1)
    for kind, maps in (("Conv", 8), ("Relu", 8), ("MaxPool", 8), ("Gemm", 10), ("Softmax", 10)):
        shown = page.locator(f'.column[data-kind="{kind}"]').last.locator(".map")
        expect(shown).to_have_count(maps)
        expect(shown.last).to_be_in_viewport(ratio=1)


def test_every_layer_shows_its_arithmetic(tiny_view: View) -> None:
    for layer in tiny_view.fetch_layers()[1:]:
        tensor = layer["tensor"]
        detail = tiny_view.inspect_map(tensor)
        expect(detail.locator(".formula").first).to_be_visible()
        expect(detail).not_to_contain_text("The value here:")
        if layer["kind"] == "Flatten":
            continue  # nothing is computed
        values = tiny_view.fetch_maps(tensor)
        value = values[0] if values.ndim == 1 else values[0, values.shape[1] // 2, values.shape[2] // 2]
        equation = detail.locator(".equation")
        assert read_number(equation, "shown") == pytest.approx(float(value), abs=1e-5), tensor
        assert read_number(equation, "total") == pytest.approx(float(value), abs=1e-4), tensor


def test_flatten_keeps_the_order_of_the_maps(tiny_view: View) -> None:
    pooled = tiny_view.fetch_maps(tiny_view.tensor_name("MaxPool", 1))
    flat = tiny_view.fetch_maps(tiny_view.tensor_name("Flatten"))
    np.testing.assert_array_equal(flat, pooled.ravel())
