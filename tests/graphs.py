"""Small real models for the tests: a convolution and a head, built in milliseconds with `onnx.helper`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from fovea.export import golden
from fovea.export.layer_table import build_layer_table, find_feature_maps
from fovea.service.artifact.contract import (
    FORMAT_VERSION,
    METADATA_KEY,
    Accuracy,
    Contract,
    Coverage,
    DriftReference,
    Geometry,
    GoldenSet,
    Histogram,
    Interpolation,
    KnownScore,
    Layer,
    PixelPath,
    Task,
    Training,
)
from fovea.service.inference.pixels import Pixels

COVERAGE = (Coverage(0.5, 0.25), Coverage(0.9, 0.95), Coverage(0.95, 0.999999))
"""Coverage sets for random weights, which give very certain answers: the last has two or three labels."""

SMALL_GEOMETRY = Geometry.cropped(16, 16, 16, Interpolation.BILINEAR, PixelPath.FAST)


def build_model(
    task: Task = Task.MULTICLASS,
    labels: Sequence[str] = ("ant", "bee", "cow", "dog"),
    geometry: Geometry = SMALL_GEOMETRY,
    seed: int = 0,
    known: KnownScore | None = None,
) -> onnx.ModelProto:
    """Return a graph of seven nodes with random weights, and its contract."""
    graph = _build_graph(task, 1 if task is Task.BINARY else len(labels), geometry, seed)
    layers = build_layer_table(graph)
    contract = Contract(
        format=FORMAT_VERSION,
        name="small",
        version="1",
        task=task,
        labels=tuple(labels),
        input_name="pixels",
        input=geometry,
        logits_name="logits",
        probabilities_name="probabilities",
        feature_maps=find_feature_maps(layers),
        thresholds={Task.MULTICLASS: (), Task.BINARY: (0.5,), Task.MULTILABEL: (0.5,) * len(labels)}[task],
        temperature=1.0,
        coverage=() if task is Task.MULTILABEL else COVERAGE,
        training=Training("random weights", 0, "none", "none"),
        accuracy=Accuracy("nothing", 1, 0.25, None),
        reference=DriftReference(
            10, {labels[0]: 6, labels[1]: 3}, Histogram((0.5,), (4, 6)), Histogram((0.2, 0.6), (1, 8, 1))
        ),
        known=known,
        quantization=None,
        layers=layers,
        golden=GoldenSet(
            dict(golden.LOGIT_TOLERANCE), golden.draw_golden_images(geometry, _SessionLogits(graph))
        ),
    )
    return with_contract(graph, contract)


def with_contract(graph: onnx.ModelProto, contract: Contract) -> onnx.ModelProto:
    """Return a copy of `graph` whose only metadata is `contract`."""
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA_KEY, value=contract.to_json())
    return model


def build_unopenable() -> onnx.ModelProto:
    """Return a graph whose layers cannot be shown: its layer table names a missing tensor."""
    model = build_model()
    contract = read_contract(model)
    layers = tuple(
        replace(layer, outputs=("nothing",)) if layer.kind == "Relu" else layer for layer in contract.layers
    )
    return with_contract(model, replace(contract, layers=layers))


def build_without_embedding_tensor() -> onnx.ModelProto:
    """Return a graph whose layer table names an embedding that the graph does not have."""
    model = build_model()
    contract = read_contract(model)

    def rename(tensors: tuple[str, ...]) -> tuple[str, ...]:
        return tuple("missing" if tensor == "pooled" else tensor for tensor in tensors)

    layers = tuple(
        replace(layer, inputs=rename(layer.inputs), outputs=rename(layer.outputs))
        for layer in contract.layers
    )
    return with_contract(model, replace(contract, layers=layers))


def build_float16_head() -> onnx.ModelProto:
    """Return a graph that computes its head, and so its embedding, in float16."""
    model = build_model()
    nodes = {node.output[0]: node for node in model.graph.node}
    nodes["pooled"].output[0] = "pooled32"
    nodes["logits"].output[0] = "logits16"
    for tensor in model.graph.initializer:
        if tensor.name.startswith("head."):
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    for before, cast in (
        ("logits", helper.make_node("Cast", ["pooled32"], ["pooled"], to=TensorProto.FLOAT16)),
        ("probabilities", helper.make_node("Cast", ["logits16"], ["logits"], to=TensorProto.FLOAT)),
    ):
        model.graph.node.insert(list(model.graph.node).index(nodes[before]), cast)
    contract = read_contract(model)
    images = golden.draw_golden_images(contract.input, _SessionLogits(model))
    return with_contract(
        model,
        replace(
            contract,
            layers=build_layer_table(model),
            golden=GoldenSet(dict(golden.LOGIT_TOLERANCE), images),
        ),
    )


def build_nan_for_black() -> onnx.ModelProto:
    """Return the same graph with NaN as the answer to black images (log(0) times 0)."""
    model = build_model()
    nodes = list(model.graph.node)
    index = next(number for number, node in enumerate(nodes) if "logits" in node.output)
    nodes[index].output[0] = "unmarred"
    nodes[index + 1 : index + 1] = [
        helper.make_node("ReduceMean", ["floats", "all_axes"], ["brightness"], keepdims=1),
        helper.make_node("Squeeze", ["brightness", "axes"], ["brightness_of_each"]),
        helper.make_node("Log", ["brightness_of_each"], ["logarithm"]),
        helper.make_node("Mul", ["logarithm", "zero"], ["nothing"]),
        helper.make_node("Add", ["unmarred", "nothing"], ["logits"]),
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for name, values in (("all_axes", np.array([1, 2, 3], np.int64)), ("zero", np.array(0, np.float32))):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def read_contract(model: onnx.ModelProto) -> Contract:
    """Return the contract inside a model."""
    return Contract.from_metadata({entry.key: entry.value for entry in model.metadata_props})


LayerRow = tuple[str, str, str, tuple[int | None, ...], dict[str, Any]]
"""A layer: its kind, inputs, output, output shape and attributes."""


def contract_with_layers(*rows: LayerRow) -> Contract:
    """Return a contract with this layer table for images of 16 x 16, without a graph."""
    layers = tuple(
        Layer(output, kind, tuple(inputs.split()), (output,), shape, attributes, 0)
        for kind, inputs, output, shape, attributes in rows
    )
    return replace(read_contract(build_model()), layers=layers)


def add_to_repository(model: onnx.ModelProto, root: Path, name: str = "small", version: str = "1") -> Path:
    """Write a model into a repository; return the root."""
    contract = replace(read_contract(model), name=name, version=version)
    folder = root / name / version
    folder.mkdir(parents=True)
    onnx.save(with_contract(model, contract), folder / "model.onnx")
    return root


def _build_graph(task: Task, logit_count: int, geometry: Geometry, seed: int) -> onnx.ModelProto:
    random = np.random.default_rng(seed)
    weights: dict[str, npt.NDArray[np.generic]] = {
        "scale": np.array(1 / 64, np.float32),
        "kernel": random.normal(0, 1, (8, 3, 3, 3)).astype(np.float32),
        "head.weight": random.normal(0, 1, (8, logit_count)).astype(np.float32),
        "head.bias": random.normal(0, 1, logit_count).astype(np.float32),
        "axes": np.array([2, 3], np.int64),
    }
    nodes = [
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "kernel"], ["conv"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("ReduceMean", ["relu", "axes"], ["pooled"], keepdims=0),
        helper.make_node("Gemm", ["pooled", "head.weight", "head.bias"], ["logits"]),
    ]
    if task is Task.MULTICLASS:
        nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1))
    elif task is Task.MULTILABEL:
        nodes.append(helper.make_node("Sigmoid", ["logits"], ["probabilities"]))
    else:
        weights["one"] = np.array(1, np.float32)
        nodes += [
            helper.make_node("Sigmoid", ["logits"], ["positive"]),
            helper.make_node("Sub", ["one", "positive"], ["negative"]),
            helper.make_node("Concat", ["negative", "positive"], ["probabilities"], axis=1),
        ]
    shape: list[str | int | None] = ["batch", geometry.height, geometry.width, 3]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, shape)],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", logit_count]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", max(logit_count, 2)]),
        ],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


class _SessionLogits:
    """Compute logits with a plain ONNX Runtime session."""

    def __init__(self, graph: onnx.ModelProto) -> None:
        self._session = onnxruntime.InferenceSession(graph.SerializeToString())

    def __call__(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = self._session.run(["logits"], {"pixels": pixels})[0]
        return logits
