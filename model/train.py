"""Training: SGD with Nesterov momentum under a one-cycle schedule, reproducible by its seed.

Every random choice is a function of (seed, epoch) or (seed, step), so a run that was interrupted
anywhere and resumed is the run that was not.
"""

from __future__ import annotations

import math
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from model import checkpoint
from model.checkpoint import RESUME, WEIGHTS, Checkpoint, CheckpointError
from model.data import Data
from model.evaluate import accuracy
from model.net import Net, NetConfig, loss
from service.contract import Task


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, beside the data."""

    epochs: int = 14
    batch: int = 128
    """Images per step."""
    peak_lr: float = 0.12
    """Reached after `warm_up`, then falls linearly to 0."""
    warm_up: float = 0.2
    """Fraction of all steps."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """On convolutions and the head; not on biases and batch normalisation."""
    label_smoothing: float = 0.1
    translate: float = 1 / 16
    """Largest random shift, as a fraction of the side; the edge is mirrored."""
    validation: float = 0.1
    """Fraction of each label's training images that is held out."""
    seed: int = 0


_LEAST_STEPS: Final = 1000
"""Below this many a network from random weights has hardly begun, whatever the data."""


def recipe_for(images: int, *, epochs: int | None, validation: float, seed: int) -> Recipe:
    """The recipe for a set of `images` to train on; `epochs` None lets it choose.

    A small set gets smaller batches, so that an epoch has 16 steps at least, a learning rate that falls
    with them (linear scaling: Goyal et al., 2017), and more epochs.
    """
    large = Recipe(validation=validation, seed=seed)
    batch = min(large.batch, 2 ** int(math.log2(max(8, images // 16))))
    enough = min(100, math.ceil(_LEAST_STEPS / max(1, images // batch)))
    return replace(
        large,
        epochs=epochs or max(large.epochs, enough),
        batch=batch,
        peak_lr=large.peak_lr * batch / large.batch,
    )


@dataclass
class Progressed:
    """How far a run has come; mutable, and stored with each checkpoint."""

    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    """Sum over the images seen in this epoch."""
    correct: int = 0
    seen: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    """One entry an epoch."""


def train(
    data: Data,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool,
    source: str | None,
    command: str,
    console: Console,
) -> Checkpoint | None:
    """Train a network on `data` and leave checkpoints in `out`.

    `source` (where the data was read from) and `command` are kept with the weights, for whoever
    wants to make them again.

    Returns the finished checkpoint, or None when Ctrl-C stopped the run: then `out` holds the
    weights so far, and `resume=True` with the same data and recipe goes on from that very step.
    Raises `CheckpointError` when `out` holds another run.
    """
    require_free(out, resume)
    run = _begin(data, recipe, source, command)
    if resume:
        _resume(run, out, console)
    progressed, total = run.progressed, recipe.epochs * run.steps
    with _interruptible() as interrupted, _progress_bar(console) as bar:
        shown = bar.add_task("", total=total, completed=progressed.step, **_fields())
        while progressed.step < total:
            run.step()
            bar.update(shown, completed=progressed.step, **_told(run))
            if progressed.step % run.steps == 0:
                console.print(run.end_epoch())
                run.save(out)
            if interrupted():
                run.save(out)
                console.print(f"stopped at step {progressed.step}; --resume goes on from there")
                return None
    if len(data.test):
        run.about["test_accuracy"] = accuracy(run.net, data.test)
        console.print(f"test accuracy {run.about['test_accuracy']:.2%} of {len(data.test)} images")
    console.print(f"wrote {out}", soft_wrap=True)
    return run.save(out)


# --- the run -------------------------------------------------------------------------------------


@dataclass
class _Run:
    """A run under way."""

    net: Net
    optimizer: torch.optim.Optimizer
    data: Data
    recipe: Recipe
    about: dict[str, Any]
    """What is stored with the weights."""
    progressed: Progressed

    @property
    def steps(self) -> int:
        """Steps in one epoch; what does not fill a batch waits for another epoch's order."""
        return len(self.data.train) // self.recipe.batch or 1

    def step(self) -> None:
        """One batch: forward, backward, update."""
        started = time.monotonic()
        recipe, progressed, task = self.recipe, self.progressed, self.net.config.task
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(progressed.step, recipe.epochs * self.steps, recipe)
        pixels, targets = self._batch()
        logits = self.net.train()(pixels)
        mean_loss = loss(logits, targets, task, label_smoothing=recipe.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        mean_loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        chosen = logits.argmax(dim=1) if task is Task.MULTICLASS else (logits[:, 0] > 0).long()
        progressed.step += 1
        progressed.seen += len(targets)
        progressed.loss += mean_loss.item() * len(targets)
        progressed.correct += int((chosen == targets).sum())
        progressed.seconds += time.monotonic() - started

    def _batch(self) -> tuple[Tensor, Tensor]:
        """The augmented pixels and the targets of the next step."""
        examples, recipe, number = self.data.train, self.recipe, self.progressed.step
        epoch, step = divmod(number, self.steps)
        order = torch.randperm(len(examples), generator=_generator(recipe.seed, 2, epoch))
        indices = order[step * recipe.batch : (step + 1) * recipe.batch]
        batch = examples.take(indices)
        shift = round(recipe.translate * batch.pixels.shape[1])
        flip = (indices + epoch) % 2 == 0  # each image is mirrored every other epoch, as airbench does
        return augment(batch.pixels, flip, shift, _generator(recipe.seed, 1, number)), batch.targets

    def end_epoch(self) -> str:
        """Measure on the held-out images, add to the history, and say so in a line."""
        progressed = self.progressed
        entry = {
            "epoch": len(progressed.history) + 1,
            "loss": progressed.loss / progressed.seen,
            "train_accuracy": progressed.correct / progressed.seen,
            "validation_accuracy": accuracy(self.net, self.data.validation),
            "images_per_second": progressed.seen / progressed.seconds,
            "seconds": progressed.seconds,
        }
        progressed.history.append(entry)
        progressed.loss, progressed.correct, progressed.seen, progressed.seconds = 0.0, 0, 0, 0.0
        return (
            f"epoch {entry['epoch']:>3}/{self.recipe.epochs}  loss {entry['loss']:.3f}  "
            f"train {entry['train_accuracy']:.1%}  validation {entry['validation_accuracy']:.2%}  "
            f"{entry['images_per_second']:.0f} images/s"
        )

    def save(self, out: Path) -> Checkpoint:
        """Write the weights, and all that it takes to go on from here."""
        self.about["progress"] = asdict(self.progressed)
        weights = Checkpoint(dict(self.net.state_dict()), self.about)
        checkpoint.save(out, WEIGHTS, weights)
        everything = {**weights.tensors, **checkpoint.optimizer_tensors(self.optimizer)}
        checkpoint.save(out, RESUME, Checkpoint(everything, self.about))
        return weights


def _begin(data: Data, recipe: Recipe, source: str | None, command: str) -> _Run:
    """A run at step 0, its weights drawn from the seed."""
    task = Task.BINARY if len(data.labels) == 2 else Task.MULTICLASS
    torch.manual_seed(recipe.seed)
    mean, std = _statistics(data.train.pixels)
    net = Net(NetConfig(task, len(data.labels), mean=mean, std=std))
    about = _about(net, data, recipe, source, command)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    return _Run(net, _optimizer(net, recipe), data, recipe, about, Progressed())


def _resume(run: _Run, out: Path, console: Console) -> None:
    """Bring a run to where the one in `out` stopped. Raises `CheckpointError` when that is another."""
    if not (out / RESUME).exists():
        console.print(f"{out} holds no run yet: this one begins", soft_wrap=True)
        return
    earlier = checkpoint.load(out, RESUME)
    for key in ("net", "labels", "geometry", "recipe", "data"):
        was, now = earlier.about[key], run.about[key]
        if was != now:
            raise CheckpointError(f"{out} holds a run with another {key}: {_difference(was, now)}")
    run.net.load_state_dict({key: earlier.tensors[key] for key in run.net.state_dict()})
    checkpoint.restore_optimizer(run.optimizer, earlier.tensors)
    run.progressed = Progressed(**earlier.about["progress"])


def require_free(out: Path, resume: bool) -> None:
    """Raise `CheckpointError` when `out` holds a run that is not to be resumed."""
    if not resume and (out / RESUME).exists():
        raise CheckpointError(f"{out} holds a run already; pass --resume to go on, or another --out")


def _difference(was: Any, now: Any) -> str:
    if not isinstance(was, dict):
        return f"{was}, not {now}"
    return ", ".join(f"{key} {was[key]}, not {now[key]}" for key in now if was[key] != now[key])


# --- what a step is made of ----------------------------------------------------------------------


def augment(pixels: Tensor, flip: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Mirror and translate a batch in one gather.

    `pixels`: uint8 (B, H, W, 3). `flip`: bool (B,). Each image moves by its own whole number of
    pixels in -shift … shift, down and across; what enters at the edge is the image mirrored.
    """
    count, height, width, _ = pixels.shape
    down, across = torch.randint(-shift, shift + 1, (2, count, 1), generator=generator)
    rows = _mirror(torch.arange(height) + down, height)  # (B, H)
    columns = _mirror(torch.arange(width) + across, width)  # (B, W)
    columns = torch.where(flip[:, None], width - 1 - columns, columns)
    return pixels[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _mirror(index: Tensor, length: int) -> Tensor:
    index = index.abs()
    return (length - 1) - ((length - 1) - index).abs()


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """One cycle (Smith and Topin, 2017), piecewise linear: 0 to the peak, and back to 0."""
    peak = max(1.0, recipe.warm_up * steps)
    return recipe.peak_lr * min((step + 1) / peak, (steps - step) / max(1.0, steps - peak))


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    """An own random stream for each purpose and step; 2^20 steps apart before any two meet."""
    return torch.Generator().manual_seed((seed << 24) + (stream << 20) + number)


def _optimizer(net: Net, recipe: Recipe) -> torch.optim.Optimizer:
    decayed = [weight for weight in net.parameters() if weight.ndim > 1]
    free = [weight for weight in net.parameters() if weight.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=recipe.momentum, nesterov=True, fused=True)


# --- around it -----------------------------------------------------------------------------------


def _statistics(
    pixels: Tensor,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per channel, of 1, from exact counts of all 256 levels.

    The deviation is at least one level: a channel that never changes is not divided by zero.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(3):
        counts = torch.bincount(pixels[..., channel].flatten(), minlength=256).double()
        mean = float((counts * levels).sum() / counts.sum())
        means.append(mean)
        variance = float((counts * (levels - mean) ** 2).sum() / counts.sum())
        deviations.append(max(variance**0.5, 1 / 255))
    return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])


def _about(net: Net, data: Data, recipe: Recipe, source: str | None, command: str) -> dict[str, Any]:
    return {
        "net": net.config.to_dict(),
        "labels": list(data.labels),
        "geometry": asdict(data.geometry),
        "recipe": asdict(recipe),
        "data": {
            "name": data.name,
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
        },
        "source": source,
        "command": command,
        "commit": _commit(),
        "torch": torch.__version__,
    }


def _commit() -> str:
    """The commit of the code that trains, with `-dirty` when it was changed since."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],  # noqa: S607
            cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:  # no git here
        return "unknown"
    return described.stdout.strip() or "unknown"


@contextmanager
def _interruptible() -> Iterator[Any]:
    """Let Ctrl-C end the run between two steps; a second one ends it at once."""
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


def _told(run: _Run) -> dict[str, Any]:
    """What the progress bar says of the epoch so far."""
    progressed = run.progressed
    return _fields(
        epoch=f"{(progressed.step - 1) // run.steps + 1}/{run.recipe.epochs}",
        rate=f"{progressed.seen / max(progressed.seconds, 1e-9):.0f}",
        loss=f"{progressed.loss / progressed.seen:.3f}",
        train=f"{progressed.correct / progressed.seen:.1%}",
    )


def _fields(epoch: str = "-", rate: str = "-", loss: str = "-", train: str = "-") -> dict[str, Any]:
    return {"epoch": epoch, "rate": rate, "loss": loss, "train": train}
