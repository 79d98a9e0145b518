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
from fovea.model.recipe import Recipe
from fovea.model.training.augmentation import apply_cutout, flip_and_shift


@dataclass(frozen=True)
class Batch:
    """The images and targets of one training step."""

    pixels: Tensor
    """Pixels, uint8 (B, H, W, 3)."""
    targets: Tensor
    teacher_logits: Tensor | None
    """A teacher's logits, float16 (B, n)."""

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
        self._shifts: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))
        self.count = min(recipe.epochs, recipe.views if recipe.teaching else recipe.epochs)

    def get_pixels(self, view: int, indices: Tensor) -> Tensor:
        """Return the pixels, uint8 (B, H, W, 3), of the images with these indices, int64 (B,)."""
        pixels = self._examples.pixels[indices]
        flip = (indices + view) % 2 == 0 if self._recipe.flip else torch.zeros(len(indices), dtype=torch.bool)
        if self._shifts[0] != view:
            max_shift = round(self._recipe.translate * pixels.shape[1])
            generator = _make_generator(self._recipe.seed, 3, view)
            shifts = torch.randint(-max_shift, max_shift + 1, (len(self._examples), 2), generator=generator)
            self._shifts = (view, shifts)
        return flip_and_shift(pixels, flip, self._shifts[1][indices])


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
        pixels = self._views.get_pixels(view, indices)
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
