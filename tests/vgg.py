"""A VGG-like network with a flatten and two linear layers, as other tools write it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 24
LABELS = ("cat", "dog", "owl", "fox")


def build_vgg(*, auto_pad: bool = False) -> onnx.ModelProto:
    """Return a graph from float32 (N, 3, 24, 24) to 4 logits.

    Two blocks of two convolutions and a pool are followed by linear layers of 32 and 4 values.
    """
    random = np.random.default_rng(7)
    weights: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {}
    nodes: list[onnx.NodeProto] = []

    def add_layer(kind: str, source: str, *shapes: tuple[int, ...], **attributes: Any) -> str:
        name = f"{kind.lower()}{len(nodes)}"
        names = [f"{name}.{part}" for part, _ in zip(("weight", "bias"), shapes, strict=False)]
        for weight_name, shape in zip(names, shapes, strict=True):
            scale = (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1
            weights[weight_name] = random.normal(0, scale, shape).astype(np.float32)
        nodes.append(helper.make_node(kind, [source, *names], [name], name, **attributes))
        return name

    padding: dict[str, Any] = {"auto_pad": "SAME_UPPER"} if auto_pad else {"pads": [1, 1, 1, 1]}
    last, channels = "image", 3
    for width in (8, 12):
        for _ in range(2):
            conv = add_layer("Conv", last, (width, channels, 3, 3), (width,), kernel_shape=[3, 3], **padding)
            last, channels = add_layer("Relu", conv), width
        last = add_layer("MaxPool", last, kernel_shape=[2, 2], strides=[2, 2])
    flat = add_layer("Flatten", last, axis=1)
    hidden = add_layer("Relu", add_layer("Gemm", flat, (32, 12 * 6 * 6), (32,), transB=1))
    scores = add_layer("Gemm", hidden, (4, 32), (4,), transB=1)
    graph = helper.make_graph(
        nodes,
        "vgg",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info(scores, TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
