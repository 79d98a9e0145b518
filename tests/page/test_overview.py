"""The overview of a network: its blocks, the numbers of its layers, and their names."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.page.views import SHIP, View

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
