"""Conversion of a classifier of torchvision to ONNX with the facts of its weights, and its own answers.

Runs as a process of its own: `python -m fovea.export.importer.sources.torchvision_child`.
"""

from __future__ import annotations

import difflib
import json
import warnings
from pathlib import Path
from typing import Any

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.sources.child import run_child
from fovea.export.importer.sources.exporter import export_network
from fovea.export.importer.sources.torch_child import restrict_pickles


def convert(action: str, name: str, weights_name: str, *arguments: str) -> None:
    """Run `export NAME WEIGHTS FILE FACTS` or `answer NAME WEIGHTS RESULT IMAGE…`."""
    warnings.simplefilter("ignore")
    if action == "export":
        file, facts = arguments
        export_model(name, weights_name, Path(file), Path(facts))
    else:
        result, *images = arguments
        answer_images(name, weights_name, Path(result), [Path(one) for one in images])


def find_weights(name: str, weights_name: str) -> Any:
    """Return the weights of a classifier; an empty name for the best. Raises `ImportRefused`."""
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=3)
        advice = f"did you mean {' or '.join(nearest)}?" if nearest else f"it has {', '.join(names[:5])}, …"
        raise ImportRefused(f"torchvision has no classifier {name!r}; {advice}")
    weights = models.get_model_weights(name)
    if not weights_name:
        return weights.DEFAULT
    try:
        return weights[weights_name]
    except KeyError:
        choices = ", ".join(one.name for one in weights)
        raise ImportRefused(f"{name} has no weights {weights_name!r}; it has {choices}") from None


def load_model(name: str, weights: Any) -> Any:
    """Return the network with its weights, from torch's cache or the network. Raises `ImportRefused`."""
    from torchvision import models

    try:
        with restrict_pickles():
            return models.get_model(name, weights=weights, progress=False).eval()
    except ImportRefused as error:
        raise ImportRefused(f"the file at {weights.url} {error}") from None
    except (OSError, RuntimeError) as error:
        raise ImportRefused(
            f"cannot load the weights of {name} from {weights.url}: {' '.join(str(error).split())[:300]}"
        ) from None


def export_model(name: str, weights_name: str, file: Path, facts: Path) -> None:
    """Write the network as ONNX, and the facts of its weights as JSON."""
    weights = find_weights(name, weights_name)
    transform = weights.transforms()
    values = {
        "weights": weights.name,
        "labels": list(weights.meta["categories"]),
        "resize": list(transform.resize_size),
        "crop": list(transform.crop_size),
        "interpolation": transform.interpolation.value,
        "mean": list(transform.mean),
        "std": list(transform.std),
        "licence": weights.meta.get("license"),
    }
    facts.write_text(json.dumps(values), encoding="utf-8")
    sides = (*values["crop"], values["crop"][0])
    export_network(load_model(name, weights), sides[0], sides[1], file)


def answer_images(name: str, weights_name: str, result: Path, images: list[Path]) -> None:
    """Write the values that the transform of the weights makes of the images, and the logits."""
    import numpy as np
    import torch
    import torchvision
    from PIL import Image

    weights = find_weights(name, weights_name)
    transform, model = weights.transforms(), load_model(name, weights)
    values = []
    for path in images:
        with Image.open(path) as image:
            values.append(transform(image.convert("RGB")))
    with torch.no_grad():
        outputs = torch.cat([model(one[None]) for one in values]).numpy()
    label = json.dumps(f"the transform of torchvision {torchvision.__version__}")
    np.savez(result, name=np.array(label), values=torch.stack(values).numpy(), outputs=outputs)


if __name__ == "__main__":
    run_child(convert)
