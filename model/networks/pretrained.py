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

from fovea.model.networks.checkpoint import KEY, WEIGHTS
from fovea.model.networks.network import Net, NetConfig
from fovea.service.artifact.contract import Task
from fovea.service.errors import FoveaError, to_one_line

HUB: Final = "hf:"
"""Prefix of a source on the hub."""

ARCHITECTURES: Final = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "mobilenetv2_100": "mobilenet_v2",
}
"""Fovea's network names by timm's architecture names."""

_FILE: Final = "model.safetensors"
_CONFIG: Final = "config.json"
_HEADS: Final = ("fc.", "classifier.")
"""Prefixes of the last linear layer in published weights."""

Triple = tuple[float, float, float]


class PretrainedError(FoveaError):
    """Initial weights are not available or belong to another network."""


@dataclass(frozen=True)
class Pretrained:
    """Weights under Fovea's parameter names, with the known properties of their network."""

    source: str
    tensors: dict[str, Tensor]
    net: str | None
    """Fovea's name of the network; None if the source does not state one."""
    mean: Triple | None = None
    """Mean of the original training pixels per channel, on a scale of 0 to 1; None if unknown."""
    std: Triple | None = None
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
        wanted, given = (
            _learned(tensors, ("features.", "head.") if same_head else ("features.",))
            for tensors in (net.state_dict(), self.tensors)
        )
        wrong = [_wrong(key, wanted.get(key), given.get(key)) for key in {**wanted, **given}]
        if found := [one for one in wrong if one]:
            what = (
                self.source if self.net in (None, net.config.name) else f"{self.source} is of {self.net} and"
            )
            more = f", and {len(found) - 3} more" if len(found) > 3 else ""
            raise PretrainedError(
                f"{what} does not fit {net.config.name} at {net.config.size} px: {'; '.join(found[:3])}{more}"
            )
        net.load_state_dict(given, strict=False)


def _learned(tensors: dict[str, Tensor], parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the named parts without batch counters, because some files lack those."""
    return {
        key: tensor
        for key, tensor in tensors.items()
        if key.startswith(parts) and not key.endswith(".num_batches_tracked")
    }


def _wrong(key: str, wanted: Tensor | None, given: Tensor | None) -> str | None:
    if wanted is None:
        return f"{key} has no place in it"
    if given is None:
        return f"{key} is missing"
    if given.shape != wanted.shape:
        return f"{key} is {tuple(given.shape)}, not {tuple(wanted.shape)}"
    return None if given.float().isfinite().all() else f"{key} is not finite"


def read(source: str) -> Pretrained:
    """Read `hf:owner/repository[@revision]`, a .safetensors file, or a folder.

    Raises `PretrainedError`.
    """
    if source.startswith(HUB):
        # the configuration first: it can rule the network out before megabytes are downloaded
        config = _config(source, _download(source, _CONFIG))
        tensors, _ = _tensors(source, _download(source, _FILE))
        return _published(source, tensors, config)
    file = _file(source)
    tensors, about = _tensors(source, file)
    if about is not None:
        return _ours(source, tensors, about)
    beside = file.with_name(_CONFIG)
    return _published(source, tensors, _config(source, beside) if beside.is_file() else _Config())


def _file(source: str) -> Path:
    path = Path(source)
    try:
        for file in (path / WEIGHTS, path / _FILE, path):
            if file.is_file():
                return file
    except OSError as error:
        raise PretrainedError(f"cannot read {source}: {error.strerror}") from None
    raise PretrainedError(
        f"{source} has no {WEIGHTS} or {_FILE}, nor is it a file; hf:owner/repository is on the hub"
    )


def _tensors(source: str, file: Path) -> tuple[dict[str, Tensor], Any]:
    """Return all tensors of a file and its metadata; the metadata is None in a file from elsewhere."""
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {}).get(KEY, "null"))
            return {key: opened.get_tensor(key) for key in opened.keys()}, about  # noqa: SIM118 - no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise PretrainedError(f"{source} is not a safetensors file, or a damaged one: {error}") from None


def _ours(source: str, tensors: dict[str, Tensor], about: Any) -> Pretrained:
    try:
        net, labels = NetConfig.from_dict(about["net"]), tuple(about["labels"])
        mean, std = _mean(net.mean), _std(net.std)
    except (KeyError, TypeError, ValueError, AttributeError, FoveaError) as error:
        raise PretrainedError(f"{source}: what it says of itself cannot be used: {error!r}") from None
    return Pretrained(source, tensors, net.name, mean, std, labels, net.task)


# --- published weights ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Config:
    """The known properties of published weights."""

    net: str | None = None
    mean: Triple | None = None
    std: Triple | None = None


def _published(source: str, tensors: dict[str, Tensor], config: _Config) -> Pretrained:
    named = {_our_name(key): tensor for key, tensor in tensors.items()}
    return Pretrained(source, named, config.net, config.mean, config.std)


def _our_name(key: str) -> str:
    for head in _HEADS:
        if key.startswith(head):
            return f"head.{key.rpartition('.')[2]}"
    return f"features.{key}"


def _config(source: str, path: Path) -> _Config:
    """Read timm's `config.json`; in old files the normalisation stands at the top level."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        architecture, pixels = str(said["architecture"]), said.get("pretrained_cfg", said)
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise PretrainedError(f"{source} is of {architecture!r}; there are {known}")
        return _Config(ARCHITECTURES[architecture], _mean(pixels["mean"]), _std(pixels["std"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PretrainedError(f"{source}: its {_CONFIG} cannot be used: {error!r}") from None


def _mean(values: Any) -> Triple:
    first, second, third = (float(value) for value in values)
    if not all(map(math.isfinite, (first, second, third))):
        raise ValueError(f"{values} is not finite")
    return first, second, third


def _std(values: Any) -> Triple:
    deviations = _mean(values)
    if min(deviations) <= 0:
        raise ValueError(f"no pixels deviate by {values}")
    return deviations


def _download(source: str, name: str) -> Path:
    """Return the local path of a file from the hub, downloaded or cached."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise PretrainedError(f"{source} needs a package: pip install huggingface_hub") from None
    repository, _, revision = source.removeprefix(HUB).partition("@")
    try:
        return Path(hf_hub_download(repository, name, revision=revision or None))
    except Exception as error:  # from three libraries without a common base class
        raise PretrainedError(f"cannot get {name} of {source}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return the reason in one sentence; the library's messages start with a status code and are long."""
    from huggingface_hub import errors

    reasons = (  # order matters: some are subclasses of others
        (errors.GatedRepoError, "it is gated; accept its terms there, then `hf auth login`"),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private"),
        (errors.RevisionNotFoundError, "there is no such revision"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached, and it is not in the cache"),
        (errors.EntryNotFoundError, "there is no such file in the repository"),
    )
    return next((reason for kind, reason in reasons if isinstance(error, kind)), to_one_line(error))
