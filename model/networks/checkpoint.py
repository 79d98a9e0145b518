"""A training run on disk: safetensors, each with its JSON in the header, no pickle.

    weights.safetensors   the weights and what they are; all that export needs
    weights.json          the same JSON, for people
    resume.safetensors    weights and optimizer state at some step; all that training needs to go on

Each file is written beside its name and renamed, so that a kill leaves the earlier one whole.
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

from fovea.model.atomic_files import write
from fovea.model.networks.network import Net, NetConfig
from fovea.service.errors import FoveaError

WEIGHTS: Final = "weights.safetensors"
RESUME: Final = "resume.safetensors"
KEY: Final = "fovea"
"""Under which the header holds the JSON."""


class CheckpointError(FoveaError):
    """A checkpoint is missing, damaged, of another network, or cannot be written."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and what they are: `about["net"]` builds the network again."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]

    def net(self) -> Net:
        """The network with these weights. Raises `CheckpointError` when they do not fit it."""
        net = Net(NetConfig.from_dict(self.about["net"]))
        try:
            net.load_state_dict(self.tensors)
        except RuntimeError as error:
            raise CheckpointError(f"the weights are of another network: {error}") from None
        return net


def save(folder: Path, name: str, checkpoint: Checkpoint) -> None:
    """Write `folder/name`, and for the weights the JSON beside them, each of them atomically.

    Raises `WriteError` when that fails, such as on a full disk; the earlier file is then whole.
    """
    about = json.dumps(checkpoint.about, indent=2)
    tensors = {key: tensor.contiguous() for key, tensor in checkpoint.tensors.items()}
    write(
        folder / name, to_bytes(tensors, metadata={KEY: about})
    )  # `save_file` would hide it from other users
    if name == WEIGHTS:
        write(folder / "weights.json", about + "\n")


def load(folder: Path, name: str = WEIGHTS) -> Checkpoint:
    """Read `folder/name`. Raises `CheckpointError` when it is missing or damaged."""
    with _opened(folder, name) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
        return Checkpoint(tensors, json.loads(file.metadata()[KEY]))


def load_about(folder: Path, name: str) -> dict[str, Any]:
    """What `folder/name` says of its tensors, which are not read. Raises `CheckpointError` as `load` does."""
    with _opened(folder, name) as file:
        about: dict[str, Any] = json.loads(file.metadata()[KEY])
        return about


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[Any]:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"there is no {path}; `fovea train --out {folder}` makes one")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint of ours: {error}") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's momentum as flat named tensors: `momentum.<parameter index>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"momentum.{index}": values["momentum_buffer"]
        for index, values in state.items()
        if values.get("momentum_buffer") is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; each buffer takes the memory format of its parameter."""
    parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, weight in enumerate(parameters):
        if f"momentum.{index}" in tensors:
            buffer = torch.empty_like(weight).copy_(tensors[f"momentum.{index}"])
            optimizer.state[weight]["momentum_buffer"] = buffer.detach()
