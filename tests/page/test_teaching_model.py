"""The model for teaching: the whole network on one screen, and arithmetic for every layer."""

from __future__ import annotations

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.page.test_layers import is_coloured
from tests.page.views import SHIP, View, read_number, read_numbers

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


def test_all_input_maps_of_a_convolution_are_shown(tiny_view: View) -> None:
    terms = tiny_view.inspect_map(tiny_view.tensor_name("Conv", 1)).locator(".terms .term")
    expect(terms).to_have_count(8)


def test_linear_layer_is_shown_map_by_map(tiny_view: View) -> None:
    """The weights of a label lie over the maps that were flattened."""
    tensor = tiny_view.tensor_name("Gemm")
    pooled = tiny_view.fetch_maps(tiny_view.tensor_name("MaxPool", 1))
    weights = tiny_view.fetch_weights(tensor, 8).reshape(pooled.shape)
    detail = tiny_view.inspect_map(tensor, 8)
    terms = detail.locator(".terms .term")
    expect(terms).to_have_count(len(pooled))
    for index, term in enumerate(terms.all()):
        grids = term.locator(".grid")
        assert read_numbers(grids.nth(0).locator("td")) == pytest.approx(pooled[index].ravel(), abs=1e-5)
        assert read_numbers(grids.nth(1).locator("td")) == pytest.approx(weights[index].ravel(), abs=1e-6)
        total = float((pooled[index].astype(float) * weights[index]).sum())
        assert read_number(term) == pytest.approx(total, abs=1e-4)
    bias = read_number(detail.locator(".equation .bias"))
    score = float(tiny_view.fetch_maps(tensor)[8])
    assert sum(read_numbers(terms)) + bias == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize(("choice", "last"), [("of each stage", 5), ("of the network", 10)])
def test_layers_can_share_one_scale(tiny_view: View, choice: str, last: int) -> None:
    tensors = [layer["tensor"] for layer in tiny_view.fetch_layers()]
    largest = max(float(np.abs(tiny_view.fetch_maps(tensor)).max()) for tensor in tensors[1 : last + 1])
    tiny_view.page.get_by_label("Stretch colours").select_option(choice)
    for tensor in tensors[1:6]:  # the first stage ends with a pooling
        column = tiny_view.column(tensor)
        expect(column).to_have_attribute("data-stretched", "false")
        shares = tiny_view.fetch_maps(tensor)[2] / largest / 2 + 0.5
        assert is_coloured(column.locator(".map canvas").nth(2), shares)
    first, later = (tiny_view.column(tensors[at]).locator(".foot .scale").inner_text() for at in (1, 6))
    assert (first == later) == (choice == "of the network")
