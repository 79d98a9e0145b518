"""The reference for drift detection."""

from __future__ import annotations

import numpy as np
import torch

from fovea.export.drift_reference import measure_reference
from fovea.model.data.examples import Examples
from fovea.model.evaluation.evaluate import BATCH_SIZE
from fovea.service.artifact.contract import Task
from fovea.service.inference.engine import Engine
from tests.graphs import build_model


def make_examples(pixels: np.ndarray) -> Examples:
    return Examples(torch.from_numpy(pixels), torch.zeros(len(pixels), dtype=torch.int64))


def make_engine(labels: int) -> Engine:
    graph = build_model(Task.MULTICLASS, [f"label {number}" for number in range(labels)], seed=1)
    return Engine(graph.SerializeToString(), provider="cpu", threads=1)


def test_reference_counts_predictions_of_all_splits() -> None:
    random = np.random.default_rng(0)
    levels = random.integers(0, 256, (BATCH_SIZE + 100, 1, 1, 3), dtype=np.uint8)
    noise = random.integers(0, 256, (BATCH_SIZE + 100, 16, 16, 3), dtype=np.uint8)
    pixels = levels // 2 + noise // 2
    model = make_engine(4)
    reference = measure_reference(
        model, make_examples(pixels[:90]), make_examples(pixels[:0]), make_examples(pixels[90:])
    )
    probabilities, brightness = model.run(pixels), pixels.mean(axis=(1, 2, 3)) / 255
    assert reference.images == len(pixels)
    counts = np.bincount(probabilities.argmax(axis=1), minlength=4)
    label_counts = {
        model.contract.labels[index]: count for index, count in enumerate(counts.tolist()) if count
    }
    assert reference.labels == label_counts
    assert list(reference.labels.values()) == sorted(label_counts.values(), reverse=True)
    for histogram, values in (
        (reference.confidence, probabilities.max(axis=1)),
        (reference.brightness, brightness),
    ):
        assert np.histogram(values, [-np.inf, *histogram.edges, np.inf])[0].tolist() == list(histogram.counts)
    assert set(reference.brightness.counts) == {len(pixels) // 10}  # bins of equal mass


def test_reference_keeps_the_nine_most_frequent_labels() -> None:
    random = np.random.default_rng(0)
    levels = random.integers(0, 256, (400, 1, 1, 3), dtype=np.uint8)
    noise = random.integers(0, 256, (400, 16, 16, 3), dtype=np.uint8)
    pixels = np.concatenate([levels * (noise > limit) for limit in (levels, 128, 30)]).astype(np.uint8)
    model = make_engine(400)
    counts = np.sort(np.bincount(model.run(pixels).argmax(axis=1), minlength=10))[::-1]
    assert list(measure_reference(model, make_examples(pixels)).labels.values()) == counts[:9].tolist()
    assert counts[9] > 0


def test_equal_images_give_brightness_bins() -> None:
    reference = measure_reference(make_engine(4), make_examples(np.full((30, 16, 16, 3), 77, np.uint8)))
    assert reference.brightness.counts == (0, 30)
    assert len(reference.labels) == 1
