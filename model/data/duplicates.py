"""Warnings about duplicate images that inflate figures or contradict a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fovea.model.data.decoding import ImageHashes
from fovea.model.data.perceptual_hash import find_similar

RowIndices = npt.NDArray[np.int64]

_MAX_PAIRS: Final = 3
"""Maximum number of pairs of file names in one sentence."""


def find_contradictions(
    image_hashes: ImageHashes, labels: Sequence[tuple[int, ...]], names: Sequence[str]
) -> list[str]:
    """Return a sentence if the same file occurs under different labels."""
    groups = _group_copies(image_hashes)
    first_rows = np.unique(groups, return_index=True)[1][groups]
    pairs = [(first_row, row) for row, first_row in enumerate(first_rows) if labels[first_row] != labels[row]]
    if not pairs:
        return []
    return [
        f"{_format_images(len(pairs))} also present under other labels, byte for byte: "
        f"{_format_pairs(pairs, names)}"
    ]


def find_leaks(
    image_hashes: ImageHashes,
    train_rows: RowIndices,
    other_rows: RowIndices,
    part_name: str,
    names: Sequence[str],
) -> list[str]:
    """Return sentences on the images of the part `part_name` that equal or resemble training images.

    `train_rows` and `other_rows` are the rows of the training images and of that part's images.
    """
    groups = _group_copies(image_hashes)
    first_rows = np.full(len(groups), -1)
    first_rows[groups[train_rows][::-1]] = train_rows[::-1]
    train_copies = first_rows[groups[other_rows]]
    copies = [(a, b) for a, b in zip(train_copies, other_rows, strict=True) if a >= 0]
    rest = other_rows[train_copies < 0]
    similar_pairs = find_similar(image_hashes.hashes[train_rows], image_hashes.hashes[rest])
    _, first_pairs = np.unique(similar_pairs[:, 1], return_index=True)
    near_copies = [(train_rows[i], rest[j]) for i, j in similar_pairs[first_pairs]]
    return [
        f"{_format_images(len(pairs), part_name)} {relation} to training images, so the accuracy looks too "
        f"good: {_format_pairs(pairs, names)}"
        for pairs, relation in ((copies, "identical"), (near_copies, "nearly identical"))
        if pairs
    ]


def _group_copies(image_hashes: ImageHashes) -> RowIndices:
    """Return a group number for each image, equal for identical files, int64 (N,)."""
    _, groups = np.unique(image_hashes.digests, axis=0, return_inverse=True)
    return groups.reshape(-1)  # (N,)


def _format_images(count: int, part_name: str = "") -> str:
    noun = f"{part_name} image" if part_name else "image"
    return f"{count} {noun} is" if count == 1 else f"{count} {noun}s are"


def _format_pairs(pairs: Sequence[tuple[int, int]], names: Sequence[str]) -> str:
    more = ", …" if len(pairs) > _MAX_PAIRS else ""
    return ", ".join(f"{names[a]} = {names[b]}" for a, b in pairs[:_MAX_PAIRS]) + more
