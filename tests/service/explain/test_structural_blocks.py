"""Blocks of layers without telling names, found by the structure of the graph."""

from __future__ import annotations

from itertools import groupby

from fovea.service.explain.layer_fusion import assign_blocks
from fovea.service.explain.layer_view import LayerView


class ChainBuilder:
    """Layers in the order of computation, without names; each one reads the layer before it."""

    def __init__(self, height: int = 32) -> None:
        self.height = height
        self.layers: list[LayerView] = []
        self.add("Input")

    def add(self, kind: str, *sources: str, height: int | None = None, values: int = 0) -> str:
        """Add a layer with maps of this height, or with `values`; return its tensor."""
        self.height = height or self.height
        tensor = f"t{len(self.layers)}"
        shape = (values,) if values else (8, self.height, self.height)
        previous = [self.layers[-1].tensor] if self.layers else []
        self.layers.append(LayerView(tensor, "", kind, sources or tuple(previous), shape))
        return tensor

    def add_head(self) -> None:
        """Add an average, a linear layer and a softmax."""
        for kind, values in (("GlobalAveragePool", 8), ("Gemm", 5), ("Softmax", 5)):
            self.add(kind, values=values)

    def fold(self) -> list[tuple[str | None, str]]:
        """Return each block with the kinds of its layers."""
        groups = groupby(assign_blocks(self.layers), key=lambda layer: layer.block)
        return [(block, " ".join(layer.kind for layer in group)) for block, group in groups]


def test_residual_blocks_end_behind_their_sum() -> None:
    net = ChainBuilder()
    for kind, height in (("Conv", 16), ("Relu", 16), ("MaxPool", 8)):
        block_input = net.add(kind, height=height)
    for shortcut in (False, True):
        net.add("Conv", block_input)
        net.add("Relu")
        last = net.add("Conv")
        if shortcut:
            block_input = net.add("Conv", block_input)
        net.add("Add", last, block_input)
        block_input = net.add("Relu")
    net.add_head()
    assert net.fold() == [
        (None, "Input"),
        ("stage 1", "Conv Relu MaxPool"),
        ("block 1", "Conv Relu Conv Add Relu"),
        ("block 2", "Conv Relu Conv Conv Add Relu"),
        (None, "GlobalAveragePool Gemm Softmax"),
    ]


def test_stages_end_where_the_resolution_changes() -> None:
    net = ChainBuilder()
    for height in (30, 28):  # without padding
        net.add("Conv", height=height)
        net.add("Relu")
    net.add("MaxPool", height=14)
    net.add("Conv")
    net.add("Relu")
    net.add("Conv", height=7)
    net.add("Relu")
    net.add("Flatten", values=8 * 7 * 7)
    net.add("Gemm", values=5)
    assert net.fold() == [
        (None, "Input"),
        ("stage 1", "Conv Relu Conv Relu MaxPool"),
        ("stage 2", "Conv Relu"),
        ("stage 3", "Conv Relu"),
        (None, "Flatten Gemm"),
    ]


def test_gate_belongs_to_its_stage() -> None:
    """Squeeze and excitation: a product by one number for each map is no merge point."""
    net = ChainBuilder()
    net.add("Conv", height=16)
    maps = net.add("Relu")
    average = LayerView("average", "", "GlobalAveragePool", (maps,), (8, 1, 1))
    gate = LayerView("gate", "", "Sigmoid", ("average",), (8, 1, 1))
    net.layers += [average, gate]
    net.add("Mul", maps, "gate")
    net.add("Conv")
    net.add_head()
    assert net.fold()[1:-1] == [("stage 1", "Conv Relu GlobalAveragePool Sigmoid Mul Conv")]


def test_large_blocks_are_divided_at_their_merge_points() -> None:
    """A DenseNet: each layer reads the maps of all layers before it."""
    net = ChainBuilder()
    features = [net.add("Conv", height=16)]
    for _ in range(4):
        for kind in ("BatchNormalization", "Relu", "Conv", "Relu"):
            net.add(kind)
        features.append(net.add("Conv"))
        net.add("Concat", *features)
    net.add_head()
    layer = "BatchNormalization Relu Conv Relu Conv Concat"
    assert net.fold()[:-1] == [
        (None, "Input Conv"),
        *((f"block {number}", layer) for number in (1, 2, 3, 4)),
    ]


def test_telling_names_are_preferred() -> None:
    net = ChainBuilder()
    for number in range(4):
        for part in ("conv", "act"):
            net.add("Conv" if part == "conv" else "Relu")
            layer = net.layers.pop()
            net.layers.append(
                LayerView(layer.tensor, f"body.{number}.{part}", layer.kind, layer.sources, layer.shape)
            )
    assert [block for block, _ in net.fold()] == [None, "body"]
