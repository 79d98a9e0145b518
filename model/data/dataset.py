"""Labelled data sets for training: read, labelled, split and checked for problems.

There are four kinds of source: None (the original CIFAR-10 binary release is downloaded), that release as a
folder or an archive, images in folders named by label, and a CSV file that names images and labels. Label
folders can lie in an archive, and folders for training, validation and test can lie above or below them.
Every encoded image is decoded through `service.inference.preprocess`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from fovea.model.data import cifar10, raw_dataset
from fovea.model.data.choices import Choices
from fovea.model.data.decoding import Prints, square
from fovea.model.data.duplicates import contradictions, leaks
from fovea.model.data.examples import DataError, Examples
from fovea.model.data.inventory import File, Inventory, Part, count, printable, some
from fovea.model.data.labels import Indices, labels_of, require_images, targets_of, task_of, without
from fovea.model.data.pixels import rows_of
from fovea.model.data.raw_dataset import Say, Whole
from fovea.model.data.split import CONFORMAL, TRAIN, VALIDATION, halves, split
from fovea.service.artifact.contract import Geometry, Task

__all__ = ["IMBALANCE", "Data", "DataError", "Examples", "load", "square"]

IMBALANCE: Final = 3.0
"""Ratio of the largest label to the smallest from which labels count as imbalanced."""


@dataclass(frozen=True)
class Data:
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
    unreadable: tuple[str, ...]
    """Lines for the skipped files, with the reason."""
    warnings: tuple[str, ...] = ()
    """Sentences on problems that make the set worse than it looks."""
    inventory: Inventory = field(default_factory=Inventory)
    """Interpretation of the source's files."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of training images of each label."""
        targets = self.train.targets
        if targets.ndim == 2:
            return tuple(targets.sum(dim=0).long().tolist())
        return tuple(torch.bincount(targets, minlength=len(self.labels)).tolist())

    @property
    def description(self) -> tuple[str, ...]:
        """Sentences on the interpretation of the files; their counts add up to the number of files found."""
        inventory = self.inventory
        held = len(self.validation) + len(self.conformal)
        used = len(self.train) + held + len(self.test)
        sizes = {Part.TRAIN: len(self.train), Part.VALIDATION: held, Part.TEST: len(self.test)}
        parts = [
            f"{some(sorted(inventory.parts[part]))}: {count(sizes[part], 'image')} {part.purpose}"
            for part in Part
            if part in inventory.parts
        ]
        if Part.VALIDATION not in inventory.parts:
            parts.append(f"no part is named for validation: {count(held, 'image')} held out by the seed")
        return (
            f"{count(inventory.found, 'file')} found: {count(used, 'image')} used, "
            f"{len(self.unreadable)} that cannot be read, {inventory.left_out_count} left out",
            f"labels are {inventory.labels}: {some(self.labels, 10)}",
            f"parts: {'; '.join(parts)}",
            *map(str, inventory.left_out),
        )

    def counted(self, images: int) -> str:
        """Format the number of images, or of labels, over which an accuracy is measured."""
        each = f"' {len(self.labels)} labels each" if self.task is Task.MULTILABEL else ""
        return f"{images} images{each}"


def load(
    source: Path | None,
    *,
    size: int | None = None,
    validation: float,
    seed: int,
    cache: Path | None = None,
    choices: Choices | None = None,
    stream: bool = False,
    say: Say = lambda line: None,
) -> Data:
    """Read a labelled data set and split it.

    `source` is a folder, an archive, a CSV file, or None for CIFAR-10. `size` is the side of the model's
    square input in pixels; None derives it from the images. `validation` is the held-out fraction of each
    label's training images, chosen by `seed`; half of it goes to `conformal`. If the source names a
    validation part, that part is held out instead. `choices` are for sources with an ambiguous layout.

    Decoded pixels are stored in the folder `cache`, memory-mapped from there, and reused by the next call.
    Without `cache` they stay in memory. With `stream`, or if the disk is too full, images are decoded on
    every access, and `say` receives a sentence about a full disk. Raises `DataError`.
    """
    path = cifar10.download(Path("data")) if source is None else source
    choices = choices or Choices()
    source_of_all = raw_dataset.source_at(path, choices)
    everything = raw_dataset.read(source_of_all, size, cache, choices, stream=stream, say=say)
    return _split(_readable(everything), validation, seed)


@dataclass(frozen=True)
class _Readable:
    """The readable images of a set, one row each."""

    whole: Whole
    files: tuple[File, ...]
    indices: tuple[Indices, ...]
    prints: Prints
    examples: Examples
    unreadable: tuple[str, ...]


def _readable(everything: Whole) -> _Readable:
    skipped = everything.prints.unreadable
    unreadable = tuple(
        f"{printable(everything.files[row].name)}: {why}" for row, why in sorted(skipped.items())
    )
    rows = [row for row in range(len(everything.files)) if row not in skipped]
    if not rows:
        raise DataError(
            f"none of the {len(skipped)} images of {everything.name} can be read: {unreadable[0]}"
        )
    files = tuple(everything.files[row] for row in rows)
    labels, task = labels_of(everything.files), task_of(everything.files)
    place = {label: index for index, label in enumerate(labels)}
    indices = tuple(tuple(place[label] for label in file.labels) for file in files)
    examples = Examples(
        rows_of(everything.pixels, torch.tensor(rows)),
        targets_of(indices, len(labels), task),
        tuple(printable(file.name) for file in files),
    )
    return _Readable(everything, files, indices, everything.prints.take(rows), examples, unreadable)


# --- the parts -----------------------------------------------------------------------------------

Rows = npt.NDArray[np.int64]


def _split(images: _Readable, fraction: float, seed: int) -> Data:
    everything = images.whole
    labels = labels_of(everything.files)
    by_part = {part: np.flatnonzero([file.part is part for file in images.files]) for part in Part}
    pool, named, test = (by_part[part] for part in Part)
    has_validation = any(file.part is Part.VALIDATION for file in everything.files)
    if has_validation and not len(named):
        raise DataError(f"no image of {everything.name} that is for validation can be read")
    pool_labels = [images.indices[row] for row in pool]
    require_images(labels, pool_labels, images.unreadable, least=1 if has_validation else 2)
    held = [images.indices[row] for row in named]
    if has_validation:
        parts = halves(held, [images.prints.digests[row].tobytes() for row in named], seed)
        train, validation, conformal = pool, named[parts == VALIDATION], named[parts == CONFORMAL]
    else:
        parts = split(pool_labels, [images.prints.digests[row].tobytes() for row in pool], fraction, seed)
        train, validation, conformal = (pool[parts == part] for part in (TRAIN, VALIDATION, CONFORMAL))
    if not len(validation):
        raise DataError(
            f"each label of {everything.name} has copies of one image alone; at least 2 are needed"
        )

    def examples(rows: Rows) -> Examples:
        return images.examples.take(torch.from_numpy(rows))

    return Data(
        everything.name,
        labels,
        task_of(everything.files),
        everything.geometry,
        train=examples(train),
        validation=examples(validation),
        conformal=examples(conformal),
        test=examples(test),
        unreadable=images.unreadable,
        warnings=(
            *_imbalance(labels, [images.indices[row] for row in train]),
            *(without(labels, held, "held-out") if has_validation else ()),
            *(without(labels, [images.indices[row] for row in test], "test") if len(test) else ()),
            *_copies(images, train, np.sort(np.concatenate([validation, conformal])), test),
        ),
        inventory=everything.inventory,
    )


def _imbalance(labels: Sequence[str], indices: Sequence[Indices]) -> list[str]:
    counts = Counter(index for own in indices for index in own)
    large, small = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    most, least = counts[large], counts[small]
    if most <= IMBALANCE * least:
        return []
    return [
        f"labels are unequal, {most / least:.1f} : 1: "
        f"{most} images of {labels[large]!r} to train on, {least} of {labels[small]!r}"
    ]


def _copies(images: _Readable, train: Rows, held: Rows, test: Rows) -> list[str]:
    prints, names = images.prints, images.examples.names
    return [
        *contradictions(prints, images.indices, names),
        *leaks(prints, train, held, "held-out", names),
        *leaks(prints, train, test, "test", names),
    ]
