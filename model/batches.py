"""The batches of a training run: gathered, augmented, and made ahead of time."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from model.augment import augment
from model.data import Data
from model.recipe import Recipe


class Batches:
    """The augmented batches of a run by number, each made in a thread while the one before is learned."""

    def __init__(self, data: Data, recipe: Recipe, mean: tuple[float, float, float]) -> None:
        self._examples, self._recipe = data.train, recipe
        self._blank = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))
        self._next: tuple[int, Future[tuple[Tensor, Tensor]]] | None = None
        self._thread = ThreadPoolExecutor(1, "batches", initializer=torch.set_num_threads, initargs=(1,))
        self.steps = len(data.train) // recipe.batch or 1
        """In one epoch; what does not fill a batch waits for another epoch's order."""

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def get(self, number: int) -> tuple[Tensor, Tensor]:
        """The pixels and the targets of step `number`."""
        coming = self._next
        if coming is None or coming[0] != number:
            coming = (number, self._thread.submit(self._make, number))
        made = coming[1].result()
        if number + 1 < self._recipe.epochs * self.steps:
            self._next = (number + 1, self._thread.submit(self._make, number + 1))
        return made

    def _make(self, number: int) -> tuple[Tensor, Tensor]:
        recipe = self._recipe
        epoch, step = divmod(number, self.steps)
        indices = self._order_of(epoch)[step * recipe.batch : (step + 1) * recipe.batch]
        pixels = self._examples.pixels[indices]
        side = pixels.shape[1]
        return augment(
            pixels,
            (indices + epoch) % 2 == 0 if recipe.flip else torch.zeros(len(indices), dtype=torch.bool),
            shift=round(recipe.translate * side),
            hole=round(recipe.cutout * side),
            blank=self._blank,
            generator=_generator(recipe.seed, 1, number),
        ), self._examples.targets[indices]

    def _order_of(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            generator = _generator(self._recipe.seed, 2, epoch)
            self._order = (epoch, torch.randperm(len(self._examples), generator=generator))
        return self._order[1]


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    """An own random stream for each purpose and step; 2^20 steps apart before any two meet."""
    return torch.Generator().manual_seed((seed << 24) + (stream << 20) + number)
