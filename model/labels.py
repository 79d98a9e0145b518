"""The labels of a set: which there are, what kind of question they are, and what can be learned of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from model.examples import DataError
from model.sources import File
from service.contract import Task

Indices = tuple[int, ...]
"""The labels of one image, by their places among all."""


def labels_of(files: Sequence[File]) -> tuple[str, ...]:
    """All labels, in order."""
    return tuple(sorted({label for file in files for label in file.labels}))


def require_labels(name: str, files: Sequence[File]) -> None:
    """Raise `DataError` unless there are two labels to tell apart, with names that can be written down."""
    labels = labels_of(files)
    if len(labels) < 2:
        found = f"only {labels[0]!r}" if labels else "none"
        raise DataError(
            f"{name} needs one sub-folder of images per label, or a CSV file that names them, and of labels "
            f"at least two; found {found}"
        )
    if set(labels) == {"train", "test"}:
        raise DataError(
            f"{name} has images right in train/ and test/; put them in sub-folders by label there"
        )
    for label in labels:
        try:
            label.encode()
        except UnicodeEncodeError:
            raise DataError(f"the name of the label {label!r} is not UTF-8; rename it") from None


def require_two(labels: Sequence[str], indices: Sequence[Indices], unreadable: Sequence[str]) -> None:
    """Raise `DataError` unless there are two images of each label: one to train on and one to hold out."""
    counts = Counter(index for own in indices for index in own)
    for index, label in enumerate(labels):
        if counts[index] < 2:
            skipped = (
                f"; {len(unreadable)} files cannot be read, such as {unreadable[0]}" if unreadable else ""
            )
            raise DataError(
                f"label {label!r} has {counts[index]} readable images to train on; "
                f"at least 2 are needed{skipped}"
            )


def task_of(files: Sequence[File]) -> Task:
    """Two labels are `binary`, several of one image `multilabel`."""
    if any(len(file.labels) > 1 for file in files):
        return Task.MULTILABEL
    return Task.BINARY if len(labels_of(files)) == 2 else Task.MULTICLASS


def targets_of(indices: Sequence[Indices], labels: int, task: Task) -> Tensor:
    """What is to be learned: int64 (N,), or for `multilabel` float32 (N, labels)."""
    if task is not Task.MULTILABEL:
        return torch.tensor([index for (index,) in indices], dtype=torch.int64)
    targets = torch.zeros(len(indices), labels)
    for row, own in enumerate(indices):
        targets[row, list(own)] = 1
    return targets
