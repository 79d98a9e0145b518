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

Labels = tuple[int, ...]
"""Label indices of one image."""
Parts = npt.NDArray[np.int64]

_UNLABELLED: Final = (-1,)
"""Pseudo-label of images without a label, so that they are stratified too."""


def split(labels: Sequence[Labels], digests: Iterable[bytes], fraction: float, seed: int) -> Parts:
    """Return the part of each image, int64 (N,).

    `fraction` of each label is held out, half of that in each held-out part; an odd image goes to
    validation. At least one image of each label is held out if it can be spared. Images with the same
    digest and labels stay in one part. A label with only one such distinct image is used for training
    only.
    """

    def wanted(images: int) -> list[int]:
        held = round(fraction * images)
        return [images - held, held - held // 2, held // 2]

    return _parted(labels, digests, wanted, seed, mend=True)


def halves(labels: Sequence[Labels], digests: Iterable[bytes], seed: int) -> Parts:
    """Return VALIDATION or CONFORMAL for each image of a held-out part, int64 (N,).

    Each half gets half of each label; an odd image goes to validation. Copies stay in one part.
    """

    def wanted(images: int) -> list[int]:
        return [_NEVER, images - images // 2, images // 2]

    return _parted(labels, digests, wanted, seed, mend=False)


_NEVER: Final = -(1 << 60)
"""Wanted number of images for a part that must stay empty."""


def _parted(
    labels: Sequence[Labels],
    digests: Iterable[bytes],
    wanted: Callable[[int], list[int]],
    seed: int,
    *,
    mend: bool,
) -> Parts:
    """Return the part of each image; `wanted` returns the number of a label's images for each part."""
    copies: dict[tuple[bytes, Labels], list[int]] = {}
    for row, key in enumerate(zip(digests, labels, strict=True)):
        copies.setdefault(key, []).append(row)
    groups = list(copies.values())
    groups = [groups[place] for place in np.random.default_rng(seed).permutation(len(groups))]
    groups.sort(key=len, reverse=True)  # the largest first, because they need the most room
    parts = np.empty(len(labels), np.int64)
    own = [labels[group[0]] for group in groups]
    shares = _stratified(own, [len(group) for group in groups], wanted, mend=mend)
    for group, part in zip(groups, shares, strict=True):
        parts[group] = part
    return parts


def _stratified(
    labels: list[Labels], sizes: list[int], shares: Callable[[int], list[int]], *, mend: bool
) -> list[int]:
    """Return the part of each group of images."""
    holders: dict[int, list[int]] = {}
    for group, own in enumerate(labels):
        for label in own or _UNLABELLED:
            holders.setdefault(label, []).append(group)
    wanted = {label: shares(sum(sizes[g] for g in own)) for label, own in holders.items()}
    remaining = {label: len(own) for label, own in holders.items()}
    parts: dict[int, int] = {}
    while remaining:
        rarest = min(remaining, key=lambda label: (remaining[label], label))
        for group in holders[rarest]:
            if group not in parts:
                parts[group] = part = wanted[rarest].index(max(wanted[rarest]))
                for label in labels[group] or _UNLABELLED:
                    wanted[label][part] -= sizes[group]
                    remaining[label] -= 1
        remaining = {label: count for label, count in remaining.items() if count}
    if mend:
        _mend(parts, labels, holders)
    return [parts[group] for group in range(len(labels))]


def _mend(parts: dict[int, int], labels: list[Labels], holders: dict[int, list[int]]) -> None:
    """Make sure that every label is trained on and, if an image can be spared, validated.

    If labels occur together, a rare label's share can contain all images of another label.
    """
    rarest_first = sorted(holders, key=lambda label: (len(holders[label]), label))
    for label in rarest_first:
        if all(parts[group] != TRAIN for group in holders[label]):
            parts[holders[label][0]] = TRAIN
    trained = Counter(label for group, part in parts.items() if part == TRAIN for label in labels[group])
    for label in rarest_first:
        if any(parts[group] == VALIDATION for group in holders[label]):
            continue
        for group in reversed(holders[label]):  # the smallest first: the fewest copies
            if parts[group] == CONFORMAL or all(trained[other] > 1 for other in labels[group]):
                trained.subtract(labels[group] if parts[group] == TRAIN else ())
                parts[group] = VALIDATION
                break
