"""A token-mixing network, as another tool writes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

LABELS = ("oak", "elm", "fir", "yew", "ash")


def build_token_network() -> onnx.ModelProto:
    """Return a graph that mixes tokens across positions, as an MLP-Mixer does, and prepends one token."""
    node, random = helper.make_node, np.random.default_rng(0)
    weights: dict[str, npt.NDArray[Any]] = {
        "kernel": random.normal(0, 0.4, (8, 3, 4, 4)).astype(np.float32),
        "columns": np.array([0, 8, 16], np.int64),
        "mixing": random.normal(0, 0.3, (16, 16)).astype(np.float32),
        "scale": np.ones(8, np.float32),
        "scale of rows": np.ones(16, np.float32),
        "matrix": random.normal(0, 1, (8, len(LABELS))).astype(np.float32),
    }
    nodes = [
        node("Conv", ["image", "kernel"], ["maps"], kernel_shape=[4, 4], strides=[4, 4]),
        node("Reshape", ["maps", "columns"], ["rows"]),
        node("MatMul", ["rows", "mixing"], ["mixed"]),
        node("Transpose", ["rows"], ["tokens"], perm=[0, 2, 1]),
        node("LayerNormalization", ["tokens", "scale"], ["norm"]),
        node("LayerNormalization", ["rows", "scale of rows"], ["across"]),
        node("Add", ["mixed", "across"], ["both"]),
        node("Transpose", ["both"], ["turned"], perm=[0, 2, 1]),
        node("MatMul", ["tokens", "rows"], ["scores of tokens"]),
        node("MatMul", ["scores of tokens", "norm"], ["attended"]),
        node("Sum", ["norm", "turned", "attended"], ["sum"]),
        node("ReduceMax", ["sum"], ["first"], axes=[1]),
        node("Concat", ["first", "sum"], ["all"], axis=1),
        node("ReduceMean", ["all"], ["average"], axes=[1], keepdims=0),
        node("MatMul", ["average", "matrix"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tokens",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", len(LABELS)])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
