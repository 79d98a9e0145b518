"""One ONNX Runtime session: pixels in, probabilities out, on the provider that was asked for."""

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

from fovea.service.artifact.contract import GOLDEN_PIXELS, Contract, GoldenImage
from fovea.service.artifact.inputs import Tensor, tensors_of
from fovea.service.artifact.model_file import stamp_of
from fovea.service.artifact.onnx_edit import steps_alone, without_steps
from fovea.service.errors import ContractError, GoldenError, ModelError, RequestError, one_line
from fovea.service.inference.preprocess import Pixels, decode

Floats: TypeAlias = npt.NDArray[np.float32]
Values: TypeAlias = npt.NDArray[Any]
ProviderSetting: TypeAlias = Literal["auto", "cpu", "cuda"]

BATCH_TOLERANCE: Final = {"cpu": 1e-5, "cuda": 1.25e-2}
"""Largest difference of one probability between an image alone and the same image in any batch.

CPU: bit for bit the same on x86-64 with AVX2 (three networks, batches to 16, one thread and two); kernels
that sum in another order change a logit by 1e-5 or so. CUDA: not measured; a quarter, the largest slope of
softmax and sigmoid, of the 5e-2 by which TF32 may change a logit.
"""

_CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"
_SILENT: Final = 4
"""ONNX Runtime's log severity FATAL: what goes wrong is raised, and written once, by us."""


_KEPT: Final = 4
"""Images whose memory a session on a CPU may keep for good: as many as come in one batch by default."""

_LARGEST: Final = (1 << 31) - 1
"""Bytes that a protobuf message can have."""

_NOWHERE: Final = "/dev/null/no external data"
"""Where ONNX Runtime looks for weights outside the file: a model is one file. It would look in the working
folder otherwise."""

_SMALL_RUNS: Final = 16
"""Runs in a row of at most half the largest batch, after which that one's memory is given back. To have it
again costs the next large batch half of its time: 64 images of a MobileNetV2 take 0.9 s and not 0.55 s."""


@dataclass(frozen=True)
class Proof:
    """How closely this host came to the golden set."""

    images: int
    pixel_difference: float
    """Largest mean absolute difference of one image, in levels of 255."""
    logit_difference: float
    """Largest absolute difference of one logit."""


class Engine:
    """A loaded model. `run` and `logits` may be called from several threads at once.

    All that run it raise `ModelError` when the graph does not run.
    """

    def __init__(
        self,
        model: bytes,
        *,
        provider: ProviderSetting,
        threads: int,
        wide_threads: int = 0,
        again: Callable[[], bytes] | None = None,
    ) -> None:
        """Load a model file's bytes with `threads` CPU threads per call.

        A call that is alone gets `wide_threads` where they are more: on a CPU the model is then held
        twice, because a session cannot change its threads, and one of many threads that is called
        by several callers at once does less than one of a single thread. `again` gives the bytes once more,
        when a tensor that is no pixels comes first; without it they are kept.
        Raises `ModelError` when ONNX Runtime cannot load it or the provider is not to be had, and
        `ContractError` when the contract is missing or does not fit the graph.
        """
        session = open_session(model, provider, threads)
        self.contract = Contract.from_metadata(session.get_modelmeta().custom_metadata_map)
        self.provider: Literal["cpu", "cuda"] = _actual_provider(session)
        _check_graph(session, self.contract)
        self.batch_limit: int | None = _batch_limit(session)
        """Most images that the graph takes at once, if not any number: larger batches are run one by one."""
        self.tensors = tensors_of(self.contract)
        """What it can be given: the pixels first."""
        self._provider, self._threads = provider, threads
        self._wide_threads = wide_threads if self.provider == "cpu" and wide_threads > threads else 0
        self._again = again or (lambda: model)
        self._pixels = _Sessions(session, self._wide(model))
        self._given: dict[str, _Sessions] = {}
        """Of other tensors, by name, once they have been asked for."""

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        provider: ProviderSetting,
        threads: int,
        wide_threads: int = 0,
        file: Path | None = None,
        stamp: Sequence[int] = (),
    ) -> Engine:
        """Load a model file. Raises `ModelError` that names it.

        It is read from `file` where that is another; and must have this `stamp` (`held.stamp_of`).
        """
        try:
            read = partial(read_model, file or path, stamp)
            return cls(read(), provider=provider, threads=threads, wide_threads=wide_threads, again=read)
        except OSError as error:
            raise ModelError(f"cannot read the model {path}: {error.strerror}") from None
        except ModelError as error:
            raise type(error)(f"{path}: {error}") from None

    def run(self, batch: Pixels, *, alone: bool = False) -> Floats:
        """Probabilities, float32 (n, labels), for a batch of pixels, uint8 (n, height, width, 3).

        `alone` promises that no other call is made meanwhile: it may then take all processors.
        """
        return self.answer(self.tensors[0], batch, alone=alone)[0]

    def logits(self, batch: Pixels, *, alone: bool = False) -> Floats:
        """Logits, float32 (n, `contract.logit_count`), for the same."""
        return self._outputs(self._pixels, self.tensors[0], batch, [self.contract.logits_name], alone)[0]

    def answer(
        self, tensor: Tensor, batch: Values, *, alone: bool = False, logits: bool = False
    ) -> list[Floats]:
        """Probabilities, and also `logits` where they are wanted, for a batch of one of its tensors,
        (n, *its shape).

        One that is no pixels takes a session of its own, made when it comes first. Raises `GoldenError` when
        that does not compute what the golden set says.
        """
        names = [self.contract.probabilities_name, *([self.contract.logits_name] if logits else [])]
        return self._outputs(self._sessions(tensor), tensor, batch, names, alone)

    def _outputs(
        self, sessions: _Sessions, tensor: Tensor, batch: Values, names: Sequence[str], alone: bool
    ) -> list[Floats]:
        count = len(batch)
        if self.batch_limit and count > self.batch_limit:
            single = [self._outputs(sessions, tensor, row[None], names, alone) for row in batch]
            return [np.concatenate(rows) for rows in zip(*single, strict=True)]
        session, options = sessions.wide if alone else sessions.narrow, None
        if self.provider == "cuda":  # every size is warmed up, and its memory stays
            batch = _padded(batch)
        elif options := sessions.memory.options(count):
            session = sessions.narrow  # the wide one has seen single images alone
        try:
            outputs: list[Floats] = session.run(names, {tensor.name: batch}, options)
        except Exception as error:  # ONNX Runtime raises a dozen classes without a common root
            raise ModelError(f"the graph does not run: {one_line(error)}") from error
        return [output[:count] for output in outputs]

    def _sessions(self, tensor: Tensor) -> _Sessions:
        if not tensor.steps:
            return self._pixels
        if tensor.name not in self._given:
            whole = self._again()
            model = without_steps(whole, tensor)
            sessions = _Sessions(open_session(model, self._provider, self._threads), self._wide(model))
            self._prove_given(tensor, sessions, open_session(steps_alone(whole, tensor), "cpu", 1))
            self._given[tensor.name] = sessions
        return self._given[tensor.name]

    def _wide(self, model: bytes) -> Any:
        """A session of more threads, where there is to be one."""
        return open_session(model, self._provider, self._wide_threads) if self._wide_threads else None

    def warm_up(self, batch_max: int) -> None:
        """Run every batch size that may come, so that no caller pays for first-time allocation or tuning."""
        geometry = self.contract.input
        for size in _warm_sizes(min(batch_max, self.batch_limit or batch_max), self.provider):
            pixels = np.zeros((size, geometry.height, geometry.width, 3), np.uint8)
            for alone in self._ways() if size == 1 else (False,):
                self.run(pixels, alone=alone)

    def _ways(self) -> tuple[bool, ...]:
        """What `alone` may be where it makes a difference: each session is warmed up and proven once."""
        return (False, True) if self._wide_threads else (False,)

    def prove(self) -> Proof:
        """Check decoder, resize and graph of this host against the contract's golden set.

        The graph is run on the recorded pixels, so that a difference of decoders and one of
        arithmetic are told apart. A second session of the same graph is run on the first image alone: all of
        them took a third of the start of a ResNet-50. Raises `GoldenError` beyond a tolerance.
        """
        pixel_worst = logit_worst = 0.0
        for number, golden in enumerate(self.contract.golden.images):
            expected = golden_pixels(golden)
            pixel_worst = max(pixel_worst, self._prove_pixels(golden, expected))
            for alone in (False,) if number else self._ways():
                logits = self.logits(expected[None], alone=alone)
                logit_worst = max(logit_worst, self._prove_logits(golden, logits))
        return Proof(len(self.contract.golden.images), pixel_worst, logit_worst)

    def _prove_logits(self, golden: GoldenImage, computed: Floats) -> float:
        tolerance = self._logit_tolerance()
        worst = float(np.abs(computed - np.array(golden.logits, np.float32)).max())
        if not worst <= tolerance:  # rather than `>`: a NaN is a failure too
            raise GoldenError(
                f"golden image {golden.name!r}: a logit is off by {worst:.3g}; at most {tolerance:g}"
            )
        return worst

    def _prove_given(self, tensor: Tensor, sessions: _Sessions, steps: Any) -> None:
        """The same of a graph that is given another tensor, on the first image: `steps` make it of pixels."""
        golden = self.contract.golden.images[0]
        pixels = {self.contract.input_name: golden_pixels(golden)[None]}
        given = steps.run([tensor.name], pixels)[0]
        for alone in self._ways():
            logits = self._outputs(sessions, tensor, given, [self.contract.logits_name], alone)[0]
            self._prove_logits(golden, logits)

    def _prove_pixels(self, golden: GoldenImage, expected: Pixels) -> float:
        try:
            image = base64.b64decode(golden.image)
            pixels = decode(image, self.contract.input, max_pixels=GOLDEN_PIXELS).pixels
        except (ValueError, RequestError) as error:
            raise GoldenError(f"golden image {golden.name!r} cannot be decoded: {error}") from None
        if pixels.shape != expected.shape:
            raise GoldenError(f"golden image {golden.name!r} becomes {pixels.shape}, not {expected.shape}")
        difference = float(np.abs(pixels.astype(np.int16) - expected).mean())
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


def golden_pixels(golden: GoldenImage) -> Pixels:
    """The recorded pixels, uint8 (height, width, 3). Raises `GoldenError` when they are damaged."""
    try:
        with Image.open(BytesIO(base64.b64decode(golden.pixels)), formats=["PNG"]) as image:
            return np.array(image.convert("RGB"))
    except (ValueError, OSError, SyntaxError) as error:
        raise GoldenError(f"golden image {golden.name!r} has damaged pixels: {error}") from None


# --- memory --------------------------------------------------------------------------------------


class BatchMemory:
    """When a session gives back the memory of a large batch: ONNX Runtime's arena never does by itself.

    Freeing it after each batch would make all slower, as it must be had again for the next one.
    """

    def __init__(self) -> None:
        self._largest = 0
        """Images in the largest batch whose memory may still be held."""
        self._small_runs = 0
        """How many in a row needed at most half of it."""
        self._shrink = onnxruntime.RunOptions()
        self._shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def options(self, count: int) -> Any:
        """How to run a batch of `count` images: as always (None), or so that unused memory is freed after."""
        if 2 * count > self._largest or self._largest <= _KEPT:
            self._largest = max(self._largest, count)
            self._small_runs = 0
            return None
        self._small_runs += 1
        if self._small_runs < _SMALL_RUNS:
            return None
        self._largest, self._small_runs = count, 0
        return self._shrink


# --- batch sizes ---------------------------------------------------------------------------------


def _warm_sizes(batch_max: int, provider: Literal["cpu", "cuda"]) -> list[int]:
    """On a CPU no size needs tuning; on CUDA the powers of two, to which all others are padded."""
    if provider == "cpu":
        return [1, batch_max]
    return sorted({_padded_size(size) for size in range(1, batch_max + 1)})


def _padded(batch: Values) -> Values:
    """The batch with black images behind it: cuDNN tunes itself anew for each size that it sees first."""
    missing = _padded_size(len(batch)) - len(batch)
    return np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), batch.dtype)]) if missing else batch


def _padded_size(size: int) -> int:
    return 1 << (size - 1).bit_length()


# --- the session ---------------------------------------------------------------------------------


class _Sessions:
    """The model, given one of its tensors: a session, and perhaps another for a call that is alone."""

    def __init__(self, narrow: Any, wide: Any) -> None:
        self.narrow = narrow
        self.wide = wide or narrow
        self.memory = BatchMemory()


def read_model(path: Path, stamp: Sequence[int]) -> bytes:
    """A file that may be a model. Raises `ModelError` for what plainly is none, before it takes memory."""
    with path.open("rb") as file:
        if stamp and stamp_of(file.fileno()) != tuple(stamp):
            raise ModelError("the file has changed since it was found")
        size = os.fstat(file.fileno()).st_size
        if size > _LARGEST:
            raise ModelError(f"the file has {size} bytes; an ONNX file has at most {_LARGEST}")
        if file.read(1) in (b"", b"\0"):  # each field of a protobuf message begins with its number, from 1 on
            raise ModelError("the file is no ONNX model")
        file.seek(0)
        return file.read()


def open_session(model: bytes, provider: ProviderSetting, threads: int, *, as_written: bool = False) -> Any:
    """A session of ONNX Runtime with `threads` CPU threads for a call; `as_written`, each node is run as it
    stands: loaded sooner, slower later. Raises `ModelError`."""
    options = onnxruntime.SessionOptions()
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads of one call wait for each other at every layer: they spin while it runs, and sleep after it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = _SILENT
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", _NOWHERE)
    providers = _wanted(provider)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime raises a dozen classes without a common root
        raise ModelError(f"ONNX Runtime cannot load the model: {one_line(error)}") from None
    if provider == "cuda" and _actual_provider(session) != "cuda":
        raise ModelError("FOVEA_PROVIDER is cuda, but ONNX Runtime fell back to the CPU")
    return session


def run_outputs(session: Any, names: Sequence[str], batch: Pixels) -> list[npt.NDArray[Any]]:
    """What a session gives for a batch of uint8 (n, height, width, 3), each output (n, ...).

    One image after the other where the graph takes no more at once. Raises `ModelError` when it does not run.
    """
    (taken,) = session.get_inputs()
    parts = [batch[row : row + 1] for row in range(len(batch))] if taken.shape[0] == 1 else [batch]
    try:
        found = [session.run(list(names), {taken.name: part}) for part in parts]
    except Exception as error:  # ONNX Runtime raises a dozen classes without a common root
        raise ModelError(f"the graph does not run: {one_line(error)}") from None
    return found[0] if len(found) == 1 else [np.concatenate(values) for values in zip(*found, strict=True)]


def _wanted(provider: ProviderSetting) -> list[str]:
    """Providers to ask for. Raises `ModelError` when CUDA is a must and this build has none."""
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
    """Raise `ContractError` unless inputs and outputs are what the contract says."""
    geometry = contract.input
    wanted = ["tensor(uint8)", geometry.height, geometry.width, 3]
    inputs = {node.name: [node.type, *node.shape[1:]] for node in session.get_inputs()}
    if inputs != {contract.input_name: wanted}:
        raise ContractError(f"the graph takes {inputs}, the contract says {contract.input_name}: {wanted}")
    outputs = {node.name: [node.type, *node.shape[1:]] for node in session.get_outputs()}
    for name, count in (
        (contract.logits_name, contract.logit_count),
        (contract.probabilities_name, len(contract.labels)),
    ):
        if outputs.get(name) != ["tensor(float)", count]:
            raise ContractError(f"the graph gives {outputs}; the contract needs {name} of {count} floats")
