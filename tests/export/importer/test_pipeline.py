"""Imported classifiers give the same probabilities as the pipelines of their users."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from PIL import Image

from fovea.export.golden import LOGIT_TOLERANCE
from fovea.export.importer.foreign_model import Arithmetic
from fovea.export.importer.inspect import TOLERANCE
from fovea.export.importer.preprocessing import (
    INCEPTION,
    ZERO_ONE,
    PreprocessingOptions,
)
from fovea.service.artifact.contract import (
    MAX_GOLDEN_PIXELS,
    Geometry,
    Interpolation,
    PixelPath,
    Training,
)
from fovea.service.artifact.geometry import MAX_SIDE
from fovea.service.inference.preprocess import decode_image
from tests.export.classifiers import (
    Array,
    GraphEnd,
    build_classifier,
    export_foreign,
    export_torchscript,
    make_network,
    prepare_imagenet,
    resize_and_crop,
    run_onnx,
    softmax,
)
from tests.export.imports import ImportedModel, import_graph, make_labels
from tests.pictures import draw_picture, encode_image, make_jpeg

IMAGES = [
    make_jpeg(90, 70, 1, quality=90),
    make_jpeg(400, 300, 2, subsampling=2),
    encode_image(draw_picture(61, 130, 3), "PNG"),
    encode_image(draw_picture(20, 20, 4), "PNG"),
]
"""Images larger and smaller than the inputs, in portrait and landscape format."""


def find_largest_difference(
    model: ImportedModel, expected: list[Array], images: list[bytes] = IMAGES
) -> float:
    """Return the largest difference of a probability, also with all images in one batch."""
    single_difference = max(
        float(np.abs(model(image) - row).max()) for image, row in zip(images, expected, strict=True)
    )
    batch_output = model.engine.run(np.stack([model.pixels(image) for image in images]))
    return max(single_difference, float(np.abs(batch_output - np.concatenate(expected)).max()))


# --- networks as torch exports them --------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 96), ("resnet50", 96), ("mobilenet_v2", 96), ("vit", 64)]
)
def test_network_agrees_with_the_handwritten_pipeline(tmp_path: Path, name: str, size: int) -> None:
    graph = export_foreign(name, size)
    resize = round(size * 256 / 224)
    model = import_graph(graph, tmp_path, 7)
    assert model.contract.input == Geometry.cropped(
        size, size, resize, Interpolation.BILINEAR, PixelPath.EXACT
    )
    expected = [softmax(run_onnx(graph, prepare_imagenet(image, resize, size))) for image in IMAGES]
    assert np.ptp(np.concatenate(expected), axis=0).max() > 0.1  # the images get different answers
    assert find_largest_difference(model, expected) <= 1e-5
    assert model.engine.check_golden_set().images == 8


@pytest.mark.long
def test_fast_path_changes_probabilities_only_slightly(tmp_path: Path) -> None:
    """The tolerance is for photographs that are decoded at a smaller scale."""
    model = import_graph(export_foreign("resnet18", 96), tmp_path, 7)
    fast = replace(model.contract.input, pixel_path=PixelPath.FAST)
    images = [make_jpeg(1600, 1200, seed, quality=90) for seed in range(3)]
    fast_pixels = [decode_image(image, fast, max_pixels=10_000_000).pixels for image in images]
    difference = max(
        float(np.abs(model.engine.run(image_pixels[None]) - model(image)).max())
        for image_pixels, image in zip(fast_pixels, images, strict=True)
    )
    print(f"fast changes a probability by {difference:.2g} at most")
    assert 0 < difference < 0.05


@pytest.mark.long
def test_transformer_feature_maps_are_its_patches(tmp_path: Path) -> None:
    """Tokens and attention have three axes too, but are not feature maps."""
    model = import_graph(export_foreign("vit"), tmp_path, 7)
    layers = {layer.outputs[0]: layer for layer in model.contract.layers}
    assert [layers[name].kind for name in model.contract.feature_maps] == ["Conv"]
    assert layers[model.contract.feature_maps[0]].shape == (48, 4, 4)
    assert any(layer.kind == "Softmax" and len(layer.shape) == 3 for layer in model.contract.layers)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("vit", 1),
        ("vit", 2),
        ("vit_of_torch", 1),
    ],
)
def test_fixed_batch_network_takes_any_batch_size(tmp_path: Path, name: str, batch: int) -> None:
    graph = export_foreign(name, batch=batch)
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value == batch
    model = import_graph(graph, tmp_path, 7)
    assert (
        model.facts["batch"] == f"any size (the file says {batch}; made dynamic and verified at 1, 2 and 3)"
    )
    assert model.engine.batch_limit is None
    assert (
        find_largest_difference(
            model,
            [softmax(run_onnx(export_foreign(name), prepare_imagenet(image, 73, 64))) for image in IMAGES],
        )
        <= 1e-5
    )


@pytest.mark.parametrize("name", ["vit", "vit_of_torch"])
def test_torchscript_network_takes_any_batch_size(tmp_path: Path, name: str) -> None:
    """The graph computes the shape of the class token from constants."""
    graph = export_torchscript(make_network(name, 64, 7), 64)
    model = import_graph(graph, tmp_path, 7)
    assert model.engine.batch_limit is None
    assert (
        find_largest_difference(
            model, [softmax(run_onnx(graph, prepare_imagenet(image, 73, 64))) for image in IMAGES]
        )
        <= 1e-5
    )


# --- graph inputs --------------------------------------------------------------------------------


def test_uint8_graphs_keep_their_own_normalisation(tmp_path: Path) -> None:
    for layout in ("nchw", "nhwc"):
        graph = build_classifier(layout=layout, dtype="uint8")
        model = import_graph(graph, tmp_path, preprocessing=PreprocessingOptions(preset=ZERO_ONE))
        axes = (0, 3, 1, 2) if layout == "nchw" else (0, 1, 2, 3)
        expected = [
            softmax(
                run_onnx(
                    graph,
                    resize_and_crop(image, 16, 16, Image.Resampling.BILINEAR)
                    .astype(np.uint8)
                    .transpose(axes),
                )
            )
            for image in IMAGES
        ]
        assert find_largest_difference(model, expected) <= 1e-6
        assert "the graph normalises them itself" in model.facts["normalise"]


@pytest.mark.parametrize("end", ["logits", "softmax", "hidden_softmax"])
def test_float16_graphs_agree_within_float16_tolerance(tmp_path: Path, end: GraphEnd) -> None:
    graph = build_classifier(dtype="float16", end=end)
    model = import_graph(graph, tmp_path)
    expected = []
    for image in IMAGES:
        output = run_onnx(graph, prepare_imagenet(image, 18, 16).astype(np.float16))
        expected.append(softmax(output) if end == "logits" else output)
    assert find_largest_difference(model, expected) <= TOLERANCE[Arithmetic.FLOAT16]
    assert model.contract.golden.logit_tolerance["cpu/float32"] >= 5e-2
    assert "float16" in model.facts["input"]


def build_rounded_graph(kind: str) -> onnx.ModelProto:
    """Build a float32 graph with a rounding to float16, or to one of 256 levels, inside."""
    graph = build_classifier()
    pool = next(node for node in graph.graph.node if node.op_type == "GlobalAveragePool")
    last, nodes = pool.output[0], []
    if kind == "float16":
        constant = onnx.numpy_helper.from_array(np.array(1, np.float16), "half")
        graph.graph.initializer.append(constant)
        nodes = [
            helper.make_node("Cast", ["exact"], ["rounded"], to=onnx.TensorProto.FLOAT16),
            helper.make_node("Mul", ["rounded", "half"], ["times"]),
            helper.make_node("Cast", ["times"], [last], to=onnx.TensorProto.FLOAT),
        ]
    else:
        for name, value in (("level", np.array(1 / 64, np.float32)), ("zero", np.array(0, np.uint8))):
            graph.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        nodes = [
            helper.make_node("QuantizeLinear", ["exact", "level", "zero"], ["levels"]),
            helper.make_node("DequantizeLinear", ["levels", "level", "zero"], [last]),
        ]
    pool.output[0] = "exact"
    index = list(graph.graph.node).index(pool) + 1
    for node in reversed(nodes):
        graph.graph.node.insert(index, node)
    return graph


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_coarse_arithmetic_inside_the_graph_is_detected(tmp_path: Path, kind: str) -> None:
    graph = build_rounded_graph(kind)
    model = import_graph(graph, tmp_path)
    assert model.facts["arithmetic"] == kind
    tolerance = model.contract.golden.logit_tolerance
    assert tolerance["cpu/float32"] >= 5e-2
    assert ("openvino/float32" in tolerance) == (kind == "int8")
    expected = [softmax(run_onnx(graph, prepare_imagenet(image, 18, 16))) for image in IMAGES]
    assert find_largest_difference(model, expected) <= TOLERANCE[Arithmetic(kind)]


def test_golden_tolerance_grows_with_the_logits(tmp_path: Path) -> None:
    small = import_graph(build_classifier(spread=0.1), tmp_path).contract.golden
    assert small.logit_tolerance == LOGIT_TOLERANCE
    large = import_graph(build_classifier(spread=300), tmp_path).contract.golden
    highest = max(abs(logit) for image in large.images for logit in image.logits)
    assert highest > 20
    assert large.logit_tolerance["cpu/float32"] == pytest.approx(1e-4 * highest)


def test_graph_of_any_size_is_served_at_the_size_option(tmp_path: Path) -> None:
    graph = build_classifier(size=None)
    model = import_graph(graph, tmp_path, size=(24, 32))
    assert (model.contract.input.height, model.contract.input.width) == (24, 32)
    conv = next(layer for layer in model.contract.layers if layer.kind == "Conv")
    assert conv.shape == (8, 24, 32)
    assert model.engine.run(np.zeros((2, 24, 32, 3), np.uint8)).shape == (2, 5)


@pytest.mark.parametrize(("opset", "ir_version"), [(7, 3), (8, 3), (11, 6), (12, 7), (20, 9)])
def test_old_and_new_onnx_versions_are_imported(tmp_path: Path, opset: int, ir_version: int) -> None:
    """The oldest graphs list all weights as inputs too."""
    graph = build_classifier(opset=opset, ir_version=ir_version, end="softmax")
    assert (len(graph.graph.input) == 1) == (ir_version > 3)
    model = import_graph(graph, tmp_path)
    assert (
        find_largest_difference(model, [run_onnx(graph, prepare_imagenet(image, 18, 16)) for image in IMAGES])
        <= 1e-5
    )
    assert len(onnx.load(model.path).graph.input) == 1


def test_names_used_by_the_graph_are_avoided(tmp_path: Path) -> None:
    graph = build_classifier(names=("pixels", "logits"))
    model = import_graph(graph, tmp_path)
    assert model.contract.input_name == "fovea/pixels"
    assert model.contract.logits_name == "fovea/logits"
    assert model.contract.probabilities_name == "probabilities"
    assert (
        find_largest_difference(
            model, [softmax(run_onnx(graph, prepare_imagenet(image, 18, 16))) for image in IMAGES]
        )
        <= 1e-5
    )
    added_layers = [
        layer for layer in model.contract.layers if layer.name not in {node.name for node in graph.graph.node}
    ]
    assert all(layer.name.startswith("fovea/") for layer in added_layers)


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("shape", [(None, 8), (None, -1)])
def test_batch_size_in_a_reshape_is_made_dynamic(
    tmp_path: Path, batch: int, shape: tuple[int | None, int]
) -> None:
    graph = build_classifier(batch=batch, shape=[batch if side is None else side for side in shape])
    model = import_graph(graph, tmp_path)
    assert f"the file says {batch}; made dynamic" in model.facts["batch"]
    assert model.engine.batch_limit is None
    expected = [
        softmax(run_onnx(graph, np.repeat(prepare_imagenet(image, 18, 16), batch, axis=0))[:1])
        for image in IMAGES
    ]
    assert find_largest_difference(model, expected) <= 1e-5


def test_hidden_batch_size_is_made_dynamic(tmp_path: Path) -> None:
    """The input has any batch size, but the constants are for one image."""
    graph = build_classifier(batch="N", shape=[1, 8])
    model = import_graph(graph, tmp_path)
    assert model.engine.batch_limit is None
    assert (
        find_largest_difference(
            model, [softmax(run_onnx(graph, prepare_imagenet(image, 18, 16))) for image in IMAGES]
        )
        <= 1e-5
    )


def build_batch_mean(batch: int | str) -> onnx.ModelProto:
    """Build a graph whose mean includes the batch axis, which no constant shows."""
    graph = build_classifier(batch=batch)
    (pool,) = [node for node in graph.graph.node if node.op_type == "GlobalAveragePool"]
    pool.CopyFrom(helper.make_node("ReduceMean", pool.input, pool.output, axes=[0, 2, 3], keepdims=1))
    return graph


@pytest.mark.parametrize("batch", [1, "N"])
def test_graph_with_a_batch_mean_runs_one_image_at_a_time(tmp_path: Path, batch: int | str) -> None:
    graph = build_batch_mean(batch)
    model = import_graph(graph, tmp_path)
    assert model.facts["batch"].startswith("1 (")
    assert "images run one after the other" in model.facts["batch"]
    assert model.engine.batch_limit == 1
    assert (
        find_largest_difference(
            model, [softmax(run_onnx(graph, prepare_imagenet(image, 18, 16))) for image in IMAGES]
        )
        <= 1e-5
    )


# --- the model file ------------------------------------------------------------------------------


def test_contract_describes_the_import(tmp_path: Path) -> None:
    model = import_graph(build_classifier(), tmp_path, command="fovea import foreign.onnx --preset imagenet")
    contract, report = model.contract, model.report
    assert (contract.name, contract.version, contract.labels) == ("thing", "1", tuple(make_labels(5)))
    assert (contract.temperature, contract.coverage, contract.thresholds) == (1.0, (), ())
    assert (contract.accuracy, contract.reference) == (None, None)
    assert contract.training == Training(
        "imported: foreign.onnx", 0, f"sha256:{report.sha256}", "fovea import foreign.onnx --preset imagenet"
    )
    assert [layer.kind for layer in contract.layers][:3] == ["Transpose", "Cast", "BatchNormalization"]
    assert contract.layers[-1].kind == "Softmax"
    assert len(contract.feature_maps) == 3  # convolution, its ReLU, and their mean
    onnx.checker.check_model(onnx.load(model.path))


def test_report_is_written_beside_the_model(tmp_path: Path) -> None:
    model = import_graph(build_classifier(), tmp_path)
    report = json.loads((model.path.parent / "report.json").read_text())
    assert report == json.loads(json.dumps(asdict(model.report)))
    assert [agreement["batch"] for agreement in report["agreement"]] == [1, 2, 3]
    assert all(agreement["probabilities"] <= 1e-5 for agreement in report["agreement"])
    assert report["parameters"] == 8 * 3 * 9 + 8 * 5 + 5
    assert sorted(path.name for path in model.path.parent.iterdir()) == [
        "README.md",
        "model.onnx",
        "report.json",
    ]


def test_next_version_number_is_used(tmp_path: Path) -> None:
    assert import_graph(build_classifier(), tmp_path).report.version == "1"
    (tmp_path / "zoo" / "thing" / "9").mkdir()
    (tmp_path / "zoo" / "thing" / "notes").mkdir()
    assert import_graph(build_classifier(), tmp_path).report.version == "10"


@pytest.mark.long
def test_golden_set_of_a_large_input_is_within_its_limit(tmp_path: Path) -> None:
    """The input of 512 pixels, with a resize to 585, is larger than that of any of Fovea's networks."""
    model = import_graph(build_classifier(size=512), tmp_path)
    assert model.contract.input.longest_resize_side == 585
    assert model.engine.check_golden_set().images == 8
    assert 2 * MAX_SIDE**2 <= MAX_GOLDEN_PIXELS  # the largest is twice as wide as high


def test_model_file_contains_the_whole_preset(tmp_path: Path) -> None:
    """The file in plain ONNX Runtime is the whole pipeline except for the resize."""
    graph = build_classifier(layout="nhwc")
    model = import_graph(graph, tmp_path, preprocessing=PreprocessingOptions(preset=INCEPTION))
    session = onnxruntime.InferenceSession(model.path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    (probabilities,) = session.run(["probabilities"], {"pixels": pixels})
    expected = softmax(run_onnx(graph, (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)))
    assert np.abs(probabilities - expected).max() <= 1e-6
