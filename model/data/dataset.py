"""Labelled data sets for training: read, labelled, split and checked for problems.

There are four kinds of source: None (the original CIFAR-10 binary release is downloaded), that release as a
folder or an archive, images in folders named by label, and a CSV file that names images and labels. Label
folders can lie in an archive, and folders for training, validation and test can lie above or below them.
Every encoded image is decoded through `service.inference.preprocess`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from fovea.model.data import cifar10, raw_dataset
from fovea.model.data.choices import Choices
from fovea.model.data.decoding import ImageHashes, square_geometry
from fovea.model.data.duplicates import find_contradictions, find_leaks
from fovea.model.data.examples import DataError, Examples
from fovea.model.data.inventory import File, Inventory, Part, format_count, join_names, to_printable
from fovea.model.data.labels import (
    LabelIndices,
    build_targets,
    collect_labels,
    describe_missing_labels,
    infer_task,
    require_images,
)
from fovea.model.data.pixels import select_pixels
from fovea.model.data.raw_dataset import RawDataset, WarningHandler
from fovea.model.data.split import CONFORMAL, TRAIN, VALIDATION, split_images, split_in_half
from fovea.service.artifact.contract import Geometry, Task

__all__ = ["IMBALANCE_RATIO", "DataError", "Dataset", "Examples", "load_dataset", "square_geometry"]

IMBALANCE_RATIO: Final = 3.0
"""Ratio of the largest label to the smallest from which labels count as imbalanced."""


@dataclass(frozen=True)
class Dataset:
    """A labelled data set with its parts; `test` is empty if the source names no test part."""

    name: str
    labels: tuple[str, ...]
    task: Task
    geometry: Geometry
    train: Examples
    validation: Examples
    """Held-out images for model selection, temperature and thresholds."""
    conformal: Examples
    """Held-out images for the conformal quantiles, used for no other choice; may be empty."""
    test: Examples
    unreadable_files: tuple[str, ...]
    """Lines for the skipped files, with the reason."""
    warnings: tuple[str, ...] = ()
    """Sentences on problems that make the set worse than it looks."""
    inventory: Inventory = field(default_factory=Inventory)
    """Interpretation of the source's files."""
    other: Examples | None = None
    """Training images of other things, which the model learns not to know; None without `--other`."""
    held_out_other: Examples | None = None
    """Held-out images of other things."""

    @property
    def label_counts(self) -> tuple[int, ...]:
        """Number of training images of each label."""
        targets = self.train.targets
        if targets.ndim == 2:
            return tuple(targets.sum(dim=0).long().tolist())
        return tuple(torch.bincount(targets, minlength=len(self.labels)).tolist())

    @property
    def description(self) -> tuple[str, ...]:
        """Sentences on the interpretation of the files; the counts add up to the number of files found."""
        inventory = self.inventory
        held_out_count = len(self.validation) + len(self.conformal)
        other_count = sum(len(part) for part in (self.other, self.held_out_other) if part)
        used_count = len(self.train) + held_out_count + len(self.test) + other_count
        sizes = {Part.TRAIN: len(self.train), Part.VALIDATION: held_out_count, Part.TEST: len(self.test)}
        parts = [
            f"{join_names(sorted(inventory.parts[part]))}: "
            f"{format_count(sizes[part], 'image')} {part.purpose}"
            for part in Part
            if part in inventory.parts
        ]
        if Part.VALIDATION not in inventory.parts:
            held_out = format_count(held_out_count, "image")
            parts.append(f"no validation part: {held_out} held out, chosen by the seed")
        return (
            f"{format_count(inventory.file_count, 'file')} found: {format_count(used_count, 'image')} used, "
            f"{len(self.unreadable_files)} unreadable, {inventory.skipped_count} left out",
            f"labels are {inventory.label_origin}: {join_names(self.labels, 10)}",
            *([f"images of other things: {other_count}"] if other_count else []),
            f"parts: {'; '.join(parts)}",
            *map(str, inventory.skipped_files),
        )

    def format_image_count(self, images: int) -> str:
        """Format the number of images, or of labels, over which an accuracy is measured."""
        suffix = f"' {len(self.labels)} labels each" if self.task is Task.MULTILABEL else ""
        return f"{images} images{suffix}"


def load_dataset(
    source: Path | None,
    *,
    size: int | None = None,
    small_set_size: int | None = None,
    validation: float,
    seed: int,
    cache: Path | None = None,
    choices: Choices | None = None,
    stream: bool = False,
    on_warning: WarningHandler = lambda line: None,
) -> Dataset:
    """Read a labelled data set and split it.

    `source` is a folder, an archive, a CSV file, or None for CIFAR-10. `size` is the side of the model's
    square input in pixels; None derives it from the images. A set of at most `SMALL_SET` images for training
    gets `small_set_size` then, if it is not None. `validation` is the held-out fraction of each
    label's training images, chosen by `seed`; half of it goes to `conformal`. If the source names a
    validation part, that part is held out instead. `choices` are for sources with an ambiguous layout.

    Decoded pixels are stored in the folder `cache`, memory-mapped from there, and reused by the next call.
    Without `cache` they stay in memory. With `stream`, or if the disk is too full, images are decoded on
    every access, and `on_warning` is called with a sentence about a full disk, on the calling thread before
    this function returns. Raises `DataError`.
    """
    path = cifar10.download_release(Path("data")) if source is None else source
    choices = choices or Choices()
    data_source = raw_dataset.open_source(path, choices)
    raw_data = raw_dataset.read_source(
        data_source, size, small_set_size, cache, choices, stream=stream, on_warning=on_warning
    )
    return _split_dataset(_select_readable(raw_data), validation, seed, choices.other)


@dataclass(frozen=True)
class _ReadableImages:
    """The readable images of a set, one row each."""

    raw_data: RawDataset
    files: tuple[File, ...]
    label_indices: tuple[LabelIndices, ...]
    image_hashes: ImageHashes
    examples: Examples
    unreadable_files: tuple[str, ...]


def _select_readable(raw_data: RawDataset) -> _ReadableImages:
    read_errors = raw_data.image_hashes.read_errors
    unreadable_files = tuple(
        f"{to_printable(raw_data.files[row].name)}: {reason}" for row, reason in sorted(read_errors.items())
    )
    rows = [row for row in range(len(raw_data.files)) if row not in read_errors]
    if not rows:
        raise DataError(
            f"none of the {len(read_errors)} images of {raw_data.name} can be read: {unreadable_files[0]}"
        )
    files = tuple(raw_data.files[row] for row in rows)
    labels, task = collect_labels(raw_data.files), infer_task(raw_data.files)
    index_by_label = {label: index for index, label in enumerate(labels)}
    indices = tuple(tuple(index_by_label[label] for label in file.labels) for file in files)
    examples = Examples(
        select_pixels(raw_data.pixels, torch.tensor(rows)),
        build_targets(indices, len(labels), task),
        tuple(to_printable(file.name) for file in files),
    )
    return _ReadableImages(
        raw_data, files, indices, raw_data.image_hashes.select(rows), examples, unreadable_files
    )


# --- the parts -----------------------------------------------------------------------------------

RowIndices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Parts:
    """Row numbers of the images in each part of a data set, each array of shape (N,) and type int64."""

    train: RowIndices
    validation: RowIndices
    conformal: RowIndices
    test: RowIndices
    has_validation: bool
    """True if the data set names its own images for validation."""

    @property
    def held_out(self) -> RowIndices:
        """Rows that are kept from training: validation and conformal, in the order of the rows."""
        return np.sort(np.concatenate([self.validation, self.conformal]))


def _split_dataset(images: _ReadableImages, fraction: float, seed: int, other: str | None) -> Dataset:
    labels = collect_labels(images.raw_data.files)
    task = infer_task(images.raw_data.files)
    if other is not None:
        _require_other(labels, task, other)
    parts = _choose_parts(images, labels, fraction, seed)
    if not len(parts.validation):
        raise DataError(
            f"each label of {images.raw_data.name} has only copies of one image; "
            "a label needs 2 different images"
        )
    other_number = -1 if other is None else labels.index(other)

    def select_examples(rows: RowIndices, *, of_other: bool = False) -> Examples:
        examples = images.examples.select(torch.from_numpy(rows))
        if other is None:
            return examples
        examples = examples.select(torch.where((examples.targets == other_number) == of_other)[0])
        later = (examples.targets > other_number).long()  # these labels move up by one
        return replace(examples, targets=examples.targets - later)

    return Dataset(
        images.raw_data.name,
        tuple(label for label in labels if label != other),
        task,
        images.raw_data.geometry,
        train=select_examples(parts.train),
        validation=select_examples(parts.validation),
        conformal=select_examples(parts.conformal),
        test=select_examples(parts.test),
        unreadable_files=images.unreadable_files,
        warnings=tuple(_find_warnings(images, labels, parts, other)),
        inventory=images.raw_data.inventory,
        other=None if other is None else select_examples(parts.train, of_other=True),
        held_out_other=None if other is None else select_examples(parts.held_out, of_other=True),
    )


_MIN_LABELS: Final = 3
"""Smallest number of labels beside other things: a binary model has no score of `known`."""


def _require_other(labels: Sequence[str], task: Task, other: str) -> None:
    """Raise `DataError` unless `other` is one of enough labels, of which each image has one."""
    if task is Task.MULTILABEL:
        raise DataError(f"--other {other}: these images have several labels, and other things have none")
    if other not in labels:
        raise DataError(f"--other {other}: no image has this label; the labels are {join_names(labels, 10)}")
    if len(labels) <= _MIN_LABELS:
        raise DataError(
            f"--other {other}: {format_count(len(labels) - 1, 'label')} would remain, and the score of "
            f"`known` needs {_MIN_LABELS}; leave --other out, so that {other} is a label like the others"
        )


def _choose_parts(images: _ReadableImages, labels: Sequence[str], fraction: float, seed: int) -> _Parts:
    """Choose the part of each image; `fraction` of the training images is held out if no part is named."""
    raw_data = images.raw_data
    by_part = {part: np.flatnonzero([file.part is part for file in images.files]) for part in Part}
    train_pool, validation_pool, test_rows = (by_part[part] for part in Part)
    has_validation = any(file.part is Part.VALIDATION for file in raw_data.files)
    if has_validation and not len(validation_pool):
        raise DataError(f"no validation image of {raw_data.name} can be read")
    pool_labels = [images.label_indices[row] for row in train_pool]
    require_images(labels, pool_labels, images.unreadable_files, min_images=1 if has_validation else 2)
    pool = validation_pool if has_validation else train_pool
    digests = [images.image_hashes.digests[row].tobytes() for row in pool]
    if has_validation:
        halves = split_in_half([images.label_indices[row] for row in pool], digests, seed)
        train_rows = train_pool
        validation_rows, conformal_rows = (pool[halves == part] for part in (VALIDATION, CONFORMAL))
    else:
        parts = split_images(pool_labels, digests, fraction, seed)
        train_rows, validation_rows, conformal_rows = (
            pool[parts == part] for part in (TRAIN, VALIDATION, CONFORMAL)
        )
    return _Parts(train_rows, validation_rows, conformal_rows, test_rows, has_validation)


def _find_warnings(
    images: _ReadableImages, labels: Sequence[str], parts: _Parts, other: str | None
) -> Iterator[str]:
    """Yield what is unusual about the parts: few images of a label, labels without images, copies.

    Images of other things, which have the label `other`, may be many more than those of a label.
    """

    def select_labels(rows: RowIndices) -> list[LabelIndices]:
        return [images.label_indices[row] for row in rows]

    yield from _describe_imbalance(labels, select_labels(parts.train), other)
    if parts.has_validation:
        yield from describe_missing_labels(labels, select_labels(parts.held_out), "held-out")
    if len(parts.test):
        yield from describe_missing_labels(labels, select_labels(parts.test), "test")
    yield from _describe_copies(images, parts.train, parts.held_out, parts.test)


def _describe_imbalance(
    labels: Sequence[str], indices: Sequence[LabelIndices], other: str | None
) -> list[str]:
    counts = Counter(index for image_indices in indices for index in image_indices if labels[index] != other)
    largest, smallest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    max_count, min_count = counts[largest], counts[smallest]
    if max_count <= IMBALANCE_RATIO * min_count:
        return []
    return [
        f"labels are imbalanced, {max_count / min_count:.1f} : 1: "
        f"{max_count} training images of {labels[largest]!r}, {min_count} of {labels[smallest]!r}"
    ]


def _describe_copies(
    images: _ReadableImages, train_rows: RowIndices, held_out_rows: RowIndices, test_rows: RowIndices
) -> list[str]:
    image_hashes, names = images.image_hashes, images.examples.names
    return [
        *find_contradictions(image_hashes, images.label_indices, names),
        *find_leaks(image_hashes, train_rows, held_out_rows, "held-out", names),
        *find_leaks(image_hashes, train_rows, test_rows, "test", names),
    ]
