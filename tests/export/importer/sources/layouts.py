"""Models with random weights, saved in the layouts of their tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx

from tests.export.classifiers import build_classifier

LABELS = ("tench", "goldfish", "great white shark", "tiger shark", "hammerhead")
PROCESSOR = {
    "crop_size": {"height": 16, "width": 16},
    "do_center_crop": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": {"shortest_edge": 20},
}
CARD = "---\nlicense: apache-2.0\ntags:\n- vision\n---\n# A model\n"


def make_config(labels: tuple[str, ...] = LABELS, **changes: Any) -> dict[str, Any]:
    """Return a `config.json` of transformers."""
    return {
        "architectures": ["ViTForImageClassification"],
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "model_type": "vit",
        **changes,
    }


def write_files(folder: Path, files: dict[str, Any]) -> Path:
    """Write files: bytes, text, a graph, or a value as JSON. Return the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, onnx.ModelProto):
            path.write_bytes(content.SerializeToString())
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def build_hub_graph(**options: Any) -> onnx.ModelProto:
    """Return a graph as optimum exports it: no axis of the input has a fixed length."""
    graph = build_classifier(**{"names": ("pixel_values", "logits"), "size": None, **options})
    for axis, name in enumerate(("batch_size", "num_channels", "height", "width")):
        graph.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    return graph


def write_hub_folder(folder: Path, **changes: Any) -> Path:
    """Write a repository as `onnx-community` has it; a change to None leaves a file out."""
    files = {
        "onnx/model.onnx": build_hub_graph(),
        "config.json": make_config(),
        "preprocessor_config.json": PROCESSOR,
        "README.md": CARD,
        **changes,
    }
    return write_files(folder, {name: one for name, one in files.items() if one is not None})
