"""`make bench-wrap`: both graphs of a pair compute the same, and the ratio is that of their times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fovea.bench.workloads import BenchError
from fovea.bench.wrapping import (
    Overhead,
    format_row,
    measure_pair,
    quantize_graph,
    to_channels_last,
    wrap_as_imported,
)
from tests.export.classifiers import build_classifier


@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "uint8"])
def test_pairs_are_measured(kind: str) -> None:
    graph = quantize_graph(build_classifier(), 16) if kind == "int8" else build_classifier(dtype=kind)
    for bare, layout in ((graph, "nchw"), (to_channels_last(graph), "nhwc")):
        result = measure_pair(wrap_as_imported("small", kind, bare), 1, 2, 0.0)
        assert (result.kind, result.layout, result.batch) == (kind, layout, 2)
        assert result.bare_seconds > 0
        assert min(result.ratios) > 0


def test_graphs_with_different_answers_are_refused() -> None:
    pair = wrap_as_imported("small", "float32", build_classifier())
    other_pair = wrap_as_imported("small", "float32", build_classifier(seed=1))
    with pytest.raises(BenchError, match=r"the logits of small, float32, nchw differ by .* at most 0.001"):
        measure_pair(replace(pair, wrapped=other_pair.wrapped), 1, 1, 0.0)


def test_row_has_the_median_and_the_quartiles() -> None:
    result = Overhead("small", "int8", "nhwc", 2, 4, 0.0123, (1.01, 1.02, 1.03, 1.02, 1.06, 0.98, 1.02))
    assert format_row(result) == "| small | int8 | nhwc | 2 | 4 | 12.30 | +2.0 | +1.0 … +3.0 |"
