"""Execution providers: their table, refusals where they are missing, and OpenVINO beside ONNX Runtime."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from fovea.bench.imported import quantize_file
from fovea.service.errors import GoldenError, ModelError
from fovea.service.inference.engine import BATCH_TOLERANCE, Engine
from fovea.service.inference.session import open_session
from fovea.service.providers import PROVIDERS, ProviderName, ProviderSetting
from fovea.service.rollout.trial import is_provider_error
from tests.export.classifiers import build_classifier
from tests.export.imports import import_graph
from tests.graphs import build_model, read_contract, with_contract
from tests.servers import DEFAULT_MODEL, FLOAT_MODEL
from tests.tools import needs_openvino, without_openvino

MODEL = build_model().SerializeToString()


def test_table_has_every_provider_that_can_be_set() -> None:
    assert set(get_args(ProviderName)) == set(PROVIDERS)
    assert set(get_args(ProviderSetting)) == {"auto", *PROVIDERS}
    assert {one.arithmetic for one in PROVIDERS.values()} == set(BATCH_TOLERANCE)
    assert all(one.absence and one.remedy for name, one in PROVIDERS.items() if name != "cpu")


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        ("cuda", "FOVEA_PROVIDER is cuda, but this ONNX Runtime has no CUDA; install onnxruntime-gpu in"),
        ("tensorrt", "FOVEA_PROVIDER is tensorrt, but this ONNX Runtime has no TensorRT; install onnx"),
        pytest.param(
            "openvino",
            "FOVEA_PROVIDER is openvino, but its plugin is missing; install onnxruntime-ep-openvino beside",
            marks=without_openvino,
        ),
    ],
)
def test_missing_provider_is_refused_with_its_remedy(provider: ProviderSetting, message: str) -> None:
    with pytest.raises(ModelError) as error_info:
        open_session(MODEL, provider, 1)
    assert str(error_info.value).startswith(message)
    assert is_provider_error(error_info.value)


@without_openvino
@pytest.mark.parametrize("library", ["/nowhere/plugin.so", __file__])
def test_plugin_that_does_not_load_is_refused(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    plugin: Any = ModuleType("onnxruntime_ep_openvino")
    plugin.get_library_path = lambda: library
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    with pytest.raises(ModelError) as error_info:
        open_session(MODEL, "openvino", 1)
    assert str(error_info.value).startswith("FOVEA_PROVIDER is openvino, but its plugin cannot be loaded: ")
    assert "Failed to load library" in str(error_info.value)
    assert str(error_info.value).endswith(PROVIDERS["openvino"].remedy)


def test_options_follow_threads_and_engine_cache() -> None:
    openvino, tensorrt = PROVIDERS["openvino"], PROVIDERS["tensorrt"]
    properties = json.loads(openvino.make_options(3, "")["load_config"])["CPU"]
    assert properties["INFERENCE_NUM_THREADS"] == 3
    assert properties["INFERENCE_PRECISION_HINT"] == "f32"
    assert tensorrt.make_options(3, "") == {}
    assert tensorrt.make_options(3, "/cache")["trt_engine_cache_path"] == "/cache"
    assert PROVIDERS["cpu"].make_options(3, "/cache") == {}


# --- OpenVINO ------------------------------------------------------------------------------------


@needs_openvino
@pytest.mark.parametrize("content", [MODEL, FLOAT_MODEL.read_bytes()], ids=["small", "cifar10"])
def test_openvino_gives_the_answers_of_the_cpu(content: bytes) -> None:
    """A processor with AMX would compute in bfloat16 by default, which the golden set would notice."""
    cpu = Engine(content, provider="cpu", threads=1)
    openvino = Engine(content, provider="openvino", threads=1, wide_threads=2)
    openvino.warm_up(4)
    assert openvino.provider == "openvino"
    assert openvino.check_golden_set().logit_difference <= 1e-3
    geometry = openvino.contract.input
    shape = (9, geometry.height, geometry.width, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = cpu.run(images)
    assert np.abs(openvino.run(images) - expected).max() <= 1e-5
    assert np.abs(openvino.run(images[:1], exclusive=True) - expected[:1]).max() <= 1e-5
    single_results = np.concatenate([openvino.run(image[None]) for image in images])
    assert np.abs(openvino.run(images) - single_results).max() <= BATCH_TOLERANCE["cpu"]


@needs_openvino
def test_own_tolerance_of_openvino_goes_before_that_of_the_cpu() -> None:
    model = build_model()
    contract = read_contract(model)
    golden = replace(contract.golden, logit_tolerance={"cpu/float32": 1e-3, "openvino/float32": -1.0})
    content = with_contract(model, replace(contract, golden=golden)).SerializeToString()
    Engine(content, provider="cpu", threads=1).check_golden_set()
    with pytest.raises(GoldenError, match="at most -1"):
        Engine(content, provider="openvino", threads=1).check_golden_set()


@needs_openvino
def test_openvino_serves_the_int8_default_model() -> None:
    engine = Engine.load(DEFAULT_MODEL, provider="openvino", threads=1)
    assert engine.provider == "openvino"
    assert engine.check_golden_set().images == 8


@needs_openvino
def test_openvino_takes_tensors(tmp_path: Path) -> None:
    content = import_graph(build_classifier(), tmp_path).path.read_bytes()
    cpu, openvino = (Engine(content, provider=one, threads=1) for one in ("cpu", "openvino"))
    raw_tensor = openvino.tensors[1]
    values = np.random.default_rng(0).normal(0, 1, (3, *raw_tensor.shape)).astype(raw_tensor.dtype)
    expected = cpu.run_tensor(raw_tensor, values)[0]
    assert np.abs(openvino.run_tensor(raw_tensor, values)[0] - expected).max() <= 1e-5


@needs_openvino
@pytest.mark.long
def test_openvino_agrees_on_int8(tmp_path: Path, cifar_test: Path) -> None:
    """Both providers run the default model in int8 on 2,000 test images, and print how far they agree."""
    folders = sorted(cifar_test.iterdir())
    files = [path for folder in folders for path in sorted(folder.iterdir())[:220]]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in files])
    rows = np.arange(len(files)) % 220  # within each label
    operators = ["Conv", "MatMul", "Gemm", "Add", "MaxPool", "GlobalAveragePool", "Relu"]
    quantize_file(FLOAT_MODEL, tmp_path / "int8.onnx", pixels[rows < 20], operators)
    content = (tmp_path / "int8.onnx").read_bytes()
    feed = {"pixels": pixels[rows >= 20]}
    cpu, openvino = (open_session(content, one, 1).run(["logits"], feed)[0] for one in ("cpu", "openvino"))
    targets = np.repeat(np.arange(len(folders)), 200)
    flips = float((cpu.argmax(axis=1) != openvino.argmax(axis=1)).mean())
    right = [float((logits.argmax(axis=1) == targets).mean()) for logits in (cpu, openvino)]
    print(f"another label: {flips:.2%}; right: {right}; a logit: {np.abs(cpu - openvino).max():.3f} at most")
    assert flips <= 0.01
    assert abs(right[0] - right[1]) <= 0.005
