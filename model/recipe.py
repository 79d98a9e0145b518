"""The recipe of a training run: every number that decides the result, beside the data and the network."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from fovea.service.errors import FoveaError


class Precision(StrEnum):
    """In what the convolutions of a training step are computed; weights and sums are always float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    """Where the processor has it in hardware: twice as fast, and as accurate in the end."""


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum under a one-cycle schedule.

    Rates, momentum and decay are those of airbench94 (Keller Jordan, 2024), for batches of 256.
    """

    epochs: int = 20
    batch: int = 256
    """Images per step."""
    peak_lr: float = 0.375
    """Reached after `warm_up`, then falls linearly to 0."""
    warm_up: float = 0.2
    """Fraction of all steps."""
    momentum: float = 0.85
    weight_decay: float = 1.33e-3
    """On convolutions and the head; not on biases and batch normalisation."""
    offsets_faster: float = 64.0
    """How many times the rate, and as much less decay, the offsets of the `cnn`'s normalisation have."""
    label_smoothing: float = 0.1
    flip: bool = True
    """Mirror each image left to right every other epoch, as airbench does."""
    translate: float = 1 / 8
    """Largest random shift, as a fraction of the side; the edge is mirrored."""
    cutout: float = 1 / 4
    """Side of the square that is blanked (DeVries and Taylor, 2017), as a fraction of the image's."""
    precision: Precision = Precision.FLOAT32
    teaching: float = 0.0
    """Weight of a teacher's answers in the loss, 0 … 1; the rest is of the labels."""
    views: int = 8
    """With a teacher: epochs after which the images are mirrored and moved as before; an even number."""
    softness: float = 2.0
    """Temperature at which teacher and pupil are compared (Hinton, Vinyals and Dean, 2015)."""
    validation: float = 0.1
    """Fraction of each label's training images that is held out."""
    seed: int = 0
    epoch_steps: int | None = None
    """Steps of an epoch at most, where the time does not allow for all images; None: as many as they fill."""


_LEAST_STEPS: Final = 1000
"""Below this many a network from random weights has hardly begun, whatever the data."""

_PASSES: Final = 360_000
"""Images seen in all epochs of a small set: 12 to 20 minutes at the 515 to 300 a second of two cores."""

_LEAST_EPOCHS: Final = 10
"""However long an image takes."""


class RecipeError(FoveaError):
    """The run cannot be as asked."""


def recipe_for(
    images: int, *, epochs: int | None = None, tuned: bool = False, cost: float = 1.0, **given: object
) -> Recipe:
    """Return the recipe for a set of `images` to train on; `epochs` None lets it choose, `given` are other
    fields.

    A small set gets smaller batches, so that an epoch has 32 steps at least, a learning rate that falls
    with them (linear scaling: Goyal et al., 2017), and more epochs. `tuned` starts from weights that
    know images already: they take a tenth of the rate, and half the epochs. `cost` is the time of an image
    relative to the usual: dearer images are seen less often, so that the run takes about as long.
    """
    large = replace(Recipe(), **given)  # type: ignore[arg-type]  # the caller names fields
    batch = min(large.batch, 2 ** int(math.log2(max(8, images // 32))))
    enough = math.ceil(_LEAST_STEPS / max(1, images // batch))
    cost = max(1.0, cost)
    least = min(large.epochs, max(_LEAST_EPOCHS, round(large.epochs / cost)))
    chosen = max(least, min(100, max(enough, int(_PASSES / cost) // max(1, images))))
    return replace(
        large,
        epochs=epochs or (chosen // 2 if tuned else chosen),
        batch=batch,
        peak_lr=large.peak_lr * batch / large.batch * (0.1 if tuned else 1.0),
    )


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """One cycle (Smith and Topin, 2017), piecewise linear: 0 to the peak, and back to 0."""
    peak = max(1.0, recipe.warm_up * steps)
    falling = (steps - step) / max(1.0, steps - peak)
    return recipe.peak_lr * min((step + 1) / peak, falling, 1.0)
