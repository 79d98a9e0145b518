"""Statistics of the benchmark and the evaluation of its goals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fovea.bench.cells import ClosedLoopCell, OpenLoopCell, measure_undisturbed
from fovea.bench.report import drop_disturbed, evaluate_goals, format_markdown, ratio_to_bare, tail_ratio

CELL = ClosedLoopCell(
    workload="thumbnails", name="fovea", round=0, connections=32, seconds=5.0, rate=900.0, p50=0.03, p99=0.05,
    cpu_seconds=9.0, resident_bytes=1, others=0.0, refusals=0, errors=0,
)  # fmt: skip

OPEN = OpenLoopCell(
    workload="thumbnails", name="fovea", round=0, share=3.0, capacity=1000.0, deadline=1.2, in_time=950.0,
    p50=0.2, p99=0.4, refusal_p50=0.001, refusal_p99=0.016, statuses={200: 1, 503: 2}, errors={},
    retry_after=(1, 1), late_requests=0, queued_requests=0, cpu_seconds=1.0, client_cpu_seconds=0.1,
    resident_bytes=1, others=0.0,
)  # fmt: skip


def test_ratios_are_taken_within_a_round() -> None:
    """The machine is half as fast in the second round: the ratio stays."""
    cells = [
        replace(CELL, name=name, round=turn, rate=rate / (1 + turn))
        for turn in range(2)
        for name, rate in (("bare", 1000.0), ("fovea", 900.0))
    ]
    assert ratio_to_bare(cells, "fovea", 32) == pytest.approx(0.9)


def test_one_disturbed_round_does_not_count() -> None:
    cells = [replace(CELL, round=turn, name="bare", rate=1000.0) for turn in range(3)]
    cells += [replace(CELL, round=turn, rate=rate) for turn, rate in enumerate((900.0, 300.0, 910.0))]
    assert ratio_to_bare(cells, "fovea", 32) == pytest.approx(0.9)
    assert tail_ratio(cells, "fovea", 32) == pytest.approx(5 / 3)


def test_disturbed_measurements_are_dropped_if_others_exist() -> None:
    clear_cell, disturbed_cell = replace(CELL, round=0), replace(CELL, round=1, others=0.5)
    assert drop_disturbed([clear_cell, disturbed_cell]) == [clear_cell]
    assert drop_disturbed([disturbed_cell]) == [disturbed_cell]
    bare_cell = replace(CELL, name="bare", rate=1000.0, round=1)
    assert ratio_to_bare(
        drop_disturbed([clear_cell, disturbed_cell, bare_cell]), "fovea", 32
    ) == pytest.approx(0.9)


def test_missing_measurements_give_nan() -> None:
    assert math.isnan(ratio_to_bare([CELL], "fovea", 32))
    assert math.isnan(tail_ratio([CELL], "fovea", 8))


def test_only_measured_goals_are_evaluated() -> None:
    goals = evaluate_goals([CELL, replace(CELL, name="bare", rate=1000.0)], [OPEN], "fovea")
    assert {goal.description: goal.is_met for goal in goals} == {
        "throughput over bare, 32 connections": True,
        "p99 / p50, 32 connections": True,
        "answered in time over capacity, at 300 %": True,
        "p99 of refusals at 300 %, in ms": False,
    }


def test_disturbed_measurement_is_repeated_and_the_best_kept() -> None:
    shares = iter([0.9, 0.3, 0.4, 0.0])
    assert measure_undisturbed(lambda: replace(CELL, others=next(shares))).others == 0.3
    assert next(shares) == 0.0  # three tries and no more
    assert measure_undisturbed(lambda: replace(CELL, others=0.01)).others == 0.01


def test_markdown_table_is_aligned() -> None:
    assert format_markdown([["", "a", "bb"], ["one", "1.5", "2"]]).splitlines() == [
        "|     |   a | bb |",
        "|-----|----:|---:|",
        "| one | 1.5 |  2 |",
    ]
