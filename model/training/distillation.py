"""Distillation (Hinton, Vinyals and Dean, 2015): teacher logits for the training images.

The teachers' logits are computed once for each view of each image, before the student's first step: the
forward pass of a large network costs more than a whole training step of a small one. The saving pays for the
mirror image too. The mean of both logits, and over all teachers, is more accurate than any one of them.
Teachers see the image without cutout.
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

from fovea.model.data.dataset import Dataset
from fovea.model.evaluation import evaluate
from fovea.model.networks.network import Net, NetConfig
from fovea.model.recipe import Recipe
from fovea.model.training.batches import Views
from fovea.service.atomic_files import WriteError

LOGITS_PATTERN: Final = "answers-*.f16"
"""File name pattern of cached teacher logits in a run's folder; the star stands for a digest."""


def compute_teacher_logits(
    teachers: Sequence[Net],
    student_config: NetConfig,
    data: Dataset,
    recipe: Recipe,
    folder: Path,
    console: Console,
) -> npt.NDArray[np.float16]:
    """Return the teachers' logits, float16 (views, N, n), for all views of the training images.

    The logits are cached in `folder` one view at a time and reused for the same teachers and images. Raises
    `WriteError` if the logits cannot be stored.
    """
    views = Views(data.train, recipe)
    shape = (views.count, len(data.train), teachers[0].head.out_features)
    path = folder / LOGITS_PATTERN.replace("*", _compute_digest(teachers, student_config, recipe, shape))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old_path in set(folder.glob(LOGITS_PATTERN)) - {path}:
            old_path.unlink()
        _append_views(path, teachers, views, recipe, shape, console)
        return np.memmap(path, np.float16, "r", shape=shape)
    except OSError as error:
        raise WriteError(f"cannot store the teacher's logits in {folder}: {error.strerror}") from None


def _append_views(
    path: Path,
    teachers: Sequence[Net],
    views: Views,
    recipe: Recipe,
    shape: tuple[int, int, int],
    console: Console,
) -> None:
    """Append the views that the file does not yet hold completely."""
    count, images, logit_count = shape
    view_bytes = 2 * images * logit_count  # bytes per view
    with path.open("ab") as file:
        complete_views = file.tell() // view_bytes
        file.truncate(complete_views * view_bytes)  # a kill may have left a part of a view
        for view in range(complete_views, count):
            for indices in torch.split(torch.arange(images), evaluate.BATCH_SIZE):
                batch_logits = average_logits(teachers, views.get_pixels(view, indices), recipe)
                file.write(batch_logits.half().numpy().tobytes())
            console.print(f"computed teacher logits: view {view + 1} of {count}")


def average_logits(teachers: Sequence[Net], pixels: Tensor, recipe: Recipe) -> Tensor:
    """Return the mean logits, float32 (B, n), for uint8 pixels (B, H, W, 3).

    The mean includes the mirror images unless the recipe has no flips.
    """
    variants = [pixels, pixels.flip(2)] if recipe.flip else [pixels]
    all_logits = [
        evaluate.compute_logits(teacher, variant, recipe.precision)
        for teacher in teachers
        for variant in variants
    ]
    return torch.stack(all_logits).mean(dim=0)  # (B, n)


def _compute_digest(
    teachers: Sequence[Net], student_config: NetConfig, recipe: Recipe, shape: tuple[int, int, int]
) -> str:
    """Return a digest of everything that determines the logits.

    The images are identified by their mean and deviation.
    """
    parameters = [
        "mirrored",
        shape,
        student_config.mean,
        student_config.std,
        recipe.seed,
        recipe.flip,
        recipe.translate,
        recipe.precision,
    ]
    digest = hashlib.sha256(json.dumps(parameters).encode())
    for tensor in chain.from_iterable(teacher.state_dict().values() for teacher in teachers):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
