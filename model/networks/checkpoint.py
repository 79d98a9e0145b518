"""Checkpoints of a training run: safetensors files with JSON metadata in the header, no pickle.

    weights.safetensors   weights and metadata; export needs only this file
    weights.json          the same metadata as JSON, for people
    resume.safetensors    weights and optimizer state at one step; training resumes from this file

Each file is written under a temporary name and then renamed. A kill during the write leaves the previous file
intact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from fovea.model.networks.network import Net, NetConfig
from fovea.service.artifact.repository import MODEL_FILE
from fovea.service.atomic_files import write_file
from fovea.service.errors import FoveaError

WEIGHTS_FILE: Final = "weights.safetensors"
RESUME_FILE: Final = "resume.safetensors"
METADATA_KEY: Final = "fovea"
"""Key of the JSON metadata in the safetensors header."""


class CheckpointError(FoveaError):
    """A checkpoint is missing or damaged, belongs to another network, or cannot be written."""


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors with their metadata; `metadata["net"]` is the `NetConfig` as a dict."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    def build_net(self) -> Net:
        """Return the network with these weights.

        Raises `CheckpointError` if the weights do not fit the network.
        """
        net = Net(NetConfig.from_dict(self.metadata["net"]))
        try:
            net.load_state_dict(self.tensors)
        except RuntimeError as error:
            raise CheckpointError(f"the weights belong to another network: {error}") from None
        return net


def save_checkpoint(folder: Path, name: str, checkpoint: Checkpoint) -> None:
    """Write `folder/name` atomically; for the weights, write `weights.json` too.

    Raises `WriteError` if a write fails, for example on a full disk. The previous file is then intact.
    """
    metadata = json.dumps(checkpoint.metadata, indent=2)
    tensors = {key: tensor.contiguous() for key, tensor in checkpoint.tensors.items()}
    write_file(
        folder / name, to_bytes(tensors, metadata={METADATA_KEY: metadata})
    )  # `save_file` makes files that other users cannot read
    if name == WEIGHTS_FILE:
        write_file(folder / "weights.json", metadata + "\n")


def load_checkpoint(folder: Path, name: str = WEIGHTS_FILE) -> Checkpoint:
    """Read `folder/name`.

    Raises `CheckpointError` if the file is missing or damaged.
    """
    with _open_checkpoint(folder, name) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
        return Checkpoint(tensors, json.loads(file.metadata()[METADATA_KEY]))


def explain_missing_weights(folder: Path) -> str | None:
    """Return a sentence on a folder with a model to serve and no weights to train; None for other folders."""
    if not (folder / MODEL_FILE).is_file():
        return None
    return (
        f"{folder / MODEL_FILE} was imported or quantized, and only `fovea train` and `fovea export` write "
        "weights; for a quantized version, take the float version from which it was made"
    )


def load_metadata(folder: Path, name: str) -> dict[str, Any]:
    """Return the metadata of `folder/name` without reading its tensors.

    Raises `CheckpointError` if the file is missing or damaged.
    """
    with _open_checkpoint(folder, name) as file:
        metadata: dict[str, Any] = json.loads(file.metadata()[METADATA_KEY])
        return metadata


@contextmanager
def _open_checkpoint(folder: Path, name: str) -> Iterator[Any]:
    path = folder / name
    if not path.is_file():
        reason = explain_missing_weights(folder) or f"`fovea train --out {folder}` makes one"
        raise CheckpointError(f"there is no {path}; {reason}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or is not a Fovea checkpoint: {error}") from None


def get_momentum_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's momentum buffers as flat tensors named `momentum.<parameter index>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"momentum.{index}": values["momentum_buffer"]
        for index, values in state.items()
        if values.get("momentum_buffer") is not None
    }


def restore_momentum(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the momentum from `get_momentum_tensors`, each buffer in its parameter's memory format."""
    parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, weight in enumerate(parameters):
        if f"momentum.{index}" in tensors:
            buffer = torch.empty_like(weight).copy_(tensors[f"momentum.{index}"])
            optimizer.state[weight]["momentum_buffer"] = buffer.detach()
