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
from fovea.model.data.dataset import IMBALANCE, Data
from fovea.model.evaluation.evaluate import accuracy, autocast, device, placed, right
from fovea.model.networks import checkpoint
from fovea.model.networks.checkpoint import RESUME, WEIGHTS, Checkpoint, CheckpointError
from fovea.model.networks.cnn import Offset
from fovea.model.networks.network import Net, distance, loss
from fovea.model.recipe import Precision, Recipe, learning_rate
from fovea.model.training.batches import Batch, Batches
from fovea.model.training.distillation import ask
from fovea.model.training.pace import Pace, duration, estimated_step, measured_evaluation, measured_teaching
from fovea.model.training.provenance import provenance


@dataclass
class Progressed:
    """The progress of a run; mutable, and stored with each checkpoint."""

    step: int = 0
    seconds: float = 0.0
    """Training time of the current epoch, in seconds."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Figures of each finished epoch."""


@dataclass(frozen=True)
class Beginning:
    """The starting point of a run, with the facts needed to reproduce the run."""

    net: Net
    teachers: Sequence[Net] = ()
    """Teachers for distillation, weighted by the recipe's `teaching`."""
    start: dict[str, str] = field(default_factory=dict)
    """Names of other weights that matter: the initial weights and the teachers' digests."""
    source: str | None = None
    """Path or name of the data source."""
    command: str = ""
    choices: Choices = field(default_factory=Choices)
    """Choices for reading the data source."""


def train(
    data: Data,
    recipe: Recipe,
    out: Path,
    beginning: Beginning,
    *,
    resume: bool,
    console: Console,
    watch: Callable[[dict[str, float]], None] = lambda entry: None,
) -> Checkpoint | None:
    """Train a network on `data` and write checkpoints to `out`; call `watch` with each epoch's figures.

    Returns the trained weights, or None if Ctrl-C stopped the run. Then `out` holds the current weights, and
    `resume=True` with the same data and recipe continues from that step. After a kill, `resume=True`
    continues from the end of the last complete epoch. Raises `CheckpointError` if `out` holds another run.
    """
    require_free(out, resume)
    answers = None
    if beginning.teachers:
        teachers = [placed(teacher, device()) for teacher in beginning.teachers]
        answers = ask(teachers, beginning.net.config, data, recipe, out, console)
    with Run(data, recipe, beginning, answers) as run:
        if resume:
            _resume(run, out, console)
        progressed, steps = run.progressed, run.batches.steps
        total = recipe.epochs * steps
        forecast = _Forecast(run, total, console)
        with _interruptible() as interrupted, _progress_bar(console) as bar:
            forecast.begin()
            shown = bar.add_task("", total=total, completed=progressed.step, **_fields())
            while progressed.step < total:
                run.step()
                forecast.observe()
                if progressed.step % _TOLD == 0 or progressed.step == total:
                    bar.update(shown, completed=progressed.step, **_told(run))
                if progressed.step % steps == 0:
                    console.print(run.end_epoch())
                    run.save(out)
                    watch(progressed.history[-1])
                if interrupted():
                    run.save(out)
                    console.print(f"stopped at step {progressed.step}; --resume goes on from there")
                    return None
        return run.save(out)


_TOLD: Final = 10
"""Steps between progress bar updates; reading figures from a GPU stalls it."""


class _Forecast:
    """A one-time forecast of the run's duration, printed within a minute and based on the first steps."""

    def __init__(self, run: Run, total: int, console: Console) -> None:
        self._run, self._total, self._console = run, total, console
        self._begun = self._warm = time.monotonic()
        self._steps = 0
        self._is_done = run.progressed.step >= total

    def begin(self) -> None:
        """Print the forecast before the first step if a step is slow."""
        if not self._is_done:
            step = estimated_step(self._run.net, self._run.data, self._run.recipe, self._run.device)
            if step is not None and step > _SOON:
                self._say(step)
        self._begun = time.monotonic()

    def observe(self) -> None:
        """Count a step, and print the forecast after enough steps or enough time."""
        if self._is_done:
            return
        now = time.monotonic()
        self._steps += 1
        if self._steps == 1:
            self._warm = now  # the first step includes warm-up
            if now - self._begun < _LATE:
                return
        is_last = self._run.progressed.step in (self._run.batches.steps, self._total)
        if self._steps < _ENOUGH and now - self._begun < _SOON and not is_last:
            return
        since = self._warm if self._steps > 1 else self._begun
        self._say((now - since) / max(1, self._steps - 1))

    def _say(self, step: float) -> None:
        self._is_done = True
        run = self._run
        remaining = self._total - run.progressed.step
        evaluation = _FORWARD * len(run.data.validation) / run.recipe.batch  # in steps
        epochs = remaining / run.batches.steps
        seconds = step * (remaining + epochs * evaluation)
        hint = "; --minutes N makes it shorter" if seconds > _LONG else ""
        images, rate = run.batches.steps * run.recipe.batch, run.recipe.batch / step
        self._console.print(
            f"expected: {duration(seconds)} for {epochs:.3g} epochs of {images} images, at {rate:.0f} "
            f"images/s{hint}",
            soft_wrap=True,
        )


_ENOUGH: Final = 50
"""Number of steps after which the forecast is accurate enough."""
_SOON: Final = 10.0
"""Time after which two steps are enough for the forecast, in seconds."""
_LATE: Final = 30.0
"""Duration of the first step, in seconds, from which one step is enough for the forecast."""
_FORWARD: Final = 1 / 3
"""Time to evaluate an image relative to its time in a training step."""
_LONG: Final = 1800.0
"""Duration, in seconds, from which the forecast mentions the option that shortens a run."""


# --- the run -------------------------------------------------------------------------------------


class Run:
    """A run in progress; a context manager, because the run owns a thread."""

    def __init__(
        self,
        data: Data,
        recipe: Recipe,
        beginning: Beginning,
        answers: npt.NDArray[np.float16] | None = None,
    ) -> None:
        """Create the run; `answers` are the teachers' logits from `ask`."""
        self.data, self.recipe = data, recipe
        self.batches = Batches(data, recipe, beginning.net.config.mean, answers)
        self.device = device()
        self.net = placed(beginning.net, self.device)
        self.optimizer = _optimizer(self.net, recipe)
        self.progressed = Progressed()
        self.tally = _tally(self.device)
        weights = class_weights(data)
        self.class_weights = None if weights is None else weights.to(self.device)
        self.about = _about(self.net, data, recipe, beginning, weights)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.batches.close()

    def step(self) -> None:
        """Train on one batch: forward, backward, update."""
        started = time.monotonic()
        recipe, progressed, task = self.recipe, self.progressed, self.net.config.task
        for group in self.optimizer.param_groups:
            rate = learning_rate(progressed.step, recipe.epochs * self.batches.steps, recipe)
            group["lr"] = rate * group["faster"]
        batch = self.batches.get(progressed.step).to(self.device)
        with autocast(self.device, recipe.precision):
            logits = self.net.train()(batch.pixels).float()
        mean_loss = self._loss(logits, batch)
        self.optimizer.zero_grad(set_to_none=True)
        mean_loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            self.tally[0] += mean_loss * len(batch.targets)
            self.tally[1] += right(logits, batch.targets, task)
            self.tally[2] += len(batch.targets)
        progressed.step += 1
        progressed.seconds += time.monotonic() - started

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        recipe, task = self.recipe, self.net.config.task
        labelled = loss(
            logits, batch.targets, task, label_smoothing=recipe.label_smoothing, weights=self.class_weights
        )
        if batch.answers is None:
            return labelled
        taught = distance(logits, batch.answers.float(), task, softness=recipe.softness)
        return (1 - recipe.teaching) * labelled + recipe.teaching * taught

    def end_epoch(self) -> str:
        """Measure on the validation images, extend the history and return a summary line."""
        progressed = self.progressed
        summed, right, seen = self.tally.tolist()
        entry = {
            "epoch": len(progressed.history) + 1,
            "loss": summed / seen,
            "train_accuracy": right / seen,
            "validation_accuracy": accuracy(self.net, self.data.validation, self.recipe.precision),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": seen / progressed.seconds,
            "seconds": progressed.seconds,
        }
        progressed.history.append(entry)
        progressed.seconds = 0.0
        self.tally.zero_()
        return (
            f"epoch {entry['epoch']:>3}/{self.recipe.epochs}  loss {entry['loss']:.3f}  "
            f"train {entry['train_accuracy']:.1%}  validation {entry['validation_accuracy']:.2%}  "
            f"{entry['images_per_second']:.0f} images/s"
        )

    def save(self, out: Path) -> Checkpoint:
        """Write the weights and the complete state for resuming."""
        self.about["progress"] = asdict(self.progressed)
        weights = Checkpoint({key: value.cpu() for key, value in self.net.state_dict().items()}, self.about)
        checkpoint.save(out, WEIGHTS, weights)
        momentum = checkpoint.optimizer_tensors(self.optimizer)
        everything = {**weights.tensors, **momentum, _TALLY: self.tally}
        checkpoint.save(
            out, RESUME, Checkpoint({key: value.cpu() for key, value in everything.items()}, self.about)
        )
        return weights


_TALLY: Final = "tally"
"""Tensor in the resume file: loss sum, correct images and images of the current epoch, float64 (3,)."""


def _tally(device: torch.device) -> Tensor:
    return torch.zeros(3, dtype=torch.float64, device=device)


def _resume(run: Run, out: Path, console: Console) -> None:
    """Restore the state of the run in `out`.

    Raises `CheckpointError` if `out` holds a different run.
    """
    if not (out / RESUME).exists():
        console.print(f"{out} holds no run yet: this one begins", soft_wrap=True)
        return
    earlier = checkpoint.load(out, RESUME)
    for key in ("net", "labels", "geometry", "recipe", "data", "start"):
        was, now = earlier.about.get(key), run.about[key]
        if key == "recipe" and was is not None:
            was = {"epoch_steps": None, **was}  # older runs do not have this field
        if was != now:
            raise CheckpointError(f"{out} holds a run with another {key}: {_difference(was, now)}")
    run.net.load_state_dict({key: earlier.tensors[key] for key in run.net.state_dict()})
    checkpoint.restore_optimizer(run.optimizer, earlier.tensors)
    run.tally.copy_(earlier.tensors[_TALLY])
    run.progressed = Progressed(**earlier.about["progress"])


def require_free(out: Path, resume: bool) -> None:
    """Raise `CheckpointError` if `out` holds a run and `resume` is false."""
    if not resume and (out / RESUME).exists():
        raise CheckpointError(f"{out} holds a run already; pass --resume to go on, or another --out")


def _difference(was: Any, now: Any) -> str:
    if not isinstance(was, dict):
        return f"{was}, not {now}"
    keys = dict.fromkeys([*now, *was])
    return ", ".join(
        f"{key} {was.get(key)}, not {now.get(key)}" for key in keys if was.get(key) != now.get(key)
    )


def measured_pace(data: Data, recipe: Recipe, beginning: Beginning, seconds: float) -> Pace:
    """Measure the first steps of a run for about `seconds`, on a copy of its network."""
    with torch.random.fork_rng(), Run(data, recipe, _copy(beginning)) as run:
        if (step := estimated_step(run.net, data, recipe, run.device)) is None or step < seconds:
            run.step()  # warm-up
            began = _now(run.device)
            steps = 0
            while steps < _FEWEST or _now(run.device) - began < seconds:
                run.step()
                steps += 1
                if _now(run.device) - began > _LONGEST_PROBE:
                    break
            step = (_now(run.device) - began) / steps
        teachers = [placed(teacher, run.device) for teacher in beginning.teachers]
        return Pace(
            step,
            measured_evaluation(run.net, data, recipe.precision),
            measured_teaching(teachers, data, recipe),
        )


def _now(device: torch.device) -> float:
    """Return the monotonic time after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def _copy(beginning: Beginning) -> Beginning:
    return replace(beginning, net=copy.deepcopy(beginning.net))


_FEWEST: Final = 3
"""Minimum number of measured steps, unless steps take very long."""
_LONGEST_PROBE: Final = 20.0
"""Time after which no further step is measured, in seconds."""


# --- parts of a step -----------------------------------------------------------------------------


def fastest_precision() -> Precision:
    """Return bfloat16 if the hardware supports it: CUDA from Ampere on, x86-64 with AVX512_BF16."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return Precision.BFLOAT16 if native else Precision.FLOAT32


def _optimizer(net: Net, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer with parameter groups that differ in weight decay and learning rate factor."""
    offsets = [layer.bias for layer in net.modules() if isinstance(layer, Offset)]
    known = set(offsets)
    others = [weight for weight in net.parameters() if weight.requires_grad and weight not in known]
    decay, faster = recipe.weight_decay, recipe.offsets_faster
    groups = [
        {"params": [weight for weight in others if weight.ndim > 1], "weight_decay": decay, "faster": 1.0},
        {"params": [weight for weight in others if weight.ndim <= 1], "weight_decay": 0.0, "faster": 1.0},
        {"params": offsets, "weight_decay": decay / faster, "faster": faster},
    ]
    return torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=recipe.momentum, nesterov=True, fused=True)


def class_weights(data: Data) -> Tensor | None:
    """Return the loss weight of each label, float32 (labels,), or None for nearly balanced labels.

    The weight is the square root of the inverse frequency. The full inverse makes the probabilities of a rare
    label far too large, and temperature scaling does not correct that.
    """
    counts = torch.tensor(data.counts, dtype=torch.float32).clamp(min=1)
    if counts.max() <= IMBALANCE * counts.min():
        return None
    return (counts.mean() / counts).sqrt()


# --- metadata and display ------------------------------------------------------------------------


def _about(
    net: Net, data: Data, recipe: Recipe, beginning: Beginning, weights: Tensor | None
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
        "inventory": data.inventory.summary(),
        "choices": beginning.choices.to_dict(),
        "class_weights": None if weights is None else weights.tolist(),
        "start": beginning.start,
        "source": beginning.source,
        "command": beginning.command,
        "parameters": sum(weight.numel() for weight in net.parameters()),
        **provenance(),
    }


@contextmanager
def _interruptible() -> Iterator[Any]:
    """Let Ctrl-C stop the run between two steps; a second Ctrl-C stops it at once."""
    requested = False

    def request(_signal: int, _frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, request)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, previous)


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s  loss {task.fields[loss]}  train {task.fields[train]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


def _told(run: Run) -> dict[str, Any]:
    """Return the progress bar's fields for the current epoch."""
    progressed = run.progressed
    summed, right, seen = run.tally.tolist()
    return _fields(
        epoch=f"{(progressed.step - 1) // run.batches.steps + 1}/{run.recipe.epochs}",
        rate=f"{seen / max(progressed.seconds, 1e-9):.0f}",
        loss=f"{summed / seen:.3f}",
        train=f"{right / seen:.1%}",
    )


def _fields(epoch: str = "-", rate: str = "-", loss: str = "-", train: str = "-") -> dict[str, Any]:
    return {"epoch": epoch, "rate": rate, "loss": loss, "train": train}
