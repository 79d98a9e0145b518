"""Counts of a model's labels against the names of the folders, from rows that are read once."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

from fovea.bulk.comparison.folder_labels import FolderLabels, find_folder
from fovea.bulk.rows import Row
from fovea.model.evaluation.report_page import MAX_MISTAKES
from fovea.model.evaluation.scores import CalibrationBin, LabelScore, calibration_error, split_into_bins
from fovea.service.artifact.contract import Task

_MAX_EXAMPLES: Final = 20
"""Number of images with an error that are kept as examples."""

_MAX_FOLDERS: Final = 1_000
"""Number of folders without a label whose names are kept."""

_CONFIDENCE_CELLS: Final = 10_000
"""Number of equal steps in which confidences are counted, so that memory does not grow with the images.

The calibration error differs by less than one step from that of the single answers.
"""

_NORMAL_QUANTILE: Final = 1.959964
"""Quantile of the standard normal distribution that a 95 % interval extends to."""


class ConfidentMistake(NamedTuple):
    """An image whose most probable label is not the name of its folder."""

    path: str
    true_label: str
    predicted_label: str
    probability: float
    """Probability of `predicted_label`."""
    width: int
    """Width of the upright image in pixels."""
    height: int


class ImageFailure(NamedTuple):
    """An image without an answer."""

    path: str
    code: str
    message: str


class FolderComparison:
    """The comparison of all rows that were added.

    A prediction is the most probable label, which is the column `label`. The memory grows with the number of
    labels and of different confusions, and not with the number of images.
    """

    def __init__(self, labels: Sequence[str], task: Task, thresholds: Sequence[float] = ()) -> None:
        """Create an empty comparison for the labels, the task and the thresholds of a model's contract."""
        self.labels, self.task = tuple(labels), task
        self.threshold = thresholds[0] if task is Task.BINARY else None
        """Probability from which a binary model selects its second label; None for other tasks."""
        self.counts: Counter[tuple[int, int]] = Counter()
        """Number of images for each pair of a true label and a predicted label, as indices."""
        self.known_count = self.unknown_count = 0
        """Numbers of measured images that are like the training images, and unlike them."""
        self.set_count = self.covered_count = self.set_label_count = 0
        """Numbers of label sets, of those with the true label, and of all their labels."""
        self.error_counts: Counter[str] = Counter()
        """Number of images without an answer, by the code of the error."""
        self.failures: list[ImageFailure] = []
        """The first images without an answer."""
        self.unknown_folders: Counter[str] = Counter()
        """Number of images in each folder that is named after no label; the first folders only."""
        self.unlabelled_count = 0
        """Number of images with an answer whose folder is named after no label, or that have no folder."""
        self.top_k = 0
        """Largest number of labels in a row."""
        self._top_hits = self._threshold_hits = 0
        self._folder_labels = FolderLabels(self.labels)
        self._folder_indices: dict[str, int | None] = {}
        self._mistakes: list[tuple[float, int, ConfidentMistake]] = []
        """Heap of the most confident mistakes, the least confident and latest first."""
        self._cell_counts, self._cell_hits = [0] * _CONFIDENCE_CELLS, [0] * _CONFIDENCE_CELLS
        self._cell_sums = [0.0] * _CONFIDENCE_CELLS
        self._row_count = 0

    def add(self, row: Row) -> None:
        """Count one row."""
        self._row_count += 1
        if row.label is None or row.probability is None:
            self._add_failure(row)
            return
        folder = find_folder(row.path)
        true_index = None if folder is None else self._find_index(folder)
        if true_index is None:
            self._add_unlabelled(folder)
            return
        predicted_index = self._folder_labels.get_index(row.label)
        self._add_answer(row, row.probability, true_index, predicted_index)

    def _find_index(self, folder: str) -> int | None:
        if folder not in self._folder_indices:
            if len(self._folder_indices) >= _MAX_FOLDERS + len(self.labels):
                self._folder_indices.clear()  # millions of folders are no labels
            self._folder_indices[folder] = self._folder_labels.find_index(folder)
        return self._folder_indices[folder]

    def _add_failure(self, row: Row) -> None:
        code = row.error or "unknown"
        self.error_counts[code] += 1
        if len(self.failures) < _MAX_EXAMPLES:
            self.failures.append(ImageFailure(row.path, code, row.message or ""))

    def _add_unlabelled(self, folder: str | None) -> None:
        self.unlabelled_count += 1
        if folder is not None and (
            folder in self.unknown_folders or len(self.unknown_folders) < _MAX_FOLDERS
        ):
            self.unknown_folders[folder] += 1

    def _add_answer(self, row: Row, probability: float, true_index: int, predicted_index: int) -> None:
        true_label, is_correct = self.labels[true_index], true_index == predicted_index
        self.counts[true_index, predicted_index] += 1
        labels = row.labels or ()
        self.top_k = max(self.top_k, len(labels))
        self._top_hits += true_label in labels
        if self.threshold is not None:
            positive = probability if predicted_index == 1 else 1 - probability
            self._threshold_hits += (positive >= self.threshold) == bool(true_index)
        if row.known is not None:
            self.known_count += row.known
            self.unknown_count += not row.known
        if row.label_set is not None:
            self.set_count += 1
            self.covered_count += true_label in row.label_set
            self.set_label_count += len(row.label_set)
        cell = min(int(probability * _CONFIDENCE_CELLS), _CONFIDENCE_CELLS - 1)
        self._cell_counts[cell] += 1
        self._cell_hits[cell] += is_correct
        self._cell_sums[cell] += probability
        if not is_correct:
            self._add_mistake(row, probability, true_label)

    def _add_mistake(self, row: Row, probability: float, true_label: str) -> None:
        mistake = ConfidentMistake(
            row.path, true_label, row.label or "", probability, row.width or 0, row.height or 0
        )
        item = (probability, -self._row_count, mistake)  # the row's number decides between equals
        if len(self._mistakes) < MAX_MISTAKES:
            heapq.heappush(self._mistakes, item)
        elif item > self._mistakes[0]:
            heapq.heapreplace(self._mistakes, item)

    # --- results ---------------------------------------------------------------------------------

    @property
    def image_count(self) -> int:
        """Number of measured images: those with an answer and a true label."""
        return self.counts.total()

    @property
    def correct_count(self) -> int:
        """Number of images whose most probable label is the true one."""
        return sum(count for (true, predicted), count in self.counts.items() if true == predicted)

    @property
    def accuracy(self) -> float:
        """Fraction of the measured images with the correct label; 0 without images."""
        return self.correct_count / self.image_count if self.image_count else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy (Wilson, 1927)."""
        return compute_interval(self.correct_count, self.image_count)

    @property
    def mean_recall(self) -> float:
        """Mean of the labels' recalls, in which labels with few images count as much as others."""
        recalls = [score.recall for _, score in self.scores if score.recall is not None]
        return sum(recalls) / len(recalls) if recalls else 0.0

    @property
    def top_accuracy(self) -> float | None:
        """Fraction of images with the true label among the first `top_k`; None if that says nothing new."""
        if not self.image_count or not 1 < self.top_k < len(self.labels):
            return None
        return self._top_hits / self.image_count

    @property
    def threshold_accuracy(self) -> float | None:
        """Accuracy where a binary model decides by its threshold; None if that is the most probable label."""
        if self.threshold is None or self.threshold == 0.5 or not self.image_count:
            return None
        return self._threshold_hits / self.image_count

    @property
    def true_indices(self) -> list[int]:
        """Indices of the labels that have images, in the model's order."""
        return sorted({true for true, _ in self.counts})

    @property
    def scores(self) -> list[tuple[str, LabelScore]]:
        """Labels that have images, or were predicted, with their precision and recall."""
        images: Counter[int] = Counter()
        predicted_counts: Counter[int] = Counter()
        for (true, predicted), count in self.counts.items():
            images[true] += count
            predicted_counts[predicted] += count
        return [
            (
                self.labels[index],
                LabelScore.from_counts(self.counts[index, index], predicted_counts[index], images[index]),
            )
            for index in sorted(images.keys() | predicted_counts.keys())
        ]

    @property
    def mistakes(self) -> list[ConfidentMistake]:
        """The most confident mistakes, the most confident first."""
        return [mistake for _, _, mistake in sorted(self._mistakes, reverse=True)]

    @property
    def bins(self) -> tuple[CalibrationBin, ...]:
        """Bins of equal mass by ascending confidence."""
        counts = np.array(self._cell_counts, np.int64)
        is_filled = counts > 0
        return split_into_bins(
            counts[is_filled],
            np.array(self._cell_sums)[is_filled],
            np.array(self._cell_hits, np.float64)[is_filled],
        )

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the most probable label."""
        return calibration_error(self.bins)

    def list_unknown_folders(self, max_count: int) -> list[str]:
        """Return a sentence on each folder without a label, those with most images first."""
        sentences = []
        for folder, count in self.unknown_folders.most_common(max_count):
            hint = self._folder_labels.explain_mismatch(folder)
            images = "1 image" if count == 1 else f"{count:,} images"
            sentences.append(f"{folder}: {images} without a true label{f'; {hint}' if hint else ''}")
        return sentences


def compare_rows(
    rows: Iterable[Row], labels: Sequence[str], task: Task, thresholds: Sequence[float] = ()
) -> FolderComparison:
    """Return the comparison of all rows for the labels, the task and the thresholds of a model's contract."""
    comparison = FolderComparison(labels, task, thresholds)
    for row in rows:
        comparison.add(row)
    return comparison


def compute_interval(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a rate (Wilson, 1927), which also holds for few images and near 0 and 1."""
    if not count:
        return 0.0, 1.0
    rate, square = hits / count, _NORMAL_QUANTILE**2
    centre = (rate + square / (2 * count)) / (1 + square / count)
    spread = (
        _NORMAL_QUANTILE
        * math.sqrt(rate * (1 - rate) / count + square / (4 * count**2))
        / (1 + square / count)
    )
    return max(0.0, centre - spread), min(1.0, centre + spread)
