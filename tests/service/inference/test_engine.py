"""An engine: the probabilities that it computes, and the models that it refuses."""

from __future__ import annotations

import base64
import gc
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fovea.service.artifact.contract import Contract, Geometry, Interpolation, PixelPath, Task
from fovea.service.errors import ContractError, ModelError
from fovea.service.inference.engine import BATCH_TOLERANCE, Engine, Floats, decode_golden_pixels
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.session import ArenaShrinker
from tests.graphs import build_model, read_contract, with_contract
from tests.pictures import draw_picture, encode_image
from tests.servers import ROOT


def make_engine(model: onnx.ModelProto) -> Engine:
    return Engine(model.SerializeToString(), provider="cpu", threads=1)


def make_engine_with(model: onnx.ModelProto, contract: Contract) -> Engine:
    return make_engine(with_contract(model, contract))


SMALL = make_engine(build_model())

IMAGES = 24
"""Noise, colours, and flat black and white."""


@pytest.mark.parametrize("task", Task)
def test_probabilities_follow_the_task(task: Task) -> None:
    labels = ("no", "yes") if task is Task.BINARY else ("a", "b", "c")
    engine = make_engine(build_model(task, labels))
    batch = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    logits, probabilities = engine.compute_logits(batch).astype(np.float64), engine.run(batch)
    if task is Task.MULTICLASS:
        expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    else:
        expected = 1 / (1 + np.exp(-logits))
        expected = np.hstack([1 - expected, expected]) if task is Task.BINARY else expected
    assert probabilities.dtype == np.float32
    assert np.allclose(probabilities, expected, atol=1e-6)


@cache
def load_both_ways(name: str) -> tuple[Engine, Pixels, Floats]:
    """Return a model with both kinds of sessions, images, and the probabilities of each image alone."""
    path = ROOT / "zoo" / name / "1" / "model.onnx"
    content = path.read_bytes() if path.exists() else build_model().SerializeToString()
    engine = Engine(content, provider="auto", threads=1, wide_threads=2)
    shape = (IMAGES, engine.contract.input.height, engine.contract.input.width, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images[:8] = images[:8, :1, :1]
    images[0], images[1] = 0, 255
    return engine, images, np.concatenate([engine.run(image[None]) for image in images])


@pytest.mark.parametrize("name", ["small", "cifar10"])
@settings(max_examples=40)
@given(st.lists(st.integers(0, IMAGES - 1), min_size=1, max_size=9))
def test_probabilities_do_not_depend_on_the_batch(name: str, indices: list[int]) -> None:
    engine, images, single_results = load_both_ways(name)
    tolerance = BATCH_TOLERANCE[engine.provider]
    assert np.abs(engine.run(images[indices]) - single_results[indices]).max() <= tolerance
    wide_result = engine.run(images[indices[:1]], exclusive=True)
    assert np.abs(wide_result - single_results[indices[:1]]).max() <= tolerance


@pytest.mark.parametrize("wide_threads", [0, 2])
def test_single_image_graph_runs_batches_image_by_image(wide_threads: int) -> None:
    """The model is warmed up with one image, and a batch gives what its images give one by one."""
    model = build_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    engine = Engine(model.SerializeToString(), provider="auto", threads=1, wide_threads=wide_threads)
    assert (engine.batch_limit, SMALL.batch_limit) == (1, None)
    engine.warm_up(4)
    batch = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    assert np.array_equal(engine.run(batch), np.concatenate([engine.run(image[None]) for image in batch]))
    assert np.abs(engine.compute_logits(batch) - SMALL.compute_logits(batch)).max() <= 1e-4
    assert engine.run(batch[:1], exclusive=True).shape == (1, 4)
    assert engine.check_golden_set().images == 8


def test_golden_set_passes_on_this_host() -> None:
    report = SMALL.check_golden_set()
    assert report.images == 8
    assert report.pixel_difference <= 1.0
    assert report.logit_difference <= 1e-3


def test_other_weights_fail_the_golden_check() -> None:
    model = build_model()
    kernel = next(tensor for tensor in model.graph.initializer if tensor.name == "kernel")
    kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel) * np.float32(1.01), "kernel"))
    with pytest.raises(ModelError, match=r"golden image .* a logit is off by"):
        make_engine(model).check_golden_set()


def test_weights_that_give_nan_fail_the_golden_check() -> None:
    model = build_model()
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(4, np.nan, np.float32), "head.bias"))
    with pytest.raises(ModelError, match="nan"):
        make_engine(model).check_golden_set()


def test_other_resize_size_fails_the_golden_check() -> None:
    model = build_model()
    contract = read_contract(model)
    changed_contract = replace(
        contract, input=Geometry.cropped(16, 16, 20, Interpolation.BILINEAR, PixelPath.FAST)
    )
    with pytest.raises(ModelError, match="pixels are off"):
        make_engine_with(model, changed_contract).check_golden_set()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image", base64.b64encode(b"rubbish").decode(), "cannot be decoded"),
        ("image", "!!", "cannot be decoded|pixels"),
        ("pixels", base64.b64encode(b"rubbish").decode(), "damaged pixels"),
        (
            "pixels",
            base64.b64encode(encode_image(draw_picture(4, 4), "PNG")).decode(),
            r"becomes \(16, 16, 3\)",
        ),
    ],
)
def test_damaged_golden_image_is_refused(field: str, value: str, message: str) -> None:
    model = build_model()
    contract = read_contract(model)
    damaged_image = replace(contract.golden.images[0], **{field: value})  # type: ignore[arg-type]
    changed_contract = replace(contract, golden=replace(contract.golden, images=(damaged_image,)))
    with pytest.raises(ModelError, match=message):
        make_engine_with(model, changed_contract).check_golden_set()


def test_golden_set_without_this_provider_is_refused() -> None:
    model = build_model()
    contract = read_contract(model)
    changed_contract = replace(
        contract, golden=replace(contract.golden, logit_tolerance={"npu/float32": 1.0})
    )
    with pytest.raises(ModelError, match="no tolerance for cpu/float32"):
        make_engine_with(model, changed_contract).check_golden_set()


def test_golden_pixels_have_the_shape_of_the_input() -> None:
    for golden in read_contract(build_model()).golden.images:
        assert decode_golden_pixels(golden).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_name": "image"}, "the graph takes"),
        ({"logits_name": "nothing"}, "contract needs nothing"),
        ({"probabilities_name": "conv"}, "contract needs conv"),
    ],
)
def test_contract_that_contradicts_the_graph_is_refused(changes: dict[str, str], message: str) -> None:
    model = build_model()
    with pytest.raises(ContractError, match=message):
        make_engine_with(model, replace(read_contract(model), **changes))  # type: ignore[arg-type]


def test_too_few_labels_for_the_graph_are_refused() -> None:
    model = build_model()
    contract = read_contract(model)
    images = tuple(replace(image, logits=image.logits[:3]) for image in contract.golden.images)
    changed_contract = replace(
        contract, labels=contract.labels[:3], golden=replace(contract.golden, images=images)
    )
    with pytest.raises(ContractError, match="3 floats"):
        make_engine_with(model, changed_contract)


def test_float_input_is_refused() -> None:
    model = build_model()
    model.graph.input[0].CopyFrom(
        helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 16, 16, 3])
    )
    with pytest.raises(ModelError):
        make_engine(model)


def test_model_without_contract_is_refused() -> None:
    model = build_model()
    del model.metadata_props[:]
    with pytest.raises(ContractError, match="no contract"):
        make_engine(model)


@pytest.mark.parametrize("length", [0, 1, 100, 1000, -1])
def test_truncated_file_gives_an_error_of_one_line(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(build_model().SerializeToString()[:length])
    with pytest.raises(ModelError, match=r"model\.onnx: ") as error_info:
        Engine.load(path, provider="cpu", threads=1)
    assert "\n" not in str(error_info.value)


def test_missing_file_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read the model .*gone\.onnx: No such file"):
        Engine.load(tmp_path / "gone.onnx", provider="cpu", threads=1)


def test_missing_cuda_is_an_error_and_auto_uses_the_cpu() -> None:
    content = build_model().SerializeToString()
    assert Engine(content, provider="auto", threads=1).provider in {"cpu", "cuda"}
    if Engine(content, provider="auto", threads=1).provider == "cpu":
        with pytest.raises(ModelError, match="this ONNX Runtime has no CUDA"):
            Engine(content, provider="cuda", threads=1)


def test_golden_set_passes_with_a_large_geometry() -> None:
    geometry = Geometry.cropped(224, 224, 256, Interpolation.BICUBIC, PixelPath.EXACT)
    assert make_engine(build_model(geometry=geometry)).check_golden_set().images == 8


MEASURE_MEMORY_CODE = """
import re, sys
from pathlib import Path
import numpy as np
from fovea.service.inference.engine import Engine

def megabytes():
    return int(re.search(r"Rss: +(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) / 1024

engine = Engine.load(Path(sys.argv[1]), provider="cpu", threads=1, wide_threads=int(sys.argv[2]))
def run(count, times=1, exclusive=False):
    for _ in range(times):
        engine.run(np.zeros((count, 224, 224, 3), np.uint8), exclusive=exclusive)
    print(megabytes())

engine.warm_up(4)
run(4)
run(64)
run(1, times=15, exclusive=True)
run(1, times=1, exclusive=True)
run(64)
"""


@pytest.mark.long
@pytest.mark.parametrize("wide_threads", [0, 2])
def test_memory_of_a_large_batch_is_released(tmp_path: Path, wide_threads: int) -> None:
    """Sixteen small batches free it, whichever session runs them; the next large batch allocates it again."""
    path = tmp_path / "large.onnx"
    onnx.save(
        build_model(geometry=Geometry.cropped(224, 224, 224, Interpolation.BILINEAR, PixelPath.FAST)),
        path,
    )
    command = [sys.executable, "-c", MEASURE_MEMORY_CODE, str(path), str(wide_threads)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    mb_before, large_mb, held_mb, mb_after, large_mb_again = map(float, process.stdout.split())
    assert large_mb - mb_before > 100  # MB
    assert held_mb > mb_before + 0.9 * (large_mb - mb_before)
    assert mb_after < mb_before + 0.1 * (large_mb - mb_before)
    assert large_mb_again == pytest.approx(large_mb, rel=0.1)


def test_dropped_engine_is_freed_without_garbage_collection() -> None:
    """A runner excludes what it has at its start from garbage collection (`gc.freeze`)."""
    gc.disable()
    try:
        engine = make_engine(build_model())
        reference = weakref.ref(engine)
        del engine
        assert reference() is None
    finally:
        gc.enable()


def test_memory_is_kept_between_large_batches() -> None:
    """Freeing and allocating cost time: nothing is freed while sizes alternate, or below five images."""
    shrinker = ArenaShrinker()
    assert not any(shrinker.get_run_options(count) for _ in range(100) for count in (64, *[1] * 15))
    shrinker = ArenaShrinker()
    assert not any(shrinker.get_run_options(count) for count in (4, *[1] * 100))
    assert not any(shrinker.get_run_options(count) for count in (64, *[33] * 100))
