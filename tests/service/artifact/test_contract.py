"""The contract and its JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fovea.service.artifact.contract import FORMAT_VERSION, METADATA_KEY, Contract, Task
from fovea.service.errors import ContractError
from tests.graphs import build_model, read_contract


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(read_contract(build_model()).to_json())
    return value


@pytest.mark.parametrize("task", Task)
def test_json_round_trip_preserves_contract(task: Task) -> None:
    labels = ("no", "yes") if task is Task.BINARY else ("a", "b", "c")
    contract = read_contract(build_model(task, labels))
    assert Contract.from_json(contract.to_json()) == contract


def _make_setter(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *parents, last = path.split(".")

    def change(document: Any) -> None:
        for key in parents:
            document = document[int(key) if key.isdecimal() else key]
        document[last] = value

    return change


QUANTIZATION = {
    "precision": "int8",
    "source_version": "1",
    "source_sha256": "0",
    "recipe": "static int8, minmax",
    "calibration": "minmax",
    "calibration_images": 10,
    "weight_bits": 8,
    "float_layers": [],
    "data": "photos",
    "images": 10,
    "source_top1": 0.9,
    "top1": 0.9,
    "agreement": 1.0,
    "loss": 0.0,
    "loss_interval": [-0.1, 0.1],
    "confidence": 0.95,
    "candidates": 1,
    "speedup": 1.5,
    "processor": "a processor",
    "command": "fovea quantize",
}
"""A valid quantization as in the document."""


def test_quantization_is_read(document: dict[str, Any]) -> None:
    contract = Contract.from_json(json.dumps({**document, "quantization": QUANTIZATION}))
    assert contract.quantization is not None
    assert contract.quantization.loss_interval == (-0.1, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_make_setter("format", FORMAT_VERSION + 1), f"format is {FORMAT_VERSION + 1}"),
        (_make_setter("quantization", {**QUANTIZATION, "weight_bits": 5}), "weight_bits must be 7, 8 or 16"),
        (_make_setter("quantization", {**QUANTIZATION, "images": 0}), "images must be positive"),
        (_make_setter("quantization", {**QUANTIZATION, "loss_interval": [0.1]}), "takes two numbers"),
        (_make_setter("quantization", {**QUANTIZATION, "top1": None}), "only one top-1 is known"),
        (_make_setter("quantization", {**QUANTIZATION, "precision": "int4"}), "known are int8, float16"),
        (_make_setter("name", 7), r"contract\.name must be str, not int"),
        (_make_setter("labels", ["one"]), "at least two"),
        (_make_setter("labels", ["a", "a", "b", "c"]), "unique"),
        (_make_setter("labels", "abcd"), r"contract\.labels must be a list"),
        (_make_setter("labels", ["a", "b", "c", None]), r"contract\.labels\[3\] must be str"),
        (_make_setter("task", "regression"), "task is 'regression'; known are multiclass"),
        (_make_setter("task", "binary"), "binary takes two labels"),
        (_make_setter("thresholds", [0.5]), "thresholds: multiclass takes 0"),
        (_make_setter("coverage.0.level", 0), "a level is not between 0 and 1"),
        (_make_setter("coverage.2.level", 1), "a level is not between 0 and 1"),
        (_make_setter("coverage.1.level", 0.5), "the levels must rise"),
        (_make_setter("coverage.2.quantile", 1.1), "a quantile is not in"),
        (_make_setter("coverage.0.quantile", -0.1), "a quantile is not in"),
        (_make_setter("coverage.0.quantile", 0.96), "the quantiles must not fall"),
        (_make_setter("temperature", 0), "temperature must be positive"),
        (_make_setter("temperature", 10**400), "cannot be used"),
        (_make_setter("name", "\ud800"), "cannot be used"),
        (_make_setter("temperature", True), r"contract\.temperature must be float, not bool"),
        (_make_setter("input.height", 0), "positive"),
        (_make_setter("input.steps.0.interpolation", "magic"), "interpolation is 'magic'"),
        (
            _make_setter("input.steps.0.step", "warp"),
            r"steps\[0\]\.step is 'warp'; known are resize, crop, asp",
        ),
        (_make_setter("input.steps.0.step", ["resize"]), r"steps\[0\]\.step is \['resize'\]; known are"),
        (_make_setter("input.steps", [{"height": 16}]), r"steps\[0\] lacks step, one of resize, crop"),
        (_make_setter("input.steps", ["resize"]), r"steps\[0\] must be an object"),
        (_make_setter("input.steps.0.angle", 3), r"steps\[0\] has unknown angle"),
        (
            _make_setter("input.steps.1.rounding", "up"),
            r"steps\[1\]\.rounding is 'up'; known are floor, round",
        ),
        (_make_setter("input.steps.0.antialias", 1), r"steps\[0\]\.antialias must be bool"),
        (_make_setter("input.steps", []), "there are 0 steps; between 1 and 8"),
        (_make_setter("input.steps.1.height", 15), "end with 15 x 16 pixels; the input has 16 x 16"),
        (_make_setter("reference.labels", {}), "between 1 and 9 labels"),
        (_make_setter("reference.labels", {"ant": 0}), "a label was never predicted"),
        (_make_setter("reference.labels", {"ant": 11}), "labels of more images"),
        (_make_setter("reference.labels", {"yak": 1}), "a label is unknown"),
        (_make_setter("reference.confidence.edges", [0.5, 0.6]), "do not fit"),
        (_make_setter("reference.brightness.edges", [0.6, 0.2]), "the edges must rise"),
        (_make_setter("reference.brightness.edges", [0.2, 0.2]), "the edges must rise"),
        (_make_setter("reference.brightness.counts", [12, -1, -1]), "a count is negative"),
        (_make_setter("reference.brightness.counts", [1, 1, 1]), "counts of other images"),
        (_make_setter("surprise", 1), "has unknown surprise"),
        (lambda document: document.pop("golden"), "lacks golden"),
        (_make_setter("golden.images", []), "between 1 and 8"),
        (_make_setter("golden.images.0.logits", [1.0]), "has 1 logits"),
        (_make_setter("golden.logit_tolerance", []), r"golden\.logit_tolerance must be an object"),
        (_make_setter("golden", None), r"contract\.golden must be an object"),
        (_make_setter("layers.0.attributes.perm", {"a": 1}), r"attributes\.perm"),
    ],
)
def test_invalid_contract_is_refused(
    document: dict[str, Any], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    changed_document = json.loads(json.dumps(document))
    change(changed_document)
    with pytest.raises(ContractError, match=message):
        Contract.from_json(json.dumps(changed_document))


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (Task.BINARY, _make_setter("thresholds", []), "thresholds: binary takes 1"),
        (Task.BINARY, _make_setter("thresholds", [1.5]), "one is not in"),
        (Task.MULTILABEL, _make_setter("thresholds", [0.5, -0.1]), "one is not in"),
        (Task.MULTILABEL, _make_setter("thresholds", [0.5]), "thresholds: multilabel takes 2"),
        (Task.MULTILABEL, _make_setter("coverage", [{"level": 0.5, "quantile": 0.5}]), "multilabel has none"),
    ],
)
def test_fields_that_do_not_fit_the_task_are_refused(
    task: Task, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    document = json.loads(read_contract(build_model(task, ("cat", "dog"))).to_json())
    change(document)
    with pytest.raises(ContractError, match=message):
        Contract.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"temperature": NaN}'])
def test_json_that_is_no_contract_is_refused(text: str) -> None:
    with pytest.raises(ContractError):
        Contract.from_json(text)


@pytest.mark.parametrize("place", ["half \ud800", "golden.half \ud800"])
def test_name_with_half_a_surrogate_pair_is_refused(document: dict[str, Any], place: str) -> None:
    """The error message could not be sent to a client."""
    changed_document = json.loads(json.dumps(document))
    _make_setter(place, 1)(changed_document)
    with pytest.raises(ContractError, match="cannot be used") as info:
        Contract.from_json(json.dumps(changed_document))
    assert str(info.value).encode()


def test_non_finite_numbers_are_refused(document: dict[str, Any]) -> None:
    text = json.dumps({**document, "temperature": float("inf")})
    with pytest.raises(ContractError, match="finite"):
        Contract.from_json(text)


def test_metadata_without_a_contract_is_refused() -> None:
    with pytest.raises(ContractError, match="no contract"):
        Contract.from_metadata({"other": "{}"})
    contract = read_contract(build_model())
    assert Contract.from_metadata({METADATA_KEY: contract.to_json()}) == contract
