"""Models of transformers and timm: conversion from safetensors, and their own pipeline as the reference."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from fovea.export.importer.sources.answers import read_answers
from fovea.export.importer.sources.config_values import ConfigError, to_side
from fovea.export.importer.sources.conversion import run_converter
from fovea.export.importer.sources.facts import ReferenceAnswers, ReferencePipeline, SourceFacts, Stated

_CHILDREN: Final = {
    "transformers": "fovea.export.importer.sources.transformers_child",
    "timm": "fovea.export.importer.sources.timm_child",
}
"""Converter of each library."""

_IMAGENET_TAG: Final = re.compile(r"in(1|12|21|22)k")
"""Part of the tags of weights that were trained on ImageNet or on a subset, such as `a1_in1k`."""

_TIMM_REPOSITORIES: Final = "hf:timm/"

_USUAL_SIDE: Final = 224
"""Side of the input if neither the processor nor the model states it, in pixels."""


def convert_safetensors(
    folder: Path, origin: str, facts: SourceFacts, config: Mapping[str, Any], work: Path
) -> tuple[Path, SourceFacts]:
    """Convert `model.safetensors` to ONNX by the library of the facts.

    Return the file, and the facts with the labels that the library knows. Raises `ImportRefused`.
    """
    height, width = choose_export_size(facts, config)
    file, labels = work / "converted.onnx", work / "library-labels.json"
    arguments: list[str | Path] = ["export", folder, str(height), str(width), file]
    if facts.library == "timm":
        arguments.append(labels)
    run_converter(_CHILDREN[facts.library or ""], arguments, what=origin)
    if facts.labels is None and labels.is_file():
        if _states_imagenet(origin, config):
            return file, replace(facts, labels=Stated(labels, "ImageNetInfo of timm"))
        problem = f"{origin} has as many outputs as ImageNet, but no tag such as a1_in1k that says so"
        facts = replace(facts, problems=(*facts.problems, problem))
    return file, facts


def _states_imagenet(origin: str, config: Mapping[str, Any]) -> bool:
    """Return whether a model of timm states that its labels are ImageNet's or those of a subset.

    timm itself infers this from the number of outputs.
    """
    inner = config.get("pretrained_cfg")
    tag = (inner if isinstance(inner, Mapping) else config).get("tag")
    has_tag = isinstance(tag, str) and _IMAGENET_TAG.search(tag) is not None
    return has_tag or origin.startswith(_TIMM_REPOSITORIES)


def choose_export_size(facts: SourceFacts, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width of the input: those of the processor, or of the model."""
    if facts.geometry:
        return facts.geometry.value.height, facts.geometry.value.width
    side = config.get("image_size")
    try:
        if isinstance(side, list) and len(side) == 2:
            return to_side("image_size", side[0]), to_side("image_size", side[1])
        return to_side("image_size", side), to_side("image_size", side)
    except ConfigError:
        return _USUAL_SIDE, _USUAL_SIDE


def create_reference(
    folder: Path, origin: str, library: str, work: Path, *, with_model: bool
) -> ReferencePipeline | None:
    """Return the pipeline of the library, or None if the library is not installed.

    `with_model` runs the network in torch too.
    """
    if importlib.util.find_spec(library) is None:
        return None
    return ReferencePipeline(
        library,
        partial(_answer, folder, origin, _CHILDREN[library], work, with_model=with_model),
        has_network=with_model,
    )


def _answer(
    folder: Path, origin: str, child: str, work: Path, images: Sequence[Path], *, with_model: bool
) -> ReferenceAnswers:
    result = work / "answers.npz"
    what = "model" if with_model else "processor"
    run_converter(
        child, ["answer", folder, what, result, *images], what=f"images by the pipeline of {origin}"
    )
    return read_answers(result)
