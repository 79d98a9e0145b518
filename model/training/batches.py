"""The batches of a training run: gathered, augmented and prepared ahead of time."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fovea.model.data.dataset import Dataset
from fovea.model.data.examples import Examples
from fovea.model.recipe import Augmentation, Recipe
from fovea.model.training.augmentation import apply_cutout, flip_and_shift
from fovea.model.training.windows import (
    blur_some,
    compress_some,
    cut_windows,
    make_windows,
    to_pixels,
    vary_colours,
)


@dataclass(frozen=True)
class Batch:
    """The images and targets of one training step."""

    pixels: Tensor
    """Pixels, uint8 (B + O, H, W, 3): labelled images, then those of other things."""
    targets: Tensor
    """Targets of the labelled images."""
    teacher_logits: Tensor | None
    """A teacher's logits for the labelled images, float16 (B, n)."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on the device."""
        pixels, targets = (part.to(device, non_blocking=True) for part in (self.pixels, self.targets))
        teacher_logits = (
            None if self.teacher_logits is None else self.teacher_logits.to(device, non_blocking=True)
        )
        return Batch(pixels, targets, teacher_logits)


class Views:
    """The flipped and shifted versions of a set's images, determined by the seed.

    Every epoch has its own view. With a teacher, the views repeat after a few epochs, so that the teacher's
    logits are computed only once.
    """

    def __init__(self, examples: Examples, recipe: Recipe) -> None:
        self._examples, self._recipe = examples, recipe
        self._draws: tuple[int, Tensor] = (-1, torch.empty(0))
        self.count = min(recipe.epochs, recipe.views if recipe.teaching else recipe.epochs)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._examples)

    def get_pixels(self, view: int, indices: Tensor, side: int | None = None) -> Tensor:
        """Return the pixels, uint8 (B, side, side, 3), of the images with these indices, int64 (B,).

        `side` None keeps the side of the images.
        """
        pixels, recipe = self._examples.pixels[indices], self._recipe
        side = side or pixels.shape[1]
        flip = (indices + view) % 2 == 0 if recipe.flip else torch.zeros(len(indices), dtype=torch.bool)
        draws = self._get_draws(view)[indices]
        if recipe.augmentation is Augmentation.SHIFT:
            max_shift = round(recipe.translate * pixels.shape[1])
            return flip_and_shift(pixels, flip, draws - max_shift)
        return self._cut_windows(torch.where(flip[:, None, None, None], pixels.flip(2), pixels), draws, side)

    def _cut_windows(self, pixels: Tensor, draws: Tensor, side: int) -> Tensor:
        """Return pixels, uint8 (B, side, side, 3), through windows; `draws`, float32 (B, 16), decide."""
        is_photo = self._recipe.augmentation is Augmentation.PHOTO
        planes, inside = cut_windows(pixels, make_windows(draws[:, :5], wide=is_photo), side)
        if not is_photo:
            return to_pixels(planes)
        others = (draws[:, 5] * len(self._examples)).long()
        rows = torch.where(~inside.all(dim=(1, 2)))[0]
        if len(rows):
            backgrounds, _ = cut_windows(
                self._examples.pixels[others[rows]], make_windows(draws[rows, 6:11], wide=False), side
            )
            planes[rows] = torch.where(inside[rows, None], planes[rows], backgrounds)
        planes = vary_colours(blur_some(planes, draws[:, 11]), draws[:, 12:15])
        return compress_some(to_pixels(planes), draws[:, 15])

    def _get_draws(self, view: int) -> Tensor:
        """Return the random numbers of all images in this view.

        Shifts take two offsets for each image, int64 (N, 2), and windows 16 numbers in 0 to 1, float32
        (N, 16).
        """
        if self._draws[0] != view:
            generator, count = _make_generator(self._recipe.seed, 3, view), len(self._examples)
            if self._recipe.augmentation is Augmentation.SHIFT:
                max_shift = round(self._recipe.translate * self._examples.pixels.shape[1])
                draws = torch.randint(0, 2 * max_shift + 1, (count, 2), generator=generator)
            else:
                draws = torch.rand(count, 16, generator=generator)
            self._draws = (view, draws)
        return self._draws[1]


class Batches:
    """The augmented batches of a run by number, each prepared on a thread during the previous step.

    `get` is called by the training loop. Only the one thread of the executor makes batches and uses the views
    and the order of the images, so that neither needs a lock.
    """

    def __init__(
        self,
        data: Dataset,
        recipe: Recipe,
        mean: tuple[float, float, float],
        teacher_logits: npt.NDArray[np.float16] | None,
    ) -> None:
        self._examples, self._recipe, self._teacher_logits = data.train, recipe, teacher_logits
        self._views = Views(data.train, recipe)
        self._other_views = Views(data.other, recipe) if data.other else None
        self._other_order = torch.randperm(
            len(data.other) if data.other else 0, generator=_make_generator(recipe.seed, 4, 0)
        )
        self._fill_colour = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))
        self._next_batch: tuple[int, Future[Batch]] | None = None
        # One torch thread for augmentation: more would compete with the training step that runs meanwhile.
        self._executor = ThreadPoolExecutor(1, "batches", initializer=torch.set_num_threads, initargs=(1,))
        full_batches = len(data.train) // recipe.batch or 1
        self.steps = min(full_batches, recipe.epoch_steps or full_batches)
        """Number of steps per epoch; images that do not fill a batch are left to other epochs' orders."""

    def close(self) -> None:
        """Stop the thread."""
        self._executor.shutdown(cancel_futures=True)

    def get(self, number: int) -> Batch:
        """Return the batch of step `number`, and start preparing the next one.

        The batch is prepared already if `number` follows the previous call's number. Otherwise, as at the
        start, the call waits for it. An exception from making the batch is raised here.
        """
        numbered_future = self._next_batch
        if numbered_future is None or numbered_future[0] != number:
            numbered_future = (number, self._executor.submit(self._make_batch, number))
        batch = numbered_future[1].result()
        # Submitted only after this batch is done, so that at most one batch is prepared ahead.
        if number + 1 < self._recipe.epochs * self.steps:
            self._next_batch = (number + 1, self._executor.submit(self._make_batch, number + 1))
        return batch

    def _make_batch(self, number: int) -> Batch:
        """Make the batch of step `number`, on the executor's thread; only seed and step determine it."""
        recipe = self._recipe
        epoch, step = divmod(number, self.steps)
        indices = self._get_order(epoch)[step * recipe.batch : (step + 1) * recipe.batch]
        view = epoch % self._views.count
        side = recipe.get_side(epoch, self._examples.pixels.shape[1])
        pixels = self._views.get_pixels(view, indices, side)
        if self._other_views:
            pixels = torch.cat([pixels, self._make_other_pixels(self._other_views, number, side)])
        if hole_side := round(recipe.cutout * pixels.shape[1]):
            pixels = apply_cutout(
                pixels, hole_side, self._fill_colour, _make_generator(recipe.seed, 1, number)
            )
        teacher_logits = (
            None
            if self._teacher_logits is None
            else torch.from_numpy(self._teacher_logits[view, indices.numpy()])
        )
        return Batch(pixels, self._examples.targets[indices], teacher_logits)

    def _make_other_pixels(self, views: Views, number: int, side: int) -> Tensor:
        """Return the next images of other things, in one random order that repeats."""
        count = max(1, round(self._recipe.other_share * self._recipe.batch))
        places = (number * count + torch.arange(count)) % len(views)
        return views.get_pixels(number // self.steps % views.count, self._other_order[places], side)

    def _get_order(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            generator = _make_generator(self._recipe.seed, 2, epoch)
            self._order = (epoch, torch.randperm(len(self._examples), generator=generator))
        return self._order[1]


def _make_generator(seed: int, stream: int, number: int) -> torch.Generator:
    """Return an independent random generator for each purpose and step.

    The seeds of two purposes are 2^20 steps apart.
    """
    return torch.Generator().manual_seed((seed << 24) + (stream << 20) + number)
