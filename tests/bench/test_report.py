"""Ratios within rounds, the evaluation of the goals, and the tables."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fovea.bench.cells import ClosedLoopCell, FrontCell, ProbeCell, RestCell, measure_undisturbed
from fovea.bench.goals import evaluate_goals
from fovea.bench.ratios import compute_ratio, find_best_peer, tail_ratio
from fovea.bench.report import drop_disturbed, format_markdown, list_losses, show_results
from fovea.bench.results import AnswerCheck, Results

CELL = ClosedLoopCell(
    workload="thumbnails", name="fovea", round=0, connections=32, seconds=5.0, rate=900.0, p50=0.03, p99=0.05,
    cpu_seconds=9.0, resident_bytes=1, others=0.0, refusals=0, errors=0,
)  # fmt: skip

FRONT = FrontCell(
    "thumbnails", "fovea", 0, 32, 900.0, fovea=240e-6, minimal=80e-6, minimal_at_its_limit=40e-6,
)  # fmt: skip


def make_rounds(name: str, *rates: float, connections: int = 32) -> list[ClosedLoopCell]:
    return [
        replace(CELL, name=name, round=number, rate=rate, connections=connections)
        for number, rate in enumerate(rates)
    ]


# --- ratios --------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round() -> None:
    """The machine is half as fast in the second round: the ratio stays."""
    cells = [*make_rounds("mosec", 1000.0, 500.0, 800.0), *make_rounds("fovea", 900.0, 460.0, 640.0)]
    ratio = compute_ratio(cells, "fovea", "mosec", 32)
    assert ratio.values == pytest.approx((0.9, 0.92, 0.8))
    assert ratio.median == pytest.approx(0.9)
    assert str(ratio) == "0.90 (0.80 to 0.92)"


def test_loop_that_runs_once_per_round_is_compared_with_every_load() -> None:
    cells = [*make_rounds("bare", 1000.0, connections=1), *make_rounds("fovea", 900.0)]
    assert compute_ratio(cells, "fovea", "bare", 32).values == (0.9,)
    cells = [*make_rounds("mosec", 1000.0, connections=1), *make_rounds("fovea", 900.0)]
    assert compute_ratio(cells, "fovea", "mosec", 32).values == ()


def test_one_disturbed_round_does_not_count() -> None:
    cells = [*make_rounds("mosec", 1000.0, 1000.0), *make_rounds("fovea", 900.0, 300.0)]
    cells[-1] = replace(cells[-1], others=0.5)
    assert compute_ratio(cells, "fovea", "mosec", 32).values == (0.9,)
    assert compute_ratio(cells[1::2], "fovea", "mosec", 32).values == (0.3,)  # there is no other round


def test_rounds_without_the_other_contestant_give_no_ratio() -> None:
    cells = [CELL, *make_rounds("mosec", 0.0, 1000.0)[1:]]
    ratio = compute_ratio(cells, "fovea", "mosec", 32)
    assert math.isnan(ratio.median)
    assert str(ratio) == ""
    assert math.isnan(tail_ratio([CELL], "fovea", 8))


def test_best_peer_has_the_highest_median_at_that_load() -> None:
    cells = [
        *make_rounds("mosec", 100.0, 100.0, 900.0),
        *make_rounds("tutorial", 200.0, 200.0, 200.0),
        *make_rounds("mosec", 300.0, connections=8),
        *make_rounds("bare", 5000.0),
    ]
    assert find_best_peer(cells, 32) == "tutorial"
    assert find_best_peer(cells, 8) == "mosec"
    assert find_best_peer(cells, 1) is None


# --- goals ---------------------------------------------------------------------------------------


def test_only_measured_goals_are_evaluated() -> None:
    results = Results(
        ["a processor"],
        closed=[CELL, *make_rounds("mosec", 1000.0), *make_rounds("bare", 1000.0)],
        fronts=[FRONT],
        probes=[ProbeCell("thumbnails", "fovea", 0, 32, probes=100, p50=0.001, p99=0.0199)],
        rests=[RestCell([1.1, 0.9, 0.8], [140_000_000] * 3)],
    )
    assert {goal.description: goal.is_met for goal in evaluate_goals(results, "fovea")} == {
        "fovea / mosec, 32 connections": False,
        "front's processor time / minimal server's, 32 connections": False,
        "p99 of /health/live under load, ms": True,
        "PSS of all processes, MB": True,
        "cold start, s": True,
    }


def test_single_caller_is_compared_with_the_tutorial_and_with_one_call() -> None:
    cells = [
        replace(CELL, connections=1, rate=500.0, p50=0.0020),
        replace(CELL, connections=1, name="tutorial", rate=400.0),
        replace(CELL, connections=1, name="alone", p50=0.0010),
    ]
    goals = {goal.description: goal for goal in evaluate_goals(Results([], closed=cells), "fovea")}
    assert goals["fovea / tutorial, 1 connection"].is_met
    assert goals["fovea / tutorial, 1 connection"].value == 1.25
    assert not goals["fovea, p50 / one call in process, 1 connection"].is_met


def test_each_pixel_path_has_its_goals_and_int8_shows_its_accuracy() -> None:
    cells = [
        replace(CELL, workload="photographs", name=name, rate=rate)
        for name, rate in (("fovea", 110.0), ("fovea, exact", 104.0), ("int8", 165.0), ("mosec", 100.0))
    ]
    results = Results([], closed=cells, checks=[AnswerCheck("photographs", "int8", 0.975)])
    goals = {goal.description: goal for goal in evaluate_goals(results, "fovea")}
    assert goals["fovea / mosec, 32 connections"].is_met
    assert not goals["fovea, exact / mosec, 32 connections"].is_met  # 1.04 of at least 1.05
    assert goals["int8 / fovea, 32 connections"].is_met
    assert goals["int8 / fovea, 32 connections"].detail.endswith(
        "97.5% of the labels are those of the bare loop"
    )


# --- the report ----------------------------------------------------------------------------------


def test_losses_are_named() -> None:
    cells = [*make_rounds("fovea", 900.0, 910.0), *make_rounds("mosec", 1000.0, 1000.0)]
    cells += [*make_rounds("fovea", 900.0, connections=8), *make_rounds("mosec", 800.0, connections=8)]
    assert list(list_losses(Results([], closed=cells), "fovea")) == [
        "* thumbnails, 32 connections: fovea serves 0.91 (0.90 to 0.91) times as many images as mosec."
    ]


def test_report_names_the_processor_and_the_losses(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [*make_rounds("fovea", 900.0), *make_rounds("mosec", 1000.0)]
    show_results(Results(["2 cores, 2026-11-29"], closed=cells, fronts=[FRONT]), "fovea")
    report = capsys.readouterr().out
    assert "Processor: 2 cores, 2026-11-29." in report
    assert "* thumbnails, 32 connections: fovea serves 0.90" in report
    assert "3.00 (3.00 to 3.00)" in report  # the front's processor time


def test_disturbed_measurements_are_dropped_if_others_exist() -> None:
    clear_cell, disturbed_cell = replace(CELL, round=0), replace(CELL, round=1, others=0.5)
    assert drop_disturbed([clear_cell, disturbed_cell]) == [clear_cell]
    assert drop_disturbed([disturbed_cell]) == [disturbed_cell]


def test_disturbed_measurement_is_repeated_and_the_best_kept() -> None:
    shares = iter([0.9, 0.3, 0.0])
    assert measure_undisturbed(lambda: replace(CELL, others=next(shares))).others == 0.3
    assert next(shares) == 0.0  # two tries and no more
    assert measure_undisturbed(lambda: replace(CELL, others=0.01)).others == 0.01


def test_markdown_table_is_aligned() -> None:
    assert format_markdown([["", "a", "bb"], ["one", "1.5", "2"]]).splitlines() == [
        "|     |   a | bb |",
        "|-----|----:|---:|",
        "| one | 1.5 |  2 |",
    ]
