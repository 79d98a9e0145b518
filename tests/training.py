"""Small drawn data sets, and real training runs on them."""

from __future__ import annotations

import io
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from fovea.model.data.dataset import Dataset, load_dataset
from fovea.model.data.pixels import Pixels, compute_statistics
from fovea.model.networks.checkpoint import Checkpoint
from fovea.model.networks.network import Net, NetConfig
from fovea.model.recipe import Recipe
from fovea.model.training.trainer import train_net
from fovea.model.training.training_run import InitialState

COLOURS = {"blue": (40, 50, 200), "green": (50, 190, 60), "red": (200, 50, 40)}
SHORT_RECIPE = Recipe(epochs=3, batch=5)
"""A recipe of 3 x 2 steps for three labels of five images each, one of them held out."""


def draw_images(
    folder: Path, *labels: str, count: int = 5, seed: int = 0, side: int = 20, colours: tuple[str, ...] = ()
) -> Path:
    """Write different squares of each label's colour to `folder/<label>/<number>.png`; return `folder`.

    `colours` are the names of the colours if the labels are not.
    """
    random = np.random.default_rng(seed)
    for label, colour in zip(labels or COLOURS, colours or labels or COLOURS, strict=True):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = np.array(COLOURS[colour]) + random.normal(0, 30, (side, side, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / label / f"{number}.png")
    return folder


def draw_dataset(folder: Path, *labels: str, count: int = 5, validation: float = 0.2) -> Dataset:
    """Return a data set of such squares, decoded to 16 x 16."""
    return load_dataset(draw_images(folder, *labels, count=count), size=16, validation=validation, seed=0)


def train_quietly(
    data: Dataset,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    teacher: Net | None = None,
    on_epoch: Callable[[dict[str, float]], None] = lambda entry: None,
) -> Checkpoint | None:
    """Run a real training without output."""
    console = Console(file=io.StringIO())
    net = make_net(data, recipe)
    initial_state = InitialState(
        net, [teacher] if teacher else [], source=str(data.name), command="fovea train"
    )
    return train_net(data, recipe, out, initial_state, resume=resume, console=console, on_epoch=on_epoch)


@contextmanager
def limit_file_size(file_bytes: int) -> Iterator[None]:
    """Limit the size of files to `file_bytes`, so that writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def stack_pixels(pixels: Pixels) -> Tensor:
    """Return all pixels, uint8 (N, H, W, 3), in memory."""
    return pixels[torch.arange(len(pixels))]


def make_net(data: Dataset, recipe: Recipe) -> Net:
    """Return a small network with weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    mean, std = compute_statistics(data.train.pixels)
    size = data.geometry.height
    return Net(NetConfig(data.task, len(data.labels), size=size, widths=(8, 16, 96), mean=mean, std=std))
