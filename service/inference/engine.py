"""ONNX Runtime sessions of one model: pixels in, probabilities out, on the requested provider."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from fovea.service.artifact.contract import MAX_GOLDEN_PIXELS, Contract, GoldenImage
from fovea.service.artifact.inputs import InputTensor, input_tensors_of
from fovea.service.artifact.model_file import fingerprint_of
from fovea.service.artifact.onnx_edit import extract_preprocessing, replace_input
from fovea.service.errors import ContractError, GoldenError, ModelError, RequestError, to_one_line
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.preprocess import decode_image

Floats: TypeAlias = npt.NDArray[np.float32]
Values: TypeAlias = npt.NDArray[Any]
ProviderSetting: TypeAlias = Literal["auto", "cpu", "cuda"]

BATCH_TOLERANCE: Final = {"cpu": 1e-5, "cuda": 1.25e-2}
"""Largest difference of one probability between an image alone and the same image in any batch.

CPU: identical bit for bit on x86-64 with AVX2 (three networks, batches up to 16, one and two threads);
kernels that sum in another order change a logit by about 1e-5. CUDA: not measured. The value is a quarter,
the largest slope of softmax and sigmoid, of the 5e-2 by which TF32 may change a logit.
"""

_CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"
_FATAL_SEVERITY: Final = 4
"""Log severity FATAL of ONNX Runtime: errors are raised, and Fovea logs them once."""


_MAX_RETAINED_IMAGES: Final = 4
"""Number of images whose memory a CPU session may keep permanently: the default size of a batch."""

_MAX_MODEL_BYTES: Final = (1 << 31) - 1
"""Size limit of a protobuf message in bytes."""

_EXTERNAL_DATA_FOLDER: Final = "/dev/null/no external data"
"""Folder in which ONNX Runtime looks for weights outside the file. It does not exist: a model is one file.

By default, ONNX Runtime would look in the working directory.
"""

_RUNS_BEFORE_SHRINK: Final = 16
"""Number of runs in a row with at most half the largest batch, after which that batch's memory is freed.

Allocating the memory again slows the next large batch: 64 images of a MobileNetV2 take 0.9 s instead of
0.55 s.
"""


@dataclass(frozen=True)
class GoldenDifferences:
    """The differences of this host from the golden set."""

    images: int
    pixel_difference: float
    """Largest mean absolute difference of one image, in levels of 255."""
    logit_difference: float
    """Largest absolute difference of one logit."""


class Engine:
    """A loaded model. `run` and `compute_logits` may be called from several threads at once.

    All methods that run the model raise `ModelError` when the graph does not run.
    """

    def __init__(
        self,
        model: bytes,
        *,
        provider: ProviderSetting,
        threads: int,
        wide_threads: int = 0,
        read_bytes: Callable[[], bytes] | None = None,
    ) -> None:
        """Load the bytes of a model file with `threads` CPU threads per call.

        An exclusive call gets `wide_threads` threads if this is more. On a CPU the model is then loaded
        twice, because a session cannot change its number of threads. A session with many threads that several
        callers use at once does less work than a session with one thread.

        `read_bytes` returns the bytes once more. It is called by the first call with a tensor that is not
        pixels, in the thread of that call. Without `read_bytes` the bytes are kept.

        Raises `ModelError` when ONNX Runtime cannot load the model or the provider is not available, and
        `ContractError` when the contract is missing or does not fit the graph.
        """
        session = open_session(model, provider, threads)
        self.contract = Contract.from_metadata(session.get_modelmeta().custom_metadata_map)
        self.provider: Literal["cpu", "cuda"] = _actual_provider(session)
        _check_graph(session, self.contract)
        self.batch_limit: int | None = _batch_limit(session)
        """Limit of images in one call of the graph; None for no limit.

        Larger batches run one image at a time.
        """
        self.tensors = input_tensors_of(self.contract)
        """Possible inputs of the model, the pixels first."""
        self._provider_setting, self._threads = provider, threads
        self._wide_threads = wide_threads if self.provider == "cpu" and wide_threads > threads else 0
        self._read_bytes = read_bytes or (lambda: model)
        self._pixel_sessions = _Sessions(session, self._open_multi_threaded(model))
        self._raw_input_sessions: dict[str, _Sessions] = {}
        """Sessions for other tensors by name, created on first use."""

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        provider: ProviderSetting,
        threads: int,
        wide_threads: int = 0,
        file: Path | None = None,
        fingerprint: Sequence[int] = (),
    ) -> Engine:
        """Load a model file. Raises `ModelError` that names the file.

        The bytes are read from `file` if it is given, and the file must have this `fingerprint`
        (`model_file.fingerprint_of`).
        """
        try:
            read_bytes = partial(read_model, file or path, fingerprint)
            return cls(
                read_bytes(),
                provider=provider,
                threads=threads,
                wide_threads=wide_threads,
                read_bytes=read_bytes,
            )
        except OSError as error:
            raise ModelError(f"cannot read the model {path}: {error.strerror}") from None
        except ModelError as error:
            raise type(error)(f"{path}: {error}") from None

    def run(self, batch: Pixels, *, exclusive: bool = False) -> Floats:
        """Return probabilities, float32 (n, labels), for pixels, uint8 (n, height, width, 3).

        `exclusive` promises that no other call is made in the meantime: the call may then use all processors.
        """
        return self.run_tensor(self.tensors[0], batch, exclusive=exclusive)[0]

    def compute_logits(self, batch: Pixels, *, exclusive: bool = False) -> Floats:
        """Return logits, float32 (n, `contract.logit_count`), for pixels, uint8 (n, height, width, 3)."""
        return self._run_session(
            self._pixel_sessions, self.tensors[0], batch, [self.contract.logits_name], exclusive
        )[0]

    def run_tensor(
        self, tensor: InputTensor, batch: Values, *, exclusive: bool = False, with_logits: bool = False
    ) -> list[Floats]:
        """Return probabilities, and on request `with_logits`, for a batch of a tensor: (n, *tensor.shape).

        A tensor that is not pixels needs its own session, which is created on first use. Raises `GoldenError`
        when this session does not reproduce the golden set.
        """
        names = [self.contract.probabilities_name, *([self.contract.logits_name] if with_logits else [])]
        return self._run_session(self._get_sessions(tensor), tensor, batch, names, exclusive)

    def _run_session(
        self, sessions: _Sessions, tensor: InputTensor, batch: Values, names: Sequence[str], exclusive: bool
    ) -> list[Floats]:
        """Run one of the sessions and return the named outputs. Raises `ModelError`."""
        count = len(batch)
        if self.batch_limit and count > self.batch_limit:
            image_outputs = [
                self._run_session(sessions, tensor, row[None], names, exclusive) for row in batch
            ]
            return [np.concatenate(rows) for rows in zip(*image_outputs, strict=True)]
        session, options = sessions.exclusive if exclusive else sessions.shared, None
        if self.provider == "cuda":  # all sizes are warmed up, and their memory is kept
            batch = _pad_batch(batch)
        elif options := sessions.arena_shrinker.get_run_options(count):
            # Exclusive calls are single images: only the arena of `shared` holds memory of large batches.
            session = sessions.shared
        try:
            outputs: list[Floats] = session.run(names, {tensor.name: batch}, options)
        except Exception as error:  # ONNX Runtime raises a dozen classes without a common base
            raise ModelError(f"the graph does not run: {to_one_line(error)}") from error
        return [output[:count] for output in outputs]

    def _get_sessions(self, tensor: InputTensor) -> _Sessions:
        """Return the sessions for a tensor; create and check them on first use.

        The sessions are stored only after their check. Two threads that call at once may both create
        sessions: the second pair replaces the first, which is slow but harmless.
        """
        if not tensor.preprocessing:
            return self._pixel_sessions
        if tensor.name not in self._raw_input_sessions:
            full_model = self._read_bytes()
            model = replace_input(full_model, tensor)
            sessions = _Sessions(
                open_session(model, self._provider_setting, self._threads), self._open_multi_threaded(model)
            )
            self._check_raw_input(
                tensor, sessions, open_session(extract_preprocessing(full_model, tensor), "cpu", 1)
            )
            self._raw_input_sessions[tensor.name] = sessions
        return self._raw_input_sessions[tensor.name]

    def _open_multi_threaded(self, model: bytes) -> Any:
        """Return a session with more threads, or None if exclusive calls get no extra threads."""
        return open_session(model, self._provider_setting, self._wide_threads) if self._wide_threads else None

    def warm_up(self, batch_max: int) -> None:
        """Run every batch size that may occur, so that no caller waits for allocation or tuning."""
        geometry = self.contract.input
        for size in _warm_up_sizes(min(batch_max, self.batch_limit or batch_max), self.provider):
            pixels = np.zeros((size, geometry.height, geometry.width, 3), np.uint8)
            for exclusive in self._exclusive_modes() if size == 1 else (False,):
                self.run(pixels, exclusive=exclusive)

    def _exclusive_modes(self) -> tuple[bool, ...]:
        """Return the values of `exclusive` that use different sessions: each is warmed up and checked."""
        return (False, True) if self._wide_threads else (False,)

    def check_golden_set(self) -> GoldenDifferences:
        """Check decoder, resize and graph of this host against the contract's golden set.

        The graph runs on the recorded pixels, so that decoder differences and arithmetic differences are
        reported separately. A second session of the same graph runs on the first image only: checking all
        images took a third of the start-up time of a ResNet-50.

        Raises `GoldenError` when a difference exceeds its tolerance.
        """
        max_pixel_difference = max_logit_difference = 0.0
        for number, golden in enumerate(self.contract.golden.images):
            expected_pixels = decode_golden_pixels(golden)
            max_pixel_difference = max(max_pixel_difference, self._check_pixels(golden, expected_pixels))
            for exclusive in (False,) if number else self._exclusive_modes():
                logits = self.compute_logits(expected_pixels[None], exclusive=exclusive)
                max_logit_difference = max(max_logit_difference, self._check_logits(golden, logits))
        return GoldenDifferences(len(self.contract.golden.images), max_pixel_difference, max_logit_difference)

    def _check_logits(self, golden: GoldenImage, logits: Floats) -> float:
        """Return the largest difference of a logit. Raises `GoldenError` beyond the tolerance."""
        tolerance = self._logit_tolerance()
        difference = float(np.abs(logits - np.array(golden.logits, np.float32)).max())
        if not difference <= tolerance:  # not `>`, so that NaN fails too
            raise GoldenError(
                f"golden image {golden.name!r}: a logit is off by {difference:.3g}; at most {tolerance:g}"
            )
        return difference

    def _check_raw_input(self, tensor: InputTensor, sessions: _Sessions, preprocessing_session: Any) -> None:
        """Check a graph with another input tensor on the first golden image.

        `preprocessing_session` is a session that computes the tensor from pixels. Raises `GoldenError`.
        """
        golden = self.contract.golden.images[0]
        pixels = {self.contract.input_name: decode_golden_pixels(golden)[None]}
        raw_input = preprocessing_session.run([tensor.name], pixels)[0]
        for exclusive in self._exclusive_modes():
            logits = self._run_session(sessions, tensor, raw_input, [self.contract.logits_name], exclusive)[0]
            self._check_logits(golden, logits)

    def _check_pixels(self, golden: GoldenImage, expected_pixels: Pixels) -> float:
        """Return the mean difference of the decoded pixels. Raises `GoldenError` beyond the tolerance."""
        try:
            image = base64.b64decode(golden.image)
            pixels = decode_image(image, self.contract.input, max_pixels=MAX_GOLDEN_PIXELS).pixels
        except (ValueError, RequestError) as error:
            raise GoldenError(f"golden image {golden.name!r} cannot be decoded: {error}") from None
        if pixels.shape != expected_pixels.shape:
            raise GoldenError(
                f"golden image {golden.name!r} becomes {pixels.shape}, not {expected_pixels.shape}"
            )
        difference = float(np.abs(pixels.astype(np.int16) - expected_pixels).mean())
        if difference > golden.pixel_tolerance:
            raise GoldenError(
                f"golden image {golden.name!r}: pixels are off by {difference:.3g} of 255 on average; "
                f"at most {golden.pixel_tolerance:g}"
            )
        return difference

    def _logit_tolerance(self) -> float:
        key = f"{self.provider}/float32"
        try:
            return self.contract.golden.logit_tolerance[key]
        except KeyError:
            raise GoldenError(f"the golden set states no tolerance for {key}") from None


def decode_golden_pixels(golden: GoldenImage) -> Pixels:
    """Return the recorded pixels, uint8 (height, width, 3). Raises `GoldenError` when they are damaged."""
    try:
        with Image.open(BytesIO(base64.b64decode(golden.pixels)), formats=["PNG"]) as image:
            return np.array(image.convert("RGB"))
    except (ValueError, OSError, SyntaxError) as error:
        raise GoldenError(f"golden image {golden.name!r} has damaged pixels: {error}") from None


# --- memory --------------------------------------------------------------------------------------


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


# --- batch sizes ---------------------------------------------------------------------------------


def _warm_up_sizes(batch_max: int, provider: Literal["cpu", "cuda"]) -> list[int]:
    """Return the batch sizes to warm up.

    A CPU needs no tuning. On CUDA these are the powers of two, to which all other sizes are padded.
    """
    if provider == "cpu":
        return [1, batch_max]
    return sorted({_pad_size(size) for size in range(1, batch_max + 1)})


def _pad_batch(batch: Values) -> Values:
    """Pad the batch with black images to a power of two.

    cuDNN tunes itself again for each batch size that it has not seen.
    """
    padding_size = _pad_size(len(batch)) - len(batch)
    return (
        np.concatenate([batch, np.zeros((padding_size, *batch.shape[1:]), batch.dtype)])
        if padding_size
        else batch
    )


def _pad_size(size: int) -> int:
    return 1 << (size - 1).bit_length()


# --- the session ---------------------------------------------------------------------------------


class _Sessions:
    """The sessions for one input tensor: one for all calls, and perhaps one for exclusive calls.

    The session for exclusive calls has more threads.
    """

    def __init__(self, shared: Any, exclusive: Any) -> None:
        self.shared = shared
        self.exclusive = exclusive or shared
        self.arena_shrinker = ArenaShrinker()


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


def open_session(model: bytes, provider: ProviderSetting, threads: int, *, unoptimized: bool = False) -> Any:
    """Open an ONNX Runtime session with `threads` CPU threads per call. Raises `ModelError`.

    With `unoptimized` the graph is not optimized: it loads faster and runs slower.
    """
    options = onnxruntime.SessionOptions()
    if unoptimized:
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
    providers = _select_providers(provider)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime raises a dozen classes without a common base
        raise ModelError(f"ONNX Runtime cannot load the model: {to_one_line(error)}") from None
    if provider == "cuda" and _actual_provider(session) != "cuda":
        raise ModelError(
            "FOVEA_PROVIDER is cuda, but ONNX Runtime fell back to the CPU; "
            "check the GPU driver and the CUDA libraries"
        )
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


def _select_providers(provider: ProviderSetting) -> list[str]:
    """Return the providers to request. Raises `ModelError` if CUDA is required and this build has none."""
    has_cuda = _CUDA in onnxruntime.get_available_providers()
    if provider == "cuda" and not has_cuda:
        raise ModelError(
            "FOVEA_PROVIDER is cuda, but this ONNX Runtime has no CUDA; install onnxruntime-gpu in its place"
        )
    return [_CUDA, _CPU] if has_cuda and provider != "cpu" else [_CPU]


def _actual_provider(session: Any) -> Literal["cpu", "cuda"]:
    return "cuda" if _CUDA in session.get_providers() else "cpu"


def _batch_limit(session: Any) -> int | None:
    return 1 if session.get_inputs()[0].shape[0] == 1 else None


def _check_graph(session: Any, contract: Contract) -> None:
    """Raise `ContractError` unless the inputs and outputs are those of the contract."""
    geometry = contract.input
    expected_input = ["tensor(uint8)", geometry.height, geometry.width, 3]
    inputs = {node.name: [node.type, *node.shape[1:]] for node in session.get_inputs()}
    if inputs != {contract.input_name: expected_input}:
        raise ContractError(
            f"the graph takes {inputs}; the contract needs {contract.input_name}: {expected_input}"
        )
    outputs = {node.name: [node.type, *node.shape[1:]] for node in session.get_outputs()}
    for name, count in (
        (contract.logits_name, contract.logit_count),
        (contract.probabilities_name, len(contract.labels)),
    ):
        if outputs.get(name) != ["tensor(float)", count]:
            raise ContractError(f"the graph gives {outputs}; the contract needs {name} of {count} floats")
