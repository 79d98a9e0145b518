"""The article: pictures by the served model, links into the network, and the sliding window to play with."""

from __future__ import annotations

import base64
import itertools
import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from tests.page.test_use import assert_fits, find_serious_faults
from tests.page.views import SHIP, TRUCK, View, read_number, read_numbers

pytestmark = pytest.mark.long

SETTINGS = ("size", "kernel", "stride", "padding", "dilation")


def open_article(view: View) -> Locator:
    """Follow the link in the head of the page."""
    view.page.get_by_role("link", name="Learn").click()
    article = view.page.locator("#learn")
    expect(article.locator("h2")).to_be_focused()
    return article


def find_picture(view: View, section: str) -> Locator:
    """Scroll to the picture of a section, and return it once it is made."""
    picture = view.page.locator(f'.picture[data-picture="{section}"]')
    picture.scroll_into_view_if_needed()
    expect(picture).to_have_attribute("aria-busy", "false")
    return picture


def test_article_is_loaded_when_its_link_is_followed(view: View) -> None:
    urls: list[str] = []
    view.page.on("request", lambda request: urls.append(request.url))
    view.page.reload()
    expect(view.page.locator("#model")).to_be_enabled()
    assert not [url for url in urls if "/article/" in url and not url.endswith("/loader.js")]
    assert not view.page.locator("#learn").is_visible()
    article = open_article(view)
    expect(article.locator("section h3")).to_have_count(10)
    view.page.reload()  # the address has the article
    expect(view.page.locator("#learn h2")).to_be_visible()
    view.page.get_by_role("link", name="Pooling", exact=True).click()
    expect(view.page.locator("#learn-pooling h3")).to_be_focused()


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ("image", "Input"),
        ("convolution", "Conv"),
        ("relu", "Gelu"),
        ("pooling", "MaxPool"),
        ("linear", "Gemm"),
        ("softmax", "Softmax"),
    ],
)
def test_sections_lead_into_the_network_and_back(view: View, section: str, kind: str) -> None:
    """A sample photo is taken if none is open."""
    open_article(view)
    view.page.locator(f"#learn-{section} .live").click()
    expect(view.detail.locator("h3")).to_be_focused()
    tensor = view.tensor_name(kind)
    opened_map = view.page.locator(f'.map[data-tensor="{tensor}"][aria-current]')
    expect(opened_map).to_be_in_viewport()
    expect(opened_map).to_have_attribute(
        "data-index", "8" if kind in ("Gemm", "Softmax") else "0"
    )  # the ship
    expect(view.photo_item("ship.jpg")).to_be_visible()
    view.page.go_back()
    expect(view.page.locator(f"#learn-{section} h3")).to_be_focused()


def test_hierarchy_leads_to_the_last_convolution_of_the_open_photo(view: View) -> None:
    view.pick_files(TRUCK)
    expect(view.top_label).to_have_attribute("data-label", "truck")
    open_article(view)
    view.page.locator("#learn-hierarchy .live").click()
    convolutions = [layer for layer in view.fetch_layers() if layer["kind"] == "Conv"]
    expect(view.detail.locator("h3")).to_contain_text(convolutions[-1]["name"])
    expect(view.page.locator("#gallery li")).to_have_count(1)


def read_input(view: View, photo: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return the exact input, uint8 (height, width, 3), by the API."""
    reply = view.client.post(f"/v1/models/{view.model}/explain", content=photo, params={"samples": 1})
    with Image.open(BytesIO(base64.b64decode(reply.json()["what_the_model_saw"]["png"]))) as image:
        return np.asarray(image.convert("RGB"))


def test_picture_of_the_image_has_the_numbers_of_the_exact_input(view: View) -> None:
    open_article(view)
    for photo in (SHIP, TRUCK):  # the first stands in for a photo
        if photo is TRUCK:
            view.pick_files(TRUCK)
            expect(view.top_label).to_have_attribute("data-label", "truck")
        pixels = read_input(view, photo.read_bytes())
        top, left = ((side - 5) // 2 for side in pixels.shape[:2])
        expected = pixels[top : top + 5, left : left + 5].transpose(2, 0, 1).ravel()
        first_cell = find_picture(view, "image").locator(".channel td").first
        expect(first_cell).to_have_attribute("data-value", str(expected[0]))
        assert read_numbers(find_picture(view, "image").locator(".channel td")) == expected.tolist()


def test_pictures_are_made_by_the_served_model(view: View) -> None:
    open_article(view)
    layers = view.fetch_layers()
    convolutions = [layer for layer in layers if layer["kind"] == "Conv"]
    expect(find_picture(view, "convolution").locator(".kernel")).to_have_count(4)
    expect(find_picture(view, "relu").locator(".formula")).to_contain_text("erf")
    captions = find_picture(view, "pooling").locator("figcaption").all_text_contents()
    assert captions[:2] == ["before, 31 × 31", "after, 15 × 15"]
    logits = view.fetch_maps(view.tensor_name("Gemm")).ravel()
    votes = find_picture(view, "linear").locator(".equation")
    assert read_number(votes, "shown") == pytest.approx(logits.max(), abs=1e-4)
    shares = read_numbers(find_picture(view, "softmax").locator("tbody tr"))
    probabilities = view.fetch_maps(view.tensor_name("Softmax")).ravel()
    assert sorted(shares) == pytest.approx(sorted(probabilities), abs=1e-5)
    parts = find_picture(view, "hierarchy").locator(".seen-part")
    heights = read_numbers_of(parts, "height")
    assert len(heights) == 4
    assert heights == sorted(heights)
    first_kernel = convolutions[0]["kernel"][0]
    assert heights[0] == first_kernel
    assert heights[-1] > 20
    expect(find_picture(view, "heat").locator("figcaption").first).to_contain_text("“ship”")


def read_numbers_of(elements: Locator, name: str) -> list[float]:
    return [read_number(element, name) for element in elements.all()]


@pytest.mark.parametrize("model", ["tiny_vgg", "varied", "deep", "float"])
def test_every_section_has_its_picture_for_other_models(view: View, model: str) -> None:
    """Networks without a class activation map get one heat map, by occlusion."""
    view.select_model(model)
    open_article(view)
    kinds = {layer["kind"] for layer in view.fetch_layers()}
    for section in ("image", "convolution", "relu", "pooling", "linear", "softmax", "hierarchy", "heat"):
        picture = find_picture(view, section)
        expect(picture).not_to_contain_text("There is no picture here")
        expect(picture.locator(".drawing > *").first).to_be_visible()
        if section not in ("heat", "image", "hierarchy"):
            expect(view.page.locator(f"#learn-{section} .live")).to_be_visible()
    maps = find_picture(view, "heat").locator(".warm")
    expect(maps).to_have_count(1 if kinds & {"Flatten"} and model != "deep" else 2)


def test_article_says_why_it_has_no_pictures(view: View) -> None:
    view.select_model("closed")
    open_article(view)
    expect(find_picture(view, "convolution")).to_contain_text("There is no picture here")
    expect(view.page.locator("#learn-linear .text")).to_be_visible()


def set_window(page: Page, **settings: int) -> None:
    """Move the sliders of the playground."""
    for name, value in settings.items():
        page.locator(f'[data-setting="{name}"]').fill(str(value))


def read_marked(page: Page, grid: str) -> set[tuple[int, int]]:
    """Return the marked squares of a grid, as row and column."""
    squares = page.locator(f".playground .{grid} .read").all()
    return {(int(read_number(one, "row")), int(read_number(one, "column"))) for one in squares}


@pytest.mark.parametrize(
    "values",
    [(7, 3, 1, 0, 1), (8, 3, 2, 1, 1), (9, 3, 1, 2, 2), (5, 1, 1, 0, 1), (10, 5, 3, 2, 1), (12, 2, 4, 0, 3)],
)
def test_playground_output_is_that_of_a_convolution(view: View, values: tuple[int, ...]) -> None:
    """Compare the size, the values and the window with a convolution by definition."""
    settings = dict(zip(SETTINGS, values, strict=True))
    open_article(view)
    expect(view.page.locator('.playground[data-picture="shown"]')).to_be_attached()
    set_window(view.page, **settings)
    size, kernel, stride, padding, dilation = values
    numbers = read_numbers(view.page.locator(".playground .input .square:not(.outside)"))
    padded = np.pad(np.reshape(numbers, (size, size)), padding)
    starts = range(0, size + 2 * padding - dilation * (kernel - 1), stride)
    offsets = [dilation * cell for cell in range(kernel)]
    means = [
        padded[np.ix_([row + offset for offset in offsets], [column + offset for offset in offsets])].mean()
        for row, column in itertools.product(starts, starts)
    ]
    assert read_number(view.page.locator(".playground .sum strong")) == len(starts)
    output = read_numbers(view.page.locator(".playground .output .square"))
    assert output == pytest.approx(means, abs=1e-9)
    last = len(starts) - 1
    view.page.locator(f'.playground .output .square[data-row="{last}"][data-column="0"]').hover()
    rows = [starts[last] + offset - padding for offset in offsets]
    columns = [offset - padding for offset in offsets]
    assert read_marked(view.page, "input") == set(itertools.product(rows, columns))
    sentence = view.page.locator(".playground .sees").text_content() or ""
    numbers = [int(number.replace("−", "-")) for number in re.findall(r"−?\d+", sentence.split(": rows")[1])]
    assert numbers == [*rows, *columns]


def test_playground_works_by_keyboard_and_from_input_to_output(view: View) -> None:
    open_article(view)
    page = view.page
    set_window(page, size=7, kernel=3, stride=2, padding=1)
    page.locator(".playground .output .cells").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert read_marked(page, "output") == {(1, 1)}
    assert read_marked(page, "input") == set(itertools.product((1, 2, 3), (1, 2, 3)))
    expect(page.locator("#said")).to_contain_text("Place (1, 1)")
    page.locator('.playground .input .square[data-row="3"][data-column="3"]').hover()
    assert read_marked(page, "output") == set(itertools.product((1, 2), (1, 2)))
    expect(page.locator(".playground .sees")).to_contain_text("read by 4 places")


def test_playground_says_when_nothing_fits_and_what_is_not_read(view: View) -> None:
    open_article(view)
    set_window(view.page, size=4, kernel=3, dilation=3)
    expect(view.page.locator(".playground .sum")).to_contain_text("No output. The window is 7 wide")
    set_window(view.page, size=7, kernel=1, stride=2, dilation=1)
    expect(view.page.locator(".playground .notes")).to_contain_text(
        "33 of 49 input pixels are read by no place"
    )


def test_playground_takes_the_settings_of_a_layer(view: View) -> None:
    open_article(view)
    layer = view.find_layer(view.tensor_name("Conv", 1))
    assert (layer["kernel"], layer["padding"]) == ([3, 3], [1, 1, 1, 1])
    set_window(view.page, kernel=2, stride=3)
    view.page.get_by_label("Set it as in").select_option(label=f"Conv {layer['name']}")
    sliders = [view.page.locator(f'[data-setting="{name}"]').input_value() for name in SETTINGS[1:]]
    assert sliders == ["3", "1", "1", "1"]


def test_article_has_no_serious_fault_and_fits_phones(view: View) -> None:
    open_article(view)
    for section in ("image", "convolution", "relu", "linear", "softmax", "hierarchy", "heat"):
        find_picture(view, section)
    assert find_serious_faults(view.page) == []
    for width in (320, 390, 768):
        view.page.set_viewport_size({"width": width, "height": 760})
        set_window(view.page, size=12, padding=3)
        assert_fits(view.page, width)
