"""Warnings about duplicate images that inflate figures or contradict a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fovea.model.data.decoding import Prints
from fovea.model.data.perceptual_hash import alike

Rows = npt.NDArray[np.int64]

_SHOWN: Final = 3
"""Maximum number of pairs of file names in one sentence."""


def contradictions(prints: Prints, labels: Sequence[tuple[int, ...]], names: Sequence[str]) -> list[str]:
    """Return a sentence if the same file occurs under different labels."""
    groups = _groups(prints)
    first = np.unique(groups, return_index=True)[1][groups]
    pairs = [(earlier, row) for row, earlier in enumerate(first) if labels[earlier] != labels[row]]
    if not pairs:
        return []
    return [f"{_images(len(pairs))} there under other labels too, byte for byte: {_shown(pairs, names)}"]


def leaks(prints: Prints, train: Rows, others: Rows, what: str, names: Sequence[str]) -> list[str]:
    """Return sentences on images of `others`, called `what`, that equal or resemble training images."""
    groups = _groups(prints)
    first = np.full(len(groups), -1)
    first[groups[train][::-1]] = train[::-1]
    earlier = first[groups[others]]
    copies = [(a, b) for a, b in zip(earlier, others, strict=True) if a >= 0]
    rest = others[earlier < 0]
    found = alike(prints.hashes[train], prints.hashes[rest])
    _, once = np.unique(found[:, 1], return_index=True)
    near = [(train[i], rest[j]) for i, j in found[once]]
    return [
        f"{_images(len(pairs), what)} {how} trained on, which makes figures too good: {_shown(pairs, names)}"
        for pairs, how in ((copies, "byte for byte one that is"), (near, "nearly one that is"))
        if pairs
    ]


def _groups(prints: Prints) -> Rows:
    """Return a group number for each image, equal for identical files, int64 (N,)."""
    _, groups = np.unique(prints.digests, axis=0, return_inverse=True)
    return groups.reshape(-1)  # (N,)


def _images(count: int, what: str = "") -> str:
    noun = f"{what} image" if what else "image"
    return f"{count} {noun} is" if count == 1 else f"{count} {noun}s are"


def _shown(pairs: Sequence[tuple[int, int]], names: Sequence[str]) -> str:
    more = ", …" if len(pairs) > _SHOWN else ""
    return ", ".join(f"{names[a]} = {names[b]}" for a, b in pairs[:_SHOWN]) + more
