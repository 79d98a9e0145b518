"""Ranges of activations, collected one image at a time."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from fovea.export.quantize.calibration import CalibrationMethod, Histogram, collect_histograms
from fovea.service.inference.pixels import Pixels
from tests.export.quantize.models import build_colour_graph


def draw_pixels(count: int) -> Iterator[Pixels]:
    random = np.random.default_rng(0)
    for _ in range(count):
        yield random.integers(0, 256, (16, 16, 3), dtype=np.uint8)


def make_histogram(values: object) -> Histogram:
    array = np.asarray(values, np.float64)
    counts = np.histogram(array, 2048, (array.min(), array.max()))[0].astype(np.float64)
    return Histogram(float(array.min()), float(array.max()), counts)


def test_histograms_hold_every_value_between_the_extremes() -> None:
    histograms = collect_histograms(build_colour_graph(), ["maps_0", "logits"], lambda: draw_pixels(5), 1)
    values = np.stack(list(draw_pixels(5))).astype(np.float32) / np.float32(255)
    maps = histograms["maps_0"]
    assert (maps.low, maps.high) == pytest.approx((values.min(), values.max()))
    expected = np.histogram(values, 2048, (maps.low, maps.high))[0]
    assert maps.counts.sum() == values.size
    assert np.abs(maps.counts - expected).sum() < 10  # rounding moves values on an edge
    assert maps.find_range(CalibrationMethod.MINMAX) == (maps.low, maps.high)
    assert histograms["logits"].counts.sum() == 20


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    graph, tensors = build_colour_graph(4), [f"conv_{number}" for number in range(4)]
    peaks = []
    for count in (4, 64):
        tracemalloc.start()
        collect_histograms(graph, tensors, lambda count=count: draw_pixels(count), 1)  # type: ignore[misc]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_entropy_and_percentile_cut_rare_extremes_and_minmax_keeps_them() -> None:
    random = np.random.default_rng(0)
    histogram = make_histogram([*random.normal(0, 1, 200_000), 60.0])
    assert histogram.find_range(CalibrationMethod.MINMAX)[1] == 60.0
    for method in (CalibrationMethod.ENTROPY, CalibrationMethod.PERCENTILE):
        low, high = histogram.find_range(method)
        assert 2.5 < high < 10
        assert -10 < low < -2.5


def test_zeros_behind_a_relu_do_not_narrow_the_range() -> None:
    values = np.maximum(np.random.default_rng(0).normal(-0.5, 1, 200_000), 0)
    low, high = make_histogram(values).find_range(CalibrationMethod.ENTROPY)
    assert low == 0
    assert high > 2.5


def test_no_method_cuts_an_even_distribution() -> None:
    histogram = make_histogram(np.linspace(0, 5, 100_000))
    for method in CalibrationMethod:
        low, high = histogram.find_range(method)
        assert (low, high) == pytest.approx((0, 5), abs=0.05)


def test_constant_tensor_has_a_range_of_one_value() -> None:
    histogram = Histogram(3.0, 3.0, np.zeros(2048))
    for method in CalibrationMethod:
        assert histogram.find_range(method) == (3.0, 3.0)
