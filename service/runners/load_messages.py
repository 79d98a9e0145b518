"""Messages about loading models, between the service and its runner processes.

    service → runner    Setup, once, before any other message
    runner → service    SetupReply, or Failure: the models are loaded, or the reason why not
    service → runner    LoadCommand: one more model, to be loaded while batches run
    runner → service    LoadReply: the model is loaded, or the reason why not; between any two reports
    service → runner    UnloadCommand: a model that will get no more batches

`service.runners.batch_messages` holds the messages about batches, and `service.runners.frames` the encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, NamedTuple

from fovea.service.errors import GoldenError, ModelError
from fovea.service.runners.frames import Frame, encode_frame

MAX_EXPLAINER_MODELS: Final = 2
"""Number of models that an explaining process holds at the same time, each in its own session."""


@dataclass(frozen=True)
class ProcessPlan:
    """Settings for running models in a process."""

    provider: Literal["auto", "cpu", "cuda"]
    batch_max: int
    """Largest number of images in one model call; 0 for the provider's default."""
    threads: int
    """Number of CPU threads inside one model call."""
    wide_threads: int
    """Number of CPU threads inside an exclusive model call; 0 if it gets no extra threads."""
    decode_threads: int
    """Number of images of one batch that are decoded at the same time."""
    image_pixels: int
    """Pixel limit of one image."""
    decode_bytes: int
    """Memory limit for images being decoded, in bytes, for all processes together."""
    processes: int
    """Number of runner processes."""

    @property
    def max_threads(self) -> int:
        """Largest number of CPU threads inside a model call."""
        return max(self.threads, self.wide_threads)


@dataclass(frozen=True)
class LoadCommand:
    """Request to load a model, with its settings."""

    model_id: int
    """Id of the model in batches."""
    path: str
    """Path of the model, for messages."""
    file: str
    """Path from which the model is read."""
    fingerprint: Sequence[int]
    """Fingerprint of `file` (`service.artifact.model_file.fingerprint_of`)."""
    plan: ProcessPlan

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        return encode_frame({"load": asdict(self)})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoadCommand:
        """Restore the result of `asdict`."""
        return cls(**{**values, "plan": ProcessPlan(**values["plan"])})


class UnloadCommand(NamedTuple):
    """Request to unload the model with this id, which gets no more batches. There is no reply."""

    model_id: int

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        return encode_frame({"unload": self.model_id})


@dataclass(frozen=True)
class Setup:
    """First message to a runner: the models to load at its start, and the `plan` of the process."""

    plan: ProcessPlan
    models: Sequence[LoadCommand]

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        return encode_frame(asdict(self))

    @classmethod
    def from_frame(cls, frame: Frame) -> Setup:
        """Decode a received message."""
        values, _ = frame
        return cls(
            ProcessPlan(**values["plan"]), [LoadCommand.from_dict(model) for model in values["models"]]
        )


@dataclass(frozen=True)
class LoadedModel:
    """A model that a process has loaded, warmed up and checked."""

    contract_json: str
    """Contract as JSON."""
    provider: Literal["cpu", "cuda"]
    batch_max: int
    batch_bytes: float
    """Limit of the encoded bytes in one batch of several images."""
    load_seconds: float
    """Time to load, warm up and check the model, in seconds."""
    golden_differences: dict[str, float]
    """Differences of this host from the golden set."""


@dataclass(frozen=True)
class SetupReply:
    """Reply to `Setup`: the loaded models in the order of the setup, and the capabilities of the process."""

    models: Sequence[LoadedModel]
    onnxruntime_version: str
    """Version of ONNX Runtime."""
    providers: Sequence[str]
    """Available execution providers."""
    formats: Sequence[str]
    """Image formats that the process can decode."""

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        return encode_frame(asdict(self))

    @classmethod
    def from_frame(cls, frame: Frame) -> SetupReply | Failure:
        """Decode a received message, which may be a `Failure`."""
        values, _ = frame
        if failure := Failure.from_dict(values):
            return failure
        return cls(**{**values, "models": [LoadedModel(**model) for model in values["models"]]})


class LoadReply(NamedTuple):
    """Reply to a `LoadCommand`."""

    model_id: int
    outcome: LoadedModel | Failure

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        outcome = self.outcome.to_dict() if isinstance(self.outcome, Failure) else asdict(self.outcome)
        return encode_frame({"model_id": self.model_id, **outcome})

    @classmethod
    def from_frame(cls, frame: Frame) -> LoadReply | None:
        """Decode a received message; return None if it is another kind of message."""
        values, _ = frame
        if "model_id" not in values:
            return None
        model_id = values.pop("model_id")
        return cls(model_id, Failure.from_dict(values) or LoadedModel(**values))


@dataclass(frozen=True)
class Failure:
    """Reply to a setup, load or batch that failed.

    A failed setup or load means that the model cannot be served. A failed batch is a bug in Fovea.
    """

    reason: str
    is_golden_error: bool = False
    """True if the golden set was not reproduced."""
    trace: str = ""
    """Traceback of a bug in Fovea."""
    batch_number: int = 0
    """Sequence number of the failed batch; 0 if a setup or a load failed."""

    def to_exception(self) -> ModelError:
        """Return the failure as an exception."""
        return (GoldenError if self.is_golden_error else ModelError)(self.reason)

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        return encode_frame(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the values as types that JSON supports."""
        return {
            "failure": self.reason,
            "golden": self.is_golden_error,
            "trace": self.trace,
            "number": self.batch_number,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Failure | None:
        """Return the failure in a frame's object, or None if it holds none."""
        if "failure" not in values:
            return None
        return cls(values["failure"], values["golden"], values["trace"], values.get("number", 0))
