"""The labels of a data set: spelling, task and training targets."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from fovea.model.data.choices import Case
from fovea.model.data.examples import DataError
from fovea.model.data.inventory import File, Inventory, count, some
from fovea.service.artifact.contract import Task

Indices = tuple[int, ...]
"""Label indices of one image."""


def labels_of(files: Sequence[File]) -> tuple[str, ...]:
    """Return all labels, sorted."""
    return tuple(sorted({label for file in files for label in file.labels}))


_BLANKS: Final = "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060"
"""Invisible characters that are not white space."""


def clean_label(name: str) -> str:
    """Return the label in composed form (Unicode NFC), without surrounding white space."""
    return unicodedata.normalize("NFC", name).strip().strip(_BLANKS).strip()


def spellings(names: Iterable[str]) -> list[str]:
    """Return a sentence for each label with several spellings that look the same."""
    by_label: dict[str, set[str]] = {}
    for name in set(names):
        by_label.setdefault(clean_label(name), set()).add(name)
    return [
        f"label {label!r} is written in {len(own)} ways that look the same (accents, white space); "
        "they are one label"
        for label, own in sorted(by_label.items())
        if len(own) > 1
    ]


def settle_labels(files: Sequence[File], case: Case | None) -> tuple[tuple[File, ...], list[str]]:
    """Return the files with similar labels merged or kept according to `case`, and a sentence on each merge.

    Similar labels differ only in case, spaces, `_` or `-`. Raises `DataError` if there are such labels and
    `case` is None.
    """
    counts = Counter(label for file in files for label in file.labels)
    groups: dict[str, list[str]] = {}
    for label in sorted(counts):
        groups.setdefault(_plain(label), []).append(label)
    alike = [group for group in groups.values() if len(group) > 1]
    if not alike or case == "keep":
        return tuple(files), []
    if case is None:
        shown = "; ".join(
            " and ".join(f"{label!r} ({count(counts[label], 'image')})" for label in group)
            for group in alike[:_SHOWN]
        )
        raise DataError(
            f"labels differ in case, spaces, _ or - alone: {shown}; rename them, or say --label-case merge "
            "if they are one label, --label-case keep if they are several"
        )
    chosen = {label: max(group, key=lambda one: (counts[one], one)) for group in alike for label in group}
    merged = [
        replace(file, labels=tuple(sorted({chosen.get(label, label) for label in file.labels})))
        for file in files
    ]
    notes = [f"labels {' and '.join(map(repr, group))} are one: {chosen[group[0]]!r}" for group in alike]
    return tuple(merged), notes


_SHOWN: Final = 3


def _plain(label: str) -> str:
    """Return a common form of similar labels."""
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", unicodedata.normalize("NFKC", label).casefold())


def require_labels(name: str, files: Sequence[File], inventory: Inventory) -> None:
    """Raise `DataError` unless there are at least two labels and all can be written as UTF-8."""
    labels = labels_of(files)
    if len(labels) < 2:
        found = f"only {labels[0]!r}" if labels else "none"
        left_out = "".join(f"; {group}" for group in inventory.left_out[:_SHOWN])
        raise DataError(
            f"{name} needs one sub-folder of images per label, or a CSV file that names them, and of labels "
            f"at least two; found {found}{left_out}"
        )
    for label in labels:
        try:
            label.encode()
        except UnicodeEncodeError:
            raise DataError(f"the name of the label {label!r} is not UTF-8; rename it") from None
        if any(unicodedata.category(letter) == "Cc" for letter in label):
            raise DataError(f"the name of the label {label!r} has control characters in it; rename it")


def require_images(
    labels: Sequence[str], indices: Sequence[Indices], unreadable: Sequence[str], *, least: int
) -> None:
    """Raise `DataError` unless each label has at least `least` training images."""
    counts = Counter(index for own in indices for index in own)
    for index, label in enumerate(labels):
        if counts[index] < least:
            skipped = (
                f"; {len(unreadable)} files cannot be read, such as {unreadable[0]}" if unreadable else ""
            )
            raise DataError(
                f"label {label!r} has {counts[index]} readable images to train on; "
                f"at least {least} {'is' if least == 1 else 'are'} needed{skipped}"
            )


def without(labels: Sequence[str], indices: Iterable[Indices], what: str) -> list[str]:
    """Return a sentence if some labels have no images of the kind `what`."""
    present = {index for own in indices for index in own}
    missing = [label for index, label in enumerate(labels) if index not in present]
    return [f"no {what} images of {count(len(missing), 'label')}: {some(missing, 10)}"] if missing else []


def task_of(files: Sequence[File]) -> Task:
    """Return the task: two labels are `binary`, several labels per image are `multilabel`."""
    if any(len(file.labels) > 1 for file in files):
        return Task.MULTILABEL
    return Task.BINARY if len(labels_of(files)) == 2 else Task.MULTICLASS


def targets_of(indices: Sequence[Indices], labels: int, task: Task) -> Tensor:
    """Return the training targets, int64 (N,), or float32 (N, labels) for `multilabel`."""
    if task is not Task.MULTILABEL:
        return torch.tensor([index for (index,) in indices], dtype=torch.int64)
    targets = torch.zeros(len(indices), labels)
    for row, own in enumerate(indices):
        targets[row, list(own)] = 1
    return targets
