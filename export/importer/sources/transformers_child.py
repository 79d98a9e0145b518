"""Conversion of a classifier of transformers from safetensors to ONNX, and answers of its own pipeline.

Runs as a process of its own: `python -m fovea.export.importer.sources.transformers_child`.
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
    """Run `export FOLDER HEIGHT WIDTH FILE` or `answer FOLDER WITH_MODEL RESULT IMAGE…`."""
    warnings.simplefilter("ignore")
    if action == "export":
        height, width, file = arguments
        export_model(Path(folder), int(height), int(width), Path(file))
    else:
        with_model, result, *images = arguments
        answer_images(Path(folder), with_model == "model", Path(result), [Path(one) for one in images])


def load_model(folder: Path) -> Any:
    """Return the classifier with all its weights, in float32.

    Only safetensors are read, and no code of the repository runs. Raises `ImportRefused` if weights are
    missing: the library would fill them with random numbers.
    """
    import torch
    from transformers import AutoModelForImageClassification

    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        if "trust_remote_code" in message:
            message = "it needs code of its own, which Fovea does not run; export it to ONNX"
        raise ImportRefused(f"transformers cannot load the model: {message[:400]}") from None
    missing = sorted({*report["missing_keys"], *(one[0] for one in report.get("mismatched_keys", ()))})
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ImportRefused(
            f"model.safetensors lacks weights of the classifier ({', '.join(missing[:3])}{more}); it is a "
            "network without a trained classifier, or of another size"
        )
    return model.eval()


def export_model(folder: Path, height: int, width: int, file: Path) -> None:
    """Write the classifier as ONNX, from normalised values (n, 3, height, width) to logits."""
    import torch

    model = load_model(folder)

    class Logits(torch.nn.Module):
        """The classifier with its logits as the only output."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            """Return the logits (n, labels)."""
            return self.model(pixel_values=pixel_values).logits

    export_network(Logits(), height, width, file)


def answer_images(folder: Path, with_model: bool, result: Path, images: list[Path]) -> None:
    """Write the values that the library's image processor makes of the images, and the model's logits.

    The processor is the one that computes with Pillow: the one with torchvision differs by a grey level.
    """
    import numpy as np
    import transformers
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, backend="pil"
    )
    values = []
    for path in images:
        with Image.open(path) as image:
            values.append(processor(image.convert("RGB"), return_tensors="np")["pixel_values"][0])
    arrays: dict[str, Any] = {"values": np.stack(values).astype(np.float32)}
    if with_model:
        import torch

        model = load_model(folder)
        with torch.no_grad():
            logits = [model(pixel_values=torch.from_numpy(one[None])).logits for one in arrays["values"]]
        arrays["outputs"] = torch.cat(logits).numpy()
    name = f"{type(processor).__name__} of transformers {transformers.__version__}"
    np.savez(result, name=np.array(json.dumps(name)), **arrays)


if __name__ == "__main__":
    run_child(convert)
