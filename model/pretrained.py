"""Weights to start from: published ones, a file, or a run of our own.

Published are timm's on the Hugging Face hub: safetensors with torchvision's names, and a `config.json` that
says which network they are of and how its input was normalised. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoint import KEY, WEIGHTS
from model.net import Net
from service.errors import FoveaError

HUB: Final = "hf:"
"""What a source on the hub begins with."""

ARCHITECTURES: Final = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "mobilenetv2_100": "mobilenet_v2",
}
"""timm's names of our networks."""

_FILE: Final = "model.safetensors"
_CONFIG: Final = "config.json"
_HEADS: Final = ("fc.", "classifier.")
"""What the last linear layer is called elsewhere."""

Triple = tuple[float, float, float]


class PretrainedError(FoveaError):
    """Weights to start from cannot be had, or are of another network."""


@dataclass(frozen=True)
class Pretrained:
    """Weights by our names, and what is known of their network."""

    source: str
    tensors: dict[str, Tensor]
    net: str | None
    """Its name among ours; None where nothing says so."""
    mean: Triple | None = None
    std: Triple | None = None
    """Of the pixels that it was trained on, per channel, of 1."""
    labels: tuple[str, ...] | None = None
    """Of the head, where it is known."""

    def load_into(self, net: Net, labels: tuple[str, ...]) -> None:
        """Give `net` these weights; the head too, if it is for the same labels.

        Raises `PretrainedError` that names what is missing or of another shape.
        """
        wanted = {key: tensor for key, tensor in net.state_dict().items() if key.startswith("features.")}
        if self.labels == labels:
            wanted |= {key: tensor for key, tensor in net.state_dict().items() if key.startswith("head.")}
        wanted = {key: tensor for key, tensor in wanted.items() if not key.endswith(".num_batches_tracked")}
        wrong = [_wrong(key, tensor, self.tensors.get(key)) for key, tensor in wanted.items()]
        if found := [one for one in wrong if one]:
            more = f", and {len(found) - 3} more" if len(found) > 3 else ""
            raise PretrainedError(
                f"{self.source} does not fit {net.config.name} at {net.config.size} px: "
                f"{'; '.join(found[:3])}{more}"
            )
        net.load_state_dict({key: self.tensors[key] for key in wanted}, strict=False)


def _wrong(key: str, wanted: Tensor, given: Tensor | None) -> str | None:
    if given is None:
        return f"{key} is missing"
    if given.shape != wanted.shape:
        return f"{key} is {tuple(given.shape)}, not {tuple(wanted.shape)}"
    return None


def read(source: str) -> Pretrained:
    """Read `hf:owner/repository[@revision]`, a .safetensors file, or a folder.

    Raises `PretrainedError`.
    """
    if source.startswith(HUB):
        return _published(source, *_fetch(source))
    path = Path(source)
    for file in (path / WEIGHTS, path / _FILE, path):
        if file.is_file():
            config = file.with_name(_CONFIG)
            return _published(source, file, config if config.is_file() else None)
    raise PretrainedError(
        f"{source} has no {WEIGHTS} or {_FILE}, nor is it a file; hf:owner/repository is on the hub"
    )


def _fetch(source: str) -> tuple[Path, Path]:
    """Download from the hub, or find in its cache."""
    from huggingface_hub import hf_hub_download

    repository, _, revision = source.removeprefix(HUB).partition("@")
    try:
        file, config = (
            Path(hf_hub_download(repository, name, revision=revision or None)) for name in (_FILE, _CONFIG)
        )
    except Exception as error:  # of three libraries below, without a common root
        reason = str(error).strip().partition("\n")[0]
        raise PretrainedError(f"cannot get {_FILE} and {_CONFIG} of {source}: {reason}") from None
    return file, config


def _published(source: str, file: Path, config: Path | None) -> Pretrained:
    tensors, about = _tensors(source, file)
    if about:  # one of ours
        net = about["net"]
        mean, std = (_triple(net[key]) for key in ("mean", "std"))
        return Pretrained(source, tensors, net["name"], mean, std, tuple(about["labels"]))
    named = {_our_name(key): tensor for key, tensor in tensors.items()}
    if config is None:
        return Pretrained(source, named, None)
    try:
        said = json.loads(config.read_text())
        architecture, pixels = said["architecture"], said.get("pretrained_cfg", {})
        mean, std = (_triple(pixels.get(key)) for key in ("mean", "std"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PretrainedError(f"{source}: its {_CONFIG} cannot be used: {error!r}") from None
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise PretrainedError(f"{source} is of {architecture!r}; there are {known}")
    return Pretrained(source, named, ARCHITECTURES[architecture], mean, std)


def _tensors(source: str, file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """All tensors of a file, and what it says of itself if it is one of ours."""
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {}).get(KEY, "null"))
            return {key: opened.get_tensor(key) for key in opened.keys()}, about  # noqa: SIM118 - no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise PretrainedError(f"{source} is not a safetensors file, or a damaged one: {error}") from None


def _our_name(key: str) -> str:
    for head in _HEADS:
        if key.startswith(head):
            return f"head.{key.rpartition('.')[2]}"
    return f"features.{key}"


def _triple(values: Any) -> Triple | None:
    if values is None:
        return None
    first, second, third = (float(value) for value in values)
    return first, second, third
