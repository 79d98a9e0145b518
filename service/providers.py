"""The execution providers of ONNX Runtime that run models, in one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

ProviderName: TypeAlias = Literal["cpu", "cuda", "openvino", "tensorrt"]

ProviderSetting: TypeAlias = Literal["auto", "cpu", "cuda", "openvino", "tensorrt"]
"""Value of FOVEA_PROVIDER: a provider that must be there, or `auto` for CUDA or else the CPU."""


def _make_openvino_options(threads: int, _engine_cache: str) -> Mapping[str, str]:
    """Return options for float32 on the CPU with this number of threads.

    By default OpenVINO computes in bfloat16 on processors with AMX, which moves a logit by up to 0.01, and
    binds each further thread to one processor, as if no other process ran there.
    """
    properties = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }
    return {"load_config": json.dumps({"CPU": properties})}


def _make_tensorrt_options(_threads: int, engine_cache: str) -> Mapping[str, str]:
    """Return options that keep compiled engines in the folder `engine_cache`; without a folder, none."""
    if not engine_cache:
        return {}
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": engine_cache,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": engine_cache,
    }


@dataclass(frozen=True)
class ExecutionProvider:
    """An execution provider, and everything in which providers differ."""

    name: ProviderName
    """Name in settings, metrics and replies."""
    runtime_name: str
    """Name in ONNX Runtime."""
    absence: str = ""
    """Reason why the provider may be missing."""
    remedy: str = ""
    """Advice on what to install then."""
    arithmetic: Literal["cpu", "cuda"] = "cpu"
    """Provider whose tolerances apply in golden sets and batches, because the rounding errors are alike."""
    is_gpu: bool = False
    explaining_provider: ProviderName = "cpu"
    """Provider of explanations: compiling a graph for a few images would take longer than it saves."""
    fallbacks: tuple[ProviderName, ...] = ("cpu",)
    """Providers of the operators that this provider does not have, the fastest first."""
    plugin: str = ""
    """Python module of the plugin; empty if the provider is a part of ONNX Runtime."""
    compiles: bool = False
    """True if the provider compiles a graph for minutes, and keeps the result in FOVEA_ENGINE_CACHE."""
    make_options: Callable[[int, str], Mapping[str, str]] = lambda _threads, _engine_cache: {}
    """Function from the CPU threads of a call and the folder of compiled engines to options."""


PROVIDERS: Final[Mapping[ProviderName, ExecutionProvider]] = {
    one.name: one
    for one in (
        ExecutionProvider("cpu", "CPUExecutionProvider", fallbacks=()),
        ExecutionProvider(
            "cuda",
            "CUDAExecutionProvider",
            "this ONNX Runtime has no CUDA",
            "install onnxruntime-gpu in its place",
            arithmetic="cuda",
            is_gpu=True,
            explaining_provider="cuda",
        ),
        ExecutionProvider(
            "openvino",
            "OpenVINOExecutionProvider",
            "its plugin is missing",
            "install onnxruntime-ep-openvino beside onnxruntime 1.23 or newer",
            plugin="onnxruntime_ep_openvino",
            make_options=_make_openvino_options,
        ),
        ExecutionProvider(
            "tensorrt",
            "TensorrtExecutionProvider",
            "this ONNX Runtime has no TensorRT",
            "install onnxruntime-gpu in its place, and TensorRT's libraries",
            arithmetic="cuda",
            is_gpu=True,
            explaining_provider="cuda",
            fallbacks=("cuda", "cpu"),
            compiles=True,
            make_options=_make_tensorrt_options,
        ),
    )
}
