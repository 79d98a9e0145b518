"""Distillation (Hinton, Vinyals and Dean, 2015): what a teacher says of the training images.

It is asked once for each view of each image, before the pupil's first step: a larger network's forward pass
costs more than all of a smaller one's step. Where the pupil sees a blank square, the teacher has seen what
was there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from model import evaluate
from model.batches import Views
from model.data import Data
from model.files import WriteError
from model.net import Net, NetConfig
from model.recipe import Recipe

PATTERN: Final = "answers-*.f16"
"""Files of answers, in a run's folder; the star is of what they are answers to."""


def ask(
    teacher: Net, pupil: NetConfig, data: Data, recipe: Recipe, folder: Path, console: Console
) -> npt.NDArray[np.float16]:
    """Logits, float16 (views, N, n), of all views of the training images.

    They are kept in `folder`, a view at a time, and not asked for again where the same teacher was asked of
    the same images before. Raises `WriteError` where there is no room for them.
    """
    views = Views(data.train, recipe)
    shape = (views.count, len(data.train), teacher.head.out_features)
    path = folder / PATTERN.replace("*", _digest(teacher, pupil, recipe, shape))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for other in set(folder.glob(PATTERN)) - {path}:
            other.unlink()
        _complete(path, teacher, views, recipe, shape, console)
        return np.memmap(path, np.float16, "r", shape=shape)
    except OSError as error:
        raise WriteError(f"cannot keep the teacher's answers in {folder}: {error.strerror}") from None


def _complete(
    path: Path, teacher: Net, views: Views, recipe: Recipe, shape: tuple[int, int, int], console: Console
) -> None:
    """Append those views that the file does not hold as a whole."""
    count, images, logits = shape
    one = 2 * images * logits  # bytes of a view
    with path.open("ab") as file:
        whole = file.tell() // one
        file.truncate(whole * one)
        for view in range(whole, count):
            for indices in torch.split(torch.arange(images), evaluate.BATCH):
                said = evaluate.logits(teacher, views.pixels(view, indices), recipe.precision)
                file.write(said.half().numpy().tobytes())
            console.print(f"asked the teacher: view {view + 1} of {count}")


def _digest(teacher: Net, pupil: NetConfig, recipe: Recipe, shape: tuple[int, int, int]) -> str:
    """Of all that decides the answers. The images are known by their mean and deviation."""
    asked = [shape, pupil.mean, pupil.std, recipe.seed, recipe.flip, recipe.translate, recipe.precision]
    digest = hashlib.sha256(json.dumps(asked).encode())
    for tensor in teacher.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
