"""Small float models whose answers mean something, and images for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fovea.export.layer_table import build_layer_table
from fovea.export.quantize.gate import Limits
from fovea.export.quantize.pipeline import QuantizeReport, QuantizeRequest, quantize_model
from fovea.service.artifact.contract import Contract, Coverage
from tests.graphs import build_model, read_contract, with_contract
from tests.pictures import encode_image

LABELS = ("red", "green", "blue", "grey")
_LEVELS = {"red": (200, 90, 90), "green": (90, 200, 90), "blue": (90, 90, 200), "grey": (120, 120, 120)}


def build_colour_graph(layers: int = 1) -> onnx.ModelProto:
    """Build a graph that names the strongest channel of an image.

    Each of `layers` convolutions keeps the channels and adds noise; the nodes have no names.
    """
    random = np.random.default_rng(0)
    weights: dict[str, npt.NDArray[np.generic]] = {
        "scale": np.array(1 / 255, np.float32),
        "axes": np.array([2, 3], np.int64),
        "head.bias": np.array([0, 0, 0, 1.2], np.float32),
        "temperature": np.array(0.5, np.float32),
    }
    nodes = [
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["maps_0"]),
    ]
    channels = 3
    for number in range(layers):
        kernel = random.normal(0, 0.02, (8, channels, 3, 3)).astype(np.float32)
        kernel[range(3), range(3), 1, 1] += 1
        weights[f"kernel_{number}"] = kernel
        nodes += [
            helper.make_node(
                "Conv", [f"maps_{number}", f"kernel_{number}"], [f"conv_{number}"], pads=[1, 1, 1, 1]
            ),
            helper.make_node("Relu", [f"conv_{number}"], [f"maps_{number + 1}"]),
        ]
        channels = 8
    head = np.zeros((8, 4), np.float32)
    head[range(3), range(3)] = 6
    head[:3, 3] = 2
    weights["head.weight"] = head
    nodes += [
        helper.make_node("ReduceMean", [f"maps_{layers}", "axes"], ["pooled"], keepdims=0),
        helper.make_node("Gemm", ["pooled", "head.weight", "head.bias"], ["logits"]),
        helper.make_node("Div", ["logits", "temperature"], ["softened"]),
        helper.make_node("Softmax", ["softened"], ["probabilities"], axis=1),
    ]
    return make_graph(nodes, weights)


def make_graph(
    nodes: list[onnx.NodeProto], weights: dict[str, npt.NDArray[np.generic]], opset: int = 20
) -> onnx.ModelProto:
    """Return a graph from pixels of 16 x 16 to four labels."""
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 16, 16, 3])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])
            for name in ("logits", "probabilities")
        ],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def add_version(
    graph: onnx.ModelProto, root: Path, labels: tuple[str, ...] = LABELS, **changes: object
) -> Path:
    """Write a graph with a contract as `root/colours/1`; return this folder."""
    contract = build_contract(graph, labels)
    folder = root / "colours" / "1"
    folder.mkdir(parents=True)
    onnx.save(with_contract(graph, replace(contract, **changes)), folder / "model.onnx")  # type: ignore[arg-type]  # its fields
    return folder


def build_contract(graph: onnx.ModelProto, labels: tuple[str, ...] = LABELS) -> Contract:
    """Return the contract of a graph from `make_graph`, calibrated at temperature 0.5."""
    import onnxruntime

    from fovea.service.inference.engine import decode_golden_pixels

    contract = read_contract(build_model(labels=labels))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    images = tuple(
        replace(
            image,
            logits=tuple(
                map(float, session.run(["logits"], {"pixels": decode_golden_pixels(image)[None]})[0][0])
            ),
        )
        for image in contract.golden.images
    )
    return replace(
        contract,
        name="colours",
        temperature=0.5,
        coverage=(Coverage(0.9, 0.5),),
        layers=build_layer_table(graph),
        feature_maps=("conv_0",),
        reference=None,
        golden=replace(contract.golden, images=images),
    )


def draw_images(folder: Path, count: int, labels: tuple[str, ...] = LABELS) -> Path:
    """Write `count` noisy images of each label into sub-folders."""
    random = np.random.default_rng(1)
    for label, levels in zip(labels, _LEVELS.values(), strict=True):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            tint = np.array(levels) + random.integers(-50, 51, 3)
            values = tint + random.integers(-20, 21, (16, 16, 3))
            picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
            (folder / label / f"{number:03}.png").write_bytes(encode_image(picture, "PNG"))
    return folder


def make_request(model: Path, images: Path, **changes: object) -> QuantizeRequest:
    """Return a request that does not ask for speed: a tiny graph is not faster in int8."""
    request = QuantizeRequest(
        model=model,
        images=images,
        calibration_images=20,
        limits=Limits(0.02, 0.0),
        is_unlabelled=False,
        is_reduced=False,
        is_float16=False,
        command="fovea quantize",
    )
    return replace(request, **changes)  # type: ignore[arg-type]  # its fields


def quantize_quietly(request: QuantizeRequest) -> tuple[QuantizeReport, Path, list[str]]:
    """Return the report, the new folder, and the lines of progress."""
    lines: list[str] = []
    report, folder = quantize_model(request, lines.append)
    return report, folder, lines
