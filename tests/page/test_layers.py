"""The layers on the page: all are shown, and their numbers add up to the values of the service."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from playwright.sync_api import Locator, expect

from tests.page.networks import ROW_LAYERS
from tests.page.views import SHIP, TRUCK, Array, View, read_number, read_numbers
from tests.servers import ROOT

pytestmark = pytest.mark.long

PIXELS = """(canvas) => [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]"""


def assert_adds_up(view: View, detail: Locator, tensor: str, index: int) -> None:
    """Check that the displayed sum is the value in the map, and the value of the API."""
    equation = detail.locator(".equation")
    total, displayed_value = read_number(equation, "total"), read_number(equation, "shown")
    values = view.fetch_maps(tensor)
    if values.ndim == 3:
        _, height, width = values.shape
        value = values[index, height // 2, width // 2]
    else:
        value = values[index]
    assert displayed_value == pytest.approx(float(value), abs=1e-5, rel=1e-5)
    assert_same_or_rounded(view, equation, total, displayed_value, float(np.abs(values).max()))


def assert_same_or_rounded(
    view: View, equation: Locator, total: float, displayed_value: float, largest: float
) -> None:
    """Check that a sum is the value in the map. The default model rounds to int8; the page then says it."""
    if view.model == "cifar10":
        assert total == pytest.approx(displayed_value, abs=0.02 * max(1, largest))
        if abs(total - displayed_value) > 1e-3 * max(1, abs(displayed_value)):
            expect(equation).to_contain_text("after the model's rounding")
            return
        expect(equation).not_to_contain_text("rounding")
    else:
        assert total == pytest.approx(displayed_value, abs=1e-4, rel=1e-4)
        expect(equation).not_to_contain_text("rounding")


def parse_number(text: str) -> float:
    """Return the number that the page writes as this text."""
    return float(text.replace("−", "-"))


def test_every_layer_has_a_column(view: View) -> None:
    view.pick_files(SHIP)
    columns = view.page.locator(".column")
    layers = view.fetch_layers()
    expect(columns).to_have_count(len(layers))
    shown_tensors = [column.get_attribute("data-tensor") for column in columns.all()]
    assert shown_tensors == [layer["tensor"] for layer in layers]


def test_imported_network_shows_all_its_layers(view: View) -> None:
    view.select_model("varied")
    view.pick_files(SHIP)
    layers = view.fetch_layers()
    expect(view.page.locator(".column")).to_have_count(len(layers))
    assert [layer["kind"] for layer in layers if layer["kind"] in ("Flatten", "Gemm")] == [
        "Flatten",
        "Gemm",
        "Gemm",
    ]
    for layer in layers:
        expect(view.column(layer["tensor"]).locator(".map").first).to_be_visible()


@pytest.mark.parametrize("number", [0, 3])
def test_convolution_terms_add_up(view: View, number: int) -> None:
    view.pick_files(SHIP)
    tensor = view.tensor_name("Conv", number)
    detail = view.inspect_map(tensor, 2)
    assert_adds_up(view, detail, tensor, 2)
    summands = detail.locator(".summand:not(.result)")
    assert sum(read_numbers(summands)) == pytest.approx(
        read_number(detail.locator(".equation"), "total"), abs=1e-9
    )
    for term in detail.locator(".terms .term").all():
        window, kernel, products = (
            read_numbers(term.locator(".grid").nth(index).locator("td")) for index in range(3)
        )
        assert products == pytest.approx([x * w for x, w in zip(window, kernel, strict=True)], abs=1e-12)
        assert sum(products) == pytest.approx(read_number(term), abs=1e-12)


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        ("cifar10", {"Gelu", "MaxPool", "BatchNormalization", "Pow", "ReduceMean", "Gemm", "Div", "Softmax"}),
        ("float", {"Gelu", "MaxPool", "BatchNormalization", "Pow", "ReduceMean", "Gemm", "Div", "Softmax"}),
        (
            "varied",
            {
                "Add",
                "AveragePool",
                "Clip",
                "Elu",
                "Flatten",
                "LayerNormalization",
                "LeakyRelu",
                "MatMul",
                "Mul",
                "Sigmoid",
                "Tanh",
            },
        ),
    ],
)
def test_sum_of_every_layer_is_the_value_of_the_api(view: View, model: str, kinds: set[str]) -> None:
    view.select_model(model)
    view.pick_files(SHIP)
    layers = [layer for layer in view.fetch_layers() if layer["kind"] != "Input"]
    assert kinds <= {layer["kind"] for layer in layers}
    for tensor in (layer["tensor"] for layer in layers):
        if tensor not in ROW_LAYERS:
            assert_adds_up(view, view.inspect_map(tensor, 1), tensor, 1)


@pytest.mark.parametrize("tensor", ROW_LAYERS)
def test_row_layers_show_a_value_without_an_equation(view: View, tensor: str) -> None:
    view.select_model("varied")
    view.pick_files(SHIP)
    detail = view.inspect_map(tensor, 1)
    expect(detail.locator(".equation")).to_have_count(0)
    value = read_number(detail.locator(".value.result"))
    assert value == pytest.approx(float(view.fetch_maps(tensor)[1, 2, 2]), abs=1e-5)


def test_maps_of_a_layer_can_share_one_colour_scale(view: View) -> None:
    view.pick_files(SHIP)
    tensor = view.tensor_name("Conv")
    view.column(tensor)
    view.page.get_by_label("Stretch colours").select_option("of each layer")
    expect(view.column(tensor)).to_have_attribute("data-stretched", "false")
    values = view.fetch_maps(tensor)
    share = values / np.abs(values).max() / 2 + 0.5
    maps = view.column(tensor).locator(".map canvas")
    for index in (1, 6):
        assert is_coloured(maps.nth(index), share[index])


def test_pale_maps_are_stretched_until_another_choice(view: View) -> None:
    """One map of the first convolution is much stronger than the others, which would be nearly white."""
    view.pick_files(SHIP, TRUCK)
    tensor = view.tensor_name("Conv")
    values = view.fetch_maps(tensor)
    assert np.median(np.abs(values[:8]).max(axis=(1, 2))) < np.abs(values).max() / 2
    map_shares = values[1] / np.abs(values[1]).max() / 2 + 0.5
    column = view.column(tensor)
    choice = view.page.get_by_label("Stretch colours")
    expect(choice).to_have_value("pale")
    expect(column).to_have_attribute("data-stretched", "true")
    expect(column.locator(".foot .scale")).to_have_text("each its own")
    assert is_coloured(column.locator(".map canvas").nth(1), map_shares)
    choice.select_option("of each layer")
    expect(column).to_have_attribute("data-stretched", "false")
    assert not is_coloured(column.locator(".map canvas").nth(1), map_shares)
    view.photo_item("truck.png").locator(".open").click()
    expect(view.page.locator("#heat-text")).to_contain_text("“truck”")
    expect(choice).to_have_value("never")
    expect(view.column(tensor)).to_have_attribute("data-stretched", "false")


@pytest.mark.parametrize("choice", ["pale", "never"])
def test_value_keeps_its_colour_through_an_activation(view: View, choice: str) -> None:
    """The maps of a ReLU have no negative values, and yet the colours of the maps before it."""
    view.select_model("deep")
    view.pick_files(SHIP)
    tensors = [(f"blocks.{number}.conv", f"blocks.{number}.act") for number in range(12)]
    maps = {tensor: view.fetch_maps(tensor) for pair in tensors for tensor in pair}
    # Its own range would be smaller.
    conv, relu = next(pair for pair in tensors if -maps[pair[0]].min() > 1.2 * maps[pair[1]].max())
    view.page.get_by_role("button", name="Unfold all").click()
    view.page.get_by_label("Stretch colours").select_option(choice)
    columns = [view.column(tensor) for tensor in (conv, relu)]
    for column in columns:
        expect(column).to_have_attribute("data-stretched", re.compile("true|false"))
    compared = 0
    for index in range(len(maps[conv])):
        before, after = (
            np.array(column.locator(".map canvas").nth(index).evaluate(PIXELS)).reshape(-1, 4)
            for column in columns
        )
        passes = (maps[conv][index] > 0).ravel()
        assert (before[passes] == after[passes]).all()
        compared += int(passes.sum())
    assert compared > 20


def test_kernels_and_probabilities_have_scales_of_their_own(view: View) -> None:
    view.pick_files(SHIP)
    scales = json.loads((ROOT / "service/web/page/colours.json").read_text())
    cells = view.inspect_map(view.tensor_name("Conv")).locator(".terms .term").first.locator(".grid")
    assert read_background(cells.nth(0).locator("td").first) in scales["signed"]
    kernel_cells = cells.nth(1).locator("td")
    weights = read_numbers(kernel_cells)
    largest = int(np.abs(weights).argmax())
    assert read_background(kernel_cells.nth(largest)) in scales["kernel"]
    assert read_background(kernel_cells.nth(largest)) not in scales["signed"]
    swatches = view.column(view.tensor_name("Softmax")).locator(".swatch")
    for swatch in (swatches.nth(8), swatches.nth(0)):
        probability = read_number(swatch)
        assert read_background(swatch) == scales["heat"][round(255 * probability)]
    expect(view.column(view.tensor_name("Softmax")).locator(".foot")).to_contain_text("01.0")
    logit = view.column(view.tensor_name("Gemm")).locator(".swatch").nth(8)
    assert read_background(logit) in scales["signed"]


def read_background(element: Locator) -> list[int]:
    """Return the colour behind an element: red, green and blue."""
    colour = element.evaluate("(element) => getComputedStyle(element).backgroundColor")
    return [int(part) for part in re.findall(r"\d+", colour)[:3]]


def is_coloured(canvas: Locator, shares: Array) -> bool:
    """Return whether the map shows these shares of the scale's colours, or their neighbours."""
    scales = json.loads((ROOT / "service/web/page/colours.json").read_text())
    pixels = np.array(canvas.evaluate(PIXELS)).reshape(*shares.shape, 4)[..., :3]
    expected = np.array(scales["signed"])[np.round(255 * shares).astype(int)]
    return bool(np.abs(pixels - expected).max() <= 8)


def test_sliding_kernel_computes_the_convolution_of_a_map(view: View) -> None:
    random = np.random.default_rng(0)
    image, kernel = random.normal(size=(7, 9)), random.normal(size=(2, 3))
    padded = np.pad(image, ((1, 0), (2, 1)))  # above and below, left and right
    rows, columns = 4, 6  # of windows that reach over 1 x 5 pixels, two rows apart
    expected = [
        float((padded[2 * row : 2 * row + 2, column : column + 5 : 2] * kernel).sum())
        for row in range(rows)
        for column in range(columns)
    ]
    computed = view.page.evaluate(
        """async ([image, kernel, shape]) => {
          const {slide} = await import("/page/arithmetic/window.js");
          const layer = {kernel: [2, 3], stride: [2, 1], padding: [1, 2, 0, 1], dilation: [1, 2], shape};
          return [...slide(layer, new Float32Array(image), [7, 9], new Float32Array(kernel))];
        }""",
        [image.ravel().tolist(), kernel.ravel().tolist(), [1, rows, columns]],
    )
    assert computed == pytest.approx(expected, abs=1e-5)


def test_ranked_contributions_add_up_to_the_logit(view: View) -> None:
    view.pick_files(SHIP)
    detail = view.inspect_map(view.tensor_name("Gemm"), 3)
    lines = detail.locator(".ranking tbody tr")
    expect(lines).to_have_count(12)  # ten of 256 inputs, the sum of the others, and the bias
    assert sum(read_numbers(lines)) == pytest.approx(
        read_number(detail.locator(".equation"), "total"), abs=1e-9
    )


def test_softmax_shares_sum_to_one(view: View) -> None:
    view.pick_files(SHIP)
    detail = view.inspect_map(view.tensor_name("Softmax"), 8)
    shares = read_numbers(detail.locator(".ranking tbody tr"))
    assert len(shares) == 10
    assert sum(shares) == pytest.approx(1, abs=1e-9)
    expect(detail.locator(".ranking .chosen th")).to_have_text("ship")


def test_padding_is_marked_and_counts_as_zero(view: View) -> None:
    view.pick_files(SHIP)
    tensor = view.tensor_name("Conv", 1)
    detail = view.inspect_map(tensor)
    detail.locator(".chooser .area").click(position={"x": 1, "y": 1})
    window = detail.locator(".terms .term").first.locator(".grid").first
    outside = [cell.get_attribute("class") == "cell outside" for cell in window.locator("td").all()]
    assert outside == [True, True, True, True, False, False, True, False, False]
    equation = detail.locator(".equation")
    assert read_number(equation, "shown") == pytest.approx(float(view.fetch_maps(tensor)[0, 0, 0]), abs=1e-5)
    total, shown = read_number(equation, "total"), read_number(equation, "shown")
    assert_same_or_rounded(view, equation, total, shown, float(np.abs(view.fetch_maps(tensor)).max()))
    expect(equation).to_contain_text("after the model's rounding")


def test_arrow_keys_select_the_next_pixel(view: View) -> None:
    view.pick_files(SHIP)
    tensor = view.tensor_name("Conv")
    detail = view.inspect_map(tensor)
    expect(detail.locator(".place")).to_have_text("row 15, column 15")
    detail.locator(".chooser .area").press("ArrowRight")
    expect(detail.locator(".place")).to_have_text("row 15, column 16")
    value = float(view.fetch_maps(tensor)[0, 15, 16])
    assert read_number(detail.locator(".equation"), "shown") == pytest.approx(value, abs=1e-5)
    announcement = view.page.locator("#said")
    expect(announcement).to_contain_text("row 15, column 16: ")
    assert parse_number(announcement.inner_text().rsplit(" ", 1)[1]) == pytest.approx(value, rel=1e-3)


def test_click_holds_and_releases_a_pixel(view: View) -> None:
    view.pick_files(SHIP)
    area = view.inspect_map(view.tensor_name("Conv")).locator(".chooser .area")
    area.click(position={"x": 3, "y": 3})
    place = view.page.locator("#detail .place")
    expect(place).to_have_text("row 0, column 0, held")
    area.hover(position={"x": 100, "y": 100})
    expect(place).to_have_text("row 0, column 0, held")
    area.click(position={"x": 3, "y": 3})
    area.hover(position={"x": 100, "y": 100})
    expect(place).not_to_have_text(re.compile("row 0,"))


def test_receptive_field_is_marked_on_input_and_photo(view: View) -> None:
    view.pick_files(SHIP)
    tensor = view.tensor_name("Conv", 2)
    view.column(tensor).locator(".map").first.hover(position={"x": 22, "y": 22})
    region = view.page.locator("#lens .input .field")
    expect(region).to_be_visible()
    jump, low, high = view.find_layer(tensor)["field"]["rows"]
    row = 7  # the middle of 15 rows
    expected = {"top": max(0, jump * row + low), "bottom": min(32, jump * row + high + 1)}
    assert {side: read_number(region, side) for side in expected} == expected
    expect(view.page.locator("#lens .told")).to_have_text(
        re.compile(rf"^Pixel \(7, 7\) is .+ and sees \d+ × {expected['bottom'] - expected['top']} of")
    )
    value = re.search(r"is (.+) and", view.page.locator("#lens .told").inner_text())
    assert value
    assert parse_number(value[1]) == pytest.approx(float(view.fetch_maps(tensor)[0, 7, 7]), rel=1e-3)
    field_box = view.page.locator("#stage .field").bounding_box()
    frame_box = view.page.locator("#stage .frame").bounding_box()
    assert field_box
    assert frame_box
    assert field_box["height"] / frame_box["height"] == pytest.approx(
        (expected["bottom"] - expected["top"]) / 32, abs=0.03
    )
    view.page.mouse.move(1, 1)
    expect(region).not_to_be_visible()


def test_hovered_map_highlights_its_connections(view: View) -> None:
    view.pick_files(SHIP)
    strong_edges = view.page.locator(".edges .strong")
    column = view.column(view.tensor_name("Conv"))
    column.locator(".map").nth(1).hover()
    sources = strong_edges.get_attribute("d") or ""
    assert sources.count("M") == 3 + 1  # from three colours, and to its activation
    view.column(view.tensor_name("MaxPool")).locator(".map").nth(1).hover()
    assert (strong_edges.get_attribute("d") or "").count("M") == 2  # from one map, and to one


def test_column_pages_through_its_maps(view: View) -> None:
    view.pick_files(SHIP)
    tensor = view.tensor_name("Conv")
    column = view.column(tensor)
    assert column.locator(".map").count() == 10
    expect(column.locator(".pager")).to_contain_text("14 more")
    column.get_by_role("button", name="more maps").click()
    expect(column.locator('.map[data-index="10"]')).to_be_visible()
    expect(column.locator(".pager")).to_contain_text("11–20")
    column.locator('.map[data-index="11"]').click()
    assert_adds_up(view, view.detail, tensor, 11)


def test_blocks_fold_and_unfold(view: View) -> None:
    view.pick_files(SHIP)
    layers = view.fetch_layers()
    columns = view.page.locator(".column")
    view.page.get_by_role("button", name="Fold all", exact=True).click()
    blocks = {layer["block"] for layer in layers if layer["block"]}
    single_layers = [layer for layer in layers if not layer["block"]]
    assert blocks
    expect(columns).to_have_count(len(blocks) + len(single_layers))
    block = sorted(blocks)[0]
    view.page.get_by_role("button", name=f"Block {block}", exact=True).click()
    block_size = sum(layer["block"] == block for layer in layers)
    expect(columns).to_have_count(len(blocks) + len(single_layers) + block_size - 1)
    expect(view.page.get_by_role("button", name=f"Block {block}", exact=True)).to_be_focused()


def test_deep_networks_open_folded(view: View) -> None:
    view.select_model("deep")
    view.pick_files(SHIP)
    columns = view.page.locator(".column")
    blocks = view.page.locator(".bracket")
    expect(blocks).to_have_count(12)
    folded_count = len(view.fetch_layers()) - 2 * 12
    expect(columns).to_have_count(folded_count)
    bypass_edges = view.page.locator(".edges .around")
    assert bypass_edges.get_attribute("d") == ""
    blocks.nth(3).click()
    expect(columns).to_have_count(folded_count + 2)
    assert (bypass_edges.get_attribute("d") or "").count("M") == 1  # the edge around the convolution
    tensor = view.tensor_name("Add", 3)
    assert_adds_up(view, view.inspect_map(tensor, 1), tensor, 1)


def test_maps_are_requested_when_they_come_into_view(view: View) -> None:
    map_urls: list[str] = []
    view.page.on("request", lambda request: map_urls.append(request.url) if "/maps?" in request.url else None)
    view.page.set_viewport_size({"width": 800, "height": 900})
    view.pick_files(SHIP)
    view.column(view.tensor_name("Conv"))
    late = [layer["tensor"] for layer in view.fetch_layers() if layer["kind"] == "Gelu"][-1]
    assert map_urls
    assert not any(f"tensor={late}&" in url for url in map_urls)
    view.column(late)
    assert any(f"tensor={late}&" in url for url in map_urls)


def test_another_photo_closes_the_detail_and_shows_its_maps(view: View) -> None:
    view.pick_files(SHIP, TRUCK)
    tensor = view.tensor_name("Conv")
    view.inspect_map(tensor)
    view.photo_item("truck.png").locator(".open").click()
    expect(view.page.locator("#detail")).not_to_be_visible()
    equation = view.inspect_map(tensor).locator(".equation")
    value = view.fetch_maps(tensor, TRUCK)[0, 15, 15]
    assert read_number(equation, "shown") == pytest.approx(float(value), abs=1e-5)


@pytest.mark.parametrize(("width", "selector"), [(1280, "#lens .words"), (700, "#detail .learn")])
def test_layer_description_is_shown_once(view: View, width: int, selector: str) -> None:
    view.page.set_viewport_size({"width": width, "height": 900})
    view.pick_files(SHIP)
    detail = view.inspect_map(view.tensor_name("BatchNormalization"))
    view.page.mouse.move(1, 1)
    descriptions = view.page.get_by_text("mean and variance as they were in training").filter(visible=True)
    expect(descriptions).to_have_count(1)
    expect(view.page.locator(selector)).to_contain_text("mean and variance as they were in training")
    expect(detail.locator('[data-fact="parameters"] dd')).to_have_text("256")


def test_numbers_have_a_short_and_a_long_form(view: View) -> None:
    values = [0, -0.0004, 0.0041, -0.0123, 3.14159, -250.6, 1234567]
    texts = view.page.evaluate(
        """async (values) => {
          const {brief, figure} = await import("/page/numbers.js");
          return [values.map(brief), values.map((value) => figure(value))];
        }""",
        values,
    )
    short_texts = view.page.evaluate(
        """async (values) => {
          const {figure} = await import("/page/numbers.js");
          return values.map((value) => figure(value, 3));
        }""",
        [0, 0.00093, 0.000499, 0.000093, 0.0041, -0.5],
    )
    # A number that is not zero never looks like it.
    assert short_texts == ["0", "9.3·10⁻⁴", "5.0·10⁻⁴", "9.3·10⁻⁵", "0.004", "−0.500"]
    assert texts == [
        ["0.00", "0.00", "0.004", "−0.01", "3.1", "−251", "1.2·10⁶"],
        ["0", "−0.0004", "0.0041", "−0.0123", "3.142", "−250.6", "1.23·10⁶"],
    ]


def test_error_function_is_exact(view: View) -> None:
    points = [float(x) for x in np.linspace(-7, 7, 141)]
    computed = view.page.evaluate(
        """async (points) => {
          const {erf} = await import("/page/arithmetic/functions.js");
          return points.map(erf);
        }""",
        points,
    )
    assert computed == pytest.approx([math.erf(x) for x in points], abs=2e-15)
