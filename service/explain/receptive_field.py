"""Receptive fields of the values of a feature map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """A receptive field along one axis.

    The value at place r depends on the places `jump` * r + `low` … `jump` * r + `high` of the input, both
    inclusive (Araujo, Norris and Sim, 2019, "Computing Receptive Fields of CNNs").
    """

    jump: int
    low: int
    high: int

    def apply_window(self, window: int, stride: int, padding: int, dilation: int) -> Span:
        """Return the span after a layer with a sliding window.

        The layer's value r reads `window` places from stride * r - before on, `dilation` apart.
        """
        last_offset = dilation * (window - 1) - padding
        return Span(self.jump * stride, self.low - self.jump * padding, self.high + self.jump * last_offset)


class ReceptiveField(NamedTuple):
    """A receptive field, in pixels of the input."""

    rows: Span
    columns: Span


@dataclass(frozen=True)
class Window:
    """The sliding window of a convolution or a pooling. Pairs are (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    """Top, left, bottom and right padding."""
    dilation: tuple[int, int]


def apply_window(receptive_field: ReceptiveField, window: Window) -> ReceptiveField:
    """Return the receptive field after a layer with a sliding window."""
    spans = (
        span.apply_window(
            window.kernel[axis], window.stride[axis], window.padding[axis], window.dilation[axis]
        )
        for axis, span in enumerate(receptive_field)
    )
    return ReceptiveField(*spans)


def unite_fields(fields: Sequence[ReceptiveField]) -> ReceptiveField | None:
    """Return the union of receptive fields, or None if their jumps differ."""
    spans = []
    for axis in zip(*fields, strict=True):
        if len({span.jump for span in axis}) > 1:
            return None
        spans.append(Span(axis[0].jump, min(one.low for one in axis), max(one.high for one in axis)))
    return ReceptiveField(*spans)
