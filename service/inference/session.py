"""ONNX Runtime sessions: their options, their providers, and the memory that they keep."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime

from fovea.service.artifact.model_file import fingerprint_of
from fovea.service.errors import ModelError, to_one_line
from fovea.service.inference.pixels import Pixels
from fovea.service.providers import PROVIDERS, ExecutionProvider, ProviderName, ProviderSetting

_FATAL_SEVERITY: Final = 4
"""Log severity FATAL of ONNX Runtime: errors are raised, and Fovea logs them once."""

_MAX_MODEL_BYTES: Final = (1 << 31) - 1
"""Size limit of a protobuf message in bytes."""

_EXTERNAL_DATA_FOLDER: Final = "/dev/null/no external data"
"""Folder in which ONNX Runtime looks for weights outside the file. It does not exist: a model is one file.

By default, ONNX Runtime would look in the working directory.
"""


def read_model(path: Path, fingerprint: Sequence[int]) -> bytes:
    """Read a file that may be a model.

    Raises `ModelError` for an obvious non-model before memory is allocated, and when the fingerprint differs.
    Raises `OSError` when the file cannot be read.
    """
    with path.open("rb") as file:
        # Compare the open file, not the path: another file may take the path at any time.
        if fingerprint and fingerprint_of(file.fileno()) != tuple(fingerprint):
            raise ModelError("the file has changed since it was found")
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_MODEL_BYTES:
            raise ModelError(f"the file has {size} bytes; an ONNX file has at most {_MAX_MODEL_BYTES}")
        if file.read(1) in (b"", b"\0"):  # a protobuf message begins with a field number of at least 1
            raise ModelError("the file is not an ONNX model")
        file.seek(0)
        return file.read()


class SharedWeights(NamedTuple):
    """An optimized graph and its weights. Sessions use the weights without a copy: keep this object."""

    graph: bytes
    """The graph as an ONNX model, which names its weights."""
    names: Sequence[str]
    values: Sequence[Any]
    """`OrtValue` of each name, in shared memory that cannot be written."""


def open_session(
    model: bytes | Path,
    provider: ProviderSetting,
    threads: int,
    *,
    unoptimized: bool = False,
    engine_cache: str = "",
    weights: SharedWeights | None = None,
) -> Any:
    """Open an ONNX Runtime session with `threads` CPU threads per call. Raises `ModelError`.

    `model` are the bytes of a model file, or its path: ONNX Runtime then needs less memory while it loads.

    With `unoptimized` the graph is not optimized: it loads faster and runs slower. `engine_cache` is the
    folder of a provider that compiles graphs (`service.inference.engine_cache`); empty for none. With
    `weights`, which must live as long as the session, the session has no copy of the model's weights.
    """
    options = onnxruntime.SessionOptions()
    if weights:
        model = weights.graph  # optimized already
        options.add_external_initializers(list(weights.names), list(weights.values))
        for name, value in zip(weights.names, weights.values, strict=True):  # otherwise it copies them
            options.add_initializer(name, value)
    if unoptimized or weights:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The threads of a call wait for each other at every layer: they spin during the call and sleep after.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = _FATAL_SEVERITY
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", _EXTERNAL_DATA_FOLDER
    )
    chosen = _choose_provider(provider)
    provider_options = dict(chosen.make_options(threads, engine_cache))
    providers: list[Any] | None = None  # a plugin that is named here is silently replaced by the CPU
    if chosen.plugin:
        options.add_provider_for_devices(_find_plugin_devices(chosen), provider_options)
    else:
        fallbacks = [PROVIDERS[name].runtime_name for name in chosen.fallbacks]
        providers = [(chosen.runtime_name, provider_options), *fallbacks]
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime raises a dozen classes without a common base
        raise ModelError(f"ONNX Runtime cannot load the model: {to_one_line(error)}") from None
    if provider != "auto" and get_provider(session) != provider:
        raise ModelError(
            f"FOVEA_PROVIDER is {provider}, but ONNX Runtime fell back to {get_provider(session)}; "
            "check the driver and the libraries of the provider"
        )
    # ONNX Runtime's wrapper keeps the bytes for another attempt on another provider, which must not happen.
    session.disable_fallback()
    session._model_bytes = None
    return session


def run_outputs(session: Any, names: Sequence[str], batch: Pixels) -> list[npt.NDArray[Any]]:
    """Return the outputs of a session for uint8 (n, height, width, 3), each output (n, ...).

    If the graph takes only one image at a time, run the images one after another. Raises `ModelError` when
    the graph does not run.
    """
    (graph_input,) = session.get_inputs()
    batches = [batch[row : row + 1] for row in range(len(batch))] if graph_input.shape[0] == 1 else [batch]
    try:
        outputs = [session.run(list(names), {graph_input.name: part}) for part in batches]
    except Exception as error:  # ONNX Runtime raises a dozen classes without a common base
        raise ModelError(f"the graph does not run: {to_one_line(error)}") from None
    return (
        outputs[0] if len(outputs) == 1 else [np.concatenate(values) for values in zip(*outputs, strict=True)]
    )


def runs_on_cpu(provider: ProviderSetting) -> bool:
    """Return whether sessions run on ONNX Runtime's own CPU provider.

    Raises `ModelError` if the provider is not available.
    """
    return _choose_provider(provider) is PROVIDERS["cpu"]


def _choose_provider(provider: ProviderSetting) -> ExecutionProvider:
    """Return the provider to request: for `auto` CUDA if this build has it, and else the CPU.

    Raises `ModelError` if this build of ONNX Runtime does not have the requested provider.
    """
    available_providers = onnxruntime.get_available_providers()
    if provider == "auto":
        has_cuda = PROVIDERS["cuda"].runtime_name in available_providers
        return PROVIDERS["cuda" if has_cuda else "cpu"]
    chosen = PROVIDERS[provider]
    if not chosen.plugin and chosen.runtime_name not in available_providers:
        raise ModelError(_describe_absence(chosen))
    return chosen


def _describe_absence(provider: ExecutionProvider) -> str:
    return f"FOVEA_PROVIDER is {provider.name}, but {provider.absence}; {provider.remedy}"


_plugin_lock: Final = threading.Lock()
"""Guards the registration of plugins, because ONNX Runtime refuses to register one twice."""


def _find_plugin_devices(provider: ExecutionProvider) -> list[Any]:
    """Return the first CPU device of a plugin, which is loaded into this process if it is not there yet.

    Raises `ModelError` if the plugin is not installed, cannot be loaded or has no such device.
    """
    try:
        with _plugin_lock:
            if not (devices := _list_cpu_devices(provider)):
                library = importlib.import_module(provider.plugin).get_library_path()
                onnxruntime.register_execution_provider_library(provider.name, library)
                devices = _list_cpu_devices(provider)
    except ImportError:
        raise ModelError(_describe_absence(provider)) from None
    except Exception as error:  # an old ONNX Runtime, a missing library: one of a dozen classes
        raise ModelError(
            f"FOVEA_PROVIDER is {provider.name}, but its plugin cannot be loaded: {to_one_line(error)}; "
            f"{provider.remedy}"
        ) from None
    if not devices:
        raise ModelError(f"FOVEA_PROVIDER is {provider.name}, but its plugin does not support this processor")
    return devices[:1]


def _list_cpu_devices(provider: ExecutionProvider) -> list[Any]:
    return [
        device
        for device in onnxruntime.get_ep_devices()
        if device.ep_name == provider.runtime_name
        and device.device.type == onnxruntime.OrtHardwareDeviceType.CPU
    ]


def get_provider(session: Any) -> ProviderName:
    """Return the provider on which the session runs: the first that ONNX Runtime names."""
    (runtime_name, *_) = session.get_providers()
    return next(one.name for one in PROVIDERS.values() if one.runtime_name == runtime_name)


def get_batch_limit(session: Any) -> int | None:
    """Return the limit of images in one call of the graph; None for no limit."""
    return 1 if session.get_inputs()[0].shape[0] == 1 else None


_MAX_RETAINED_IMAGES: Final = 4
"""Number of images whose memory a CPU session may keep permanently: the default size of a batch."""

_RUNS_BEFORE_SHRINK: Final = 16
"""Number of runs in a row with at most half the largest batch, after which that batch's memory is freed.

Allocating the memory again slows the next large batch: 64 images of a MobileNetV2 take 0.9 s instead of
0.55 s.
"""


class ArenaShrinker:
    """The decision when a session frees the memory of a large batch.

    ONNX Runtime's arena never frees memory by itself. Freeing memory after each batch would slow all batches
    down, because the next batch allocates the memory again. Each call asks just before its run. The counts
    have no lock: a race between threads only shifts the moment at which memory is freed.
    """

    def __init__(self) -> None:
        self._largest_batch = 0
        """Number of images in the largest batch whose memory may still be held."""
        self._small_runs = 0
        """Number of runs in a row that needed at most half of that memory."""
        self._shrink_options = onnxruntime.RunOptions()
        self._shrink_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def get_run_options(self, count: int) -> Any:
        """Return the run options for `count` images: None, or options that free unused memory afterwards."""
        if 2 * count > self._largest_batch or self._largest_batch <= _MAX_RETAINED_IMAGES:
            self._largest_batch = max(self._largest_batch, count)
            self._small_runs = 0
            return None
        self._small_runs += 1
        if self._small_runs < _RUNS_BEFORE_SHRINK:
            return None
        self._largest_batch, self._small_runs = count, 0
        return self._shrink_options
