"""The last layers of networks as other tools export them: each shows its arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from playwright.sync_api import Page, expect
from torch import nn

from tests.export.classifiers import export_network, export_torchscript
from tests.export.imports import import_graph
from tests.export.test_input_colours import NO_NORMALISATION
from tests.export.test_linear_inputs import CHANNELS, SIDE, ClassToken, linear
from tests.page.networks import LABELS, GraphBuilder
from tests.page.test_layers import assert_adds_up
from tests.page.views import SHIP, View, read_number, read_numbers
from tests.servers import Server
from tests.tools import require_tool

pytestmark = pytest.mark.long


def make_network(*head: nn.Module) -> nn.Module:
    """Return a network that ends in these modules, in evaluation mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.ReLU(), *head).eval()


def build_channels_last_flatten() -> GraphBuilder:
    """Return a network as Keras has it: maps with channels last are flattened, and a bias is (1, labels)."""
    net = GraphBuilder()
    net.add_conv("conv", CHANNELS, 3, 3, strides=[2, 2], pads=[1, 1, 1, 1])
    net.add("Relu", "relu")
    net.add("MaxPool", "pool", kernel_shape=[4, 4], strides=[4, 4])  # 4 x 4
    net.add("Transpose", "last", perm=[0, 2, 3, 1])
    net.add("Flatten", "flat", axis=1)
    net.add("MatMul", "product", net.last, net.add_weight("dense.weight", 16 * CHANNELS, len(LABELS)))
    net.add("Add", "scores", net.last, net.add_weight("dense.bias", 1, len(LABELS)))
    return net


@pytest.fixture(scope="module")
def head_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service of four networks, named by their heads and exporters."""
    require_tool("chromium")  # before anything slow
    pool = make_network(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear())
    graphs = {
        "pool-dynamo": export_network(pool, SIDE),
        "pool-torchscript": export_torchscript(pool, SIDE),
        "class-token": export_torchscript(make_network(ClassToken(), linear()), SIDE),
        "channels-last": build_channels_last_flatten().build(),
    }
    root = tmp_path_factory.mktemp("heads")
    for name, graph in graphs.items():
        preprocessing = NO_NORMALISATION if name == "channels-last" else None
        model = import_graph(graph, tmp_path_factory.mktemp(name), LABELS, preprocessing)
        model.path.parents[1].rename(root / name)
    (root / "default").write_text("pool-dynamo\n")
    with Server(FOVEA_MODELS=str(root)) as server:
        yield server


@pytest.mark.parametrize("model", ["pool-dynamo", "pool-torchscript", "class-token", "channels-last"])
def test_linear_layer_of_each_head_adds_up(page: Page, head_server: Server, model: str) -> None:
    view = View(page, head_server)
    view.open()
    view.select_model(model)
    view.pick_files(SHIP)
    linear_layer = [layer for layer in view.fetch_layers() if "weight" in layer["weights"]][-1]
    detail = view.inspect_map(linear_layer["tensor"], 3)
    expect(detail.locator(".ranking tbody tr .bar")).not_to_have_count(0)
    assert_adds_up(view, detail, linear_layer["tensor"], 3)
    terms = detail.locator(".terms .term")
    if model != "channels-last":
        expect(terms).to_have_count(0)  # no maps with places were flattened
        return
    expect(terms).to_have_count(CHANNELS)
    products = read_number(detail.locator(".equation .summand").first)
    assert sum(read_numbers(terms)) == pytest.approx(products, abs=1e-4)


def test_flatten_of_channels_last_shows_where_a_value_comes_from(page: Page, head_server: Server) -> None:
    view = View(page, head_server)
    view.open()
    view.select_model("channels-last")
    view.pick_files(SHIP)
    tensor = view.tensor_name("Flatten")
    detail = view.inspect_map(tensor, 7)
    expect(detail).to_contain_text("place = row · 24 + column · 6 + map")
    expect(detail).to_contain_text("Value 8 is that of map 2 in row 0, column 1.")
    assert_adds_up(view, detail, tensor, 7)
    pooled_value = float(view.fetch_maps(view.tensor_name("MaxPool"))[1, 0, 1])
    assert read_number(detail.locator(".equation"), "total") == pytest.approx(pooled_value, abs=1e-5)
    view.column(tensor).locator(".map").nth(7).hover()
    edges = view.page.locator(".edges .strong").get_attribute("d") or ""
    assert edges.count("M") == 1 + len(LABELS)  # from one map, and to all scores


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("pool-dynamo", "so that they lie around zero, from −2.12 to 2.64; blue is below"),
        ("channels-last", "They are not shifted to lie around zero: they go from 0 to 1,"),
    ],
)
def test_lesson_of_the_input_says_what_the_network_reads(
    page: Page, head_server: Server, model: str, sentence: str
) -> None:
    view = View(page, head_server)
    view.open()
    view.select_model(model)
    view.pick_files(SHIP)
    column = view.column(view.fetch_layers()[0]["tensor"])
    expect(column.locator(".map")).to_have_text(["red", "green", "blue"])
    column.locator(".map").nth(2).click()
    expect(view.detail.locator("h3")).to_contain_text("blue, map 3 of 3")
    lesson = page.locator("#lens .words")
    expect(lesson).to_contain_text("one map each for red, green and blue.")
    expect(lesson).to_contain_text(sentence)
    terms = view.inspect_map(view.tensor_name("Conv")).locator(".terms figcaption")
    expect(terms.first).to_have_text("red")
