"""A stratified split into training and held-out images.

The method is iterative stratification (Sechidis, Tsoumakas and Vlahavas, 2011, "On the Stratification of
Multi-Label Data"). Starting with the rarest label, each image goes to the part that still wants the most
images of that label. With one label per image, the method is ordinary stratified splitting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

TRAIN, VALIDATION, CONFORMAL = range(3)
"""Numbers of the parts."""

LabelIndices = tuple[int, ...]
"""Label indices of one image."""
Parts = npt.NDArray[np.int64]

_NO_LABEL: Final = (-1,)
"""Pseudo-label of images without a label, so that they are stratified too."""


def split_images(
    labels: Sequence[LabelIndices], digests: Iterable[bytes], fraction: float, seed: int
) -> Parts:
    """Return the part of each image, int64 (N,).

    `fraction` of each label is held out, half of that in each held-out part; an odd image goes to
    validation. At least one image of each label is held out if it can be spared. Images with the same
    digest and labels stay in one part. A label with only one such distinct image is used for training
    only.
    """

    def count_by_part(images: int) -> list[int]:
        held_out_count = round(fraction * images)
        return [images - held_out_count, held_out_count - held_out_count // 2, held_out_count // 2]

    return _assign_parts(labels, digests, count_by_part, seed, repair=True)


def split_in_half(labels: Sequence[LabelIndices], digests: Iterable[bytes], seed: int) -> Parts:
    """Return VALIDATION or CONFORMAL for each image of a held-out part, int64 (N,).

    Each half gets half of each label; an odd image goes to validation. Copies stay in one part.
    """

    def count_by_part(images: int) -> list[int]:
        return [_NO_IMAGES, images - images // 2, images // 2]

    return _assign_parts(labels, digests, count_by_part, seed, repair=False)


_NO_IMAGES: Final = -(1 << 60)
"""Wanted number of images for a part that must stay empty."""


def _assign_parts(
    labels: Sequence[LabelIndices],
    digests: Iterable[bytes],
    count_by_part: Callable[[int], list[int]],
    seed: int,
    *,
    repair: bool,
) -> Parts:
    """Return the part of each image; `count_by_part` returns the number of a label's images for each part."""
    copies: dict[tuple[bytes, LabelIndices], list[int]] = {}
    for row, key in enumerate(zip(digests, labels, strict=True)):
        copies.setdefault(key, []).append(row)
    groups = list(copies.values())
    groups = [groups[position] for position in np.random.default_rng(seed).permutation(len(groups))]
    groups.sort(key=len, reverse=True)  # the largest first, because they need the most room
    parts = np.empty(len(labels), np.int64)
    group_labels = [labels[group[0]] for group in groups]
    group_parts = _stratify_groups(
        group_labels, [len(group) for group in groups], count_by_part, repair=repair
    )
    for group, part in zip(groups, group_parts, strict=True):
        parts[group] = part
    return parts


def _stratify_groups(
    labels: list[LabelIndices], sizes: list[int], count_by_part: Callable[[int], list[int]], *, repair: bool
) -> list[int]:
    """Return the part of each group of images."""
    groups_by_label: dict[int, list[int]] = {}
    for group, own in enumerate(labels):
        for label in own or _NO_LABEL:
            groups_by_label.setdefault(label, []).append(group)
    needed_counts = {
        label: count_by_part(sum(sizes[g] for g in own)) for label, own in groups_by_label.items()
    }
    remaining_groups = {label: len(own) for label, own in groups_by_label.items()}
    parts: dict[int, int] = {}
    while remaining_groups:
        rarest = min(remaining_groups, key=lambda label: (remaining_groups[label], label))
        for group in groups_by_label[rarest]:
            if group not in parts:
                parts[group] = part = needed_counts[rarest].index(max(needed_counts[rarest]))
                for label in labels[group] or _NO_LABEL:
                    needed_counts[label][part] -= sizes[group]
                    remaining_groups[label] -= 1
        remaining_groups = {label: count for label, count in remaining_groups.items() if count}
    if repair:
        _repair_parts(parts, labels, groups_by_label)
    return [parts[group] for group in range(len(labels))]


def _repair_parts(
    parts: dict[int, int], labels: list[LabelIndices], groups_by_label: dict[int, list[int]]
) -> None:
    """Make sure that every label is trained on and, if an image can be spared, validated.

    If labels occur together, a rare label's share can contain all images of another label.
    """
    rarest_first = sorted(groups_by_label, key=lambda label: (len(groups_by_label[label]), label))
    for label in rarest_first:
        if all(parts[group] != TRAIN for group in groups_by_label[label]):
            parts[groups_by_label[label][0]] = TRAIN
    train_counts = Counter(label for group, part in parts.items() if part == TRAIN for label in labels[group])
    for label in rarest_first:
        if any(parts[group] == VALIDATION for group in groups_by_label[label]):
            continue
        for group in reversed(groups_by_label[label]):  # the smallest first: the fewest copies
            if parts[group] == CONFORMAL or all(train_counts[other] > 1 for other in labels[group]):
                train_counts.subtract(labels[group] if parts[group] == TRAIN else ())
                parts[group] = VALIDATION
                break
