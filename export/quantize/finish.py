"""The contract of a quantized model: its layers, calibration, golden set and tolerance, made anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fovea.export import golden
from fovea.export.drift_reference import build_reference
from fovea.export.known_threshold import choose_threshold
from fovea.export.layer_table import build_layer_table
from fovea.export.quantize.candidate import GraphRunner, Outputs
from fovea.export.quantize.float_model import FloatModel
from fovea.export.quantize.images import PixelSelection
from fovea.model.evaluation import metrics
from fovea.model.evaluation.calibration import Calibration, fit_calibration
from fovea.model.evaluation.scores import calibration_error
from fovea.model.networks.network import to_probabilities
from fovea.service.artifact.contract import (
    FORMAT_VERSION,
    Accuracy,
    Contract,
    Coverage,
    DriftReference,
    GoldenSet,
    KnownScore,
    Layer,
    Quantization,
    Task,
)
from fovea.service.inference.engine import Floats, decode_golden_pixels
from fovea.service.inference.known import compute_known_scores
from fovea.service.inference.pixels import Pixels, brightness_of

_MIN_FIT_IMAGES: Final = 100
"""Minimum number of held-out images with labels for a new temperature, thresholds and conformal sets."""

_FIT_ROWS: Final = slice(0, None, 2)
"""Held-out images on which temperature and thresholds are fitted: every second,
because images are sorted by label."""

_OTHER_ROWS: Final = slice(1, None, 2)
"""Held-out images for the conformal sets and for the calibration error."""

_MIN_REFERENCE_IMAGES: Final = 100
"""Minimum number of held-out images for a new reference for drift."""

_ROUNDING_MARGIN: Final = 3.0
"""Factor on the differences of logits that the rounding of this host's own kernels causes."""

_MIN_TOLERANCE: Final = 2e-2
"""Smallest tolerance of a logit. A value that lies between two levels may round to either."""


def calibrate_answers(
    contract: Contract, outputs: Outputs, images: PixelSelection
) -> tuple[Calibration, list[str]]:
    """Return the calibration of the quantized model, and sentences on what could not be made anew."""
    kept = Calibration(contract.temperature, contract.thresholds, ())
    if contract.temperature == 1.0 and not contract.coverage:
        return kept, []
    count = len(images)
    if images.targets is None or count < _MIN_FIT_IMAGES:
        reason = (
            "the images have no labels"
            if images.targets is None
            else f"only {count} held-out images; {_MIN_FIT_IMAGES} are needed"
        )
        notes = [f"temperature and thresholds are those of the float model: {reason}"]
        return kept, notes + (["the conformal sets were dropped"] if contract.coverage else [])
    logits, targets = torch.from_numpy(outputs.logits), torch.from_numpy(images.targets)
    calibration = fit_calibration(
        logits[_FIT_ROWS], targets[_FIT_ROWS], logits[_OTHER_ROWS], targets[_OTHER_ROWS], contract.task
    )
    return calibration, []


def describe_missing_labels(contract: Contract, images: PixelSelection) -> list[str]:
    """Return a sentence on labels of which no image was compared, if there are any."""
    if images.targets is None:
        return []
    missing_count = len(contract.labels) - len(np.unique(images.targets))
    if not missing_count:
        return []
    return [
        f"no held-out image shows {missing_count} of the {len(contract.labels)} labels: the comparison says "
        "nothing about these"
    ]


def replace_end(graph: ModelProto, contract: Contract, temperature: float) -> ModelProto:
    """Return the graph with new steps from the logits to the probabilities."""
    copy = ModelProto()
    copy.CopyFrom(graph)
    needed_names = {contract.logits_name}
    nodes = []
    for node in reversed(copy.graph.node):
        if not needed_names.isdisjoint(node.output):
            needed_names.update(node.input)
            nodes.append(node)
    used_names = {name for node in nodes for name in (node.name, *node.input, *node.output)}
    prefix = next(
        one for one in ("end", *(f"end_{number}" for number in range(1 << 16)))
        if not any(name.startswith(one) for name in used_names)
    )  # fmt: skip

    def add_node(op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = f"{prefix}_{op_type.lower()}"
        new_nodes.append(helper.make_node(op_type, inputs, [output or name], name, **attributes))
        return output or name

    def add_constant(name: str, value: float) -> str:
        tensor = numpy_helper.from_array(np.array(value, np.float32), f"{prefix}_{name}")
        copy.graph.initializer.append(tensor)
        return tensor.name

    new_nodes: list[NodeProto] = []
    scaled = contract.logits_name
    if temperature != 1.0:
        scaled = add_node("Div", scaled, add_constant("temperature", temperature))
    if contract.task is Task.MULTICLASS:
        add_node("Softmax", scaled, output=contract.probabilities_name, axis=1)
    elif contract.task is Task.MULTILABEL:
        add_node("Sigmoid", scaled, output=contract.probabilities_name)
    else:
        positive = add_node("Sigmoid", scaled)
        negative = add_node("Sub", add_constant("one", 1.0), positive)
        add_node("Concat", negative, positive, output=contract.probabilities_name, axis=1)
    del copy.graph.node[:]
    copy.graph.node.extend([*reversed(nodes), *new_nodes])
    _remove_unused_weights(copy)
    return copy


def _remove_unused_weights(graph: ModelProto) -> None:
    used_names = {name for node in graph.graph.node for name in node.input}
    for index in reversed(range(len(graph.graph.initializer))):
        if graph.graph.initializer[index].name not in used_names:
            del graph.graph.initializer[index]


def build_quantized_contract(
    source: FloatModel,
    graph: ModelProto,
    version: str,
    calibration: Calibration,
    outputs: Outputs,
    images: PixelSelection,
    quantization: Quantization,
) -> Contract:
    """Return the contract of a converted graph. Raises `ModelError`."""
    contract = source.contract
    layers = _name_layers(build_layer_table(graph), source.layer_names)
    tensors = {tensor for layer in layers for tensor in layer.outputs}
    probabilities = outputs.probabilities
    if calibration.temperature != contract.temperature:
        logits = torch.from_numpy(outputs.logits)
        probabilities = to_probabilities(logits, contract.task, calibration.temperature).numpy()
    return replace(
        contract,
        format=FORMAT_VERSION,
        version=version,
        feature_maps=tuple(name for name in contract.feature_maps if name in tensors),
        thresholds=calibration.thresholds,
        temperature=calibration.temperature,
        coverage=tuple(Coverage(level, quantile) for level, quantile in calibration.coverage),
        accuracy=_measure_accuracy(contract, calibration, probabilities, images, quantization.data),
        reference=_measure_reference(contract, probabilities, images),
        known=_measure_known_score(contract, outputs),
        quantization=quantization,
        layers=layers,
        golden=_record_golden_set(graph, contract, images),
    )


def _name_layers(layers: tuple[Layer, ...], names: dict[str, str]) -> tuple[Layer, ...]:
    """Return the layers under the names that they have in the float model."""
    return tuple(
        replace(layer, name=names.get(layer.name) or names.get(layer.outputs[0]) or layer.name)
        for layer in layers
    )


def _measure_accuracy(
    contract: Contract, calibration: Calibration, probabilities: Floats, images: PixelSelection, data: str
) -> Accuracy | None:
    if images.targets is None:
        return None
    predictions, targets = torch.from_numpy(probabilities), torch.from_numpy(images.targets)
    decisions = metrics.choose_labels(predictions, contract.task, calibration.thresholds)
    bins = metrics.reliability_bins(predictions[_OTHER_ROWS], targets[_OTHER_ROWS], contract.task)
    return Accuracy(
        f"{data}, held out",
        len(images),
        metrics.compute_accuracy(decisions, targets),
        calibration_error(bins),
    )


def _measure_reference(
    contract: Contract, probabilities: Floats, images: PixelSelection
) -> DriftReference | None:
    """Return the reference of this model's answers, or the float model's if there are few images."""
    if contract.reference is None or len(images) < _MIN_REFERENCE_IMAGES:
        return contract.reference
    brightness = np.concatenate([brightness_of(batch) for batch in images.iterate_batches(64)])
    return build_reference(
        contract.labels,
        probabilities.argmax(axis=1).astype(np.int64),
        probabilities.max(axis=1),
        brightness,
    )


def _measure_known_score(contract: Contract, outputs: Outputs) -> KnownScore | None:
    """Return the threshold for this model's scores, or the float model's if there are few images."""
    if contract.known is None:
        return None
    return choose_threshold(compute_known_scores(outputs.logits, contract.task)) or contract.known


def _record_golden_set(graph: ModelProto, contract: Contract, images: PixelSelection) -> GoldenSet:
    """Return the golden images with the logits of the converted graph, and its tolerances.

    Other kernels round elsewhere: ONNX Runtime's float kernels, with rounding between them, stand for those
    of another host, and the same kernels on operands in TF32 for those of CUDA. A host on which int8
    saturates differs much more.
    """
    fused = GraphRunner(graph, contract, threads=1)
    unfused = GraphRunner(graph, contract, threads=1, unoptimized=True)
    tf32 = GraphRunner(_round_operands_to_tf32(graph), contract, threads=1, unoptimized=True)
    worst = worst_of_tf32 = 0.0
    golden_images = []

    def compute_logits(pixels: Pixels) -> Floats:
        nonlocal worst, worst_of_tf32
        logits = fused.run(pixels).logits
        worst = max(worst, float(np.abs(unfused.run(pixels).logits - logits).max()))
        worst_of_tf32 = max(worst_of_tf32, float(np.abs(tf32.run(pixels).logits - logits).max()))
        return logits

    for image in contract.golden.images:
        logits = compute_logits(decode_golden_pixels(image)[None])
        golden_images.append(replace(image, logits=tuple(map(float, logits[0]))))
    for pixels in images.take(16).iterate_images():
        compute_logits(pixels[None])
    usual = max(1.0, max(abs(one) for image in golden_images for one in image.logits) / 10)
    tolerance = max(_ROUNDING_MARGIN * worst, _MIN_TOLERANCE * usual)
    # OpenVINO's int8 kernels round elsewhere than those of ONNX Runtime (`golden.OPENVINO_INT8_TOLERANCE`).
    own_tolerances = golden.LOGIT_TOLERANCE | {"openvino/float32": golden.OPENVINO_INT8_TOLERANCE * usual}
    own_tolerances["cuda/float32"] = max(own_tolerances["cuda/float32"], _ROUNDING_MARGIN * worst_of_tf32)
    return GoldenSet(
        {
            provider: max(tolerance, contract.golden.logit_tolerance.get(provider, own), own)
            for provider, own in own_tolerances.items()
        },
        tuple(golden_images),
    )


def _round_operands_to_tf32(graph: ModelProto) -> ModelProto:
    """Return the graph with the float32 operands of convolutions and matrix products rounded to TF32.

    TF32 has 11 significant bits instead of 24. The bits beyond them vanish in `x * k - (x * k - x)` for
    k = 2^13 + 1 (Veltkamp's splitting), if nothing simplifies this.
    """
    copy = ModelProto()
    copy.CopyFrom(graph)
    if any(tensor.data_type == TensorProto.FLOAT16 for tensor in graph.graph.initializer):
        return copy  # CUDA computes float16 as it is
    splitter = numpy_helper.from_array(np.array(2**13 + 1, np.float32), "tf32_splitter")
    nodes: list[NodeProto] = []
    for number, node in enumerate(copy.graph.node):
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            for place in (0, 1):
                value = node.input[place]
                product, rest, rounded = (
                    f"tf32_{number}_{place}_{part}" for part in ("product", "rest", "rounded")
                )
                nodes += [
                    helper.make_node("Mul", [value, splitter.name], [product]),
                    helper.make_node("Sub", [product, value], [rest]),
                    helper.make_node("Sub", [product, rest], [rounded]),
                ]
                node.input[place] = rounded
        nodes.append(node)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.append(splitter)
    return copy
