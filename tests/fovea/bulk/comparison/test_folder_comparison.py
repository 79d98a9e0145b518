"""Figures of a comparison, against counts by hand and against the metrics of the training report."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fovea.bulk.comparison.folder_comparison import FolderComparison, compare_rows, compute_interval
from fovea.bulk.rows import Row
from fovea.model.evaluation import metrics
from fovea.model.evaluation.report_page import MAX_MISTAKES
from fovea.model.evaluation.scores import LabelScore, calibration_error
from fovea.service.artifact.contract import Task

LABELS = ("ant", "bee", "cow", "dog", "elk", "fox", "gnu")


def make_row(path: str, label: str, probability: float = 0.9, **fields: Any) -> Row:
    return Row(path, label, probability, (label,), (probability,), width=40, height=20)._replace(**fields)


def compare(*rows: Row, task: Task = Task.MULTICLASS, thresholds: tuple[float, ...] = ()) -> FolderComparison:
    return compare_rows(rows, LABELS[:2] if task is Task.BINARY else LABELS, task, thresholds)


def test_counts_match_counts_by_hand() -> None:
    comparison = compare(
        make_row("ant/1.jpg", "ant"),
        make_row("ant/2.jpg", "bee", 0.6),
        make_row("Bee/1.jpg", "bee"),
        make_row("photos.zip/BEE/2.jpg", "cow", 0.8),
    )
    assert (comparison.image_count, comparison.correct_count, comparison.accuracy) == (4, 2, 0.5)
    assert comparison.counts == {(0, 0): 1, (0, 1): 1, (1, 1): 1, (1, 2): 1}
    assert comparison.true_indices == [0, 1]
    assert comparison.scores == [
        ("ant", LabelScore(1.0, 0.5, 2)),
        ("bee", LabelScore(0.5, 0.5, 2)),
        ("cow", LabelScore(0.0, None, 0)),
    ]
    assert comparison.mean_recall == 0.5
    assert [mistake.path for mistake in comparison.mistakes] == ["photos.zip/BEE/2.jpg", "ant/2.jpg"]
    assert comparison.mistakes[0][1:] == ("bee", "cow", 0.8, 40, 20)


def test_images_that_cannot_be_measured_are_counted_and_do_not_count_as_mistakes() -> None:
    comparison = compare(
        make_row("ant/1.jpg", "ant"),
        make_row("bees/1.jpg", "bee"),
        make_row("bees/2.jpg", "bee"),
        make_row("s3://bucket/1.jpg", "bee"),
        Row("ant/broken.jpg", error="bad_image", message="it is damaged"),
        Row("other/missing.jpg", error="unreadable_file", message="it is gone"),
    )
    assert (comparison.image_count, comparison.accuracy) == (1, 1.0)
    assert (comparison.unlabelled_count, dict(comparison.unknown_folders)) == (3, {"bees": 2})
    assert comparison.list_unknown_folders(9) == [
        "bees: 2 images without a true label; the nearest label is 'bee'"
    ]
    assert comparison.error_counts == {"bad_image": 1, "unreadable_file": 1}
    assert comparison.failures[0] == ("ant/broken.jpg", "bad_image", "it is damaged")


def test_most_confident_mistakes_are_kept_whatever_their_order() -> None:
    rows = [make_row(f"ant/{number}.jpg", "bee", 0.5 + number / 1000) for number in range(100)]
    expected = [f"ant/{number}.jpg" for number in range(99, 99 - MAX_MISTAKES, -1)]
    for seed in range(3):
        random.Random(seed).shuffle(rows)  # noqa: S311
        assert [mistake.path for mistake in compare(*rows).mistakes] == expected
    ties = [make_row(f"ant/{number}.jpg", "bee") for number in range(100)]
    assert [mistake.path for mistake in compare(*ties).mistakes] == [
        f"ant/{number}.jpg" for number in range(MAX_MISTAKES)
    ]


def test_figures_equal_those_of_the_training_report() -> None:
    """The same probabilities as a tensor and as rows have the same scores and calibration error."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(0, 7, (2_000,), generator=generator)
    logits = torch.randn(2_000, 7, generator=generator) + 2 * torch.nn.functional.one_hot(targets, 7)
    probabilities = logits.softmax(dim=1)
    best = probabilities.max(dim=1)
    rows = [
        make_row(f"{LABELS[target]}/{number}.jpg", LABELS[predicted], probability)
        for number, (target, predicted, probability) in enumerate(
            zip(targets.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
        )
    ]
    comparison = compare(*rows)
    assert comparison.accuracy == metrics.compute_accuracy(best.indices, targets)
    assert [score for _, score in comparison.scores] == list(metrics.label_scores(best.indices, targets, 7))
    bins = metrics.reliability_bins(probabilities, targets, Task.MULTICLASS)
    assert [one.count for one in comparison.bins] == [one.count for one in bins]
    assert comparison.calibration_error == pytest.approx(calibration_error(bins), abs=1e-3)


def test_further_labels_sets_and_unlike_images_are_measured() -> None:
    comparison = compare(
        make_row("ant/1.jpg", "bee", labels=("bee", "ant"), label_set=("bee", "ant"), known=True),
        make_row("ant/2.jpg", "bee", labels=("bee", "cow"), label_set=("bee",), known=False),
        make_row("ant/3.jpg", "ant", labels=("ant", "cow"), label_set=("ant",), known=True),
    )
    assert comparison.top_k == 2
    assert comparison.top_accuracy == pytest.approx(2 / 3)
    assert (comparison.covered_count, comparison.set_count, comparison.set_label_count) == (2, 3, 4)
    assert (comparison.known_count, comparison.unknown_count) == (2, 1)


def test_first_label_alone_and_all_labels_have_no_accuracy_of_several() -> None:
    assert compare(make_row("ant/1.jpg", "bee")).top_accuracy is None
    assert compare(make_row("ant/1.jpg", "bee", labels=LABELS)).top_accuracy is None
    assert compare().top_accuracy is None


def test_threshold_of_a_binary_model_is_measured_apart() -> None:
    """With 0.3 for `bee`, an image of 0.4 is a bee although `ant` is more probable."""
    rows = [
        make_row("ant/1.jpg", "ant", 0.6),
        make_row("bee/1.jpg", "ant", 0.6),
        make_row("bee/2.jpg", "ant", 0.8),
        make_row("bee/3.jpg", "bee", 0.7),
    ]
    comparison = compare(*rows, task=Task.BINARY, thresholds=(0.3,))
    assert (comparison.accuracy, comparison.threshold_accuracy) == (0.5, 0.5)
    assert compare(*rows[1:], task=Task.BINARY, thresholds=(0.3,)).threshold_accuracy == pytest.approx(2 / 3)
    assert compare(*rows, task=Task.BINARY, thresholds=(0.5,)).threshold_accuracy is None
    assert compare(*rows).threshold_accuracy is None


def test_no_rows_give_no_figures() -> None:
    comparison = compare()
    assert (comparison.accuracy, comparison.interval, comparison.mean_recall) == (0.0, (0.0, 1.0), 0.0)
    assert (comparison.calibration_error, comparison.bins, comparison.scores) == (0.0, (), [])


def test_interval_covers_the_rate_and_stays_between_zero_and_one() -> None:
    for hits, count, low, high in ((0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (50, 100, 0.404, 0.596)):
        interval = compute_interval(hits, count)
        assert interval == pytest.approx([low, high], abs=1e-3)
        assert 0 <= interval[0] <= interval[1] <= 1


@pytest.mark.long
def test_memory_does_not_grow_with_images_or_folders() -> None:
    """Every image is a mistake, or an error, or lies in a folder of its own."""

    def list_rows(count: int) -> Iterator[Row]:
        for number in range(count):
            yield make_row(f"/ant/{number}.jpg", "bee", number / count)
            yield make_row(f"/folder {number}/1.jpg", "bee")
            yield Row(f"/ant/broken {number}.jpg", error="bad_image", message="it is damaged")

    compare_rows(list_rows(1_500), LABELS, Task.MULTICLASS)
    tracemalloc.start()
    try:
        sizes = []
        for count in (1_500, 6_000):
            tracemalloc.reset_peak()
            start = tracemalloc.get_traced_memory()[0]
            compare_rows(list_rows(count), LABELS, Task.MULTICLASS)
            sizes.append(tracemalloc.get_traced_memory()[1] - start)
    finally:
        tracemalloc.stop()
    assert sizes[1] < sizes[0] + 200_000
