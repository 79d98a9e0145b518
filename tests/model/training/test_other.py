"""Training with images of other things: the score of `known` tells them from those of the labels."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fovea.model.data.choices import Choices
from fovea.model.data.dataset import Dataset, load_dataset
from fovea.model.evaluation.finalize import finalize_run
from fovea.model.networks.network import compute_other_loss
from fovea.model.recipe import Recipe
from fovea.model.training.batches import Batches
from tests.training import draw_images, train_quietly

RECIPE = Recipe(epochs=12, batch=8, peak_lr=0.02)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Thirty images of each of three colours, and sixty grey ones of other things."""
    folder = draw_images(tmp_path_factory.mktemp("set"), count=30)
    (folder / "grey").mkdir()
    random = np.random.default_rng(5)
    for number in range(60):
        pixels = random.normal(128, 40, (20, 20, 1)).repeat(3, axis=2).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "grey" / f"{number}.png")
    return load_dataset(folder, size=16, validation=0.2, seed=0, choices=Choices(other="grey"))


def measure_other(data: Dataset, recipe: Recipe, out: Path) -> tuple[dict[str, float], str]:
    """Train; return the figures of the held-out images of other things, and what was printed."""
    checkpoint = train_quietly(data, recipe, out)
    assert checkpoint
    text = io.StringIO()
    measured = finalize_run(checkpoint, data, out, Console(file=text)).metadata["measured"]
    assert measured["accuracy"] == 1
    return measured["other"], text.getvalue()


def test_other_things_are_told_from_labels(tmp_path: Path, data: Dataset) -> None:
    trained, text = measure_other(data, RECIPE, tmp_path / "trained")
    untrained, _ = measure_other(data, replace(RECIPE, other_weight=0.0), tmp_path / "untrained")
    assert trained["images"] == 12
    assert trained["accepted"] == 0 and trained["auroc"] == 1
    assert untrained["auroc"] < 1
    assert (
        "where 95% of the held-out images count as known, so do 0.0% of 12 images of other things"
        in " ".join(text.split())
    )


def test_each_step_has_other_images_and_all_of_them_in_turn(data: Dataset) -> None:
    recipe = Recipe(epochs=2, batch=8, other_share=0.5, translate=0.0, flip=False, cutout=0.0)
    batches = Batches(data, recipe, (0.5, 0.5, 0.5), None)
    try:
        steps = [batches.get(number) for number in range(2 * batches.steps)]
    finally:
        batches.close()
    others = torch.cat([step.pixels[8:] for step in steps])
    assert all(len(step.pixels) == 12 and len(step.targets) == 8 for step in steps)
    assert (others.amax(dim=3) == others.amin(dim=3)).all()  # grey
    assert data.other is not None
    assert len(np.unique(others.flatten(1).numpy(), axis=0)) == min(len(others), len(data.other))


def test_loss_is_that_of_its_formula() -> None:
    logits, other_logits = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, -1.0]])
    known, other = math.log(math.exp(2) + 1), math.log(math.e + math.exp(-1))
    score_loss = math.log(1 + math.exp(-known)) + math.log(1 + math.exp(other))
    label_loss = other - (1 + -1) / 2  # cross-entropy with equal probabilities
    assert math.isclose(
        float(compute_other_loss(logits, other_logits)), score_loss + label_loss, rel_tol=1e-6
    )
