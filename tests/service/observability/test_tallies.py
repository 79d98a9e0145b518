"""Values that are added to the metrics in bulk count as if each had been observed by itself."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest

from fovea.service.observability.metrics import MAX_PENDING_REQUESTS, Metrics
from fovea.service.observability.tallies import HistogramTally, SumTally, observe_all

BUCKETS = (0.1, 0.25, 1.0)
VALUES = st.lists(
    st.sampled_from((*BUCKETS, 0.0, 0.100001, 0.2, 5.0, math.nan, math.inf, -math.inf)) | st.floats(0, 10),
    max_size=30,
)


def render_histogram(observations: list[list[float]], *, in_bulk: bool) -> str:
    registry = CollectorRegistry()
    histogram = Histogram("size", "Sizes.", registry=registry, buckets=BUCKETS)
    for values in observations:
        if in_bulk:
            observe_all(histogram, values)
        else:
            for value in values:
                histogram.observe(value)
    lines = generate_latest(registry).decode().splitlines()
    return "\n".join(line for line in lines if "_created" not in line and "_sum" not in line)


def test_values_that_are_no_numbers_are_in_no_bucket() -> None:
    """`prometheus_client` adds them to the sum alone, which shows that something is wrong."""
    registry = CollectorRegistry()
    observe_all(Histogram("size", "Sizes.", registry=registry, buckets=BUCKETS), [math.nan, 0.5])
    assert registry.get_sample_value("size_count") == 1
    assert math.isnan(registry.get_sample_value("size_sum") or 0.0)


@given(observations=st.lists(VALUES, max_size=3))
def test_bulk_gives_the_buckets_of_single_observations(observations: list[list[float]]) -> None:
    assert render_histogram(observations, in_bulk=True) == render_histogram(observations, in_bulk=False)


def test_tallies_count_every_value_once() -> None:
    registry = CollectorRegistry()
    histogram = HistogramTally(Histogram("size", "Sizes.", registry=registry, buckets=BUCKETS))
    total = SumTally(Counter("bytes", "Bytes.", registry=registry))
    for values in ([0.5, 2.0], [], [0.25]):
        for value in values:
            histogram.observe(value)
            total.add(value)
        for _ in range(2):
            histogram.fold()
            total.fold()
    assert registry.get_sample_value("size_count") == 3
    assert registry.get_sample_value("size_bucket", {"le": "0.25"}) == 1
    assert registry.get_sample_value("size_sum") == 2.75
    assert registry.get_sample_value("bytes_total") == 2.75


def count_requests(metrics: Metrics, count: int) -> float:
    for number in range(count):
        metrics.count_request("native", "/v1/classify", "small", 400 if number % 2 else 200, 0.5)
    series = {"protocol": "native", "route": "/v1/classify", "model": "small"}
    return metrics.registry.get_sample_value("fovea_request_seconds_count", series) or 0.0


def test_requests_wait_for_a_fold_and_are_folded_at_the_limit() -> None:
    metrics = Metrics(CollectorRegistry())
    assert count_requests(metrics, MAX_PENDING_REQUESTS - 1) == 0
    assert count_requests(metrics, 1) == MAX_PENDING_REQUESTS
    assert count_requests(metrics, 3) == MAX_PENDING_REQUESTS
    metrics.fold()
    assert count_requests(metrics, 0) == MAX_PENDING_REQUESTS + 3
    series = {"protocol": "native", "route": "/v1/classify", "model": "small", "status": "200"}
    # Every other request is 200: 128 of 255, the first one behind them, and two of the last three.
    assert metrics.registry.get_sample_value("fovea_requests_total", series) == 131


def test_every_change_is_visible_at_once_to_other_processes() -> None:
    metrics = Metrics(CollectorRegistry(), is_shared=True)
    assert count_requests(metrics, 1) == 1
    metrics.active_requests += 1
    metrics.fold()
    assert metrics.registry.get_sample_value("fovea_requests_in_flight") == 1


def test_failing_tally_does_not_keep_others_from_being_counted(caplog: pytest.LogCaptureFixture) -> None:
    class FailingTally:
        def fold(self) -> None:
            raise OSError("No space left on device")

    metrics = Metrics(CollectorRegistry())
    tally: Any = FailingTally()
    metrics.fold_later(tally)
    metrics.seconds_by_stage["read"].observe(1.0)
    with caplog.at_level(logging.ERROR):
        metrics.fold()
    assert "could not be updated" in caplog.text
    assert count_requests(metrics, 0) == 0
    assert metrics.registry.get_sample_value("fovea_stage_seconds_count", {"stage": "read"}) == 1


def test_fold_takes_no_time_for_tallies_without_values() -> None:
    """A service may have a hundred models, of which one gets a request at a time."""

    class CountingTally:
        fold_count = 0

        def fold(self) -> None:
            self.fold_count += 1

    metrics = Metrics(CollectorRegistry(), is_shared=True)
    tally = CountingTally()
    for expected_count in (1, 2):
        for _ in range(2):
            metrics.fold_later(tally)
        for _ in range(2):
            metrics.fold()
            assert tally.fold_count == expected_count


def test_pending_tally_does_not_bring_removed_series_back() -> None:
    metrics = Metrics(CollectorRegistry())
    identity = ("small", "1")

    class DriftTally:
        def fold(self) -> None:
            metrics.drift_psi.labels(*identity, "label").set(0.5)

    metrics.fold_later(DriftTally())
    metrics.remove_version(*identity)
    metrics.fold()
    series = {"model": "small", "version": "1", "signal": "label"}
    assert metrics.registry.get_sample_value("fovea_drift_psi", series) is None


def test_callers_are_counted_with_the_request_that_follows() -> None:
    metrics = Metrics(CollectorRegistry(), is_shared=True)
    for name, status in (("app", 200), ("app", 200), ("app", 429), ("", 401)):
        metrics.count_caller(name, status)
    count_requests(metrics, 1)
    counts = {
        (sample.labels["caller"], sample.labels["status"]): sample.value
        for sample in next(iter(metrics.caller_requests.collect())).samples
        if sample.name == "fovea_caller_requests_total"
    }
    assert counts == {("app", "200"): 2, ("app", "429"): 1, ("anonymous", "401"): 1}
