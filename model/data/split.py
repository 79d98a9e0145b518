"""Which images are trained on and which are held out, so that every label has its share of both.

Iterative stratification (Sechidis, Tsoumakas and Vlahavas, 2011, "On the Stratification of Multi-Label
Data"): from the rarest label on, each image goes to the part that still wants the most images of that
label. With one label an image it is the usual stratified split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

TRAIN, VALIDATION, CONFORMAL = range(3)
"""The parts."""

Labels = tuple[int, ...]
"""Those of one image."""
Parts = npt.NDArray[np.int64]

_UNLABELLED: Final = (-1,)
"""Images with no label are spread too, as if that were one."""


def split(labels: Sequence[Labels], digests: Iterable[bytes], fraction: float, seed: int) -> Parts:
    """Return the part of each image, int64 (N,).

    `fraction` of each label is held out, at least one image, half of that in each held-out part, the odd
    one for validation. Images of one digest and the same labels are never parted: a label that has one such
    image alone is all trained on.
    """

    def wanted(images: int) -> list[int]:
        held = round(fraction * images)
        return [images - held, held - held // 2, held // 2]

    return _parted(labels, digests, wanted, seed, mend=True)


def halves(labels: Sequence[Labels], digests: Iterable[bytes], seed: int) -> Parts:
    """Return the half of each image of a part that is held out as a whole: VALIDATION, or CONFORMAL.

    Of each label half, the odd image for validation. Copies are never parted.
    """

    def wanted(images: int) -> list[int]:
        return [_NEVER, images - images // 2, images // 2]

    return _parted(labels, digests, wanted, seed, mend=False)


_NEVER: Final = -(1 << 60)
"""Images that a part wants which is to have none."""


def _parted(
    labels: Sequence[Labels],
    digests: Iterable[bytes],
    wanted: Callable[[int], list[int]],
    seed: int,
    *,
    mend: bool,
) -> Parts:
    """Return the part of each image; `wanted` is how many of a label's images each part should have."""
    copies: dict[tuple[bytes, Labels], list[int]] = {}
    for row, key in enumerate(zip(digests, labels, strict=True)):
        copies.setdefault(key, []).append(row)
    groups = list(copies.values())
    groups = [groups[place] for place in np.random.default_rng(seed).permutation(len(groups))]
    groups.sort(key=len, reverse=True)  # the largest first: they need the most room
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
    """See that every label is trained on and, where it can be spared, validated.

    Where labels come together, the share of a rare one can be all that a commoner one has.
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
