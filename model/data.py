"""Labelled sets for training: read, labelled, split, and looked through for what spoils them.

Four sources are understood: nothing (the original CIFAR-10 binary release is downloaded), that release as a
folder or an archive, images in folders named by label, plain or in a tar archive, with or without `train/`
and `test/` above them, and a CSV file that names images and labels. Every encoded image is read through
`service.images`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from model import cifar10, whole
from model.duplicates import contradictions, leaks
from model.examples import DataError, Examples
from model.labels import Indices, labels_of, require_two, targets_of, task_of
from model.pixels import rows_of
from model.reading import Prints, square
from model.sources import File
from model.split import CONFORMAL, TRAIN, VALIDATION, split
from model.whole import Say, Whole
from service.contract import Geometry, Task

__all__ = ["IMBALANCE", "Data", "DataError", "Examples", "load", "square"]

IMBALANCE: Final = 3.0
"""From this ratio of the largest label to the smallest on, labels are called unequal."""


@dataclass(frozen=True)
class Data:
    """A labelled set in its parts. `test` is empty where the source names none."""

    name: str
    labels: tuple[str, ...]
    task: Task
    geometry: Geometry
    train: Examples
    validation: Examples
    """Held out: choices, temperature and thresholds are made on it."""
    conformal: Examples
    """Held out too: the conformal sets are measured on it, and nothing is chosen. May be empty."""
    test: Examples
    unreadable: tuple[str, ...]
    """A line for each file that was skipped, with the reason."""
    warnings: tuple[str, ...] = ()
    """Sentences on what makes the set worse than it looks."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Images to train on, by label."""
        targets = self.train.targets
        if targets.ndim == 2:
            return tuple(targets.sum(dim=0).long().tolist())
        return tuple(torch.bincount(targets, minlength=len(self.labels)).tolist())

    def counted(self, images: int) -> str:
        """What an accuracy of so many images is a share of."""
        each = f"' {len(self.labels)} labels each" if self.task is Task.MULTILABEL else ""
        return f"{images} images{each}"


def load(
    source: Path | None,
    *,
    size: int | None = None,
    validation: float,
    seed: int,
    cache: Path | None = None,
    stream: bool = False,
    say: Say = lambda line: None,
) -> Data:
    """Read a labelled set and split it.

    `source` is a folder, an archive, a CSV file, or None for CIFAR-10. `size` is the side of the model's
    square input in pixels, None to go by the images; `validation` the fraction of each label's training
    images that is held out, chosen by `seed`, half of it for `conformal`. The decoded pixels are kept in the
    folder `cache`, from where they are used without being read into memory, and from where the next call
    takes them; without a folder they are kept in memory. With `stream`, or where the disk has not the room,
    they are decoded each time they are asked for. `say` is told so in a sentence. Raises `DataError`.
    """
    path = cifar10.download(Path("data")) if source is None else source
    everything = whole.read(whole.source_at(path), size, cache, stream=stream, say=say)
    return _split(_readable(everything), validation, seed)


@dataclass(frozen=True)
class _Readable:
    """The images of a set that can be read, a row each."""

    whole: Whole
    files: tuple[File, ...]
    indices: tuple[Indices, ...]
    prints: Prints
    examples: Examples
    unreadable: tuple[str, ...]


def _readable(everything: Whole) -> _Readable:
    skipped = everything.prints.unreadable
    unreadable = tuple(f"{_printable(everything.files[row])}: {why}" for row, why in sorted(skipped.items()))
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
        tuple(map(_printable, files)),
    )
    return _Readable(everything, files, indices, everything.prints.take(rows), examples, unreadable)


def _printable(file: File) -> str:
    """Its name; what is not UTF-8 becomes a question mark."""
    return file.name.encode(errors="replace").decode()


# --- the parts -----------------------------------------------------------------------------------

Rows = npt.NDArray[np.int64]


def _split(images: _Readable, fraction: float, seed: int) -> Data:
    everything = images.whole
    labels = labels_of(everything.files)
    tests = np.array([file.test for file in images.files])
    pool, test = np.flatnonzero(~tests), np.flatnonzero(tests)
    pool_labels = [images.indices[row] for row in pool]
    require_two(labels, pool_labels, images.unreadable)
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
            *_copies(images, train, np.sort(np.concatenate([validation, conformal])), test),
        ),
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
