"""Messages about loading models, between the service and its runner processes.

    service → runner    Setup, once, before any other message
    runner → service    SetupReply, or Failure: the models are loaded, or the reason why not
    service → runner    LoadRequest: one more model, to be loaded while batches run
    runner → service    LoadReply, or Failure: the model is loaded, or the reason why not; between any two
                        reports
    service → runner    UnloadCommand: a model that will get no more batches; there is no reply

`service.runners.batch_messages` holds the messages about batches, whose numbers are of the same sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fovea.service.artifact.model_file import MemoryFile
from fovea.service.providers import PROVIDERS, ProviderName, ProviderSetting
from fovea.service.runners.messages import Message, NumberedMessage

MAX_EXPLAINER_MODELS: Final = 2
"""Number of models that an explaining process holds at the same time, each in its own session."""


@dataclass(frozen=True)
class ProcessPlan:
    """Settings for running models in a process."""

    provider: ProviderSetting
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
    engine_cache: str = ""
    """Folder for compiled engines; empty if there is none, or the provider compiles nothing."""

    @property
    def explaining_provider(self) -> ProviderSetting:
        """Provider of explanations."""
        return self.provider if self.provider == "auto" else PROVIDERS[self.provider].explaining_provider

    @property
    def max_threads(self) -> int:
        """Largest number of CPU threads inside a model call."""
        return max(self.threads, self.wide_threads)


@dataclass(frozen=True)
class LoadCommand:
    """A model to load, with its settings; a part of messages."""

    model_id: int
    """Id of the model in batches."""
    path: str
    """Path of the model, for messages."""
    file: str
    """Path from which the model is read."""
    fingerprint: Sequence[int]
    """Fingerprint of `file` (`service.artifact.model_file.fingerprint_of`)."""
    plan: ProcessPlan
    weights_file: MemoryFile | None = None
    """Memory file through which processes share the weights (`inference.shared_weights`)."""


@dataclass(frozen=True)
class LoadRequest(NumberedMessage):
    """Request to load a model."""

    load: LoadCommand


@dataclass(frozen=True)
class UnloadCommand(Message):
    """Request to unload the model with this id, which gets no more batches."""

    model_id: int


@dataclass(frozen=True)
class Setup(NumberedMessage):
    """First message to a runner: the models to load at its start, and the `plan` of the process."""

    plan: ProcessPlan
    models: Sequence[LoadCommand]


@dataclass(frozen=True)
class LoadedModel:
    """A model that a process has loaded, warmed up and checked; a part of messages."""

    contract_json: str
    """Contract as JSON."""
    provider: ProviderName
    batch_max: int
    batch_bytes: float
    """Limit of the encoded bytes in one batch of several images."""
    load_seconds: float
    """Time to load, warm up and check the model, in seconds."""
    golden_differences: Mapping[str, float]
    """Differences of this host from the golden set."""


@dataclass(frozen=True)
class SetupReply(NumberedMessage):
    """Reply to `Setup`: the loaded models in the order of the setup, and the capabilities of the process."""

    models: Sequence[LoadedModel]
    onnxruntime_version: str
    """Version of ONNX Runtime."""
    providers: Sequence[str]
    """Available execution providers."""
    formats: Sequence[str]
    """Image formats that the process can decode."""


@dataclass(frozen=True)
class LoadReply(NumberedMessage):
    """Reply to a `LoadRequest`."""

    model: LoadedModel
