"""The quantization of a version: convert, compare with the float model, prove, and write the next version.

load        the float version, proven on its golden set          (float_model)
images      decoded, divided into calibration and comparison     (images)
region      the nodes that can be quantized                      (regions)
climb       conversions until one passes the gate                (ladder, recipe, gate)
finish      calibration, reference, golden set                   (finish)
write       after all checks, as the next version                (service.artifact.new_version)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import onnxruntime
from onnx import ModelProto

from fovea.export.model_card import render_model_card
from fovea.export.model_output import REPORT_FILE, embed_contract
from fovea.export.quantize.comparison import CONFIDENCE, PairedCounts, share_confidence
from fovea.export.quantize.finish import (
    build_quantized_contract,
    calibrate_answers,
    describe_missing_labels,
    replace_end,
)
from fovea.export.quantize.float_model import FloatModel, load_float_model, modernize_graph
from fovea.export.quantize.gate import Gate, Limits, Verdict
from fovea.export.quantize.host import describe_processor, saturates_int8
from fovea.export.quantize.images import QuantizationImages, load_images
from fovea.export.quantize.ladder import Climb, Ladder, Passed
from fovea.export.quantize.recipe import Recipe, RecipeKind, convert_graph, get_weight_bits
from fovea.export.quantize.refusal import QuantizeRefused
from fovea.export.quantize.regions import Region, find_region
from fovea.service.artifact.contract import Accuracy, Precision, Quantization
from fovea.service.artifact.model_card import CARD_FILE, read_model_card
from fovea.service.artifact.new_version import add_version
from fovea.service.artifact.repository import MODEL_FILE, next_version
from fovea.service.inference.engine import Engine, GoldenDifferences


@dataclass(frozen=True)
class QuantizeRequest:
    """The options of `fovea quantize`."""

    model: Path
    """Folder of a version, or its model file."""
    images: Path
    calibration_images: int
    limits: Limits
    is_unlabelled: bool
    is_reduced: bool | None
    """Flag for weights of 7 bits; None to decide by the processor."""
    is_float16: bool
    command: str


@dataclass(frozen=True)
class Proof:
    """Certainty that the loss is within its limit."""

    counts: PairedCounts
    max_loss: float
    certainty: float
    """Probability that the loss is at most `max_loss`, 0 to 1."""
    images_for_proof: int | None
    """Number of images that would prove it at `CONFIDENCE`, if their shares were the same; None for none."""


@dataclass(frozen=True)
class QuantizeReport:
    """The facts and measurements of a quantization."""

    model: str
    version: str
    source_version: str
    source_bytes: int
    bytes: int
    quantization: Quantization
    proof: Proof
    source_ms: float | None
    ms: float | None
    golden: GoldenDifferences
    golden_tolerance: float
    accuracy: Accuracy | None
    temperature: float
    notes: tuple[str, ...]
    unreadable: dict[str, str]


def quantize_model(request: QuantizeRequest, say: Callable[[str], None]) -> tuple[QuantizeReport, Path]:
    """Write the next version of a model in int8 or float16. Return the report and the new folder.

    `say` prints a line of progress. Raises `QuantizeRefused` or `ModelError`, and then leaves no file.
    """
    if request.is_float16 and request.is_reduced is not None:
        raise QuantizeRefused("--fp16 has weights of 16 bits; leave out --reduced-range and --full-range")
    source = load_float_model(request.model)
    _require_writable(source.folder)
    graph = modernize_graph(source.graph)
    region = find_region(graph, source.contract.input_name, source.contract.logits_name)
    calibration_images = 0 if request.is_float16 else request.calibration_images
    images = load_images(
        request.images, source.contract, calibration_images, is_unlabelled=request.is_unlabelled
    )
    note = "" if images.held_out.targets is not None else " (no labels: a changed answer counts as a loss)"
    if request.is_float16:
        say(f"{len(images.held_out)} images compare both models{note}")
    else:
        say(f"{len(images.calibration)} images calibrate, {len(images.held_out)} are held out{note}")
    gate = Gate(source.graph, source.contract, images.held_out, request.limits)
    if request.is_float16:
        climb = _convert_to_float16(graph, region, gate, say)
    else:
        is_reduced = saturates_int8() if request.is_reduced is None else request.is_reduced
        weight_bits = get_weight_bits(RecipeKind.STATIC, is_reduced=is_reduced)
        ladder = Ladder(graph, region, source.contract, images.calibration, weight_bits, say)
        climb = ladder.climb(gate)
    if climb.passed is None:
        raise QuantizeRefused(_explain_refusal(climb, gate))
    return _write_version(request, source, gate, images, climb, climb.passed)


def _require_writable(folder: Path) -> None:
    """Raise `QuantizeRefused` if no version can be added, before minutes of measurements."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise QuantizeRefused(
            f"cannot write the next version into {folder}, which is read-only; copy the model's folder to a "
            "repository that you can write"
        )


def _convert_to_float16(graph: ModelProto, region: Region, gate: Gate, say: Callable[[str], None]) -> Climb:
    """Judge the only candidate in float16, whose speed counts on CUDA alone."""
    recipe = Recipe(RecipeKind.FLOAT16, get_weight_bits(RecipeKind.FLOAT16, is_reduced=False))
    converted_graph = convert_graph(graph, region, {}, recipe)
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    verdict = gate.judge(recipe, converted_graph, provider="cuda" if has_cuda else None)
    say(gate.describe(verdict, 1))
    return Climb(Passed(verdict, converted_graph) if verdict.passes else None, (verdict,))


def _explain_refusal(climb: Climb, gate: Gate) -> str:
    """Return the sentence for a model of which no conversion passes."""
    limits, compared = gate.limits, climb.compared or 1
    accurate = [verdict for verdict in climb.verdicts if verdict.is_accurate]
    fast = [verdict for verdict in climb.verdicts if verdict.is_fast]
    best = min(fast or accurate or climb.verdicts, key=_loss_of)
    is_float16 = best.recipe.kind is RecipeKind.FLOAT16
    if not fast:
        precision, place = ("float16", "GPU") if is_float16 else ("int8", "processor")
        advice = f"{precision} is not worth it for this network on this {place}: serve the float model"
    elif is_float16:
        advice = "allow more with --max-loss, or serve the float model"
    else:
        advice = "allow more with --max-loss, or give more images of calibration with --calibration"
    return (
        f"nothing was written: no conversion is at most {100 * limits.max_loss:g} points worse and at least "
        f"{limits.min_speedup:g} times as fast; the nearest of {len(climb.verdicts)} was "
        f"{gate.describe(best, compared)}; {advice}"
    )


def _loss_of(verdict: Verdict) -> float:
    """Return the loss of a verdict; without a comparison, a number that grows as the speed falls."""
    if verdict.counts:
        return verdict.counts.loss
    return 1 / verdict.speed.ratio if verdict.speed else float("inf")


def _write_version(
    request: QuantizeRequest,
    source: FloatModel,
    gate: Gate,
    images: QuantizationImages,
    climb: Climb,
    passed: Passed,
) -> tuple[QuantizeReport, Path]:
    """Write the candidate that has passed. Raises `ModelError` or `QuantizeRefused`."""
    verdict = passed.verdict
    if verdict.outputs is None or verdict.counts is None:
        raise ValueError("the candidate was not compared")
    calibration, notes = calibrate_answers(source.contract, verdict.outputs, images.held_out)
    notes += describe_missing_labels(source.contract, images.held_out)
    graph = passed.graph
    if calibration.temperature != source.contract.temperature:
        graph = replace_end(graph, source.contract, calibration.temperature)
    folder = source.folder
    version = next_version(folder)
    quantization = _describe_quantization(request, source, images, climb, verdict, verdict.counts)
    contract = build_quantized_contract(
        source, graph, version, calibration, verdict.outputs, images.held_out, quantization
    )
    content = embed_contract(graph, contract)
    report = QuantizeReport(
        model=source.name,
        version=version,
        source_version=source.version,
        source_bytes=len(source.content),
        bytes=len(content),
        quantization=quantization,
        proof=_describe_proof(verdict.counts, request.limits.max_loss, climb.compared),
        source_ms=verdict.speed.source_ms if verdict.speed else None,
        ms=verdict.speed.candidate_ms if verdict.speed else None,
        golden=Engine(content, provider="cpu", threads=1).check_golden_set(),
        golden_tolerance=contract.golden.logit_tolerance["cpu/float32"],
        accuracy=contract.accuracy,
        temperature=calibration.temperature,
        notes=tuple(notes),
        unreadable=images.unreadable,
    )

    def write_files(hidden_folder: Path, version: str) -> None:
        nonlocal report
        if version != report.version:  # another program has just added a version
            new_content = embed_contract(graph, replace(contract, version=version))
            report = replace(report, version=version, bytes=len(new_content))
        else:
            new_content = content
        (hidden_folder / MODEL_FILE).write_bytes(new_content)
        (hidden_folder / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n")
        card = render_model_card(replace(contract, version=version), read_model_card(folder / source.version))
        (hidden_folder / CARD_FILE).write_text(card, encoding="utf-8")

    try:
        new_folder = add_version(folder, write_files)
        return report, new_folder
    except OSError as error:
        raise QuantizeRefused(
            f"cannot write version {version} into {folder}: {error.strerror}; nothing was written"
        ) from None


def _describe_proof(counts: PairedCounts, max_loss: float, candidates: int) -> Proof:
    return Proof(
        counts,
        max_loss,
        counts.find_certainty(max_loss, candidates),
        counts.count_images_for_proof(max_loss, share_confidence(candidates)),
    )


def _describe_quantization(
    request: QuantizeRequest,
    source: FloatModel,
    images: QuantizationImages,
    climb: Climb,
    verdict: Verdict,
    counts: PairedCounts,
) -> Quantization:
    recipe, confidence = verdict.recipe, share_confidence(climb.compared)
    is_labelled = images.held_out.targets is not None
    return Quantization(
        precision=Precision.FLOAT16 if recipe.kind is RecipeKind.FLOAT16 else Precision.INT8,
        source_version=source.version,
        source_sha256=source.sha256,
        recipe=recipe.describe(),
        calibration=recipe.method.value if recipe.method else "",
        calibration_images=len(images.calibration) if recipe.method else 0,
        weight_bits=recipe.weight_bits,
        float_layers=tuple(source.layer_names.get(name) or name for name in recipe.float_layers),
        data=images.name,
        images=len(images.held_out),
        source_top1=(counts.both + counts.only_first) / counts.images if is_labelled else None,
        top1=(counts.both + counts.only_second) / counts.images if is_labelled else None,
        agreement=verdict.agreement,
        loss=counts.loss,
        loss_interval=counts.find_interval(confidence),
        confidence=CONFIDENCE,
        candidates=climb.compared,
        speedup=verdict.speed.ratio if verdict.speed else None,
        processor=describe_processor(),
        command=request.command,
    )
