"""Any label can be asked about, and labels, photos and versions of a model can be compared side by side."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.export.imports import ZOO, import_graph
from tests.page.networks import LABELS, build_network_of_labels, build_varied_network
from tests.page.test_features import fetch_weights, find_features
from tests.page.test_use import assert_fits, find_serious_faults
from tests.page.views import SHIP, TRUCK, View, read_number, read_numbers
from tests.servers import ROOT, Server
from tests.tools import require_tool

pytestmark = pytest.mark.long

MANY_LABELS = [*(f"thing {number}" for number in range(1, 1000)), "Jellyfish"]
SHIP_INDEX, BIRD_INDEX = 8, 2


@pytest.fixture(scope="module")
def comparison_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service of two versions of a model, 1,000 labels, and a network without activation maps."""
    require_tool("chromium")  # before anything slow
    root = tmp_path_factory.mktemp("comparison")
    shutil.copytree(ROOT / ZOO / "cifar10", root / "cifar10")
    (root / "cifar10" / "config.toml").write_text('versions = ["3", "4"]\n')
    graphs = {
        "many": (build_network_of_labels(len(MANY_LABELS)), MANY_LABELS),
        "varied": (build_varied_network(), LABELS),
        "binary": (build_network_of_labels(1), ("no", "yes")),
    }
    for name, (graph, labels) in graphs.items():
        model = import_graph(graph, tmp_path_factory.mktemp(name), labels)
        model.path.parents[1].rename(root / name)
    (root / "default").write_text("cifar10\n")
    with Server(FOVEA_MODELS=str(root), FOVEA_EXPLAIN_SECONDS="0.3") as server:
        yield server


@pytest.fixture
def pair(page: Page, comparison_server: Server) -> View:
    """The opened page of the service with two versions."""
    view = View(page, comparison_server)
    view.open()
    return view


def open_comparison(view: View) -> tuple[Locator, Locator]:
    """Compare what is open, and return both sides."""
    find_features(view)
    view.page.get_by_role("button", name="Compare …").click()
    expect(view.page.locator("#compare h2")).to_be_focused()
    left, right = (view.page.locator(".side").nth(number) for number in (0, 1))
    return left, right


def wait_for_side(side: Locator, label: str) -> Locator:
    """Wait until a side shows a label, and return its heading."""
    heading = side.locator("h3")
    expect(heading).to_have_attribute("data-label", label)
    expect(side).to_have_attribute("aria-busy", "false")
    return heading


def test_any_of_a_thousand_labels_is_found_by_name(pair: View) -> None:
    pair.select_model("many")
    pair.pick_files(SHIP)
    find_features(pair)
    box = pair.page.locator("#ask").get_by_label("Why not …?")
    box.press_sequentially("jelly")
    box.press("Enter")
    expect(pair.page.locator("#heat-text")).to_contain_text("“Jellyfish”")
    expect(box).to_have_value("Jellyfish")
    expect(box).to_be_focused()
    row = pair.page.locator('.bars [data-label="Jellyfish"]')
    expect(row.locator("button")).to_have_attribute("aria-pressed", "true")
    reply = pair.client.post(
        "/v1/models/many/explain", content=SHIP.read_bytes(), params={"label": "Jellyfish"}
    ).json()
    assert read_number(row) == pytest.approx(reply["probability"], rel=1e-4)
    expect(pair.page.locator("#features p")).to_contain_text("the score of “Jellyfish”")
    expect(pair.page.locator(".bars li")).to_have_count(11)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zebra", "No label contains “zebra”."),
        ("THING 99", ""),  # the whole name of one
        ("thing", "Several labels contain it: thing 1; thing 2; thing 3; thing 4 and 995 more."),
    ],
)
def test_box_says_when_a_text_names_no_label_or_several(pair: View, text: str, message: str) -> None:
    pair.select_model("many")
    pair.pick_files(SHIP)
    find_features(pair)
    box = pair.page.locator("#ask").get_by_label("Why not …?")
    box.fill(text)
    box.press("Enter")
    expect(pair.page.locator("#ask [role=status]")).to_have_text(message)
    if not message:
        expect(pair.page.locator("#heat-text")).to_contain_text("“thing 99”")


def test_choice_from_the_list_needs_no_enter(pair: View) -> None:
    pair.select_model("many")
    pair.pick_files(SHIP)
    find_features(pair)
    options = pair.page.locator("#ask datalist option")
    expect(options).to_have_count(1000)
    pair.page.locator("#ask input").evaluate(
        """(input) => {
          input.value = "thing 7";
          input.dispatchEvent(new InputEvent("input", {inputType: "insertReplacementText"}));
        }"""
    )
    expect(pair.page.locator("#heat-text")).to_contain_text("“thing 7”")


def test_box_is_left_out_where_all_labels_are_shown(pair: View) -> None:
    pair.pick_files(SHIP)
    find_features(pair)
    expect(pair.page.locator("#ask")).not_to_be_visible()


def test_two_labels_are_compared_with_their_heat_maps_and_what_decides(pair: View) -> None:
    pair.pick_files(SHIP)
    find_features(pair)
    pair.page.select_option("#model", label="cifar10 · 3")
    expect(pair.page.locator("#answer .model")).to_contain_text("version 3")
    left, right = open_comparison(pair)
    wait_for_side(left, "ship")
    box = right.get_by_label("Why not …?")
    box.fill("bird")
    box.press("Enter")
    wait_for_side(right, "bird")
    for side, label in ((left, "ship"), (right, "bird")):
        reply = pair.client.post(
            "/v1/models/cifar10/versions/3/explain", content=SHIP.read_bytes(), params={"label": label}
        ).json()
        assert read_number(side.locator("h3")) == pytest.approx(reply["probability"], rel=1e-4)
        heat = side.locator("canvas.heat")
        size = [reply["heatmap"]["height"], reply["heatmap"]["width"]]
        assert heat.evaluate("(canvas) => [canvas.height, canvas.width]") == size
    urls = [side.locator("canvas.heat").evaluate("(canvas) => canvas.toDataURL()") for side in (left, right)]
    assert urls[0] != urls[1]

    pair.model = "cifar10/versions/3"
    decision = pair.page.locator(".decision .found")
    expect(decision).to_have_count(2)
    gemm = pair.find_layer(pair.tensor_name("Gemm"))
    ship, bird = (fetch_weights(pair, gemm["tensor"], index).ravel() for index in (SHIP_INDEX, BIRD_INDEX))
    products = pair.fetch_maps(gemm["sources"][0]).ravel() * (ship - bird)
    expected = np.sort(products)[::-1][:5]
    assert read_numbers(decision.first.locator("li")) == pytest.approx(expected.tolist(), rel=1e-3)
    assert read_numbers(decision.last.locator("li")) == pytest.approx(
        (-np.sort(products)[:5]).tolist(), rel=1e-3
    )
    expect(decision.first).to_contain_text("for “ship” rather than “bird”")


def test_two_versions_of_a_model_are_compared(pair: View) -> None:
    pair.pick_files(SHIP)
    left, right = open_comparison(pair)
    assert {"cifar10 · 3", "cifar10 · 4"} <= set(pair.page.locator("#model option").all_text_contents())
    expect(pair.page.locator("#model option:checked")).to_have_text("cifar10 · 4")  # the latest
    right.get_by_label("Model").select_option("cifar10 · 3")
    expect(right).to_contain_text("cifar10, version 3, on ship.jpg")
    wait_for_side(right, "ship")
    expect(left).to_contain_text("cifar10, version 4, on ship.jpg")
    expect(pair.page.locator(".decision")).not_to_be_visible()
    feature = right.locator(".features-list li").first
    tensor, index = feature.get_attribute("data-tensor"), feature.get_attribute("data-index")
    feature.locator("button").click()  # leads to the network of that version
    expect(pair.page.locator("#answer .model")).to_contain_text("version 3")
    expect(pair.page.locator(f'.map[data-tensor="{tensor}"][data-index="{index}"]')).to_have_attribute(
        "aria-current", "true"
    )
    pair.page.go_back()
    expect(pair.page.locator("#answer .model")).to_contain_text("version 4")


def test_two_photos_are_compared(pair: View) -> None:
    pair.pick_files(SHIP, TRUCK)
    left, right = open_comparison(pair)
    right.get_by_label("Photo").select_option("truck.png")
    wait_for_side(left, "ship")
    heading = wait_for_side(right, "ship")  # the same label on both sides
    reply = pair.client.post("/v1/explain", content=TRUCK.read_bytes(), params={"label": "ship"}).json()
    assert read_number(heading) == pytest.approx(reply["probability"], rel=1e-4)
    expect(right).to_contain_text("Its answer: truck")
    pair.page.get_by_role("button", name="Remove truck.png").click()
    expect(right.get_by_label("Photo").locator("option")).to_have_text(["ship.jpg"])
    expect(right.locator("h3")).not_to_have_attribute("data-label", "ship")


def test_comparison_follows_the_page_until_it_is_closed(pair: View) -> None:
    pair.pick_files(SHIP)
    left, right = open_comparison(pair)
    wait_for_side(left, "ship")
    pair.page.locator('.bars [data-label="bird"] button').click()
    wait_for_side(left, "bird")
    wait_for_side(right, "ship")
    pair.page.locator("#compare").get_by_role("button", name="Close").click()
    expect(pair.page.locator("#compare")).not_to_be_visible()
    expect(pair.page.locator(".compare-open")).to_be_focused()


def test_labels_of_a_network_without_activation_maps_are_compared(pair: View) -> None:
    pair.select_model("varied")
    pair.pick_files(SHIP)
    left, right = open_comparison(pair)
    for side in (left, right):
        expect(side).to_have_attribute("aria-busy", "false")
        expect(side.locator("canvas.heat")).to_be_visible()
        expect(side.locator(".features-list li")).not_to_have_count(0)


def test_one_score_for_two_labels_speaks_for_one_and_against_the_other(pair: View) -> None:
    pair.select_model("binary")
    pair.pick_files(SHIP)
    weights = pair.find_layer(pair.tensor_name("Gemm"))
    products = (
        pair.fetch_maps(weights["sources"][0]).ravel() * fetch_weights(pair, weights["tensor"], 0).ravel()
    )
    for label, sign in (("no", -1), ("yes", 1)):
        pair.page.locator(f'.bars [data-label="{label}"] button').click()
        expect(pair.page.locator("#features p")).to_contain_text(f"“{label}”")
        expected = [value for value in np.sort(sign * products)[::-1][:5] if value > 0]
        assert read_numbers(find_features(pair)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_other_label_of_the_page_is_kept_for_another_version(pair: View) -> None:
    pair.pick_files(SHIP)
    _, right = open_comparison(pair)
    pair.page.locator('.bars [data-label="bird"] button').click()
    right.get_by_label("Model").select_option("cifar10 · 3")
    wait_for_side(right, "bird")
    expect(right).to_contain_text("version 3")


@pytest.mark.parametrize("width", [320, 1366])
def test_comparison_fits_and_has_no_serious_fault(pair: View, width: int) -> None:
    pair.page.set_viewport_size({"width": width, "height": 768})
    pair.pick_files(SHIP, TRUCK)
    left, right = open_comparison(pair)
    wait_for_side(left, "ship")
    expect(right).to_have_attribute("aria-busy", "false")
    expect(pair.page.locator(".decision li").first).to_be_visible()
    assert_fits(pair.page, width)
    assert find_serious_faults(pair.page) == []
