"""Models and image processors of transformers, saved by transformers itself with random weights."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fovea.export.importer.sources.comparison import write_images
from fovea.export.importer.sources.processor_config import CLASSES, read_processor_config
from fovea.service.artifact.geometry import Geometry, PixelPath
from fovea.service.inference.preprocess import decode_image
from tests.export.importer.sources.imports import import_source, read_refusal
from tests.export.importer.sources.layouts import LABELS, build_hub_graph, make_config, write_files
from tests.tools import needs_transformers

pytestmark = [needs_transformers, pytest.mark.long]

LABEL_MAPS = {"id2label": dict(enumerate(LABELS)), "label2id": {one: at for at, one in enumerate(LABELS)}}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

PROCESSORS: dict[str, dict[str, Any]] = {
    "Beit": {"size": {"height": 40, "width": 40}, "do_center_crop": True, "crop_size": 32},
    "Bit": {"size": {"shortest_edge": 36}, "crop_size": 32},
    "CLIP": {"size": {"shortest_edge": 32}, "crop_size": 32},
    "ConvNext": {"size": {"shortest_edge": 32}},
    "DeiT": {"size": {"height": 36, "width": 36}, "crop_size": 32},
    "EfficientNet": {"size": {"height": 32, "width": 32}, "resample": 0},
    "Levit": {"size": {"shortest_edge": 32}, "crop_size": 32},
    "MobileNetV1": {"size": {"shortest_edge": 36}, "crop_size": 32},
    "MobileNetV2": {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 30}},
    "MobileViT": {"size": {"shortest_edge": 36}, "crop_size": 32},
    "PoolFormer": {"size": {"shortest_edge": 32}, "crop_size": 32, "crop_pct": 0.95},
    "Pvt": {"size": {"height": 32, "width": 32}},
    "Segformer": {"size": {"height": 32, "width": 32}},
    "Siglip": {"size": {"height": 32, "width": 32}},
    "ViT": {"size": {"height": 32, "width": 48}},
}
"""Processors with small sizes; everything else is the default of the class."""

OTHER_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "convnext from 384 on": ("ConvNext", {"size": {"shortest_edge": 384}}),
    "crop larger than the image": ("CLIP", {"size": {"shortest_edge": 20}, "crop_size": 32}),
    "crop without a resize": ("CLIP", {"do_resize": False, "crop_size": 32}),
    "efficientnet with an offset": (
        "EfficientNet",
        {"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5, "rescale_offset": True},
    ),
    "efficientnet without a head": (
        "EfficientNet",
        {"size": {"height": 32, "width": 32}, "include_top": False},
    ),
    "no rescaling": (
        "ViT",
        {"size": {"height": 32, "width": 32}, "do_rescale": False, "image_mean": [99.0] * 3},
    ),
    "no normalisation": ("ViT", {"size": {"height": 32, "width": 32}, "do_normalize": False}),
    "lanczos": ("ViT", {"size": {"height": 32, "width": 32}, "resample": 1}),
    "poolformer without a share": (
        "PoolFormer",
        {"size": {"height": 40, "width": 36}, "crop_size": 32},
    ),
}


def create_processor(name: str, options: dict[str, Any]) -> Any:
    """Return a processor of transformers that computes with Pillow."""
    import importlib

    modules = {"MobileNetV1": "mobilenet_v1", "MobileNetV2": "mobilenet_v2"}
    module = modules.get(name, name.lower())
    path = f"transformers.models.{module}.image_processing_pil_{module}"
    return getattr(importlib.import_module(path), f"{name}ImageProcessorPil")(**options)


@pytest.mark.parametrize("form", [*PROCESSORS, *OTHER_FORMS])
def test_processor_of_transformers_is_reproduced(tmp_path: Path, form: str) -> None:
    name, options = (form, PROCESSORS[form]) if form in PROCESSORS else OTHER_FORMS[form]
    processor = create_processor(name, options)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    facts = read_processor_config(config)
    assert facts.problems == ()
    assert facts.geometry is not None
    assert facts.normalization is not None
    stated = facts.geometry
    geometry = Geometry(stated.height, stated.width, stated.steps, PixelPath.EXACT)
    scale = np.array(facts.normalization.std) / facts.normalization.scale
    for file in write_images(tmp_path, stated.height, stated.width):
        pixels = np.array(decode_image(file.read_bytes(), geometry, max_pixels=10_000_000).pixels)
        with Image.open(file) as image:
            expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
        difference = np.abs(facts.normalization(pixels[None])[0] - expected) * scale
        assert difference.max() < 1e-2, (form, file.name)


def test_every_class_of_the_table_has_the_defaults_of_transformers() -> None:
    for name in CLASSES.keys() - {"EfficientFormer", "DINOv3ViT"}:  # removed, and without Pillow
        processor = create_processor(name, {})
        stated = read_processor_config({"image_processor_type": f"{name}ImageProcessor"})
        saved = read_processor_config(json.loads(processor.to_json_string()))
        assert (stated.geometry, stated.normalization) == (saved.geometry, saved.normalization), name


# --- whole models --------------------------------------------------------------------------------


def save_vit(folder: Path, **options: Any) -> Path:
    """Save a small vision transformer with its processor."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(**SMALL, image_size=32, patch_size=8, **LABEL_MAPS)
    network = ViTForImageClassification(config)
    network.classifier.weight.data.mul_(100)  # else all probabilities are nearly the same
    network.save_pretrained(folder, **options)
    create_processor("ViT", {"size": {"height": 32, "width": 32}}).save_pretrained(folder)
    return folder


def test_safetensors_are_converted_and_compared(tmp_path: Path) -> None:
    report, engine = import_source(tmp_path, save_vit(tmp_path / "tiny-vit"))
    assert (report.model, engine.contract.labels) == ("tiny-vit", LABELS)
    comparison = report.comparison
    assert comparison is not None
    assert re.fullmatch(r"ViTImageProcessorPil of transformers 5\.\d+\.\d+", comparison.pipeline)
    assert (comparison.images, comparison.same_labels) == (32, 32)
    assert comparison.pixel_difference < 1e-2
    assert comparison.probability_difference < 1e-4


def test_weights_in_several_files_are_converted(tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "vit", max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    report, _ = import_source(tmp_path, folder)
    assert report.comparison is not None
    assert report.file == "model.safetensors.index.json"
    assert report.sha256 == hashlib.sha256((folder / report.file).read_bytes()).hexdigest()


def test_single_onnx_file_is_compared_with_the_processor_beside_it(tmp_path: Path) -> None:
    graph = build_hub_graph()
    files = {"model.onnx": graph, "config.json": make_config(LABELS)}
    folder = write_files(tmp_path / "vit", files)
    create_processor("ViT", {"size": {"height": 32, "width": 32}}).save_pretrained(folder)
    report, _ = import_source(tmp_path, folder / "model.onnx")
    assert report.comparison is not None
    assert report.comparison.pixel_difference < 1e-2


def test_network_without_a_trained_classifier_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_vit(tmp_path / "vit")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    message = read_refusal(tmp_path, folder)
    assert message.startswith("model.safetensors lacks weights of the classifier (classifier.bias, class")


def test_cut_safetensors_are_refused(tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "vit")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "transformers" in read_refusal(tmp_path, folder) or "SafetensorError" in read_refusal(
        tmp_path, folder
    )


def test_code_of_a_repository_does_not_run(tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForImageClassification": "own.OwnModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    message = read_refusal(tmp_path, folder)
    assert "needs code of its own, which Fovea does not run" in message
    assert not (tmp_path / "exploded").exists()
