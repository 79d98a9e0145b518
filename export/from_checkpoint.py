"""Export of a checkpoint to one verified, self-describing ONNX file."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from fovea.export import golden
from fovea.export.drift_reference import measure_reference
from fovea.export.known_threshold import measure_known_score
from fovea.export.layer_table import build_layer_table, find_feature_maps
from fovea.export.model_card import write_model_card
from fovea.export.model_output import REPORT_FILE, embed_contract
from fovea.export.pixel_steps import arrange_pixel_steps
from fovea.export.verify import Agreement, compare_outputs, measure_accuracy
from fovea.model.data.dataset import Dataset, Examples
from fovea.model.evaluation import evaluate
from fovea.model.evaluation.calibration import Calibration
from fovea.model.networks.checkpoint import WEIGHTS_FILE, Checkpoint, save_checkpoint
from fovea.model.networks.network import Net, to_probabilities
from fovea.service.artifact.contract import (
    FORMAT_VERSION,
    Accuracy,
    Contract,
    Coverage,
    Geometry,
    GoldenSet,
    Task,
    Training,
)
from fovea.service.artifact.geometry_upgrade import read_geometry
from fovea.service.artifact.model_card import ModelCard
from fovea.service.artifact.repository import (
    DEFAULT_MODEL_FILE,
    MODEL_FILE,
    MODEL_NAME_PATTERN,
    MODEL_NAME_RULE,
    next_version,
    record_default_model,
)
from fovea.service.atomic_files import write_file
from fovea.service.errors import FoveaError
from fovea.service.inference.engine import Engine, GoldenDifferences
from fovea.service.inference.pixels import Pixels


class ExportError(FoveaError):
    """The requested export is not possible."""


@dataclass(frozen=True)
class ExportReport:
    """The verification results of an export."""

    model: str
    version: str
    bytes: int
    parameters: int
    agreement: tuple[Agreement, ...]
    golden: GoldenDifferences
    accuracy: Accuracy


def export_checkpoint(
    checkpoint: Checkpoint, data: Dataset, out: Path, *, default: bool = False
) -> ExportReport:
    """Write `out/model.onnx`, `out/report.json` and the weights; `out` is `…/<name>/<version>`.

    The graph is compared with the network on images of `data`, and checked on its golden set. Its accuracy is
    measured on the test images or, without test images, on the validation images. Its predictions on the
    held-out images are the reference for drift. `default` makes the model the default model for requests
    without a model name. Raises `ExportError`, `VerificationError` or `ModelError`, and then leaves no file.
    """
    name, version = _parse_version_path(out)
    if tuple(checkpoint.metadata["labels"]) != data.labels:
        raise ExportError(
            f"the checkpoint has labels {checkpoint.metadata['labels']}, the data {data.labels}; "
            "use the training data"
        )
    net = checkpoint.build_net().eval()
    split_name, examples = ("test", data.test) if len(data.test) else ("validation", data.validation)
    geometry = read_geometry(checkpoint.metadata["geometry"], "geometry")
    if "calibration" not in checkpoint.metadata:
        raise ExportError("the run was interrupted before its end; continue it with `fovea train --resume`")
    calibration = Calibration.from_dict(checkpoint.metadata["calibration"])
    graph = export_classifier_graph(net, net.config.task, geometry, calibration.temperature)
    contract = _build_checkpoint_contract(
        checkpoint.metadata, geometry, net, graph, calibration, name, version
    )
    engine = Engine(embed_contract(graph, contract), provider="cpu", threads=1)
    contract = replace(
        contract,
        reference=measure_reference(engine, data.validation, data.conformal),
        known=measure_known_score(engine, data.validation, data.conformal),
    )
    accuracy = measure_accuracy(engine, examples, f"{data.name}, {split_name}")
    # Before the model is written: beside a second model, a model without this record is not the default.
    record_default_model(out.parent.parent)
    report = write_verified_model(net, graph, contract, accuracy, examples, out)
    save_checkpoint(out, WEIGHTS_FILE, checkpoint)
    if default:
        write_file(out.parent.parent / DEFAULT_MODEL_FILE, name + "\n")
    return report


def require_new_version(out: Path) -> None:
    """Raise `ExportError` unless `out` is `…/<name>/<version>` and holds no model yet."""
    _parse_version_path(out)
    if (out / MODEL_FILE).exists():
        suggestion = out.parent / next_version(out.parent)
        raise ExportError(f"{out} already holds a model; the next free version is {suggestion}")


def write_verified_model(
    net: Net, graph: onnx.ModelProto, contract: Contract, accuracy: Accuracy, examples: Examples, out: Path
) -> ExportReport:
    """Verify `graph` under `contract` against `net`, then write it to `out`.

    Raises `VerificationError` or `ModelError`, and then leaves no file.
    """
    contract = replace(contract, accuracy=accuracy)
    content = embed_contract(graph, contract)
    engine = Engine(content, provider="cpu", threads=1)
    agreement = compare_outputs(net, engine, _verification_pixels(examples))
    report = ExportReport(
        model=contract.name,
        version=contract.version,
        bytes=len(content),
        parameters=sum(weight.numel() for weight in net.parameters()),
        agreement=agreement,
        golden=engine.check_golden_set(),
        accuracy=accuracy,
    )
    write_file(out / MODEL_FILE, content)
    write_file(out / REPORT_FILE, json.dumps(asdict(report), indent=2) + "\n")
    write_model_card(contract, ModelCard(library="fovea"), out)
    return report


def _parse_version_path(out: Path) -> tuple[str, str]:
    name, version = out.absolute().parent.name, out.name
    if not (MODEL_NAME_PATTERN.fullmatch(name) and version.isdecimal()):
        raise ExportError(
            f"{out} cannot hold a model: the path must end in <name>/<number>, such as zoo/pets/1; in names "
            f"{MODEL_NAME_RULE}"
        )
    return name, version


def _verification_pixels(examples: Examples) -> Tensor:
    """Return 64 images spread evenly over all, uint8 (64, H, W, 3); few images are repeated."""
    return examples.pixels[torch.linspace(0, len(examples) - 1, 64).long()]


# --- the graph -----------------------------------------------------------------------------------


class _NetWithProbabilities(nn.Module):
    """The network with its probabilities as a second output."""

    def __init__(self, net: nn.Module, task: Task, temperature: float) -> None:
        super().__init__()
        self.net = net
        self.task = task
        self.temperature = temperature

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(pixels)
        return logits, to_probabilities(logits, self.task, self.temperature)


def export_classifier_graph(
    net: nn.Module, task: Task, geometry: Geometry, temperature: float = 1.0
) -> onnx.ModelProto:
    """Export the network to a graph with input `pixels` and outputs `logits` and `probabilities`.

    `pixels` are uint8 (batch, H, W, 3).
    """
    example = torch.zeros(2, geometry.height, geometry.width, 3, dtype=torch.uint8)
    graph = export_graph(_NetWithProbabilities(net, task, temperature), example, ("logits", "probabilities"))
    arrange_pixel_steps(graph)
    return graph


def export_graph(net: nn.Module, example: Tensor, outputs: Sequence[str]) -> onnx.ModelProto:
    """Export any network to a graph with input `pixels` like `example` and any batch size from 1."""
    with silence_exporter():
        program = torch.onnx.export(
            net.eval(),
            (example,),
            dynamo=True,
            input_names=["pixels"],
            output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    if program is None:
        raise ExportError("torch exported nothing")
    return program.model_proto


@contextlib.contextmanager
def silence_exporter() -> Iterator[None]:
    """Silence the exporter's warnings about torchvision's absence and deprecations inside torch."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# --- the contract --------------------------------------------------------------------------------


def _build_checkpoint_contract(
    metadata: dict[str, Any],
    geometry: Geometry,
    net: Net,
    graph: onnx.ModelProto,
    calibration: Calibration,
    name: str,
    version: str,
) -> Contract:
    # The golden set calls this for each of its images: torch is the reference for the graph's logits.
    def compute_logits(pixels: Pixels) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = evaluate.compute_logits(net, torch.tensor(pixels)).numpy()
        return logits

    return build_contract(
        graph,
        compute_logits,
        name=name,
        version=version,
        task=net.config.task,
        labels=tuple(metadata["labels"]),
        geometry=geometry,
        training=Training(
            metadata["data"]["name"], metadata["data"]["train"], metadata["commit"], metadata["command"]
        ),
        calibration=calibration,
    )


def build_contract(
    graph: onnx.ModelProto,
    compute_logits: Callable[[Pixels], npt.NDArray[np.float32]],
    *,
    name: str,
    version: str,
    task: Task,
    labels: tuple[str, ...],
    geometry: Geometry,
    training: Training,
    calibration: Calibration,
) -> Contract:
    """Return the contract of a graph from `export_classifier_graph`.

    `compute_logits` maps pixels, uint8 (n, H, W, 3), to logits, float32 (n, labels).
    """
    layers = build_layer_table(graph)
    return Contract(
        format=FORMAT_VERSION,
        name=name,
        version=version,
        task=task,
        labels=labels,
        input_name="pixels",
        input=geometry,
        logits_name="logits",
        probabilities_name="probabilities",
        feature_maps=find_feature_maps(layers),
        thresholds=calibration.thresholds,
        temperature=calibration.temperature,
        coverage=tuple(Coverage(level, quantile) for level, quantile in calibration.coverage),
        training=training,
        accuracy=None,
        reference=None,
        known=None,
        quantization=None,
        layers=layers,
        golden=GoldenSet(dict(golden.LOGIT_TOLERANCE), golden.draw_golden_images(geometry, compute_logits)),
    )
