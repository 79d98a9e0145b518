"""The labels of a data set: spelling, task and training targets."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from fovea.model.data.choices import LabelCase
from fovea.model.data.examples import DataError
from fovea.model.data.inventory import File, Inventory, format_count, join_names
from fovea.model.data.spelling import clean_label, normalize_label
from fovea.service.artifact.contract import Task

LabelIndices = tuple[int, ...]
"""Label indices of one image."""


def collect_labels(files: Sequence[File]) -> tuple[str, ...]:
    """Return all labels, sorted."""
    return tuple(sorted({label for file in files for label in file.labels}))


def describe_spellings(names: Iterable[str]) -> list[str]:
    """Return a sentence for each label with several spellings that look the same."""
    by_label: dict[str, set[str]] = {}
    for name in set(names):
        by_label.setdefault(clean_label(name), set()).add(name)
    return [
        f"label {label!r} is written in {len(label_spellings)} ways that look the same (accents, white "
        "space); they are merged"
        for label, label_spellings in sorted(by_label.items())
        if len(label_spellings) > 1
    ]


def merge_similar_labels(files: Sequence[File], case: LabelCase | None) -> tuple[tuple[File, ...], list[str]]:
    """Return the files with similar labels merged or kept according to `case`, and a sentence on each merge.

    Similar labels differ only in case, spaces, `_` or `-`. Raises `DataError` if there are such labels and
    `case` is None.
    """
    counts = Counter(label for file in files for label in file.labels)
    groups: dict[str, list[str]] = {}
    for label in sorted(counts):
        groups.setdefault(normalize_label(label), []).append(label)
    similar_groups = [group for group in groups.values() if len(group) > 1]
    if not similar_groups or case == "keep":
        return tuple(files), []
    if case is None:
        examples = "; ".join(
            " and ".join(f"{label!r} ({format_count(counts[label], 'image')})" for label in group)
            for group in similar_groups[:_MAX_EXAMPLES]
        )
        raise DataError(
            f"labels differ only in case, spaces, _ or -: {examples}; rename them, or pass --label-case "
            "merge if they are one label, --label-case keep if they are several"
        )
    merged_labels = {
        label: max(group, key=lambda one: (counts[one], one)) for group in similar_groups for label in group
    }
    merged_files = [
        replace(file, labels=tuple(sorted({merged_labels.get(label, label) for label in file.labels})))
        for file in files
    ]
    notes = [
        f"labels {' and '.join(map(repr, group))} are merged: {merged_labels[group[0]]!r}"
        for group in similar_groups
    ]
    return tuple(merged_files), notes


_MAX_EXAMPLES: Final = 3


def require_labels(name: str, files: Sequence[File], inventory: Inventory) -> None:
    """Raise `DataError` unless there are at least two labels and all can be written as UTF-8."""
    labels = collect_labels(files)
    if len(labels) < 2:
        label_summary = f"only {labels[0]!r}" if labels else "none"
        skipped_text = "".join(f"; {group}" for group in inventory.skipped_files[:_MAX_EXAMPLES])
        raise DataError(
            f"{name} must have at least two labels, each a sub-folder of images, or named in a CSV file; "
            f"found {label_summary}{skipped_text}"
        )
    for label in labels:
        try:
            label.encode()
        except UnicodeEncodeError:
            raise DataError(f"the name of the label {label!r} is not UTF-8; rename it") from None
        if any(unicodedata.category(letter) == "Cc" for letter in label):
            raise DataError(f"the name of the label {label!r} has control characters in it; rename it")


def require_images(
    labels: Sequence[str],
    indices: Sequence[LabelIndices],
    unreadable_files: Sequence[str],
    *,
    min_images: int,
) -> None:
    """Raise `DataError` unless each label has at least `min_images` training images."""
    counts = Counter(index for image_indices in indices for index in image_indices)
    for index, label in enumerate(labels):
        if counts[index] < min_images:
            unreadable_text = (
                f"; {len(unreadable_files)} files cannot be read, such as {unreadable_files[0]}"
                if unreadable_files
                else ""
            )
            raise DataError(
                f"label {label!r} has {counts[index]} readable images to train on; "
                f"at least {min_images} {'is' if min_images == 1 else 'are'} needed{unreadable_text}"
            )


def describe_missing_labels(
    labels: Sequence[str], indices: Iterable[LabelIndices], part_name: str
) -> list[str]:
    """Return a sentence if some labels have no images of the kind `part_name`."""
    present = {index for image_indices in indices for index in image_indices}
    missing = [label for index, label in enumerate(labels) if index not in present]
    return (
        [f"no {part_name} images of {format_count(len(missing), 'label')}: {join_names(missing, 10)}"]
        if missing
        else []
    )


def infer_task(files: Sequence[File]) -> Task:
    """Return the task: two labels are `binary`, several labels per image are `multilabel`."""
    if any(len(file.labels) > 1 for file in files):
        return Task.MULTILABEL
    return Task.BINARY if len(collect_labels(files)) == 2 else Task.MULTICLASS


def build_targets(indices: Sequence[LabelIndices], label_count: int, task: Task) -> Tensor:
    """Return the training targets, int64 (N,), or float32 (N, labels) for `multilabel`."""
    if task is not Task.MULTILABEL:
        return torch.tensor([index for (index,) in indices], dtype=torch.int64)
    targets = torch.zeros(len(indices), label_count)
    for row, image_indices in enumerate(indices):
        targets[row, list(image_indices)] = 1
    return targets
