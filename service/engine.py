"""One ONNX Runtime session: pixels in, probabilities out, on the provider that was asked for."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from service.contract import GOLDEN_PIXELS, Contract, GoldenImage
from service.errors import ContractError, ModelError, RequestError, one_line
from service.images import Pixels, decode

Floats: TypeAlias = npt.NDArray[np.float32]
ProviderSetting: TypeAlias = Literal["auto", "cpu", "cuda"]

_CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"
_SILENT: Final = 4
"""ONNX Runtime's log severity FATAL: what goes wrong is raised, and written once, by us."""


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

    Both raise `ModelError` when the graph does not run.
    """

    def __init__(self, model: bytes, *, provider: ProviderSetting, threads: int) -> None:
        """Load a model file's bytes with `threads` CPU threads per call.

        Raises `ModelError` when ONNX Runtime cannot load it or the provider is not to be had, and
        `ContractError` when the contract is missing or does not fit the graph.
        """
        self._session = _session(model, provider, threads)
        self.contract = Contract.from_metadata(self._session.get_modelmeta().custom_metadata_map)
        self.provider: Literal["cpu", "cuda"] = _actual_provider(self._session)
        _check_graph(self._session, self.contract)

    @classmethod
    def load(cls, path: Path, *, provider: ProviderSetting, threads: int) -> Engine:
        """Load a model file. Raises `ModelError` that names it."""
        try:
            return cls(path.read_bytes(), provider=provider, threads=threads)
        except OSError as error:
            raise ModelError(f"cannot read the model {path}: {error.strerror}") from None
        except ModelError as error:
            raise type(error)(f"{path}: {error}") from None

    def run(self, batch: Pixels) -> Floats:
        """Probabilities, float32 (n, labels), for a batch of pixels, uint8 (n, height, width, 3)."""
        return self._outputs(batch, self.contract.probabilities_name)

    def logits(self, batch: Pixels) -> Floats:
        """Logits, float32 (n, `contract.logit_count`), for the same."""
        return self._outputs(batch, self.contract.logits_name)

    def _outputs(self, batch: Pixels, name: str) -> Floats:
        try:
            output: Floats = self._session.run([name], {self.contract.input_name: batch})[0]
        except Exception as error:  # ONNX Runtime raises a dozen classes without a common root
            raise ModelError(f"the graph does not run: {one_line(error)}") from error
        return output

    def warm_up(self, sizes: tuple[int, ...]) -> None:
        """Run each batch size once, so that no caller pays for first-time allocation or tuning."""
        geometry = self.contract.input
        for size in sizes:
            self.run(np.zeros((size, geometry.height, geometry.width, 3), np.uint8))

    def prove(self) -> Proof:
        """Check decoder, resize and graph of this host against the contract's golden set.

        The graph is run on the recorded pixels, so that a difference of decoders and one of
        arithmetic are told apart. Raises `ModelError` beyond a tolerance.
        """
        tolerance = self._logit_tolerance()
        pixel_worst = logit_worst = 0.0
        for golden in self.contract.golden.images:
            expected = golden_pixels(golden)
            pixel_worst = max(pixel_worst, self._prove_pixels(golden, expected))
            difference = np.abs(self.logits(expected[None])[0] - np.array(golden.logits, np.float32))
            # `not <=` rather than `>`: a NaN is a failure too
            if not (worst := float(difference.max())) <= tolerance:
                raise ModelError(
                    f"golden image {golden.name!r}: a logit is off by {worst:g}; at most {tolerance:g}"
                )
            logit_worst = max(logit_worst, worst)
        return Proof(len(self.contract.golden.images), pixel_worst, logit_worst)

    def _prove_pixels(self, golden: GoldenImage, expected: Pixels) -> float:
        try:
            image = base64.b64decode(golden.image)
            pixels = decode(image, self.contract.input, max_pixels=GOLDEN_PIXELS).pixels
        except (ValueError, RequestError) as error:
            raise ModelError(f"golden image {golden.name!r} cannot be decoded: {error}") from None
        if pixels.shape != expected.shape:
            raise ModelError(f"golden image {golden.name!r} becomes {pixels.shape}, not {expected.shape}")
        difference = float(np.abs(pixels.astype(np.int16) - expected).mean())
        if difference > golden.pixel_tolerance:
            raise ModelError(
                f"golden image {golden.name!r}: pixels are off by {difference:g} of 255 on average; "
                f"at most {golden.pixel_tolerance:g}"
            )
        return difference

    def _logit_tolerance(self) -> float:
        key = f"{self.provider}/float32"
        try:
            return self.contract.golden.logit_tolerance[key]
        except KeyError:
            raise ModelError(f"the golden set states no tolerance for {key}") from None


def golden_pixels(golden: GoldenImage) -> Pixels:
    """The recorded pixels, uint8 (height, width, 3). Raises `ModelError` when they are damaged."""
    try:
        with Image.open(BytesIO(base64.b64decode(golden.pixels)), formats=["PNG"]) as image:
            return np.array(image.convert("RGB"))
    except (ValueError, OSError, SyntaxError) as error:
        raise ModelError(f"golden image {golden.name!r} has damaged pixels: {error}") from None


# --- the session ---------------------------------------------------------------------------------


def _session(model: bytes, provider: ProviderSetting, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = _SILENT
    providers = _wanted(provider)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime raises a dozen classes without a common root
        raise ModelError(f"ONNX Runtime cannot load the model: {one_line(error)}") from None
    if provider == "cuda" and _actual_provider(session) != "cuda":
        raise ModelError("FOVEA_PROVIDER is cuda, but ONNX Runtime fell back to the CPU")
    return session


def _wanted(provider: ProviderSetting) -> list[str]:
    """Providers to ask for. Raises `ModelError` when CUDA is a must and this build has none."""
    has_cuda = _CUDA in onnxruntime.get_available_providers()
    if provider == "cuda" and not has_cuda:
        raise ModelError("FOVEA_PROVIDER is cuda, but this ONNX Runtime has no CUDA; install fovea[cuda]")
    return [_CUDA, _CPU] if has_cuda and provider != "cpu" else [_CPU]


def _actual_provider(session: Any) -> Literal["cpu", "cuda"]:
    return "cuda" if _CUDA in session.get_providers() else "cpu"


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
