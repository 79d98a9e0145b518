"""The figures of `make bench-ray`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fovea.bench.ray_data import measure
from fovea.bench.workloads import BenchError


def test_rate_is_that_of_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("fovea.bench.ray_data.time.monotonic", lambda: clock)

    def answer() -> Iterator[int]:
        nonlocal clock
        clock = 30.0  # a slow start
        yield 10
        for _ in range(8):
            clock += 2.0
            yield 10
        clock += 50.0  # a slow end
        yield 10

    timing = measure(answer(), 100)
    assert timing.start == 30.0
    assert timing.rate == pytest.approx(5.0)
    assert timing.seconds == 96.0


def test_lost_photographs_are_an_error() -> None:
    with pytest.raises(BenchError, match="3 of 4 photographs were answered"):
        measure(iter([2, 1]), 4)
