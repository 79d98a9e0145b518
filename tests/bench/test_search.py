"""The search for the best configuration of a peer."""

from __future__ import annotations

from collections import Counter

import pytest

from fovea.bench.search import FINALISTS, find_fastest


def test_finalists_are_measured_again_by_turns_and_the_best_median_wins() -> None:
    """`lucky` is the fastest once; `steady` is the fastest of the repeated measurements."""
    planned = {
        "slow": [10.0],
        "lucky": [100.0, 50.0, 50.0],
        "steady": [80.0, 90.0, 90.0],
        "middle": [70.0, 60.0, 60.0],
        "slower": [5.0],
    }
    measured: list[str] = []

    def measure(candidate: str) -> float:
        measured.append(candidate)
        return planned[candidate][measured.count(candidate) - 1]

    winner, rates = find_fastest(list(planned), measure, repetitions=2)
    assert winner == "steady"
    assert rates == planned
    assert measured == [*planned, *["lucky", "steady", "middle"] * 2]


@pytest.mark.parametrize(("count", "repetitions"), [(1, 2), (2, 1), (12, 2), (4, 0)])
def test_number_of_measurements_is_bounded(count: int, repetitions: int) -> None:
    counter: Counter[int] = Counter()

    def measure(candidate: int) -> float:
        counter[candidate] += 1
        return float(candidate)

    winner, _ = find_fastest(range(count), measure, repetitions=repetitions)
    assert winner == count - 1
    finalists = min(FINALISTS, count) if count > 1 else 0  # the only one needs no final
    assert counter.total() == count + finalists * repetitions
