"""Hostile model files, made from the small model with a valid contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.graphs import build_model


def make_external_weight(location: str) -> Callable[[Path], None]:
    """Return a writer of a model with a weight in another file at this path."""

    def write(path: Path) -> None:
        model = build_model()
        kernel = next(tensor for tensor in model.graph.initializer if tensor.name == "kernel")
        content = bytes(kernel.raw_data)
        kernel.ClearField("raw_data")
        kernel.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": "0", "length": str(len(content))}.items():
            kernel.external_data.add(key=key, value=value)
        if not location.startswith("/"):
            (path.parent / location).write_bytes(content)
        path.write_bytes(model.SerializeToString())

    return write


def write_custom_operator(path: Path) -> None:
    """Write a model with an operator from a missing library."""
    model = build_model()
    model.graph.node[3].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    path.write_bytes(model.SerializeToString())


def write_truncated(path: Path) -> None:
    """Write a truncated model."""
    content = build_model().SerializeToString()
    path.write_bytes(content[: len(content) // 2])


def write_zeros(path: Path) -> None:
    """Write a sparse file of 2 GB, which takes no disk space."""
    with path.open("wb") as file:
        file.truncate(2 << 30)


def write_endless_loop(path: Path) -> None:
    """Write a model with an endless loop."""
    model = build_model()
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["condition"], ["go_on"]),
            helper.make_node("Identity", ["value"], ["same"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("same", TensorProto.FLOAT, None),
        ],
    )
    relu = model.graph.node[4]
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "true"))
    model.graph.node.insert(5, helper.make_node("Loop", ["", "true", relu.output[0]], ["looped"], body=body))
    model.graph.node[6].input[0] = "looped"
    path.write_bytes(model.SerializeToString())


def write_huge_tensor(path: Path) -> None:
    """Write a model that computes a tensor of 128 GB, which the file does not declare."""
    model = build_model()
    relu = model.graph.node[4]
    nodes = [
        helper.make_node("Shape", [relu.output[0]], ["shape"]),
        helper.make_node("Mul", ["shape", "many"], ["large"]),
        helper.make_node("Expand", ["one_value", "large"], ["expanded"]),
        helper.make_node("ReduceMax", ["expanded", "axes"], ["largest"], keepdims=1),
        helper.make_node("Slice", ["largest", "start", "end", "axis"], ["one_row"]),
        helper.make_node("Add", [relu.output[0], "one_row"], ["fed"]),
    ]
    values: dict[str, npt.NDArray[np.generic]] = {
        "many": np.array([1 << 10, 1, 1 << 6, 1 << 8], np.int64),
        "one_value": np.array(0.0, np.float32),
        "start": np.array([0], np.int64),
        "end": np.array([1], np.int64),
        "axis": np.array([0], np.int64),
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    for place, node in enumerate(nodes, 5):
        model.graph.node.insert(place, node)
    model.graph.node[5 + len(nodes)].input[0] = "fed"
    path.write_bytes(model.SerializeToString())


def write_without_contract(path: Path) -> None:
    """Write a model without a contract."""
    model = build_model()
    del model.metadata_props[:]
    onnx.save(model, path)
