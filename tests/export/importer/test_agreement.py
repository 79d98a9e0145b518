"""Tolerances of the comparison with the original file: their limits, their advice, and `--tolerance`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fovea.export.golden import LOGIT_TOLERANCE as GOLDEN_TOLERANCE
from fovea.export.importer.agreement import LOGIT_TOLERANCE
from fovea.export.importer.foreign_model import Arithmetic, ImportRefused
from fovea.export.importer.inspect import TOLERANCE, ForeignModel
from fovea.export.importer.option_values import parse_tolerance
from fovea.export.verify import VerificationError
from fovea.service.artifact.contract import Task
from tests.export.classifiers import GraphEnd, build_classifier
from tests.export.importer.test_refused import replace_softmax, wrap_with_change
from tests.export.imports import has_no_output, import_graph


def build_close_race(**options: Any) -> onnx.ModelProto:
    """Build a graph with large logits that hardly differ, so that their rounding shows in probabilities."""
    graph = build_classifier(spread=0.2, **options)
    (bias,) = [tensor for tensor in graph.graph.initializer if tensor.name == "bias"]
    values = numpy_helper.to_array(bias)
    bias.CopyFrom(numpy_helper.from_array(values + np.asarray(10, values.dtype), bias.name))
    return graph


def shift_first_logit(graph: onnx.GraphProto, amount: float) -> None:
    (bias,) = [tensor for tensor in graph.initializer if tensor.name == "bias"]
    values = numpy_helper.to_array(bias).copy()
    values[0] += np.asarray(amount, values.dtype)
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))


def shift_logits(monkeypatch: pytest.MonkeyPatch, amount: float) -> None:
    """Let the imported graph differ from the file by `amount` in one logit, as rounding does."""
    wrap = wrap_with_change(lambda graph: shift_first_logit(graph, amount))
    monkeypatch.setattr(ForeignModel, "wrap", wrap)


@pytest.mark.parametrize("end", ["logits", "softmax"])
def test_rounding_of_large_logits_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: GraphEnd
) -> None:
    """A difference of 1e-5 of the largest logit changes a probability by more than 1e-5."""
    shift_logits(monkeypatch, 2e-4)
    model = import_graph(build_close_race(end=end), tmp_path)
    worst = max(model.report.agreement, key=lambda agreement: agreement.probabilities)
    assert worst.logits is not None
    assert worst.logits <= LOGIT_TOLERANCE[Arithmetic.FLOAT32]
    assert worst.probabilities > TOLERANCE[Arithmetic.FLOAT32]


def test_larger_differences_are_refused_with_figures_and_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift_logits(monkeypatch, 4e-3)
    message = (
        r"a probability of the imported graph is off by (\S+); at most 1e-05, and a logit by \S+ of the "
        r"largest logit, \S+; at most 5e-05 for float32\. If .* accept the difference with --tolerance (\S+),"
    )
    with pytest.raises(VerificationError, match=message) as error_info:
        import_graph(build_classifier(spread=0.5), tmp_path)
    assert has_no_output(tmp_path)
    tolerance = float(str(error_info.value).rpartition("--tolerance ")[2].partition(",")[0])
    model = import_graph(build_classifier(spread=0.5), tmp_path, tolerance=tolerance)
    assert model.report.tolerance == tolerance
    assert model.facts["tolerance"] == f"{tolerance:g} (from --tolerance)"
    report = json.loads((model.path.parent / "report.json").read_text())
    assert report["tolerance"] == tolerance
    golden = model.contract.golden.logit_tolerance
    assert golden["cpu/float32"] == max(4 * tolerance, GOLDEN_TOLERANCE["cpu/float32"])


def test_wide_tolerance_is_recorded_in_the_contract(tmp_path: Path) -> None:
    model = import_graph(build_classifier(), tmp_path, tolerance=0.01)
    assert model.contract.golden.logit_tolerance["cpu/float32"] == pytest.approx(0.04)
    assert model.contract.golden.logit_tolerance["cuda/float32"] >= 0.05


def test_tolerance_counts_instead_of_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shift_logits(monkeypatch, 2e-4)
    with pytest.raises(VerificationError, match=r"off by \S+; at most 2e-06\. If "):
        import_graph(build_classifier(spread=0.5), tmp_path, tolerance=2e-6)


def test_float16_logits_may_differ_by_their_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference of 0.015 was refused for networks whose input is float16."""
    shift_logits(monkeypatch, 0.1)
    model = import_graph(build_close_race(dtype="float16"), tmp_path)
    worst = max(agreement.probabilities for agreement in model.report.agreement)
    assert worst > TOLERANCE[Arithmetic.FLOAT16]


def test_error_behind_the_logits_is_never_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ForeignModel, "wrap", wrap_with_change(replace_softmax))
    with pytest.raises(VerificationError, match="that is more than rounding: export the model again"):
        import_graph(build_classifier(), tmp_path)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 5),
        ({"count": 2}, 2),
        ({"count": 1}, 2),
        ({"end": "softmax", "count": 2}, 2),
        ({"end": "log_softmax"}, 5),
        ({"end": "sigmoid"}, 5),
        ({"end": "hidden_softmax"}, 5),
    ],
    ids=str,
)
def test_logits_are_compared_where_the_file_has_them(
    tmp_path: Path, options: dict[str, Any], count: int
) -> None:
    task = Task.MULTILABEL if options.get("end") == "sigmoid" else None
    model = import_graph(build_classifier(**options), tmp_path, count, task=task)
    has_logits = options.get("end") != "hidden_softmax"
    for agreement in model.report.agreement:
        assert (agreement.logits is not None) == has_logits
        assert agreement.logits is None or agreement.logits < 1e-5


@pytest.mark.parametrize("text", ["0", "-1", "0.5", "nan", "many"])
def test_impossible_tolerances_are_refused(text: str) -> None:
    with pytest.raises(ImportRefused, match=f"--tolerance is '{text}'"):
        parse_tolerance("--tolerance", text)
    assert parse_tolerance("--tolerance", "2e-5") == 2e-5
