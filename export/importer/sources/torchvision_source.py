"""`torchvision:NAME[:WEIGHTS]`: a classifier of torchvision with the facts of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.preprocessing import Normalization
from fovea.export.importer.sources.answers import read_answers
from fovea.export.importer.sources.config_values import (
    ConfigError,
    read_json,
    to_channel_values,
    to_interpolation,
    to_side,
)
from fovea.export.importer.sources.conversion import run_converter
from fovea.export.importer.sources.facts import (
    ReferenceAnswers,
    ReferencePipeline,
    Source,
    SourceFacts,
    Stated,
    StatedGeometry,
)
from fovea.export.importer.sources.model_config import write_labels
from fovea.service.artifact.geometry import CropStep, Fit, ResizeStep

TORCHVISION_PREFIX: Final = "torchvision:"
_CHILD: Final = "fovea.export.importer.sources.torchvision_child"


def read_torchvision_model(text: str, work: Path) -> Source:
    """Return a classifier of torchvision as ONNX. Raises `ImportRefused`."""
    name, _, weights = text.removeprefix(TORCHVISION_PREFIX).partition(":")
    if not name.replace("_", "").isalnum():
        raise ImportRefused(f"{text!r} is not torchvision:NAME or torchvision:NAME:WEIGHTS")
    file, facts_file = work / "converted.onnx", work / "facts.json"
    run_converter(_CHILD, ["export", name, weights, file, facts_file], what=text, may_download=True)
    try:
        values = read_json(facts_file)
        facts = _to_facts(name, values, work)
    except (ConfigError, KeyError, TypeError) as error:
        raise ImportRefused(f"the facts of {text} cannot be used: {error}") from None
    origin = f"{TORCHVISION_PREFIX}{name}:{values['weights']}"
    run = partial(_answer, name, values["weights"], text, work)
    reference = ReferencePipeline("torchvision", run, has_network=True)
    return Source(file, f"{name}.onnx", origin, facts, work, reference, is_local=False)


def _to_facts(name: str, values: dict[str, Any], work: Path) -> SourceFacts:
    origin = f"meta and transforms of {values['weights']}"
    write_labels(tuple(values["labels"]), work / "labels.json")
    crop_height, crop_width = to_side("crop", values["crop"][0]), to_side("crop", values["crop"][-1])
    side = to_side("resize", values["resize"][0])
    interpolation = to_interpolation("interpolation", values["interpolation"])
    fit = Fit.COVER if len(values["resize"]) == 1 else Fit.STRETCH
    resize = ResizeStep(fit, side, to_side("resize", values["resize"][-1]), interpolation)
    mean, std = to_channel_values("mean", values["mean"]), to_channel_values("std", values["std"])
    return SourceFacts(
        name=name,
        labels=Stated(work / "labels.json", origin),
        normalization=Stated(Normalization(1 / 255, mean, std), origin),
        geometry=Stated(
            StatedGeometry(crop_height, crop_width, (resize, CropStep(crop_height, crop_width))), origin
        ),
        licence=values.get("licence"),
        library="torchvision",
    )


def _answer(name: str, weights: str, text: str, work: Path, images: Sequence[Path]) -> ReferenceAnswers:
    result = work / "answers.npz"
    what = f"images by the pipeline of {text}"
    run_converter(_CHILD, ["answer", name, weights, result, *images], what=what, may_download=True)
    return read_answers(result)
