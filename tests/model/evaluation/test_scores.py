"""Bins of equal mass from groups of answers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fovea.model.evaluation.scores import CalibrationBin, calibration_error, split_into_bins
from tests.servers import ROOT


@given(
    answers=st.lists(st.tuples(st.sampled_from([0.3, 0.5, 0.7, 0.99, 1.0]), st.booleans()), max_size=60),
    bin_count=st.integers(1, 20),
)
def test_bins_hold_every_answer_once(answers: list[tuple[float, bool]], bin_count: int) -> None:
    confidences = sorted({confidence for confidence, _ in answers})
    groups = [[is_correct for one, is_correct in answers if one == confidence] for confidence in confidences]
    counts = np.array([len(group) for group in groups], np.int64)
    bins = split_into_bins(
        counts, np.array(confidences) * counts, np.array([float(sum(group)) for group in groups]), bin_count
    )
    assert sum(one.count for one in bins) == len(answers)
    assert len(bins) == min(bin_count, len(answers))
    assert max((one.count for one in bins), default=0) - min((one.count for one in bins), default=0) <= 1
    for total, expected in (
        (sum(one.count * one.confidence for one in bins), sum(confidence for confidence, _ in answers)),
        (sum(one.count * one.accuracy for one in bins), sum(is_correct for _, is_correct in answers)),
    ):
        assert total == pytest.approx(expected)
    steps = [one.confidence for one in bins]
    assert steps == pytest.approx(sorted(steps))


def test_group_is_divided_between_bins() -> None:
    """Three answers of 0.5, one of them correct, and one correct answer of 0.9, in two bins of two."""
    bins = split_into_bins(np.array([3, 1]), np.array([1.5, 0.9]), np.array([1.0, 1.0]), 2)
    assert [one.count for one in bins] == [2, 2]
    assert [one.confidence for one in bins] == pytest.approx([0.5, 0.7])
    assert [one.accuracy for one in bins] == pytest.approx([1 / 3, 2 / 3])
    assert calibration_error(bins) == pytest.approx((1 / 6 + 1 / 30) / 2)
    assert calibration_error((CalibrationBin(4, 0.75, 0.5),)) == 0.25


def test_shared_parts_of_reports_need_no_pytorch() -> None:
    """The wheel has no PyTorch, and bulk classification writes a report with it."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import fovea.model.evaluation.report_page, fovea.model.evaluation.plots, fovea.model.data.spelling\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
