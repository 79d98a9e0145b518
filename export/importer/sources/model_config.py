"""Labels, task and kind of model that a `config.json` of transformers or timm states."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.label_syntax import WORDNET_ID
from fovea.service.artifact.contract import Task

_OTHER_KINDS: Final = (
    ("ObjectDetection", "an object detector"),
    ("Segmentation", "a segmentation model"),
    ("DepthEstimation", "a depth estimator"),
    ("ForVideoClassification", "a classifier of videos"),
    ("ForAudioClassification", "a classifier of sounds"),
    ("ForSequenceClassification", "a text model"),
    ("ForTokenClassification", "a text model"),
    ("ForQuestionAnswering", "a text model"),
    ("ForMaskedLM", "a text model"),
    ("ForCausalLM", "a text model"),
    ("LMHeadModel", "a text model"),
    ("ForConditionalGeneration", "a model that generates text"),
    ("ForMaskedImageModeling", "a network without a classifier"),
    ("ForPreTraining", "a network without a classifier"),
    ("Model", "a network without a classifier"),
)
"""Kinds of models by the end of the architecture's name."""

_OTHER_TAGS: Final = {
    "feature-extraction": "a network without a classifier",
    "image-feature-extraction": "a network without a classifier",
    "image-segmentation": "a segmentation model",
    "image-text-to-text": "a text model",
    "mask-generation": "a segmentation model",
    "object-detection": "an object detector",
    "zero-shot-image-classification": "a model that compares images with texts, without labels of its own",
}
_TEXT_TAG: Final = re.compile(r"text|fill-mask|token|sentence|translation|summarization|question|table")
_TASKS: Final = {
    "multi_label_classification": Task.MULTILABEL,
    "single_label_classification": Task.MULTICLASS,
}
_PLACEHOLDER: Final = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class ModelConfig:
    """The facts of a `config.json`."""

    labels: tuple[str, ...] | tuple[tuple[str, str], ...] | None
    """Labels, or pairs of WordNet id and label; None if the file states none."""
    task: Task | None
    model_type: str | None
    architecture: str | None
    library: str | None
    problems: tuple[str, ...]


def require_image_classifier(origin: str, config: Mapping[str, Any], pipeline_tag: str | None = None) -> None:
    """Raise `ImportRefused` if configuration or tag say that the model is of another kind."""
    name = next(iter(_read_architectures(config)), "")
    if "ForImageClassification" in name:
        return
    if kind := next((kind for end, kind in _OTHER_KINDS if name.endswith(end)), ""):
        raise ImportRefused(
            f"{origin} is {kind} ({name}); Fovea serves image classifiers, such as ViTForImageClassification"
        )
    if pipeline_tag in (None, "image-classification"):
        return
    kind = _OTHER_TAGS.get(pipeline_tag, "")
    if not kind and _TEXT_TAG.search(pipeline_tag):
        kind = "a text model"
    raise ImportRefused(
        f"{origin} is {kind or 'another kind of model'} (tag {pipeline_tag}); Fovea serves image classifiers"
    )


def read_model_config(config: Mapping[str, Any]) -> ModelConfig:
    """Return the facts of a `config.json`."""
    problems: list[str] = []
    labels = _read_labels(config, problems)
    names = _read_architectures(config)
    architecture = config.get("architecture")
    model_type = config.get("model_type")
    problem_type = config.get("problem_type")
    return ModelConfig(
        labels=labels,
        task=_TASKS.get(problem_type) if isinstance(problem_type, str) else None,
        model_type=model_type if isinstance(model_type, str) else None,
        architecture=names[0] if names else architecture if isinstance(architecture, str) else None,
        library=(
            "timm" if is_timm_config(config) else "transformers" if names or "model_type" in config else None
        ),
        problems=tuple(problems),
    )


def _read_architectures(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [one for one in names if isinstance(one, str)] if isinstance(names, list) else []


def is_timm_config(config: Mapping[str, Any]) -> bool:
    """Return whether the configuration has the layout of timm."""
    return isinstance(config.get("architecture"), str) and "architectures" not in config


def _read_labels(
    config: Mapping[str, Any], problems: list[str]
) -> tuple[str, ...] | tuple[tuple[str, str], ...] | None:
    names = config.get("label_names")
    if isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) > 1:
        descriptions = config.get("label_descriptions")
        texts = descriptions if isinstance(descriptions, Mapping) else {}
        if all(WORDNET_ID.fullmatch(name) and isinstance(texts.get(name), str) for name in names):
            return tuple((name, texts[name]) for name in names)
        return tuple(str(texts.get(name, name)) for name in names)
    mapping = config.get("id2label")
    if not isinstance(mapping, Mapping) or not mapping:
        problems.append("config.json has no " + ("label_names" if is_timm_config(config) else "id2label"))
        return None
    try:
        numbers = sorted(int(key) for key in mapping)
        labels = tuple(mapping[key] for key in sorted(mapping, key=int))
    except (TypeError, ValueError):
        problems.append("id2label in config.json does not map numbers to labels")
        return None
    if numbers != list(range(len(numbers))) or not all(isinstance(one, str) for one in labels):
        problems.append("id2label in config.json does not map the numbers from 0 on to labels")
        return None
    if all(_PLACEHOLDER.fullmatch(label) for label in labels):
        problems.append(
            f"id2label in config.json has placeholders only, from {labels[0]!r} to {labels[-1]!r}"
        )
        return None
    return labels


def write_labels(labels: tuple[str, ...] | tuple[tuple[str, str], ...], path: Path) -> None:
    """Write labels to a file that `read_labels` reads."""
    path.write_text(json.dumps(labels), encoding="utf-8")  # in ASCII: half a surrogate pair has no UTF-8
