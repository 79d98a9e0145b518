"""The engine of one model: pixels in, probabilities out, on the requested provider."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from fovea.service.artifact.contract import MAX_GOLDEN_PIXELS, Contract, GoldenImage
from fovea.service.artifact.embedding import find_embedding
from fovea.service.artifact.inputs import InputTensor, input_tensors_of
from fovea.service.artifact.model_file import MemoryFile
from fovea.service.artifact.onnx_edit import add_outputs, extract_preprocessing, replace_input
from fovea.service.errors import (
    ContractError,
    GoldenError,
    Interrupted,
    ModelError,
    RequestError,
    to_one_line,
)
from fovea.service.inference.pinned_memory import PinnedBatches, find_pinned_memory, pad_size, run_bound
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.preprocess import decode_image
from fovea.service.inference.session import (
    ArenaShrinker,
    SharedWeights,
    get_batch_limit,
    get_provider,
    open_session,
    read_model,
    runs_on_cpu,
)
from fovea.service.inference.shared_weights import share_weights
from fovea.service.providers import PROVIDERS, ProviderName, ProviderSetting
from fovea.service.resources.model_memory import check_container_memory

Floats: TypeAlias = npt.NDArray[np.float32]
Values: TypeAlias = npt.NDArray[Any]
BatchAllocator: TypeAlias = Callable[[tuple[int, ...], npt.DTypeLike], Values]

BATCH_TOLERANCE: Final = {"cpu": 1e-5, "cuda": 1.25e-2}
"""Largest difference of one probability between an image alone and the same image in any batch.

The keys are the `arithmetic` of providers.

CPU: identical bit for bit on x86-64 with AVX2 (three networks, batches up to 16, one and two threads);
kernels that sum in another order change a logit by about 1e-5. CUDA: not measured. The value is a quarter,
the largest slope of softmax and sigmoid, of the 5e-2 by which TF32 may change a logit.
"""


_RETRY_SECONDS: Final = 60.0
"""Time after which sessions that could not be created are tried again, in seconds."""


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
        model: bytes | Path,
        *,
        provider: ProviderSetting,
        threads: int,
        wide_threads: int = 0,
        engine_cache: str = "",
        read_bytes: Callable[[], bytes] | None = None,
        weights_file: MemoryFile | None = None,
    ) -> None:
        """Load a model with `threads` CPU threads per call: the bytes of its file, or the path.

        From a path, loading needs less memory, by the size of the file and more. The file must stay as it is.

        An exclusive call gets `wide_threads` threads if this is more. On a CPU the model is then loaded
        twice, because a session cannot change its number of threads. A session with many threads that several
        callers use at once does less work than a session with one thread.

        `engine_cache` is the folder of a provider that compiles graphs; empty for none.

        `read_bytes` returns the bytes once more. It is called by the first call with a tensor that is not
        pixels, in the thread of that call. Without `read_bytes` the bytes are kept.

        The weights are shared through `weights_file` if it is given and the model runs on a CPU
        (`shared_weights`).

        Raises `ModelError` when ONNX Runtime cannot load the model or the provider is not available, and
        `ContractError` when the contract is missing or does not fit the graph.
        """
        self._open_session = partial(open_session, provider=provider, engine_cache=engine_cache)
        weights = None
        if weights_file and runs_on_cpu(provider):
            weights = share_weights(_read_whole(model), weights_file)
        session = self._open_session(model, threads=threads, weights=weights)
        self.contract = Contract.from_metadata(session.get_modelmeta().custom_metadata_map)
        self.provider: ProviderName = get_provider(session)
        is_gpu = PROVIDERS[self.provider].is_gpu
        self._pinned_batches = PinnedBatches(find_pinned_memory()) if is_gpu else None
        """Memory from which a GPU reads; None without a GPU."""
        self.allocate_batch: BatchAllocator = (
            self._pinned_batches.allocate if self._pinned_batches else np.empty
        )
        """Function that returns an array for a batch. On a GPU the thread's next batch overwrites it."""
        _check_graph(session, self.contract)
        self.batch_limit: int | None = get_batch_limit(session)
        """Limit of images in one call of the graph; None for no limit.

        Larger batches run one image at a time.
        """
        self.tensors = input_tensors_of(self.contract)
        """Possible inputs of the model, the pixels first."""
        self._threads = threads
        self._wide_threads = wide_threads if not is_gpu and wide_threads > threads else 0
        self._read_bytes = read_bytes or partial(_read_whole, model)
        self._pixel_sessions = _Sessions(session, self._open_multi_threaded(model, weights))
        self._further_sessions: dict[str, _Sessions] = {}
        """Sessions for other tensors or with the embedding, by what they are for, created on first use."""
        self._failures: dict[str, tuple[ModelError, float]] = {}
        """Error of the last attempt to create further sessions, and the time (monotonic) of the next one."""
        self.embedding = find_embedding(self.contract)
        """Tensor with the embedding; None if the model has none."""
        self._weights = weights  # the last attribute: it goes after the sessions that use the weights

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        provider: ProviderSetting,
        threads: int,
        wide_threads: int = 0,
        engine_cache: str = "",
        file: Path | None = None,
        fingerprint: Sequence[int] = (),
        weights_file: MemoryFile | None = None,
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
                engine_cache=engine_cache,
                read_bytes=read_bytes,
                weights_file=weights_file,
            )
        except OSError as error:
            raise ModelError(f"cannot read the model {path}: {error.strerror}") from None
        except ModelError as error:
            raise type(error)(f"{path}: {error}") from None

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, and say what can be."""
        raise TypeError(
            "an engine holds the sessions of one process and cannot be pickled; pickle the model that "
            "fovea.load returns, or a fovea.BatchClassifier: both load the file again in the other process"
        )

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

    def run_with_embedding(
        self, batch: Pixels, *, exclusive: bool = False, with_logits: bool = False
    ) -> tuple[list[Floats], Floats]:
        """Return what `run_tensor` returns for pixels, and embeddings, float32 (n, `embedding.dimension`).

        The sessions for this are created on first use, with weights of their own. Raises `ModelError` for a
        model without an embedding and when the sessions cannot be created: `GoldenError` when they do not
        reproduce the golden set, `Interrupted` when the container lacks memory.
        """
        sessions, tensor = self._get_embedding_sessions(), self.embedding
        assert tensor is not None  # noqa: S101 - its sessions exist
        names = [self.contract.probabilities_name, *([self.contract.logits_name] if with_logits else [])]
        *outputs, embeddings = self._run_session(
            sessions, self.tensors[0], batch, [*names, tensor.tensor], exclusive
        )
        rows = np.ascontiguousarray(embeddings, np.float32).reshape(len(batch), -1)
        if rows.shape[1] != tensor.dimension:
            raise ModelError(f"the embedding has {rows.shape[1]} values, not {tensor.dimension}")
        return outputs, rows

    def prepare_embedding(self) -> None:
        """Create the sessions for `run_with_embedding` if they are missing. Raises `ModelError` like it."""
        self._get_embedding_sessions()

    def _get_embedding_sessions(self) -> _Sessions:
        """Return the sessions that also return the embedding; create and check them on first use."""
        if self.embedding is None:
            raise ModelError("the model has no embedding")
        tensor = self.embedding.tensor

        def create(model: bytes) -> _Sessions:
            sessions = self._open_sessions(add_outputs(model, [tensor]))
            pixels = decode_golden_pixels(self.contract.golden.images[0])[None]
            for exclusive in self._exclusive_modes():
                logits = self._run_session(
                    sessions, self.tensors[0], pixels, [self.contract.logits_name], exclusive
                )[0]
                self._check_logits(self.contract.golden.images[0], logits)
            return sessions

        return self._get_further_sessions("the embedding", create)

    def _get_further_sessions(self, purpose: str, create: Callable[[bytes], _Sessions]) -> _Sessions:
        """Return the sessions for a purpose; create them on first use, from the bytes of the model.

        The sessions are stored only after their check. Two threads that call at once may both create
        sessions: the second pair replaces the first, which is slow but harmless. After a failure, another
        attempt is made in `_RETRY_SECONDS` at the earliest, because it takes as long as loading the model.
        """
        if purpose not in self._further_sessions:
            failure, retry_at = self._failures.get(purpose, (None, 0.0))
            if failure and time.monotonic() < retry_at:
                raise failure.with_traceback(None)
            try:
                model = self._read_model()
                check_container_memory(len(model) * (2 if self._wide_threads else 1))
                self._further_sessions[purpose] = create(model)
            except ModelError as error:
                self._failures[purpose] = error, time.monotonic() + _RETRY_SECONDS
                raise
        return self._further_sessions[purpose]

    def _read_model(self) -> bytes:
        """Return the bytes of the model. Raises `ModelError`."""
        try:
            return self._read_bytes()
        except OSError as error:
            raise Interrupted(f"cannot read the model once more: {error.strerror}") from None

    def _open_sessions(self, model: bytes) -> _Sessions:
        return _Sessions(self._open_session(model, threads=self._threads), self._open_multi_threaded(model))

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
        session, pinned_batches = sessions.exclusive if exclusive else sessions.shared, self._pinned_batches
        if not pinned_batches and (options := sessions.arena_shrinker.get_run_options(count)):
            # Exclusive calls are single images: only the arena of `shared` holds memory of large batches.
            session = sessions.shared
        try:
            outputs: list[Floats] = (
                # On a GPU all sizes are warmed up, and their memory is kept.
                run_bound(session, names, tensor.name, pinned_batches.pad_batch(batch))
                if pinned_batches
                else session.run(names, {tensor.name: batch}, options)
            )
        except Exception as error:  # ONNX Runtime raises a dozen classes without a common base
            raise ModelError(f"the graph does not run: {to_one_line(error)}") from error
        return [output[:count] for output in outputs]

    def prepare_tensor(self, tensor: InputTensor) -> None:
        """Create the sessions for a tensor if they are missing. Raises `ModelError` like `run_tensor`."""
        self._get_sessions(tensor)

    def _get_sessions(self, tensor: InputTensor) -> _Sessions:
        """Return the sessions for a tensor; create and check them on first use."""
        if not tensor.preprocessing:
            return self._pixel_sessions

        def create(model: bytes) -> _Sessions:
            sessions = self._open_sessions(replace_input(model, tensor))
            self._check_raw_input(
                tensor, sessions, open_session(extract_preprocessing(model, tensor), "cpu", 1)
            )
            return sessions

        return self._get_further_sessions(f"the input {tensor.name!r}", create)

    def _open_multi_threaded(self, model: bytes | Path, weights: SharedWeights | None = None) -> Any:
        """Return a session with more threads, or None if exclusive calls get no extra threads."""
        if not self._wide_threads:
            return None
        return self._open_session(model, threads=self._wide_threads, weights=weights)

    def warm_up(self, batch_max: int) -> None:
        """Run every batch size that may occur, so that no caller waits for allocation or tuning."""
        geometry = self.contract.input
        for size in _warm_up_sizes(
            min(batch_max, self.batch_limit or batch_max), gpu=self._pinned_batches is not None
        ):
            pixels = np.zeros((size, geometry.height, geometry.width, 3), np.uint8)
            for exclusive in self._exclusive_modes() if size == 1 else (False,):
                self.run(pixels, exclusive=exclusive)

    @property
    def has_exclusive_session(self) -> bool:
        """True if exclusive calls run in a session of their own, with more threads."""
        return bool(self._wide_threads)

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
                f"{_explain_quantization(self.contract)}"
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
        tolerances = self.contract.golden.logit_tolerance
        for name in (self.provider, PROVIDERS[self.provider].arithmetic):
            if (key := f"{name}/float32") in tolerances:
                return tolerances[key]
        raise GoldenError(f"the golden set states no tolerance for {key}")


def _explain_quantization(contract: Contract) -> str:
    """Return why a quantized model may compute other logits on this host, and what to do; else nothing."""
    quantization = contract.quantization
    if quantization is None:
        return ""
    return (
        f". The {quantization.precision} arithmetic of this processor differs from that of "
        f"{quantization.processor}, where the model was quantized: run `fovea quantize` on this host, or "
        f"with --reduced-range for hosts of several kinds, or serve version {quantization.source_version}"
    )


def decode_golden_pixels(golden: GoldenImage) -> Pixels:
    """Return the recorded pixels, uint8 (height, width, 3). Raises `GoldenError` when they are damaged."""
    try:
        with Image.open(BytesIO(base64.b64decode(golden.pixels)), formats=["PNG"]) as image:
            return np.array(image.convert("RGB"))
    except (ValueError, OSError, SyntaxError) as error:
        raise GoldenError(f"golden image {golden.name!r} has damaged pixels: {error}") from None


def _warm_up_sizes(batch_max: int, *, gpu: bool) -> list[int]:
    """Return the batch sizes to warm up.

    A CPU needs no tuning. On a GPU these are the powers of two, to which all other sizes are padded. The
    largest and the smallest come first: TensorRT compiles again when a size is outside the range so far.
    """
    if not gpu:
        return [1, batch_max]
    largest, *others = sorted({pad_size(size) for size in range(1, batch_max + 1)}, reverse=True)
    return [largest, *reversed(others)]


class _Sessions:
    """The sessions for one input tensor: one for all calls, and perhaps one for exclusive calls.

    The session for exclusive calls has more threads.
    """

    def __init__(self, shared: Any, exclusive: Any) -> None:
        self.shared = shared
        self.exclusive = exclusive or shared
        self.arena_shrinker = ArenaShrinker()


def _read_whole(model: bytes | Path) -> bytes:
    return model.read_bytes() if isinstance(model, Path) else model


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
