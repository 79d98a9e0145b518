"""Conversion of a classifier of timm from safetensors to ONNX, and answers of its own pipeline.

Runs as a process of its own: `python -m fovea.export.importer.sources.timm_child`.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.sources.child import run_child
from fovea.export.importer.sources.exporter import export_network


def convert(action: str, folder: str, *arguments: str) -> None:
    """Run `export FOLDER HEIGHT WIDTH FILE LABELS` or `answer FOLDER WITH_MODEL RESULT IMAGE…`."""
    warnings.simplefilter("ignore")
    if action == "export":
        height, width, file, labels = arguments
        model = load_model(Path(folder))
        write_imagenet_labels(model, Path(labels))
        export_network(model, int(height), int(width), Path(file))
    else:
        with_model, result, *images = arguments
        answer_images(Path(folder), with_model == "model", Path(result), [Path(one) for one in images])


def load_model(folder: Path) -> Any:
    """Return the network with the weights in `model.safetensors`. Raises `ImportRefused`."""
    import timm

    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ImportRefused(f"timm cannot load the model: {' '.join(str(error).split())[:400]}") from None


def write_imagenet_labels(model: Any, file: Path) -> None:
    """Write the labels of ImageNet or of a subset, if timm knows them for the network."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        pairs = [
            (info.index_to_label_name(index), info.index_to_description(index))
            for index in range(model.num_classes)
        ]
        file.write_text(json.dumps(pairs), encoding="utf-8")


def answer_images(folder: Path, with_model: bool, result: Path, images: list[Path]) -> None:
    """Write the values that timm's transform for evaluation makes of the images, and the logits."""
    import numpy as np
    import timm
    import torch
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    transform = create_transform(
        **resolve_data_config({}, pretrained_cfg=config.get("pretrained_cfg", config)), is_training=False
    )
    values = []
    for path in images:
        with Image.open(path) as image:
            values.append(transform(image.convert("RGB")))
    arrays: dict[str, Any] = {"values": torch.stack(values).numpy().astype(np.float32)}
    if with_model:
        model = load_model(folder)
        with torch.no_grad():
            arrays["outputs"] = torch.cat([model(one[None]) for one in values]).numpy()
    np.savez(result, name=np.array(json.dumps(f"the transform of timm {timm.__version__}")), **arrays)


if __name__ == "__main__":
    run_child(convert)
