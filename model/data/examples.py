"""Labelled images, and the error for unusable data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fovea.model.data.pixels import Pixels, select_pixels
from fovea.service.errors import FoveaError


class DataError(FoveaError):
    """The training data cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Examples:
    """Labelled images.

    `pixels` are uint8 (N, H, W, 3), RGB, in a tensor or an object that returns a tensor for indices.
    """

    pixels: Pixels
    targets: Tensor
    """Label indices, int64 (N,); for `multilabel` flags, float32 (N, labels), 1 if the label is true."""
    names: tuple[str, ...] = ()
    """Path of each image inside its source, for people; empty if unknown."""

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, indices: Tensor) -> Examples:
        """Return the examples at `indices`, in that order, without copying pixels."""
        names = tuple(self.names[index] for index in indices.tolist()) if self.names else ()
        return Examples(select_pixels(self.pixels, indices), self.targets[indices], names)
