"""Layers and feature maps that the service shows are equal to those that torch computes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor, nn

from fovea.export.from_checkpoint import build_contract, export_classifier_graph
from fovea.export.model_output import embed_contract
from fovea.model.data.dataset import square_geometry
from fovea.model.evaluation import evaluate
from fovea.model.evaluation.calibration import Calibration
from fovea.model.networks.network import Net
from fovea.service.artifact.contract import Contract, Task, Training
from fovea.service.errors import BadRequest
from fovea.service.explain.cam import find_head
from fovea.service.explain.explainer import Explainer
from fovea.service.explain.heatmap import scale_to_unit
from fovea.service.explain.introspection import IntrospectedModel
from fovea.service.explain.layer_view import LayerView
from fovea.service.explain.layers import find_receptive_field
from fovea.service.explain.messages import ExplanationRequest
from fovea.service.explain.receptive_field import ReceptiveField, Span
from fovea.service.inference.pixels import Pixels
from tests.export.classifiers import build_classifier, export_foreign
from tests.export.imports import PLAN, import_graph
from tests.export.test_nets import make_net

pytestmark = pytest.mark.long

NETWORKS = [
    ("cnn", 32, Task.MULTICLASS),
    ("cnn", 32, Task.BINARY),
    ("resnet18", 32, Task.MULTILABEL),
    ("mobilenet_v2", 64, Task.MULTICLASS),
    ("resnet50", 64, Task.MULTICLASS),
]


@dataclass(frozen=True)
class NetworkCase:
    """A network and its model file."""

    net: Net
    contract: Contract
    content: bytes


@cache
def make_case(name: str, size: int, task: Task) -> NetworkCase:
    """Return the case of a network; only its gradients may be changed."""
    net = make_net(name, size, task)
    labels = tuple(f"label {number}" for number in range(net.config.labels))
    thresholds = {Task.MULTICLASS: 0, Task.BINARY: 1, Task.MULTILABEL: len(labels)}[task]
    graph = export_classifier_graph(net, task, square_geometry(size), 1.3)
    contract = build_contract(
        graph,
        lambda pixels: evaluate.compute_logits(net, torch.tensor(pixels)).numpy(),
        name=name,
        version="1",
        task=task,
        labels=labels,
        geometry=square_geometry(size),
        training=Training("noise", 0, "none", "none"),
        calibration=Calibration(1.3, (0.4,) * thresholds, ()),
    )
    return NetworkCase(net, contract, embed_contract(graph, contract))


def make_noise(size: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def encode_png(pixels: Pixels) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def record_calls(net: nn.Module, pixels: Pixels) -> list[tuple[str, nn.Module, npt.NDArray[np.float32]]]:
    """Return the output of every module, in the order of their calls."""
    records: list[tuple[str, nn.Module, npt.NDArray[np.float32]]] = []

    def make_hook(name: str) -> object:
        def record_call(module: nn.Module, _inputs: object, output: Tensor) -> None:
            records.append((name, module, output.detach().clone().numpy()))

        return record_call

    hooks = [module.register_forward_hook(make_hook(name)) for name, module in net.named_modules()]
    with torch.no_grad():
        net(torch.tensor(pixels[None]))
    for hook in hooks:
        hook.remove()
    return records


# --- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size", "task"), NETWORKS)
def test_layer_outputs_equal_torch_outputs(name: str, size: int, task: Task) -> None:
    case = make_case(name, size, task)
    introspected = IntrospectedModel(case.content, case.contract, PLAN)
    pixels = make_noise(size)
    calls = record_calls(case.net, pixels)
    leaves = [call for call in calls if not list(call[1].children())]
    compared = set()
    for layer in introspected.layers:
        candidates = find_outputs(leaves, layer)
        if not candidates:
            continue
        values = introspected.compute_output(layer.tensor, pixels)
        difference = min(float(np.abs(values - output[0]).max()) for output in candidates)
        assert difference < 1e-4, layer
        compared.add(layer.tensor)
    kinds = {layer.kind for layer in introspected.layers if layer.tensor in compared}
    assert {"Conv", "Gemm"} <= kinds
    other_layers = [layer for layer in introspected.layers if layer.tensor not in compared]
    # these are no modules: sums of residual blocks, the average, the steps to probabilities
    assert {layer.kind for layer in other_layers} <= {
        "Input", "Add", "ReduceMean", "Div", "Softmax", "Sigmoid", "Sub", "Concat",
    }  # fmt: skip


def find_outputs(
    leaves: list[tuple[str, nn.Module, npt.NDArray[np.float32]]], layer: LayerView
) -> list[npt.NDArray[np.float32]]:
    """Return the outputs of the module that gives the layer its name.

    For a convolution that is fused with its batch normalisation, they include the normalisation's output.
    """
    outputs = []
    for index, (name, module, output) in enumerate(leaves):
        if name == layer.name and output.shape[1:] == layer.shape:
            outputs.append(output)
            next_leaf = leaves[index + 1] if index + 1 < len(leaves) else None
            if isinstance(module, nn.Conv2d) and next_leaf and isinstance(next_leaf[1], nn.BatchNorm2d):
                outputs.append(next_leaf[2])
    return outputs


def test_input_layer_equals_normalised_pixels() -> None:
    case = make_case("cnn", 32, Task.MULTICLASS)
    introspected = IntrospectedModel(case.content, case.contract, PLAN)
    pixels = make_noise(32)
    with torch.no_grad():
        planes = case.net.normalize(torch.tensor(pixels[None]))[0].numpy()
    first = introspected.layers[0]
    assert first.kind == "Input"
    assert np.abs(introspected.compute_output(first.tensor, pixels) - planes).max() < 1e-5


@pytest.mark.parametrize(("name", "size"), [("cnn", 32), ("resnet18", 32)])
def test_convolution_outputs_follow_from_weights(name: str, size: int) -> None:
    """The inputs convolved with the weights, plus the bias, give the outputs."""
    case = make_case(name, size, Task.MULTICLASS)
    introspected = IntrospectedModel(case.content, case.contract, PLAN)
    pixels = make_noise(size)
    convolutions = [layer for layer in introspected.layers if layer.kind == "Conv"]
    assert len(convolutions) > 5
    for layer in convolutions:
        assert layer.window
        inputs = torch.tensor(introspected.compute_output(layer.sources[0], pixels))[None]
        weight = torch.tensor(introspected.read_weights(layer.tensor, "weight"))
        bias = (
            torch.tensor(introspected.read_weights(layer.tensor, "bias")) if "bias" in layer.weights else None
        )
        top, left, bottom, right = layer.window.padding
        padded = nn.functional.pad(inputs, (left, right, top, bottom))
        window = layer.window
        computed = nn.functional.conv2d(
            padded, weight, bias, window.stride, 0, window.dilation, layer.groups
        )[0]
        difference = np.abs(computed.numpy() - introspected.compute_output(layer.tensor, pixels)).max()
        assert difference < 1e-4 * max(1.0, float(computed.abs().max()))


@pytest.mark.parametrize(("name", "size"), [("cnn", 32), ("cnn", 64), ("resnet18", 64)])
def test_receptive_field_matches_the_gradient(name: str, size: int) -> None:
    """Only pixels inside the receptive field change a value, and pixels at its edge do."""
    case = make_case(name, size, Task.MULTICLASS)
    net = deepcopy(case.net).double()
    introspected = IntrospectedModel(case.content, case.contract, PLAN)
    layers_by_name = {
        layer.name: layer
        for layer in introspected.layers
        if layer.receptive_field and layer.kind in ("Conv", "MaxPool")
    }
    torch.manual_seed(0)
    planes = torch.rand(1, 3, size, size, dtype=torch.double, requires_grad=True)
    outputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, output, path=path: outputs.update({path: output}))
        for path, module in net.named_modules()
        if path in layers_by_name
    ]
    net.features(planes)
    checked_count = 0
    for path, output in outputs.items():
        receptive_field = layers_by_name[path].receptive_field
        assert receptive_field
        middle = (output.shape[2] // 2, output.shape[3] // 3)
        output[0, :, middle[0], middle[1]].sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        assert planes.grad is not None
        has_gradient = planes.grad.abs().sum(dim=(0, 1)) > 0
        planes.grad = None
        for axis, span in enumerate(receptive_field):
            positions = has_gradient.any(dim=1 - axis).nonzero().flatten().tolist()
            low = span.jump * middle[axis] + span.low
            high = span.jump * middle[axis] + span.high
            assert max(low, 0) <= positions[0]
            assert positions[-1] <= min(high, size - 1)
            # some maxima do not depend on an edge
            if layers_by_name[path].kind == "Conv" and checked_count < 3:
                assert (positions[0], positions[-1]) == (max(low, 0), min(high, size - 1))
        checked_count += 1
    for hook in hooks:
        hook.remove()
    assert checked_count > 5


# --- class activation maps -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size", "task"), NETWORKS)
def test_cam_equals_grad_cam(name: str, size: int, task: Task) -> None:
    """Compute Grad-CAM with torch's gradients (Selvaraju et al.), after ReLU and scaling."""
    case = make_case(name, size, task)
    explainer = Explainer(case.content, case.contract, PLAN)
    assert explainer.has_cam
    assert IntrospectedModel(case.content, case.contract, PLAN).has_cam
    pixels = make_noise(size, 3)
    planes = case.net.normalize(torch.tensor(pixels[None])).detach()
    maps = case.net.features(planes)
    maps.retain_grad()
    logits = case.net.head(maps.mean(dim=(2, 3)))
    for label in range(len(case.contract.labels)):
        score = logits[0, label] if task is not Task.BINARY else (1 if label else -1) * logits[0, 0]
        case.net.zero_grad()
        maps.grad = None
        score.backward(retain_graph=True)
        assert maps.grad is not None
        alphas = maps.grad.mean(dim=(2, 3), keepdim=True)
        expected = scale_to_unit((alphas * maps).sum(dim=1)[0].detach().numpy())
        assert np.abs(scale_to_unit(explainer.compute_class_map(pixels, label)) - expected).max() < 1e-4


def build_ending(kind: str) -> onnx.ModelProto:
    """Build a graph of a convolution and the end `kind`: NCHW, 5 logits."""
    random = np.random.default_rng(0)
    weights: dict[str, npt.NDArray[Any]] = {
        "kernel": random.normal(0, 0.4, (8, 3, 3, 3)).astype(np.float32),
        "matrix": random.normal(0, 1, (8, 5)).astype(np.float32),
        "rows": random.normal(0, 1, (5, 8)).astype(np.float32),
        "points": random.normal(0, 1, (5, 8, 1, 1)).astype(np.float32),
        "wide": random.normal(0, 0.1, (8 * 16 * 16, 5)).astype(np.float32),
        "bias": random.normal(0, 0.2, 5).astype(np.float32),
        "grouped": random.normal(0, 1, (6, 4, 1, 1)).astype(np.float32),
        "six": random.normal(0, 1, (6, 5)).astype(np.float32),
        "lined": random.normal(0, 0.3, (8 * 16, 5)).astype(np.float32),
        "flat": np.array([0, -1], np.int64),
        "in rows": np.array([0, 8, -1], np.int64),
    }
    node = helper.make_node

    def make_constant(name: str) -> onnx.NodeProto:
        return node("Constant", [], [name], value=numpy_helper.from_array(weights[name]))

    maps = [
        node("Conv", ["image", "kernel"], ["conv"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", ["conv"], ["maps"]),
    ]
    pooled_nodes = [*maps, node("GlobalAveragePool", ["maps"], ["pooled"])]
    flat = [*pooled_nodes, node("Flatten", ["pooled"], ["flat_"])]
    nodes = {
        "product and sum": [*flat, node("MatMul", ["flat_", "matrix"], ["product"]),
                            node("Add", ["product", "bias"], ["scores"])],
        "sum and product": [*flat, node("MatMul", ["flat_", "matrix"], ["product"]),
                            node("Add", ["bias", "product"], ["scores"])],
        "Gemm": [*flat, node("Gemm", ["flat_", "matrix", "bias"], ["scores"])],
        "Gemm transposed": [*flat, node("Gemm", ["flat_", "rows", "bias"], ["scores"], transB=1)],
        "convolution of points": [*pooled_nodes, node("Conv", ["pooled", "points", "bias"], ["point"]),
                                  node("Reshape", ["point", "flat"], ["scores"])],
        "maps of labels": [*maps, node("Conv", ["maps", "points", "bias"], ["own"]),
                           node("GlobalAveragePool", ["own"], ["average"]),
                           node("Flatten", ["average"], ["scores"])],
        "AveragePool": [*maps, node("AveragePool", ["maps"], ["pooled"], kernel_shape=[16, 16]),
                        node("Flatten", ["pooled"], ["flat_"]),
                        node("Gemm", ["flat_", "matrix", "bias"], ["scores"])],
        "maxima": [*maps, node("GlobalMaxPool", ["maps"], ["pooled"]), node("Flatten", ["pooled"], ["flat_"]),
                   node("Gemm", ["flat_", "matrix", "bias"], ["scores"])],
        "flattened": [*maps, node("Flatten", ["maps"], ["flat_"]),
                      node("Gemm", ["flat_", "wide", "bias"], ["scores"])],
        "two layers": [*flat, node("Gemm", ["flat_", "matrix", "bias"], ["hidden"]),
                       node("Relu", ["hidden"], ["on"]),
                       node("Gemm", ["on", "square"], ["scores"])],
        "a factor": [*flat, node("Gemm", ["flat_", "matrix", "bias"], ["scores"], alpha=-3.0)],
        "a constant": [*flat, make_constant("matrix"), node("MatMul", ["flat_", "matrix"], ["product"]),
                       make_constant("bias"), node("Add", ["bias", "product"], ["scores"])],
        "a transposed constant": [*flat, make_constant("rows"), node("Transpose", ["rows"], ["turned"]),
                                  node("MatMul", ["flat_", "turned"], ["product"]),
                                  node("Add", ["product", "bias"], ["scores"])],
        "channels last": [*maps, node("Transpose", ["maps"], ["last"], perm=[0, 2, 3, 1]),
                          node("ReduceMean", ["last"], ["flat_"], axes=[1, 2], keepdims=0),
                          node("Gemm", ["flat_", "matrix", "bias"], ["scores"])],
        "channels last, axes kept": [
            *maps, node("Transpose", ["maps"], ["last"], perm=[0, 2, 3, 1]), node("Relu", ["last"], ["on"]),
            node("ReduceMean", ["on"], ["kept"], axes=[1, 2]), node("Reshape", ["kept", "flat"], ["flat_"]),
            node("MatMul", ["flat_", "matrix"], ["product"]), node("Add", ["product", "bias"], ["scores"])],
        "tokens": [*maps, node("Reshape", ["maps", "in rows"], ["columns"]),
                   node("Transpose", ["columns"], ["tokens"], perm=[0, 2, 1]),
                   node("ReduceMean", ["tokens"], ["flat_"], axes=[1], keepdims=0),
                   node("Gemm", ["flat_", "matrix", "bias"], ["scores"])],
        "a dropout": [*maps, node("Identity", ["maps"], ["alike"]), node("Dropout", ["alike"], ["kept"]),
                      node("GlobalAveragePool", ["kept"], ["pooled"]), node("Flatten", ["pooled"], ["flat_"]),
                      node("Gemm", ["flat_", "matrix", "bias"], ["scores"])],
        "groups": [*pooled_nodes, node("Conv", ["pooled", "grouped"], ["point"], group=2),
                   node("Flatten", ["point"], ["two"]), node("Gemm", ["two", "six"], ["scores"])],
        "rounded": [*flat, node("Cast", ["flat_"], ["whole"], to=TensorProto.INT64),
                    node("Cast", ["whole"], ["again"], to=TensorProto.FLOAT),
                    node("Gemm", ["again", "matrix", "bias"], ["scores"])],
        "one axis": [*maps, node("ReduceMean", ["maps"], ["lines"], axes=[2], keepdims=0),
                     node("Flatten", ["lines"], ["flat_"]),
                     node("Gemm", ["flat_", "lined", "bias"], ["scores"])],
    }[kind]  # fmt: skip
    weights["square"] = random.normal(0, 1, (5, 5)).astype(np.float32)
    used_names = {name for graph_node in nodes for name in graph_node.input} - {
        name for graph_node in nodes for name in graph_node.output
    }
    return helper.make_model(
        helper.make_graph(
            nodes,
            "ending",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 16, 16])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 5])],
            [numpy_helper.from_array(value, name) for name, value in weights.items() if name in used_names],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


@pytest.mark.parametrize(
    "kind",
    ["product and sum", "sum and product", "Gemm", "Gemm transposed", "convolution of points",
     "maps of labels", "AveragePool", "a factor", "a dropout", "a constant", "a transposed constant",
     "channels last", "channels last, axes kept", "tokens"],
)  # fmt: skip
def test_class_map_means_follow_the_logits(kind: str, tmp_path: Path) -> None:
    """The mean of an exact map is the logit, except for the bias."""
    model = import_graph(build_ending(kind), tmp_path)
    explainer = Explainer(model.path.read_bytes(), model.contract, PLAN)
    assert explainer.has_cam
    first_image, second_image = make_noise(16, 5), make_noise(16, 6)
    logits = model.engine.compute_logits(np.stack([first_image, second_image]))
    for label in range(5):
        mean_difference = (
            explainer.compute_class_map(first_image, label).mean()
            - explainer.compute_class_map(second_image, label).mean()
        )
        assert mean_difference == pytest.approx(logits[0, label] - logits[1, label], abs=1e-4)


@pytest.mark.parametrize(
    "kind",
    ["a constant", "a transposed constant", "channels last", "channels last, axes kept", "tokens"],
)
def test_cam_equals_grad_cam_for_every_graph_end(kind: str, tmp_path: Path) -> None:
    """Each network ends in a convolution, an average and a linear layer; torch computes the expected map."""
    graph = build_ending(kind)
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    tensors |= {
        node.output[0]: node.attribute[0].t for node in graph.graph.node if node.op_type == "Constant"
    }
    weights = {name: torch.tensor(numpy_helper.to_array(tensor)) for name, tensor in tensors.items()}
    matrix = weights["matrix"] if "matrix" in weights else weights["rows"].T
    model = import_graph(graph, tmp_path)
    explainer = Explainer(model.path.read_bytes(), model.contract, PLAN)
    introspected = IntrospectedModel(model.path.read_bytes(), model.contract, PLAN)
    assert introspected.has_cam
    assert find_receptive_field(model.contract, find_head(model.contract).maps) == ReceptiveField(
        Span(1, -1, 1), Span(1, -1, 1)
    )
    pixels = make_noise(16, 5)
    planes = torch.tensor(introspected.compute_output(introspected.layers[0].tensor, pixels))[None]
    maps = nn.functional.conv2d(planes, weights["kernel"], padding=1).relu().requires_grad_()
    logits = maps.mean(dim=(2, 3)) @ matrix
    for label in range(5):
        (gradient,) = torch.autograd.grad(logits[0, label], maps, retain_graph=True)
        alphas = gradient.mean(dim=(2, 3), keepdim=True)
        expected = scale_to_unit((alphas * maps).sum(dim=1)[0].detach().numpy())
        assert np.abs(scale_to_unit(explainer.compute_class_map(pixels, label)) - expected).max() < 1e-4


def test_weights_in_constant_nodes_are_read(tmp_path: Path) -> None:
    model = import_graph(build_ending("a constant"), tmp_path)
    introspected = IntrospectedModel(model.path.read_bytes(), model.contract, PLAN)
    linear = introspected.layers[-2]
    assert (linear.kind, linear.parameters) == ("MatMul", 8 * 5 + 5)
    pixels = make_noise(16)
    inputs = introspected.compute_output(linear.sources[0], pixels).reshape(8)
    computed = introspected.read_weights(linear.tensor, "weight") @ inputs + introspected.read_weights(
        linear.tensor, "bias"
    )
    assert computed == pytest.approx(introspected.compute_output(linear.tensor, pixels), abs=1e-4)


def test_channels_last_model_has_cam(tmp_path: Path) -> None:
    model = import_graph(build_classifier(layout="nhwc"), tmp_path)
    explainer = Explainer(model.path.read_bytes(), model.contract, PLAN)
    assert explainer.has_cam


@pytest.mark.parametrize("kind", ["maxima", "flattened", "two layers", "groups", "one axis", "rounded"])
def test_other_heads_fall_back_to_occlusion_with_a_note(kind: str, tmp_path: Path) -> None:
    model = import_graph(build_ending(kind), tmp_path)
    explainer = Explainer(model.path.read_bytes(), model.contract, PLAN)
    assert not explainer.has_cam
    progress_values: list[float] = []
    explanation = explainer.explain(
        encode_png(make_noise(16)),
        ExplanationRequest(samples=64),
        lambda _: None,
        lambda step, _: progress_values.append(step.progress),
    )
    assert (explanation.method, explanation.samples) == ("occlusion", 64)
    assert explanation.note in (
        "the network does not end in an average over its last maps and one linear layer",
        "the averages of the last maps and the linear layer do not give the logits",
    )
    assert progress_values == [0.25, 0.5, 0.75, 1.0]
    with pytest.raises(BadRequest, match="no class activation map"):
        explainer.explain(
            encode_png(make_noise(16)), ExplanationRequest(method="cam"), lambda _: None, lambda *_: None
        )


def test_transformer_is_explained_by_occlusion(tmp_path: Path) -> None:
    model = import_graph(export_foreign("vit", 32), tmp_path, labels=7)
    explainer = Explainer(model.path.read_bytes(), model.contract, PLAN)
    explanation = explainer.explain(
        encode_png(make_noise(32)), ExplanationRequest(samples=32), lambda _: None, lambda *_: None
    )
    assert explanation.method == "occlusion"
    introspected = IntrospectedModel(model.path.read_bytes(), model.contract, PLAN)
    assert not introspected.has_cam
    kinds = [layer.kind for layer in introspected.layers]
    assert kinds[:2] == ["Input", "Conv"]
    assert kinds[-1] == "Softmax"
    assert kinds.count("Gelu") == 3
