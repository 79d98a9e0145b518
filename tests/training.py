"""Small labelled sets, drawn here, and real training runs on them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from model import train as training
from model.checkpoint import Checkpoint
from model.data import Data, load
from model.net import Net, NetConfig
from model.recipe import Recipe

COLOURS = {"blue": (40, 50, 200), "green": (50, 190, 60), "red": (200, 50, 40)}
BRIEF = Recipe(epochs=3, batch=5)
"""With three labels of five images, of which one is held out: 3 x 2 steps."""


def draw(folder: Path, *labels: str, count: int = 5, seed: int = 0) -> Path:
    """`folder/<label>/<number>.png`: squares of each label's colour, no two alike; returns `folder`."""
    random = np.random.default_rng(seed)
    for label in labels or COLOURS:
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = np.array(COLOURS[label]) + random.normal(0, 30, (20, 20, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / label / f"{number}.png")
    return folder


def drawn_data(folder: Path, *labels: str, count: int = 5, validation: float = 0.2) -> Data:
    """Such squares, read at 16 x 16."""
    return load(draw(folder, *labels, count=count), size=16, validation=validation, seed=0)


def train(data: Data, recipe: Recipe, out: Path, *, resume: bool = False) -> Checkpoint | None:
    """A real training run that says nothing."""
    quiet = Console(file=io.StringIO())
    beginning = training.Beginning(fresh_net(data, recipe), source=str(data.name), command="fovea train")
    return training.train(data, recipe, out, beginning, resume=resume, console=quiet)


def fresh_net(data: Data, recipe: Recipe) -> Net:
    """A small network with weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    mean, std = training.statistics(data.train.pixels)
    size = data.geometry.height
    return Net(NetConfig(data.task, len(data.labels), size=size, widths=(8, 16, 96), mean=mean, std=std))
