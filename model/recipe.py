"""The recipe of a training run: every number that determines the result, besides data and network."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from fovea.service.errors import FoveaError


class Precision(StrEnum):
    """The precision of convolutions in a training step; weights and sums are always float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    """bfloat16, for processors with hardware support: twice as fast, with the same final accuracy."""


class Augmentation(StrEnum):
    """The part of an image that a training step sees."""

    SHIFT = "shift"
    """The whole image, moved by up to `translate`: for images that their object fills, as in CIFAR-10."""
    CROP = "crop"
    """A random part of the image, 35 to 100 % of its area."""
    PHOTO = "photo"
    """A part of the image, or the image small in another one, with other colours, blur and JPEG quality."""


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters for SGD with Nesterov momentum and a one-cycle schedule.

    Learning rates, momentum and weight decay are those of airbench94 (Keller Jordan, 2024), for a batch size
    of 256.
    """

    epochs: int = 20
    batch: int = 256
    """Images per step."""
    peak_lr: float = 0.375
    """Peak learning rate, reached after `warm_up`; it then falls linearly to 0."""
    warm_up: float = 0.2
    """Warm-up, as a fraction of all steps."""
    momentum: float = 0.85
    weight_decay: float = 1.33e-3
    """Weight decay of convolutions and the head; biases and batch normalisation have none."""
    offsets_faster: float = 64.0
    """Factor on the learning rate, and divisor of the decay, of the `cnn`'s normalisation offsets."""
    label_smoothing: float = 0.1
    flip: bool = True
    """Flag that mirrors each image left to right every other epoch, as airbench does."""
    translate: float = 1 / 8
    """Largest random shift, as a fraction of the side; the border is filled by mirroring."""
    cutout: float = 1 / 4
    """Side of the cutout square (DeVries and Taylor, 2017), as a fraction of the image's side."""
    augmentation: Augmentation = Augmentation.SHIFT
    growth: float = 0.0
    """Fraction of the epochs in which images grow from half their side to all of it; not for `shift`."""
    precision: Precision = Precision.FLOAT32
    other_share: float = 0.25
    """Images of other things in a step, as a fraction of the labelled ones; none without `--other`."""
    other_weight: float = 0.5
    """Weight of the two losses of images of other things."""
    teaching: float = 0.0
    """Weight of the distillation loss, 0 to 1; the label loss has the rest."""
    views: int = 8
    """Number of epochs after which a distillation run repeats its flips and shifts; an even number."""
    softness: float = 2.0
    """Distillation temperature of student and teacher (Hinton, Vinyals and Dean, 2015)."""
    validation: float = 0.1
    """Fraction of each label's training images that is held out."""
    seed: int = 0
    epoch_steps: int | None = None
    """Maximum number of steps per epoch for runs with a time limit; None uses all images."""

    def get_side(self, epoch: int, side: int) -> int:
        """Return the side of the images in an epoch, in pixels: a multiple of 8, from 16 to `side`.

        Small images cost less, and a network learns coarse features from them first (progressive resizing:
        Karras et al., 2018; Howard, 2018).
        """
        share = min(1.0, 0.5 + 0.5 * epoch / max(1.0, self.growth * self.epochs)) if self.growth else 1.0
        return min(side, max(_SMALLEST_SIDE, 8 * round(share * side / 8))) if share < 1 else side


_SMALLEST_SIDE: Final = 16
"""Side of the smallest images that all networks take, in pixels."""

_MIN_STEPS: Final = 1000
"""Minimum number of steps; below it, training from random weights has hardly begun, whatever the data."""

_TOTAL_IMAGES: Final = 360_000
"""Images seen in all epochs of a small set.

This takes 12 to 20 minutes at 515 to 300 images/s on two cores.
"""

_MIN_EPOCHS: Final = 10
"""Minimum number of epochs, whatever the cost of an image."""

SMALL_SET: Final = 10_000
"""Number of training images up to which a set counts as small.

Pretrained weights may move further for a larger one without being forgotten.
"""


class RecipeError(FoveaError):
    """The requested run is not possible."""


def build_recipe(
    images: int,
    *,
    epochs: int | None = None,
    fine_tuning: bool = False,
    cost: float = 1.0,
    **overrides: object,
) -> Recipe:
    """Return the recipe for `images` training images; `overrides` overrides fields.

    `epochs` None chooses the number of epochs. A small set gets smaller batches, so that an epoch has at
    least 32 steps, a proportionally smaller learning rate (linear scaling: Goyal et al., 2017), and more
    epochs. `fine_tuning` means that training starts from pretrained weights, which take a tenth of the
    learning rate, or a quarter for more than `SMALL_SET`, and half the epochs. `cost` is the time for one
    image relative to the reference. With a higher cost, images are seen less often, so that the run takes
    about as long.
    """
    base_recipe = replace(Recipe(), **overrides)  # type: ignore[arg-type]  # the caller names fields
    batch = min(base_recipe.batch, 2 ** int(math.log2(max(8, images // 32))))
    needed_epochs = math.ceil(_MIN_STEPS / max(1, images // batch))
    cost = max(1.0, cost)
    min_epochs = min(base_recipe.epochs, max(_MIN_EPOCHS, round(base_recipe.epochs / cost)))
    default_epochs = max(
        min_epochs, min(100, max(needed_epochs, int(_TOTAL_IMAGES / cost) // max(1, images)))
    )
    fine_tuning_rate = 0.25 if images > SMALL_SET else 0.1
    return replace(
        base_recipe,
        epochs=epochs or (default_epochs // 2 if fine_tuning else default_epochs),
        batch=batch,
        peak_lr=base_recipe.peak_lr * batch / base_recipe.batch * (fine_tuning_rate if fine_tuning else 1.0),
    )


def compute_learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Return the learning rate of a one-cycle schedule (Smith and Topin, 2017).

    The rate rises linearly from 0 to the peak and falls linearly to 0.
    """
    peak = max(1.0, recipe.warm_up * steps)
    falling_factor = (steps - step) / max(1.0, steps - peak)
    return recipe.peak_lr * min((step + 1) / peak, falling_factor, 1.0)
