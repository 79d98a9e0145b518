"""A training run in progress: the step, the end of an epoch and the checkpoint.

Every random choice is a function of (seed, epoch) or (seed, step). A run that is interrupted at any step and
resumed gives the same result as an uninterrupted run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fovea.model.data.choices import Choices
from fovea.model.data.dataset import IMBALANCE_RATIO, Dataset
from fovea.model.evaluation.evaluate import (
    autocast,
    choose_device,
    count_correct,
    measure_accuracy,
    to_device,
)
from fovea.model.networks import checkpoint
from fovea.model.networks.checkpoint import RESUME_FILE, WEIGHTS_FILE, Checkpoint
from fovea.model.networks.cnn import OffsetBatchNorm
from fovea.model.networks.network import Net, compute_loss, compute_other_loss, distillation_loss
from fovea.model.recipe import Precision, Recipe, compute_learning_rate
from fovea.model.training.batches import Batch, Batches
from fovea.model.training.provenance import describe_provenance
from fovea.service.artifact.geometry_upgrade import to_plain_geometry


@dataclass
class TrainState:
    """The progress of a run; mutable, and stored with each checkpoint."""

    step: int = 0
    seconds: float = 0.0
    """Training time of the current epoch, in seconds."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Figures of each finished epoch."""


@dataclass(frozen=True)
class InitialState:
    """The starting point of a run, with the facts needed to reproduce the run."""

    net: Net
    teachers: Sequence[Net] = ()
    """Teachers for distillation, weighted by the recipe's `teaching`."""
    weight_sources: dict[str, str] = field(default_factory=dict)
    """Names of other weights that matter: the initial weights and the teachers' digests."""
    source: str | None = None
    """Path or name of the data source."""
    command: str = ""
    choices: Choices = field(default_factory=Choices)
    """Choices for reading the data source."""


class TrainingRun:
    """A run in progress; a context manager, because the run owns the thread that prepares batches.

    All methods belong to one thread, the caller's.
    """

    def __init__(
        self,
        data: Dataset,
        recipe: Recipe,
        initial_state: InitialState,
        teacher_logits: npt.NDArray[np.float16] | None = None,
    ) -> None:
        """Create the run; `teacher_logits` are the teachers' logits from `compute_teacher_logits`."""
        self.data, self.recipe = data, recipe
        self.batches = Batches(data, recipe, initial_state.net.config.mean, teacher_logits)
        self.device = choose_device()
        self.net = to_device(initial_state.net, self.device)
        self.optimizer = _build_optimizer(self.net, recipe)
        self.state = TrainState()
        self.epoch_sums = _zero_sums(self.device)
        weights = compute_class_weights(data)
        self.class_weights = None if weights is None else weights.to(self.device)
        self.metadata = _build_metadata(self.net, data, recipe, initial_state, weights)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.batches.close()

    def step(self) -> None:
        """Train on one batch: forward, backward, update."""
        started_at = time.monotonic()
        recipe, state, task = self.recipe, self.state, self.net.config.task
        self.set_learning_rate()
        batch = self.batches.get(state.step).to(self.device)
        with autocast(self.device, recipe.precision):
            all_logits = self.net.train()(batch.pixels).float()  # (B + O, n)
        logits = all_logits[: len(batch.targets)]  # (B, n)
        mean_loss = self._compute_loss(logits, batch)
        if len(all_logits) > len(logits):
            mean_loss = mean_loss + recipe.other_weight * compute_other_loss(
                logits, all_logits[len(logits) :]
            )
        self.optimizer.zero_grad(set_to_none=True)
        mean_loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            self.epoch_sums[0] += mean_loss * len(batch.targets)
            self.epoch_sums[1] += count_correct(logits, batch.targets, task)
            self.epoch_sums[2] += len(batch.targets)
        state.step += 1
        state.seconds += time.monotonic() - started_at

    def set_learning_rate(self) -> float:
        """Give the optimizer the learning rate of this step, and return it."""
        rate = compute_learning_rate(self.state.step, self.recipe.epochs * self.batches.steps, self.recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["faster"]
        return rate

    def _compute_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        recipe, task = self.recipe, self.net.config.task
        label_loss = compute_loss(
            logits, batch.targets, task, label_smoothing=recipe.label_smoothing, weights=self.class_weights
        )
        if batch.teacher_logits is None:
            return label_loss
        teacher_loss = distillation_loss(logits, batch.teacher_logits.float(), task, softness=recipe.softness)
        return (1 - recipe.teaching) * label_loss + recipe.teaching * teacher_loss

    def end_epoch(self) -> str:
        """Measure on the validation images, extend the history and return a summary line."""
        state = self.state
        loss_sum, correct_count, image_count = self.epoch_sums.tolist()
        entry = {
            "epoch": len(state.history) + 1,
            "loss": loss_sum / image_count,
            "train_accuracy": correct_count / image_count,
            "validation_accuracy": measure_accuracy(self.net, self.data.validation, self.recipe.precision),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": image_count / state.seconds,
            "seconds": state.seconds,
        }
        state.history.append(entry)
        state.seconds = 0.0
        self.epoch_sums.zero_()
        return (
            f"epoch {entry['epoch']:>3}/{self.recipe.epochs}  loss {entry['loss']:.3f}  "
            f"train {entry['train_accuracy']:.1%}  validation {entry['validation_accuracy']:.2%}  "
            f"{entry['images_per_second']:.0f} images/s"
        )

    def save(self, out: Path) -> Checkpoint:
        """Write the weights and the complete state for resuming."""
        self.metadata["progress"] = asdict(self.state)
        weights = Checkpoint(
            {key: value.cpu() for key, value in self.net.state_dict().items()}, self.metadata
        )
        # Weights first: after a kill between the writes, resuming from the older step makes the same weights.
        checkpoint.save_checkpoint(out, WEIGHTS_FILE, weights)
        momentum = checkpoint.get_momentum_tensors(self.optimizer)
        tensors = {**weights.tensors, **momentum, SUMS_KEY: self.epoch_sums}
        checkpoint.save_checkpoint(
            out, RESUME_FILE, Checkpoint({key: value.cpu() for key, value in tensors.items()}, self.metadata)
        )
        return weights


SUMS_KEY: Final = "tally"
"""Tensor in the resume file: loss sum, correct images and images of the current epoch, float64 (3,)."""


def _zero_sums(device: torch.device) -> Tensor:
    return torch.zeros(3, dtype=torch.float64, device=device)


# --- parts of a step -----------------------------------------------------------------------------


def choose_precision() -> Precision:
    """Return bfloat16 if the hardware supports it: CUDA from Ampere on, x86-64 with AVX512_BF16."""
    if torch.cuda.is_available():
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_native = torch.cpu._is_avx512_bf16_supported()
    return Precision.BFLOAT16 if is_native else Precision.FLOAT32


def _build_optimizer(net: Net, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer with parameter groups that differ in weight decay and learning rate factor."""
    offsets = [layer.bias for layer in net.modules() if isinstance(layer, OffsetBatchNorm)]
    offset_set = set(offsets)
    other_weights = [
        weight for weight in net.parameters() if weight.requires_grad and weight not in offset_set
    ]
    decay, faster = recipe.weight_decay, recipe.offsets_faster
    groups = [
        {
            "params": [weight for weight in other_weights if weight.ndim > 1],
            "weight_decay": decay,
            "faster": 1.0,
        },
        {
            "params": [weight for weight in other_weights if weight.ndim <= 1],
            "weight_decay": 0.0,
            "faster": 1.0,
        },
        {"params": offsets, "weight_decay": decay / faster, "faster": faster},
    ]
    return torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=recipe.momentum, nesterov=True, fused=True)


def compute_class_weights(data: Dataset) -> Tensor | None:
    """Return the loss weight of each label, float32 (labels,), or None for nearly balanced labels.

    The weight is the square root of the inverse frequency. The full inverse makes the probabilities of a rare
    label far too large, and temperature scaling does not correct that.
    """
    counts = torch.tensor(data.label_counts, dtype=torch.float32).clamp(min=1)
    if counts.max() <= IMBALANCE_RATIO * counts.min():
        return None
    return (counts.mean() / counts).sqrt()


# --- metadata --------------------------------------------------------------------------------------


def _build_metadata(
    net: Net, data: Dataset, recipe: Recipe, initial_state: InitialState, class_weights: Tensor | None
) -> dict[str, Any]:
    return {
        "net": net.config.to_dict(),
        "labels": list(data.labels),
        "geometry": to_plain_geometry(data.geometry),
        "recipe": asdict(recipe),
        "data": {
            "name": data.name,
            "train": len(data.train),
            "validation": len(data.validation),
            "conformal": len(data.conformal),
            "test": len(data.test),
        },
        "inventory": data.inventory.summarize(),
        "choices": initial_state.choices.to_dict(),
        "class_weights": None if class_weights is None else class_weights.tolist(),
        "start": initial_state.weight_sources,
        "source": initial_state.source,
        "command": initial_state.command,
        "parameters": sum(weight.numel() for weight in net.parameters()),
        **describe_provenance(),
    }
