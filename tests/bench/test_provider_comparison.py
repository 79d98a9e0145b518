"""`make bench-providers`: both providers run the same model, and the table has a row for it."""

from __future__ import annotations

from fovea.bench.providers import Comparison, compare_providers
from tests.graphs import build_model
from tests.tools import needs_openvino


def test_row_has_medians_and_the_range_of_the_ratios() -> None:
    comparison = Comparison("resnet50", "int8", 1, 4, [0.02, 0.03, 0.02], [0.01, 0.01, 0.02], 1e-3)
    row = "| resnet50 | int8 | 1 | 4 | 20.00 | 10.00 | 2.00 (1.00 to 3.00) | 1.0e-03 |"
    assert comparison.format_row() == row


@needs_openvino
def test_both_providers_are_measured_on_one_model() -> None:
    model = build_model().SerializeToString()
    comparison = compare_providers(model, "small", "float32", threads=1, images=2, rounds=2)
    assert len(comparison.cpu) == len(comparison.openvino) == 2
    assert min(comparison.cpu + comparison.openvino) > 0
    assert comparison.difference < 1e-5
