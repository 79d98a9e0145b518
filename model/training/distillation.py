"""Distillation (Hinton, Vinyals and Dean, 2015): what teachers say of the training images.

They are asked once for each view of each image, before the pupil's first step: a larger network's forward
pass costs more than all of a smaller one's step. So they can be asked of its mirror image too: the mean of
both logits, and of all teachers', is right more often than any of them. Where the pupil sees a blank square,
the teachers have seen what was there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor

from fovea.model.atomic_files import WriteError
from fovea.model.data.dataset import Data
from fovea.model.evaluation import evaluate
from fovea.model.networks.network import Net, NetConfig
from fovea.model.recipe import Recipe
from fovea.model.training.batches import Views

PATTERN: Final = "answers-*.f16"
"""Files of answers, in a run's folder; the star is of what they are answers to."""


def ask(
    teachers: Sequence[Net], pupil: NetConfig, data: Data, recipe: Recipe, folder: Path, console: Console
) -> npt.NDArray[np.float16]:
    """Logits, float16 (views, N, n), of all views of the training images.

    They are kept in `folder`, a view at a time, and not asked for again where the same teachers were asked
    of the same images before. Raises `WriteError` where there is no room for them.
    """
    views = Views(data.train, recipe)
    shape = (views.count, len(data.train), teachers[0].head.out_features)
    path = folder / PATTERN.replace("*", _digest(teachers, pupil, recipe, shape))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for other in set(folder.glob(PATTERN)) - {path}:
            other.unlink()
        _complete(path, teachers, views, recipe, shape, console)
        return np.memmap(path, np.float16, "r", shape=shape)
    except OSError as error:
        raise WriteError(f"cannot keep the teacher's answers in {folder}: {error.strerror}") from None


def _complete(
    path: Path,
    teachers: Sequence[Net],
    views: Views,
    recipe: Recipe,
    shape: tuple[int, int, int],
    console: Console,
) -> None:
    """Append those views that the file does not hold as a whole."""
    count, images, logits = shape
    one = 2 * images * logits  # bytes of a view
    with path.open("ab") as file:
        whole = file.tell() // one
        file.truncate(whole * one)
        for view in range(whole, count):
            for indices in torch.split(torch.arange(images), evaluate.BATCH):
                said = mean_logits(teachers, views.pixels(view, indices), recipe)
                file.write(said.half().numpy().tobytes())
            console.print(f"asked for answers: view {view + 1} of {count}")


def mean_logits(teachers: Sequence[Net], pixels: Tensor, recipe: Recipe) -> Tensor:
    """Of uint8 pixels (B, H, W, 3), and of their mirror images unless the recipe has none: float32 (B, n)."""
    seen = [pixels, pixels.flip(2)] if recipe.flip else [pixels]
    said = [evaluate.logits(teacher, each, recipe.precision) for teacher in teachers for each in seen]
    return torch.stack(said).mean(dim=0)


def _digest(teachers: Sequence[Net], pupil: NetConfig, recipe: Recipe, shape: tuple[int, int, int]) -> str:
    """Of all that decides the answers. The images are known by their mean and deviation."""
    asked = [
        "mirrored",
        shape,
        pupil.mean,
        pupil.std,
        recipe.seed,
        recipe.flip,
        recipe.translate,
        recipe.precision,
    ]
    digest = hashlib.sha256(json.dumps(asked).encode())
    for tensor in chain.from_iterable(teacher.state_dict().values() for teacher in teachers):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
