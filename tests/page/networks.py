"""Networks like those of other tools: of many kinds of layers, of many layers, and without names."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

LABELS = ("oak", "elm", "fir", "yew", "ash")
SIDE = 32
ROW_LAYERS = ("columns", "columns.norm")
"""Layers of `build_varied_network` that work along the rows of each map, not over the maps."""


class GraphBuilder:
    """An unfinished graph; each layer reads the one before it."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, npt.NDArray[np.float32]] = {}
        self.last = "image"

    def add(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Add a layer that reads these inputs, or else the last layer."""
        node = helper.make_node(kind, [*(inputs or (self.last,))], [name], name=name, **attributes)
        self.nodes.append(node)
        self.last = name
        return name

    def add_weight(self, name: str, *shape: int, spread: float = 1.0, mean: float = 0.0) -> str:
        """Add random weights."""
        self.weights[name] = self.random.normal(mean, spread, shape).astype(np.float32)
        return name

    def add_conv(self, name: str, outputs: int, inputs: int, kernel: int, **attributes: Any) -> str:
        """Add a convolution with a bias; `inputs` are those of one group."""
        spread = 1.5 / np.sqrt(inputs * kernel * kernel)
        weight = self.add_weight(f"{name}.weight", outputs, inputs, kernel, kernel, spread=float(spread))
        bias = self.add_weight(f"{name}.bias", outputs, spread=0.1)
        return self.add("Conv", name, self.last, weight, bias, kernel_shape=[kernel, kernel], **attributes)

    def add_linear(self, name: str, outputs: int, inputs: int) -> str:
        """Add a linear layer with a bias."""
        weight = self.add_weight(f"{name}.weight", outputs, inputs, spread=float(2 / np.sqrt(inputs)))
        return self.add("Gemm", name, self.last, weight, self.add_weight(f"{name}.bias", outputs), transB=1)

    def build(self, labels: int = len(LABELS)) -> onnx.ModelProto:
        """Return the model; its last layer makes the scores of so many labels."""
        graph = helper.make_graph(
            self.nodes,
            "drawn",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])],
            [helper.make_tensor_value_info(self.last, TensorProto.FLOAT, ["N", labels])],
            [numpy_helper.from_array(value, name) for name, value in self.weights.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def build_varied_network() -> onnx.ModelProto:
    """Return a network of many kinds of layers; it takes a normalised image, float32, NCHW."""
    net = GraphBuilder()
    net.add_conv("first", 8, 3, 3, pads=[1, 1, 1, 1])
    net.add("Relu", "first.act")
    net.add("MaxPool", "first.pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])  # 16 x 16
    depthwise = net.add_conv("depth", 8, 1, 3, pads=[2, 2, 2, 2], dilations=[2, 2], group=8)
    norm = [net.add_weight(f"norm.{part}", 8, mean=1.0, spread=0.2) for part in ("scale", "shift", "mean")]
    net.weights["norm.variance"] = np.linspace(0.5, 2, 8, dtype=np.float32)
    net.add("BatchNormalization", "norm", depthwise, *norm, "norm.variance", epsilon=1e-3)
    net.add("LeakyRelu", "leaky", alpha=0.1)
    net.add("Add", "sum", "leaky", depthwise)
    net.weights |= {"low": np.array(-2, np.float32), "high": np.array(2, np.float32)}
    net.add("Clip", "clip", net.last, "low", "high")
    net.add_conv("grouped", 6, 4, 3, strides=[2, 2], pads=[1, 0, 1, 1], group=2)  # 8 x 8
    net.add("Sigmoid", "gate")
    net.add("Mul", "gated", "grouped", "gate")
    net.add("Tanh", "tanh")
    net.add("AveragePool", "mean", kernel_shape=[2, 2], strides=[2, 2])
    net.add("MatMul", "columns", net.last, net.add_weight("columns.weight", 4, 4))  # 6 maps of 4 x 4
    net.add("LayerNormalization", "columns.norm", net.last, net.add_weight("columns.scale", 4))
    net.add("Transpose", "last", perm=[0, 2, 3, 1])
    net.add("MatMul", "mix", net.last, net.add_weight("mix.weight", 6, 6))
    net.add("Add", "mixed", net.last, net.add_weight("mix.bias", 6))
    layer_norm = net.add_weight("layer.scale", 6), net.add_weight("layer.shift", 6)
    net.add("LayerNormalization", "layer.norm", net.last, *layer_norm, epsilon=1e-3)
    net.add("Transpose", "again", perm=[0, 3, 1, 2])
    net.add("Flatten", "flat", axis=1)
    net.add_linear("hidden", 12, 6 * 4 * 4)
    net.add("Elu", "hidden.act", alpha=0.5)
    net.add_linear("scores", len(LABELS), 12)
    return net.build()


def build_network_of_labels(labels: int) -> onnx.ModelProto:
    """Return a small network that tells apart many labels."""
    net = GraphBuilder(2)
    net.add_conv("conv", 12, 3, 3, pads=[1, 1, 1, 1], strides=[2, 2])
    net.add("Relu", "relu")
    net.add("GlobalAveragePool", "mean")
    net.add("Flatten", "flat", axis=1)
    net.add_linear("scores", labels, 12)
    return net.build(labels)


def build_deep_network() -> onnx.ModelProto:
    """Return a network of twelve residual blocks, whose layers the page folds, and a linear layer."""
    net = GraphBuilder(1)
    net.add_conv("stem", 4, 3, 3, pads=[1, 1, 1, 1], strides=[2, 2])
    for number in range(12):
        block_input = net.last
        net.add_conv(f"blocks.{number}.conv", 4, 4, 3, pads=[1, 1, 1, 1])
        act = net.add("Relu", f"blocks.{number}.act")
        net.add("Add", f"blocks.{number}.sum", act, block_input)
    net.add("GlobalAveragePool", "mean")
    net.add("Flatten", "flat", axis=1)
    net.add_linear("scores", len(LABELS), 4)
    return net.build()


def build_unnamed_network() -> onnx.ModelProto:
    """Return a network of inverted residual blocks as in MobileNetV2, without the names of its nodes.

    Two stages have four blocks each; a block has six layers.
    """
    net = GraphBuilder(2)
    net.weights |= {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    for stage in range(2):
        net.add_conv(f"{stage}.down", 4, 3 if stage == 0 else 4, 3, pads=[1, 1, 1, 1], strides=[2, 2])
        net.add("Clip", f"{stage}.down.act", net.last, "zero", "six")
        for block in (f"{stage}.{number}" for number in range(4)):
            block_input = net.last
            net.add_conv(f"{block}.expand", 12, 4, 1)
            net.add("Clip", f"{block}.expand.act", net.last, "zero", "six")
            net.add_conv(f"{block}.depthwise", 12, 1, 3, pads=[1, 1, 1, 1], group=12)
            net.add("Clip", f"{block}.depthwise.act", net.last, "zero", "six")
            net.add_conv(f"{block}.project", 4, 12, 1)
            net.add("Add", f"{block}.sum", net.last, block_input)
    net.add("GlobalAveragePool", "mean")
    net.add("Flatten", "flat", axis=1)
    net.add_linear("scores", len(LABELS), 4)
    model = net.build()
    for node in model.graph.node:
        node.name = ""
    return model
