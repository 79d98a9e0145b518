"""Labelled images, and what is raised of those that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fovea.model.data.pixels import Pixels, rows_of
from fovea.service.errors import FoveaError


class DataError(FoveaError):
    """The training data cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Examples:
    """`pixels`: uint8 (N, H, W, 3), RGB; a tensor, or what gives one for indices."""

    pixels: Pixels
    targets: Tensor
    """int64 (N,), indices into the labels; for `multilabel` float32 (N, labels), 1 where a label is true."""
    names: tuple[str, ...] = ()
    """Each image's path inside its source, for people; none where nothing is known of them."""

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Tensor) -> Examples:
        """Those of `indices`, in that order. Their pixels stay where they are."""
        names = tuple(self.names[index] for index in indices.tolist()) if self.names else ()
        return Examples(rows_of(self.pixels, indices), self.targets[indices], names)
