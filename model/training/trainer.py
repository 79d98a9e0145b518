"""The training loop: SGD with Nesterov momentum and a one-cycle schedule, reproducible by seed.

Every random choice is a function of (seed, epoch) or (seed, step). A run that is interrupted at any step and
resumed gives the same result as an uninterrupted run.
"""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
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
from fovea.model.networks.checkpoint import RESUME_FILE, WEIGHTS_FILE, Checkpoint, CheckpointError
from fovea.model.networks.cnn import OffsetBatchNorm
from fovea.model.networks.network import Net, compute_loss, distillation_loss
from fovea.model.recipe import Precision, Recipe, compute_learning_rate
from fovea.model.training.batches import Batch, Batches
from fovea.model.training.distillation import compute_teacher_logits
from fovea.model.training.pace import (
    Pace,
    estimate_step,
    format_duration,
    measure_evaluation,
    measure_teaching,
)
from fovea.model.training.provenance import describe_provenance


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


def train_net(
    data: Dataset,
    recipe: Recipe,
    out: Path,
    initial_state: InitialState,
    *,
    resume: bool,
    console: Console,
    on_epoch: Callable[[dict[str, float]], None] = lambda entry: None,
) -> Checkpoint | None:
    """Train a network on `data` and write checkpoints to `out`; call `on_epoch` with each epoch's figures.

    Returns the trained weights, or None if Ctrl-C stopped the run. Then `out` holds the current weights, and
    `resume=True` with the same data and recipe continues from that step. After a kill, `resume=True`
    continues from the end of the last complete epoch. Raises `CheckpointError` if `out` holds another run.
    """
    require_unused_folder(out, resume)
    teacher_logits = None
    if initial_state.teachers:
        teachers = [to_device(teacher, choose_device()) for teacher in initial_state.teachers]
        teacher_logits = compute_teacher_logits(
            teachers, initial_state.net.config, data, recipe, out, console
        )
    with TrainingRun(data, recipe, initial_state, teacher_logits) as run:
        if resume:
            _restore_run(run, out, console)
        state, steps = run.state, run.batches.steps
        total = recipe.epochs * steps
        forecast = _Forecast(run, total, console)
        with _catch_interrupt() as is_interrupted, _create_progress_bar(console) as bar:
            forecast.start()
            task_id = bar.add_task("", total=total, completed=state.step, **_progress_fields())
            while state.step < total:
                run.step()
                forecast.count_step()
                if state.step % _UPDATE_STEPS == 0 or state.step == total:
                    bar.update(task_id, completed=state.step, **_format_progress(run))
                if state.step % steps == 0:
                    console.print(run.end_epoch())
                    run.save(out)
                    on_epoch(state.history[-1])
                if is_interrupted():
                    run.save(out)
                    console.print(f"stopped at step {state.step}; --resume goes on from there")
                    return None
        return run.save(out)


_UPDATE_STEPS: Final = 10
"""Steps between progress bar updates; reading figures from a GPU stalls it."""


class _Forecast:
    """A one-time forecast of the run's duration, printed within a minute and based on the first steps."""

    def __init__(self, run: TrainingRun, total: int, console: Console) -> None:
        self._run, self._total, self._console = run, total, console
        self._started_at = self._warm_at = time.monotonic()
        self._step_count = 0
        self._is_done = run.state.step >= total

    def start(self) -> None:
        """Print the forecast before the first step if a step is slow."""
        if not self._is_done:
            step_seconds = estimate_step(self._run.net, self._run.data, self._run.recipe, self._run.device)
            if step_seconds is not None and step_seconds > _FORECAST_SECONDS:
                self._print_forecast(step_seconds)
        self._started_at = time.monotonic()

    def count_step(self) -> None:
        """Count a step, and print the forecast after enough steps or enough time."""
        if self._is_done:
            return
        now = time.monotonic()
        self._step_count += 1
        if self._step_count == 1:
            self._warm_at = now  # the first step includes warm-up
            if now - self._started_at < _SLOW_STEP_SECONDS:
                return
        is_last = self._run.state.step in (self._run.batches.steps, self._total)
        if self._step_count < _FORECAST_STEPS and now - self._started_at < _FORECAST_SECONDS and not is_last:
            return
        measured_since = self._warm_at if self._step_count > 1 else self._started_at
        self._print_forecast((now - measured_since) / max(1, self._step_count - 1))

    def _print_forecast(self, step_seconds: float) -> None:
        self._is_done = True
        run = self._run
        remaining = self._total - run.state.step
        evaluation = _FORWARD_COST * len(run.data.validation) / run.recipe.batch  # in steps
        epochs = remaining / run.batches.steps
        seconds = step_seconds * (remaining + epochs * evaluation)
        hint = "; --minutes N makes it shorter" if seconds > _LONG_RUN_SECONDS else ""
        images, rate = run.batches.steps * run.recipe.batch, run.recipe.batch / step_seconds
        self._console.print(
            f"expected: {format_duration(seconds)} for {epochs:.3g} epochs of {images} images, at {rate:.0f} "
            f"images/s{hint}",
            soft_wrap=True,
        )


_FORECAST_STEPS: Final = 50
"""Number of steps after which the forecast is accurate enough."""
_FORECAST_SECONDS: Final = 10.0
"""Time after which two steps are enough for the forecast, in seconds."""
_SLOW_STEP_SECONDS: Final = 30.0
"""Duration of the first step, in seconds, from which one step is enough for the forecast."""
_FORWARD_COST: Final = 1 / 3
"""Time to evaluate an image relative to its time in a training step."""
_LONG_RUN_SECONDS: Final = 1800.0
"""Duration, in seconds, from which the forecast mentions the option that shortens a run."""


# --- the run -------------------------------------------------------------------------------------


class TrainingRun:
    """A run in progress; a context manager, because the run owns a thread."""

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

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.batches.close()

    def step(self) -> None:
        """Train on one batch: forward, backward, update."""
        started_at = time.monotonic()
        recipe, state, task = self.recipe, self.state, self.net.config.task
        for group in self.optimizer.param_groups:
            rate = compute_learning_rate(state.step, recipe.epochs * self.batches.steps, recipe)
            group["lr"] = rate * group["faster"]
        batch = self.batches.get(state.step).to(self.device)
        with autocast(self.device, recipe.precision):
            logits = self.net.train()(batch.pixels).float()
        mean_loss = self._compute_loss(logits, batch)
        self.optimizer.zero_grad(set_to_none=True)
        mean_loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            self.epoch_sums[0] += mean_loss * len(batch.targets)
            self.epoch_sums[1] += count_correct(logits, batch.targets, task)
            self.epoch_sums[2] += len(batch.targets)
        state.step += 1
        state.seconds += time.monotonic() - started_at

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
        checkpoint.save_checkpoint(out, WEIGHTS_FILE, weights)
        momentum = checkpoint.get_momentum_tensors(self.optimizer)
        tensors = {**weights.tensors, **momentum, _SUMS_KEY: self.epoch_sums}
        checkpoint.save_checkpoint(
            out, RESUME_FILE, Checkpoint({key: value.cpu() for key, value in tensors.items()}, self.metadata)
        )
        return weights


_SUMS_KEY: Final = "tally"
"""Tensor in the resume file: loss sum, correct images and images of the current epoch, float64 (3,)."""


def _zero_sums(device: torch.device) -> Tensor:
    return torch.zeros(3, dtype=torch.float64, device=device)


def _restore_run(run: TrainingRun, out: Path, console: Console) -> None:
    """Restore the state of the run in `out`.

    Raises `CheckpointError` if `out` holds a different run.
    """
    if not (out / RESUME_FILE).exists():
        console.print(f"{out} holds no run yet: this one begins", soft_wrap=True)
        return
    previous_run = checkpoint.load_checkpoint(out, RESUME_FILE)
    for key in ("net", "labels", "geometry", "recipe", "data", "start"):
        previous_value, current_value = previous_run.metadata.get(key), run.metadata[key]
        if key == "recipe" and previous_value is not None:
            previous_value = {"epoch_steps": None, **previous_value}  # older runs do not have this field
        if previous_value != current_value:
            raise CheckpointError(
                f"{out} holds a run with another {key}: {_describe_difference(previous_value, current_value)}"
            )
    run.net.load_state_dict({key: previous_run.tensors[key] for key in run.net.state_dict()})
    checkpoint.restore_momentum(run.optimizer, previous_run.tensors)
    run.epoch_sums.copy_(previous_run.tensors[_SUMS_KEY])
    run.state = TrainState(**previous_run.metadata["progress"])


def require_unused_folder(out: Path, resume: bool) -> None:
    """Raise `CheckpointError` if `out` holds a run and `resume` is false."""
    if not resume and (out / RESUME_FILE).exists():
        raise CheckpointError(f"{out} holds a run already; pass --resume to go on, or another --out")


def _describe_difference(previous: Any, current: Any) -> str:
    if not isinstance(previous, dict):
        return f"{previous}, not {current}"
    keys = dict.fromkeys([*current, *previous])
    return ", ".join(
        f"{key} {previous.get(key)}, not {current.get(key)}"
        for key in keys
        if previous.get(key) != current.get(key)
    )


def measure_pace(data: Dataset, recipe: Recipe, initial_state: InitialState, seconds: float) -> Pace:
    """Measure the first steps of a run for about `seconds`, on a copy of its network."""
    with torch.random.fork_rng(), TrainingRun(data, recipe, _copy_state(initial_state)) as run:
        if (
            step_seconds := estimate_step(run.net, data, recipe, run.device)
        ) is None or step_seconds < seconds:
            run.step()  # warm-up
            started_at = _synchronized_time(run.device)
            steps = 0
            while steps < _MIN_PROBE_STEPS or _synchronized_time(run.device) - started_at < seconds:
                run.step()
                steps += 1
                if _synchronized_time(run.device) - started_at > _MAX_PROBE_SECONDS:
                    break
            step_seconds = (_synchronized_time(run.device) - started_at) / steps
        teachers = [to_device(teacher, run.device) for teacher in initial_state.teachers]
        return Pace(
            step_seconds,
            measure_evaluation(run.net, data, recipe.precision),
            measure_teaching(teachers, data, recipe),
        )


def _synchronized_time(device: torch.device) -> float:
    """Return the monotonic time after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def _copy_state(initial_state: InitialState) -> InitialState:
    return replace(initial_state, net=copy.deepcopy(initial_state.net))


_MIN_PROBE_STEPS: Final = 3
"""Minimum number of measured steps, unless steps take very long."""
_MAX_PROBE_SECONDS: Final = 20.0
"""Time after which no further step is measured, in seconds."""


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


# --- metadata and display ------------------------------------------------------------------------


def _build_metadata(
    net: Net, data: Dataset, recipe: Recipe, initial_state: InitialState, class_weights: Tensor | None
) -> dict[str, Any]:
    return {
        "net": net.config.to_dict(),
        "labels": list(data.labels),
        "geometry": asdict(data.geometry),
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


@contextmanager
def _catch_interrupt() -> Iterator[Any]:
    """Let Ctrl-C stop the run between two steps; a second Ctrl-C stops it at once."""
    requested = False

    def request_stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, request_stop)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, previous)


def _create_progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s  loss {task.fields[loss]}  train {task.fields[train]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


def _format_progress(run: TrainingRun) -> dict[str, Any]:
    """Return the progress bar's fields for the current epoch."""
    state = run.state
    loss_sum, correct_count, image_count = run.epoch_sums.tolist()
    return _progress_fields(
        epoch=f"{(state.step - 1) // run.batches.steps + 1}/{run.recipe.epochs}",
        rate=f"{image_count / max(state.seconds, 1e-9):.0f}",
        loss=f"{loss_sum / image_count:.3f}",
        train=f"{correct_count / image_count:.1%}",
    )


def _progress_fields(epoch: str = "-", rate: str = "-", loss: str = "-", train: str = "-") -> dict[str, Any]:
    return {"epoch": epoch, "rate": rate, "loss": loss, "train": train}
