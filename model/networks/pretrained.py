"""Initial weights from the Hugging Face hub, a file or a Fovea run.

Published weights are timm's: safetensors with torchvision's parameter names, and a `config.json` with the
architecture and the input normalisation. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fovea.model.networks.checkpoint import METADATA_KEY, WEIGHTS_FILE, explain_missing_weights
from fovea.model.networks.network import Net, NetConfig
from fovea.service.artifact.contract import Task
from fovea.service.errors import FoveaError, to_one_line

HUB_PREFIX: Final = "hf:"
"""Prefix of a source on the hub."""

ARCHITECTURES: Final = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "mobilenetv2_100": "mobilenet_v2",
}
"""Fovea's network names by timm's architecture names."""

_WEIGHTS_FILE: Final = "model.safetensors"
_CONFIG_FILE: Final = "config.json"
_HEAD_PREFIXES: Final = ("fc.", "classifier.")
"""Prefixes of the last linear layer in published weights."""

ChannelValues = tuple[float, float, float]


class PretrainedError(FoveaError):
    """Initial weights are not available or belong to another network."""


@dataclass(frozen=True)
class PretrainedWeights:
    """Weights under Fovea's parameter names, with the known properties of their network."""

    source: str
    tensors: dict[str, Tensor]
    net: str | None
    """Fovea's name of the network; None if the source does not state one."""
    mean: ChannelValues | None = None
    """Mean of the original training pixels per channel, on a scale of 0 to 1; None if unknown."""
    std: ChannelValues | None = None
    """Standard deviation of these pixels per channel, on a scale of 0 to 1; None if unknown."""
    labels: tuple[str, ...] | None = None
    """Labels of the head; None if unknown."""
    task: Task | None = None
    """Task of the head; None if unknown."""

    def load_into(self, net: Net, labels: tuple[str, ...]) -> None:
        """Load these weights into `net`, with the head if task and labels are the same.

        Raises `PretrainedError` that names missing, unexpected, misshapen or non-finite tensors. `net` is
        then unchanged.
        """
        same_head = (self.task, self.labels) == (net.config.task, labels)
        target_tensors, source_tensors = (
            _select_tensors(tensors, ("features.", "head.") if same_head else ("features.",))
            for tensors in (net.state_dict(), self.tensors)
        )
        results = [
            _find_mismatch(key, target_tensors.get(key), source_tensors.get(key))
            for key in {**target_tensors, **source_tensors}
        ]
        if problems := [one for one in results if one]:
            subject = (
                self.source
                if self.net in (None, net.config.name)
                else f"{self.source} has weights of {self.net} and"
            )
            more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise PretrainedError(
                f"{subject} does not fit {net.config.name} at {net.config.size} px: "
                f"{'; '.join(problems[:3])}{more}"
            )
        net.load_state_dict(source_tensors, strict=False)


def _select_tensors(tensors: dict[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the named parts without batch counters, because some files lack those."""
    return {
        key: tensor
        for key, tensor in tensors.items()
        if key.startswith(prefixes) and not key.endswith(".num_batches_tracked")
    }


def _find_mismatch(key: str, target_tensor: Tensor | None, source_tensor: Tensor | None) -> str | None:
    if target_tensor is None:
        return f"{key} is not a tensor of this network"
    if source_tensor is None:
        return f"{key} is missing"
    if source_tensor.shape != target_tensor.shape:
        return f"{key} is {tuple(source_tensor.shape)}, not {tuple(target_tensor.shape)}"
    return None if source_tensor.float().isfinite().all() else f"{key} is not finite"


def read_pretrained(source: str) -> PretrainedWeights:
    """Read `hf:owner/repository[@revision]`, a .safetensors file, or a folder.

    Raises `PretrainedError`.
    """
    if source.startswith(HUB_PREFIX):
        # the configuration first: it can rule the network out before megabytes are downloaded
        config = _read_config(source, _download_file(source, _CONFIG_FILE))
        tensors, _ = _read_tensors(source, _download_file(source, _WEIGHTS_FILE))
        return _from_published(source, tensors, config)
    file = _find_file(source)
    tensors, metadata = _read_tensors(source, file)
    if metadata is not None:
        return _from_checkpoint(source, tensors, metadata)
    config_path = file.with_name(_CONFIG_FILE)
    return _from_published(
        source, tensors, _read_config(source, config_path) if config_path.is_file() else _PublishedConfig()
    )


def _find_file(source: str) -> Path:
    path = Path(source)
    try:
        for file in (path / WEIGHTS_FILE, path / _WEIGHTS_FILE, path):
            if file.is_file():
                return file
    except OSError as error:
        raise PretrainedError(f"cannot read {source}: {error.strerror}") from None
    if reason := explain_missing_weights(path):
        raise PretrainedError(f"{source} has no {WEIGHTS_FILE}: {reason}")
    raise PretrainedError(
        f"{source} is neither a file nor a folder with {WEIGHTS_FILE} or {_WEIGHTS_FILE}; for weights on the "
        "hub, write hf:owner/repository"
    )


def _read_tensors(source: str, file: Path) -> tuple[dict[str, Tensor], Any]:
    """Return all tensors of a file and its metadata; the metadata is None in a file from elsewhere."""
    try:
        with safe_open(file, framework="pt") as reader:
            metadata = json.loads((reader.metadata() or {}).get(METADATA_KEY, "null"))
            return {key: reader.get_tensor(key) for key in reader.keys()}, metadata  # noqa: SIM118 - no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise PretrainedError(f"{source} is damaged or is not a safetensors file: {error}") from None


def _from_checkpoint(source: str, tensors: dict[str, Tensor], metadata: Any) -> PretrainedWeights:
    try:
        net, labels = NetConfig.from_dict(metadata["net"]), tuple(metadata["labels"])
        mean, std = _parse_mean(net.mean), _parse_std(net.std)
    except (KeyError, TypeError, ValueError, AttributeError, FoveaError) as error:
        raise PretrainedError(f"{source}: its metadata cannot be used: {error!r}") from None
    return PretrainedWeights(source, tensors, net.name, mean, std, labels, net.task)


# --- published weights ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _PublishedConfig:
    """The known properties of published weights."""

    net: str | None = None
    mean: ChannelValues | None = None
    std: ChannelValues | None = None


def _from_published(source: str, tensors: dict[str, Tensor], config: _PublishedConfig) -> PretrainedWeights:
    renamed_tensors = {_rename_tensor(key): tensor for key, tensor in tensors.items()}
    return PretrainedWeights(source, renamed_tensors, config.net, config.mean, config.std)


def _rename_tensor(key: str) -> str:
    for head in _HEAD_PREFIXES:
        if key.startswith(head):
            return f"head.{key.rpartition('.')[2]}"
    return f"features.{key}"


def _read_config(source: str, path: Path) -> _PublishedConfig:
    """Read timm's `config.json`; in old files the normalisation stands at the top level."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        architecture, input_config = str(values["architecture"]), values.get("pretrained_cfg", values)
        if architecture not in ARCHITECTURES:
            known_names = ", ".join(ARCHITECTURES)
            raise PretrainedError(f"{source} has weights of {architecture!r}; supported are {known_names}")
        return _PublishedConfig(
            ARCHITECTURES[architecture], _parse_mean(input_config["mean"]), _parse_std(input_config["std"])
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PretrainedError(f"{source}: its {_CONFIG_FILE} cannot be used: {error!r}") from None


def _parse_mean(values: Any) -> ChannelValues:
    first, second, third = (float(value) for value in values)
    if not all(map(math.isfinite, (first, second, third))):
        raise ValueError(f"{values} is not finite")
    return first, second, third


def _parse_std(values: Any) -> ChannelValues:
    deviations = _parse_mean(values)
    if min(deviations) <= 0:
        raise ValueError(f"the standard deviation {values} is not positive")
    return deviations


def _download_file(source: str, name: str) -> Path:
    """Return the local path of a file from the hub, downloaded or cached."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise PretrainedError(f"{source} needs a package: pip install huggingface_hub") from None
    repository, _, revision = source.removeprefix(HUB_PREFIX).partition("@")
    try:
        return Path(hf_hub_download(repository, name, revision=revision or None))
    except Exception as error:  # from three libraries without a common base class
        raise PretrainedError(f"cannot download {name} of {source}: {_describe_error(error)}") from None


def _describe_error(error: Exception) -> str:
    """Return the reason in one sentence; the library's messages start with a status code and are long."""
    from huggingface_hub import errors

    reasons = (  # order matters: some are subclasses of others
        (
            errors.GatedRepoError,
            "the repository is gated; accept its terms on the hub, then run `hf auth login`",
        ),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private"),
        (errors.RevisionNotFoundError, "there is no such revision"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached, and the file is not in the local cache"),
        (errors.EntryNotFoundError, "there is no such file in the repository"),
    )
    return next((reason for kind, reason in reasons if isinstance(error, kind)), to_one_line(error))
