"""The backbone: weights that training on few images starts from.

They are the convolutions of a `cnn_large`, trained by `fovea train` on 190 classes of Tiny ImageNet at 64 px
and stored as float16 beside this module. `python -m fovea.model.networks.backbone RUN` makes the file from a
run's folder.
"""

from __future__ import annotations

import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes

from fovea.model.data.dataset import Dataset
from fovea.model.data.inventory import join_names
from fovea.model.networks.checkpoint import METADATA_KEY, Checkpoint, load_checkpoint
from fovea.model.networks.pretrained import PretrainedError, PretrainedWeights, read_pretrained
from fovea.service.atomic_files import write_file

BACKBONE: Final = "backbone"
"""Name of the backbone as a source of weights."""

SCRATCH: Final = "scratch"
"""Name of random weights as a source."""

BACKBONE_FILE: Final = Path(__file__).with_name("backbone.safetensors")

BACKBONE_NET: Final = "cnn_large"

BACKBONE_SIDE: Final = 64
"""Side of the images that the backbone was trained on, in pixels."""

BACKBONE_SIDES: Final = range(64, 128)
"""Sides of the input for which a `cnn_large` has the backbone's layers."""

_GREY_LEVELS: Final = 4
"""Mean difference between the channels of grey images, in levels of 255; JPEG gives them a little colour."""

_SAMPLE_IMAGES: Final = 200

_MIN_HELD_OUT: Final = 50
"""Number of held-out images below which their accuracy is a rough guess."""


def can_start_from_backbone(net: str | None, size: int | None) -> bool:
    """Return whether the backbone fits a network and the side of its input; None is a free choice."""
    return net in (None, BACKBONE_NET) and (size is None or size in BACKBONE_SIDES)


def require_backbone_fits(net: str | None, size: int | None) -> None:
    """Raise `PretrainedError` unless the backbone fits a network and the side of its input in pixels."""
    if not can_start_from_backbone(net, size):
        sides = f"{BACKBONE_SIDES[0]} to {BACKBONE_SIDES[-1]} px"
        chosen = " ".join([net or BACKBONE_NET, *([f"at {size} px"] if size else [])])
        raise PretrainedError(
            f"--from {BACKBONE} is a {BACKBONE_NET} for images of {sides}, not a {chosen}; leave out --net "
            f"and --size, or pass --from {SCRATCH}"
        )


def find_doubts(data: Dataset) -> list[str]:
    """Return a sentence, with a better command, for each reason to train these images in another way."""
    doubts = []
    sample = data.train.pixels[torch.linspace(0, len(data.train) - 1, _SAMPLE_IMAGES).long()].float()
    if float((sample.amax(dim=3) - sample.amin(dim=3)).mean()) < _GREY_LEVELS:
        doubts.append(
            f"the images are grey, and the {BACKBONE} knows photographs in colour: compare with "
            f"--from {SCRATCH} --out another folder"
        )
    held_out = len(data.validation) + len(data.conformal)
    if held_out < _MIN_HELD_OUT and not len(data.test):
        margin = 100 / math.sqrt(held_out)  # two standard errors at an accuracy of 50 %
        doubts.append(
            f"only {held_out} images are held out, so the accuracy may be off by {min(margin, 50):.0f} "
            "points: add images, or pass --validation 0.3"
        )
    known = [label for label in data.labels if _normalize_name(label) in _read_classes()]
    if known:
        doubts.append(
            f"the {BACKBONE} was trained on images of {join_names(known, 5)}, so images from the same source "
            "are no test of it: keep images of your own for a folder `test`"
        )
    return doubts


def _normalize_name(label: str) -> str:
    return label.casefold().replace("_", " ").replace("-", " ")


@cache
def _read_classes() -> frozenset[str]:
    """Return the names of the classes that the backbone was trained on."""
    with safe_open(BACKBONE_FILE, framework="pt") as file:
        return frozenset(map(_normalize_name, json.loads(file.metadata()[METADATA_KEY])["classes"]))


def read_backbone() -> PretrainedWeights:
    """Read the weights. Raises `PretrainedError` if the file is missing."""
    if not BACKBONE_FILE.is_file():
        raise PretrainedError(f"this installation has no {BACKBONE_FILE.name}; pass --from {SCRATCH}")
    weights = read_pretrained(str(BACKBONE_FILE))
    return PretrainedWeights(BACKBONE, weights.tensors, weights.net, weights.mean, weights.std)


def write_backbone(checkpoint: Checkpoint, path: Path = BACKBONE_FILE) -> None:
    """Write the convolutions of a trained network as float16, with the facts of its training.

    Raises `PretrainedError` for another network or an unfinished run, and for weights that float16 cannot
    hold.
    """
    metadata = checkpoint.metadata
    if metadata["net"]["name"] != BACKBONE_NET or metadata["net"]["size"] != BACKBONE_SIDE:
        raise PretrainedError(f"the backbone is a {BACKBONE_NET} at {BACKBONE_SIDE} px")
    if "measured" not in metadata:
        raise PretrainedError("the run is not finished; continue it with `fovea train --resume`")
    tensors = {
        key: tensor.half().contiguous()
        for key, tensor in checkpoint.tensors.items()
        if key.startswith("features.") and not key.endswith("num_batches_tracked")
    }
    if wrong := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise PretrainedError(f"float16 cannot hold {', '.join(wrong)}")
    facts: dict[str, Any] = {
        "net": metadata["net"],
        "labels": [],  # without a head
        "classes": metadata["labels"],
        **{key: metadata[key] for key in ("recipe", "data", "measured", "command", "commit", "torch")},
    }
    write_file(path, to_bytes(tensors, metadata={METADATA_KEY: json.dumps(facts)}))


if __name__ == "__main__":
    write_backbone(load_checkpoint(Path(sys.argv[1])))
    print(f"wrote {BACKBONE_FILE}, {BACKBONE_FILE.stat().st_size / 1e6:.1f} MB")
