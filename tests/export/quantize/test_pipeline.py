"""Quantization of small models: what is written, and what is proven."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from fovea.export.quantize import pipeline
from fovea.export.quantize.candidate import GraphRunner
from fovea.export.quantize.gate import Limits
from fovea.export.quantize.images import load_images
from fovea.export.quantize.refusal import QuantizeRefused
from fovea.model.evaluation.metrics import reliability_bins
from fovea.model.evaluation.scores import calibration_error
from fovea.service.artifact import new_version
from fovea.service.artifact.contract import Contract, Precision
from fovea.service.errors import GoldenError
from fovea.service.explain.explainer import Explainer
from fovea.service.explain.introspection import IntrospectedModel
from fovea.service.explain.messages import ExplanationRequest
from fovea.service.inference.engine import Engine, decode_golden_pixels
from fovea.service.rollout.publish import publish_model
from tests.export.imports import PLAN
from tests.export.quantize.models import (
    add_version,
    build_colour_graph,
    draw_images,
    make_request,
    quantize_quietly,
)
from tests.graphs import with_contract
from tests.pictures import make_jpeg


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("photos"), 70)


def load(folder: Path) -> Engine:
    return Engine.load(folder / "model.onnx", provider="cpu", threads=1)


def test_next_version_is_int8_and_records_how_it_was_proven(tmp_path: Path, images: Path) -> None:
    source = add_version(build_colour_graph(2), tmp_path / "zoo")
    report, folder, lines = quantize_quietly(make_request(source, images))
    assert folder == tmp_path / "zoo" / "colours" / "2"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.onnx", "report.json"]
    engine = load(folder)
    assert engine.check_golden_set().logit_difference < engine.contract.golden.logit_tolerance["cpu/float32"]
    contract, quantization = engine.contract, engine.contract.quantization
    assert quantization is not None
    assert (contract.version, quantization.source_version) == ("2", "1")
    assert (quantization.precision, quantization.weight_bits) == (Precision.INT8, 8)
    assert (quantization.calibration_images, quantization.images, quantization.data) == (20, 260, images.name)
    assert quantization.source_top1 is not None
    assert quantization.top1 is not None
    assert quantization.loss == pytest.approx(quantization.source_top1 - quantization.top1)
    assert quantization.loss_interval[0] <= quantization.loss <= quantization.loss_interval[1]
    assert quantization.source_top1 > 0.8
    assert json.loads((folder / "report.json").read_text())["version"] == "2"
    assert "20 images calibrate, 260 are held out" in lines[0]
    assert all(method in lines[1] for method in ("minmax", "entropy", "percentile"))
    kinds = [layer.kind for layer in contract.layers]
    first_conv = kinds.index("Conv")
    assert "QuantizeLinear" not in kinds[: kinds.index("Mul") + 1]  # the normalisation stays in float
    assert kinds[first_conv - 1 : first_conv + 1] == ["DequantizeLinear", "Conv"]
    assert report.golden.images == 8


def test_calibration_is_made_anew_from_held_out_images(tmp_path: Path, images: Path) -> None:
    source = add_version(build_colour_graph(), tmp_path / "zoo")
    report, folder, _ = quantize_quietly(make_request(source, images))
    contract = load(folder).contract
    assert contract.temperature != 0.5
    assert report.notes == ()
    assert [one.level for one in contract.coverage] == [round(0.8 + step / 100, 2) for step in range(20)]
    assert contract.accuracy is not None
    assert (contract.accuracy.images, contract.accuracy.top1) == (260, contract.quantization.top1)  # type: ignore[union-attr]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    logits = load(folder).compute_logits(pixels).astype(np.float64) / contract.temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(
        load(folder).run(pixels), powers / powers.sum(axis=1, keepdims=True), atol=1e-5
    )


def test_calibration_error_is_measured_on_images_that_fitted_no_temperature(
    tmp_path: Path, images: Path
) -> None:
    """Every second held-out image fits the temperature."""
    source = add_version(build_colour_graph(), tmp_path / "zoo")
    request = make_request(source, images)
    report, folder, _ = quantize_quietly(request)
    engine = load(folder)
    held_out = load_images(images, engine.contract, request.calibration_images, is_unlabelled=False).held_out
    assert held_out.targets is not None
    pixels = np.concatenate(list(held_out.iterate_batches(64)))
    probabilities, targets = torch.from_numpy(engine.run(pixels)), torch.from_numpy(held_out.targets)
    bins = reliability_bins(probabilities[1::2], targets[1::2], engine.contract.task)
    assert engine.contract.accuracy is not None
    assert engine.contract.accuracy.ece == pytest.approx(calibration_error(bins), abs=1e-6)
    assert report.accuracy == engine.contract.accuracy


def test_labels_without_images_are_named(tmp_path: Path, images: Path) -> None:
    two_labels = tmp_path / "photos"
    for label in ("red", "blue"):
        shutil.copytree(images / label, two_labels / label)
    source = add_version(build_colour_graph(), tmp_path / "zoo")
    report, _, _ = quantize_quietly(make_request(source, two_labels, limits=Limits(0.2, 0.0)))
    assert report.notes == (
        "no held-out image shows 2 of the 4 labels: the comparison says nothing about these",
    )


def test_version_that_another_program_adds_meanwhile_is_skipped(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = add_version(build_colour_graph(), tmp_path / "zoo")

    def add_competitor(folder: Path, write_files: Callable[[Path, str], None]) -> Path:
        publish_model(source / "model.onnx", tmp_path / "zoo", "colours")
        return new_version.add_version(folder, write_files)

    monkeypatch.setattr(pipeline, "add_version", add_competitor)
    report, folder, _ = quantize_quietly(make_request(source, images))
    assert (folder.name, report.version, load(folder).contract.version) == ("3", "3", "3")
    assert json.loads((folder / "report.json").read_text())["version"] == "3"
    assert report.bytes == (folder / "model.onnx").stat().st_size


def test_without_labels_answers_are_compared_and_conformal_sets_dropped(tmp_path: Path, images: Path) -> None:
    source = add_version(build_colour_graph(), tmp_path / "zoo")
    report, folder, lines = quantize_quietly(make_request(source, images, is_unlabelled=True))
    contract = load(folder).contract
    assert contract.quantization is not None
    assert contract.quantization.top1 is None
    assert contract.quantization.loss == pytest.approx(1 - contract.quantization.agreement)
    assert contract.accuracy is None
    assert (contract.temperature, contract.coverage) == (0.5, ())
    assert "no labels" in lines[0]
    assert any("conformal sets were dropped" in note for note in report.notes)


def test_flat_folder_has_no_labels(tmp_path: Path, images: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in images.glob("*/*.png"):
        (flat / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    (flat / "broken.png").write_bytes(b"no image")
    source = add_version(build_colour_graph(), tmp_path / "zoo")
    report, _, _ = quantize_quietly(make_request(source, flat))
    assert report.quantization.top1 is None
    assert list(report.unreadable) == [str(flat / "broken.png")]


def test_explanations_of_int8_show_the_same_layers(tmp_path: Path, images: Path) -> None:
    source = add_version(build_colour_graph(2), tmp_path / "zoo")
    _, folder, _ = quantize_quietly(make_request(source, images))
    content = (folder / "model.onnx").read_bytes()
    contract = load(folder).contract
    model = IntrospectedModel(content, contract, PLAN)
    assert [layer.kind for layer in model.layers] == [
        "Input", "Conv", "Conv", "ReduceMean", "Gemm", "Div", "Softmax"
    ]  # fmt: skip
    assert model.has_cam
    conv = model.layers[1]
    assert model.read_weights(conv.tensor, "weight").shape == (8, 3, 3, 3)
    explainer = Explainer(content, contract, PLAN)
    answers = [
        explainer.explain(
            make_jpeg(40, 40), ExplanationRequest(method=method, samples=64), lambda _: None, lambda *_: None
        )
        for method in ("cam", "occlusion")
    ]
    assert [answer.method for answer in answers] == ["cam", "occlusion"]


def test_golden_error_of_int8_says_what_to_do(tmp_path: Path, images: Path) -> None:
    """A host on which int8 saturates computes other logits; here the recorded logits are others."""
    source = add_version(build_colour_graph(), tmp_path / "zoo")
    _, folder, _ = quantize_quietly(make_request(source, images))
    model = onnx.load(folder / "model.onnx")
    contract = load(folder).contract
    first, *others = contract.golden.images
    shifted = replace(first, logits=tuple(one + 1 for one in first.logits))
    golden = replace(contract.golden, images=(shifted, *others))
    engine = Engine(
        with_contract(model, replace(contract, golden=golden)).SerializeToString(), provider="cpu", threads=1
    )
    with pytest.raises(GoldenError, match=r"int8 arithmetic .* run `fovea quantize` .* or serve version 1"):
        engine.check_golden_set()


def build_fragile_graph() -> onnx.ModelProto:
    """Build a graph whose second convolution reads small values beside a channel that is far larger."""
    graph = build_colour_graph(4)
    for tensor in graph.graph.initializer:
        if tensor.name in ("kernel_0", "kernel_1"):
            kernel = onnx.numpy_helper.to_array(tensor).copy()
            if tensor.name == "kernel_0":
                kernel[7] = 20_000
            else:
                kernel[:, 7] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(kernel, tensor.name))
    return graph


def test_ladder_keeps_the_sensitive_layer_in_float(tmp_path: Path, images: Path) -> None:
    source = add_version(build_fragile_graph(), tmp_path / "zoo")
    report, folder, lines = quantize_quietly(make_request(source, images))
    assert report.quantization.candidates >= 3
    assert "Conv_5" in report.quantization.float_layers  # the second convolution
    assert any("sensitivity" in line for line in lines)
    assert load(folder).contract.quantization == report.quantization


def test_model_that_loses_too_much_is_not_written(tmp_path: Path, images: Path) -> None:
    source = add_version(build_fragile_graph(), tmp_path / "zoo")
    limits = Limits(-1.0, 0.0)
    with pytest.raises(
        QuantizeRefused, match=r"^nothing was written: no conversion is .*; the nearest of \d+"
    ):
        quantize_quietly(make_request(source, images, limits=limits))
    assert [path.name for path in source.parent.iterdir()] == ["1"]


def test_model_that_is_not_faster_is_not_compared(tmp_path: Path, images: Path) -> None:
    source = add_version(build_colour_graph(), tmp_path / "zoo")
    lines: list[str] = []
    with pytest.raises(QuantizeRefused, match=r"not worth it for this network .* serve the float model"):
        pipeline.quantize_model(make_request(source, images, limits=Limits(0.1, 50.0)), lines.append)
    assert "right" not in lines[-1]
    assert [path.name for path in source.parent.iterdir()] == ["1"]


def test_reduced_range_has_weights_of_7_bits(tmp_path: Path, images: Path) -> None:
    source = add_version(build_colour_graph(), tmp_path / "zoo")
    _, folder, _ = quantize_quietly(make_request(source, images, is_reduced=True))
    graph = onnx.load(folder / "model.onnx").graph
    (weights,) = (
        onnx.numpy_helper.to_array(one) for one in graph.initializer if one.name == "kernel_0_quantized"
    )
    assert np.abs(weights).max() <= 64
    assert load(folder).contract.quantization.weight_bits == 7  # type: ignore[union-attr]


def test_float16_keeps_the_interface_of_the_graph(tmp_path: Path, images: Path) -> None:
    source = add_version(build_colour_graph(2), tmp_path / "zoo")
    report, folder, _ = quantize_quietly(make_request(source, images, is_float16=True, is_reduced=None))
    engine = load(folder)
    assert engine.check_golden_set().images == 8
    assert report.quantization.precision is Precision.FLOAT16
    assert report.quantization.speedup is None  # no CUDA here
    types = {
        one.data_type for one in onnx.load(folder / "model.onnx").graph.initializer if len(one.dims) == 4
    }
    assert types == {onnx.TensorProto.FLOAT16}


def test_float16_compares_all_images_and_accepts_types_of_weights(tmp_path: Path, images: Path) -> None:
    """torch's exporter writes the type of every weight; those of the normalisation stay in float32."""
    graph = build_colour_graph(2)
    graph.graph.value_info.extend(
        helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
        for weight in graph.graph.initializer
    )
    source = add_version(graph, tmp_path / "zoo")
    report, folder, lines = quantize_quietly(make_request(source, images, is_float16=True, is_reduced=None))
    assert lines[0] == "280 images compare both models"
    assert (report.quantization.calibration_images, report.quantization.images) == (0, 280)
    assert load(folder).check_golden_set().images == 8


def test_refusal_of_float16_gives_advice_for_float16(tmp_path: Path, images: Path) -> None:
    source = add_version(build_colour_graph(), tmp_path / "zoo")
    unreachable = Limits(-0.1, 0.0)
    request = make_request(source, images, is_float16=True, is_reduced=None, limits=unreachable)
    with pytest.raises(QuantizeRefused, match=r"; allow more with --max-loss, or serve the float model$"):
        quantize_quietly(request)


def test_batch_norms_are_folded_into_convolutions(tmp_path: Path, images: Path) -> None:
    graph = build_colour_graph()
    index = next(number for number, node in enumerate(graph.graph.node) if node.op_type == "Conv")
    graph.graph.node[index].output[0] = "unscaled"
    names = ["gain", "shift", "mean", "variance"]
    graph.graph.node.insert(
        index + 1, helper.make_node("BatchNormalization", ["unscaled", *names], ["conv_0"])
    )
    for name, value in zip(names, (1.5, 0.1, 0.2, 2.0), strict=True):
        graph.graph.initializer.append(onnx.numpy_helper.from_array(np.full(8, value, np.float32), name))
    source = add_version(graph, tmp_path / "zoo")
    _, folder, _ = quantize_quietly(make_request(source, images))
    kinds = [layer.kind for layer in load(folder).contract.layers]
    assert "BatchNormalization" not in kinds


def test_contract_survives_its_document(tmp_path: Path, images: Path) -> None:
    source = add_version(build_colour_graph(), tmp_path / "zoo")
    _, folder, _ = quantize_quietly(make_request(source, images))
    contract = load(folder).contract
    assert Contract.from_json(contract.to_json()) == contract


def test_tolerance_on_cuda_covers_operands_in_tf32(tmp_path: Path, images: Path) -> None:
    """float16 has as many significant bits as TF32, and all operands lie in its range."""
    source = add_version(build_colour_graph(2), tmp_path / "zoo")
    _, folder, _ = quantize_quietly(make_request(source, images))
    graph = onnx.load(folder / "model.onnx")
    nodes = []
    for node in graph.graph.node:
        for place in (0, 1) if node.op_type in ("Conv", "Gemm") else ():
            half, rounded = (f"{node.name}_{place}_{part}" for part in ("half", "rounded"))
            nodes += [
                helper.make_node("Cast", [node.input[place]], [half], to=onnx.TensorProto.FLOAT16),
                helper.make_node("Cast", [half], [rounded], to=onnx.TensorProto.FLOAT),
            ]
            node.input[place] = rounded
        nodes.append(node)
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    contract = load(folder).contract
    runner = GraphRunner(graph, contract, threads=1, unoptimized=True)
    worst = max(
        float(np.abs(runner.run(decode_golden_pixels(image)[None]).logits - np.array(image.logits)).max())
        for image in contract.golden.images
    )
    assert worst > 0.02  # the tolerance of a float model, 0.05, would be narrow
    assert 2.5 * worst <= contract.golden.logit_tolerance["cuda/float32"] <= 10 * worst
