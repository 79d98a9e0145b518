"""A session: what it computes, and what it refuses."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from service.contract import Contract, Geometry, Interpolation, PixelPath, Resize, Task
from service.engine import Engine, golden_pixels
from service.errors import ContractError, ModelError
from service.images import Pixels
from tests.graphs import build, contract_of, with_contract
from tests.pictures import encode, picture

TOLERANCE = 1e-5
"""Of a probability, between batch sizes on the CPU: float32 sums may be taken in another order."""


def engine(model: onnx.ModelProto) -> Engine:
    return Engine(model.SerializeToString(), provider="cpu", threads=1)


def changed(model: onnx.ModelProto, contract: Contract) -> Engine:
    return engine(with_contract(model, contract))


SMALL = engine(build())


@pytest.mark.parametrize("task", Task)
def test_probabilities_are_those_of_the_task(task: Task) -> None:
    labels = ("no", "yes") if task is Task.BINARY else ("a", "b", "c")
    model = engine(build(task, labels))
    batch = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    logits, probabilities = model.logits(batch).astype(np.float64), model.run(batch)
    if task is Task.MULTICLASS:
        wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    else:
        wanted = 1 / (1 + np.exp(-logits))
        wanted = np.hstack([1 - wanted, wanted]) if task is Task.BINARY else wanted
    assert probabilities.dtype == np.float32
    assert np.allclose(probabilities, wanted, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.just(16), st.just(16), st.just(3))))
def test_an_image_gives_the_same_alone_and_in_any_batch(batch: Pixels) -> None:
    together = SMALL.run(batch)
    alone = np.concatenate([SMALL.run(image[None]) for image in batch])
    assert np.abs(together - alone).max() <= TOLERANCE


def test_the_golden_set_proves_this_host() -> None:
    proof = SMALL.prove()
    assert proof.images == 8
    assert proof.pixel_difference <= 1.0
    assert proof.logit_difference <= 1e-3


def test_other_weights_fail_the_golden_check() -> None:
    model = build()
    kernel = next(tensor for tensor in model.graph.initializer if tensor.name == "kernel")
    kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel) * np.float32(1.01), "kernel"))
    with pytest.raises(ModelError, match=r"golden image .* a logit is off by"):
        engine(model).prove()


def test_weights_that_give_nan_fail_the_golden_check() -> None:
    model = build()
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(4, np.nan, np.float32), "head.bias"))
    with pytest.raises(ModelError, match="nan"):
        engine(model).prove()


def test_another_pixel_path_fails_the_golden_check() -> None:
    model = build()
    contract = contract_of(model)
    other = replace(contract, input=replace(contract.input, resize_to=20))
    with pytest.raises(ModelError, match="pixels are off"):
        changed(model, other).prove()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image", base64.b64encode(b"rubbish").decode(), "cannot be decoded"),
        ("image", "!!", "cannot be decoded|pixels"),
        ("pixels", base64.b64encode(b"rubbish").decode(), "damaged pixels"),
        ("pixels", base64.b64encode(encode(picture(4, 4), "PNG")).decode(), r"becomes \(16, 16, 3\)"),
    ],
)
def test_a_damaged_golden_image_is_refused(field: str, value: str, message: str) -> None:
    model = build()
    contract = contract_of(model)
    first = replace(contract.golden.images[0], **{field: value})  # type: ignore[arg-type]
    other = replace(contract, golden=replace(contract.golden, images=(first,)))
    with pytest.raises(ModelError, match=message):
        changed(model, other).prove()


def test_a_golden_set_without_this_provider_is_refused() -> None:
    model = build()
    contract = contract_of(model)
    other = replace(contract, golden=replace(contract.golden, logit_tolerance={"npu/float32": 1.0}))
    with pytest.raises(ModelError, match="no tolerance for cpu/float32"):
        changed(model, other).prove()


def test_golden_pixels_are_what_the_images_become() -> None:
    for golden in contract_of(build()).golden.images:
        assert golden_pixels(golden).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_name": "image"}, "the graph takes"),
        ({"logits_name": "nothing"}, "contract needs nothing"),
        ({"probabilities_name": "conv"}, "contract needs conv"),
    ],
)
def test_a_contract_that_contradicts_the_graph_is_refused(change: dict[str, str], message: str) -> None:
    model = build()
    with pytest.raises(ContractError, match=message):
        changed(model, replace(contract_of(model), **change))  # type: ignore[arg-type]


def test_too_few_labels_for_the_graph_are_refused() -> None:
    model = build()
    contract = contract_of(model)
    images = tuple(replace(image, logits=image.logits[:3]) for image in contract.golden.images)
    other = replace(contract, labels=contract.labels[:3], golden=replace(contract.golden, images=images))
    with pytest.raises(ContractError, match="3 floats"):
        changed(model, other)


def test_a_float_input_is_refused() -> None:
    model = build()
    model.graph.input[0].CopyFrom(
        helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 16, 16, 3])
    )
    with pytest.raises(ModelError):
        engine(model)


def test_no_contract_is_refused() -> None:
    model = build()
    del model.metadata_props[:]
    with pytest.raises(ContractError, match="no contract"):
        engine(model)


@pytest.mark.parametrize("kept", [0, 1, 100, 1000, -1])
def test_a_truncated_file_is_one_line(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(build().SerializeToString()[:kept])
    with pytest.raises(ModelError, match=r"model\.onnx: ") as raised:
        Engine.load(path, provider="cpu", threads=1)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read the model .*gone\.onnx: No such file"):
        Engine.load(tmp_path / "gone.onnx", provider="cpu", threads=1)


def test_cuda_that_is_not_there_is_an_error_and_auto_takes_the_cpu() -> None:
    content = build().SerializeToString()
    assert Engine(content, provider="auto", threads=1).provider in {"cpu", "cuda"}
    if Engine(content, provider="auto", threads=1).provider == "cpu":
        with pytest.raises(ModelError, match="this ONNX Runtime has no CUDA"):
            Engine(content, provider="cuda", threads=1)


def test_a_large_geometry_is_proven_too() -> None:
    geometry = Geometry(224, 224, Resize.SHORTER, 256, Interpolation.BICUBIC, PixelPath.EXACT)
    assert engine(build(geometry=geometry)).prove().images == 8
