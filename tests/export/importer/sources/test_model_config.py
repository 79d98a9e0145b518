"""Labels, task and kind of model in `config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.label_file import read_labels
from fovea.export.importer.sources.model_config import (
    read_model_config,
    require_image_classifier,
    write_labels,
)
from fovea.service.artifact.contract import Task


def test_labels_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    config = {"id2label": {"10": "k", **{str(index): chr(97 + index) for index in range(10)}}}
    labels = read_model_config(config).labels
    assert labels == tuple("abcdefghijk")
    write_labels(labels, tmp_path / "labels.json")
    assert read_labels(tmp_path / "labels.json").names == labels


def test_timm_labels_have_their_descriptions(tmp_path: Path) -> None:
    config = {
        "architecture": "vit",
        "label_names": ["n01440764", "n01443537"],
        "label_descriptions": {"n01440764": "tench", "n01443537": "goldfish"},
    }
    labels = read_model_config(config).labels
    assert labels is not None
    write_labels(labels, tmp_path / "labels.json")
    assert read_labels(tmp_path / "labels.json").names == ("tench", "goldfish")
    assert read_labels(tmp_path / "labels.json").ids == ("n01440764", "n01443537")
    assert read_model_config({"architecture": "vit", "label_names": ["cat", "dog"]}).labels == ("cat", "dog")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "vit"}, "config.json has no id2label"),
        ({"architecture": "resnet18"}, "config.json has no label_names"),
        (
            {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}},
            "only, from 'LABEL_0' to 'LABEL_1'",
        ),
        ({"id2label": {"1": "a", "2": "b"}}, "does not map the numbers from 0 on"),
        ({"id2label": {"a": 0, "b": 1}}, "does not map numbers to labels"),
        ({"id2label": {"0": "a", "1": 7}}, "does not map the numbers from 0 on"),
        ({"id2label": ["a", "b"]}, "config.json has no id2label"),
    ],
)
def test_unusable_labels_are_problems(config: dict[str, Any], problem: str) -> None:
    model = read_model_config(config)
    assert model.labels is None
    assert len(model.problems) == 1
    assert problem in model.problems[0]


def test_task_follows_from_problem_type() -> None:
    assert read_model_config({"problem_type": "multi_label_classification"}).task is Task.MULTILABEL
    assert read_model_config({"problem_type": "single_label_classification"}).task is Task.MULTICLASS
    assert read_model_config({"problem_type": None}).task is None


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("YolosForObjectDetection", "an object detector"),
        ("OwlViTForZeroShotObjectDetection", "an object detector"),
        ("BeitForSemanticSegmentation", "a segmentation model"),
        ("BertForSequenceClassification", "a text model"),
        ("LlamaForCausalLM", "a text model"),
        ("GPT2LMHeadModel", "a text model"),
        ("WhisperForConditionalGeneration", "a model that generates text"),
        ("VideoMAEForVideoClassification", "a classifier of videos"),
        ("ViTModel", "a network without a classifier"),
        ("CLIPModel", "a network without a classifier"),
        ("ViTForMaskedImageModeling", "a network without a classifier"),
    ],
)
def test_other_kinds_of_models_are_refused(architecture: str, kind: str) -> None:
    with pytest.raises(ImportRefused, match=rf"^hf:a/b is {kind} \({architecture}\); Fovea serves"):
        require_image_classifier("hf:a/b", {"architectures": [architecture]}, "image-classification")


@pytest.mark.parametrize(
    ("tag", "kind"),
    [
        ("text-classification", "a text model"),
        ("fill-mask", "a text model"),
        ("object-detection", "an object detector"),
        ("zero-shot-image-classification", "a model that compares images with texts"),
        ("reinforcement-learning", "another kind of model"),
    ],
)
def test_other_tags_are_refused_without_an_architecture(tag: str, kind: str) -> None:
    with pytest.raises(ImportRefused, match=f"^hf:a/b is {kind}.*{tag}"):
        require_image_classifier("hf:a/b", {}, tag)


@pytest.mark.parametrize(
    "architecture",
    [
        "ViTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "PerceiverForImageClassificationLearned",
    ],
)
def test_image_classifiers_are_accepted(architecture: str) -> None:
    require_image_classifier("hf:a/b", {"architectures": [architecture]}, "image-feature-extraction")
    require_image_classifier("hf:a/b", {"architecture": "resnet18"}, "image-classification")
    require_image_classifier("folder", {})
