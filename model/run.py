"""The `fovea train` command: from labelled images to calibrated weights and a report."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from fovea.model.atomic_files import write
from fovea.model.data.choices import Choices
from fovea.model.data.dataset import Data, load
from fovea.model.data.inventory import count, printable
from fovea.model.data.pixels import statistics
from fovea.model.evaluation.finalize import finish
from fovea.model.networks import checkpoint
from fovea.model.networks.checkpoint import RESUME, WEIGHTS, Checkpoint, CheckpointError
from fovea.model.networks.network import Net, NetConfig, require_offered
from fovea.model.networks.pretrained import read
from fovea.model.recipe import Precision, Recipe, RecipeError, recipe_for
from fovea.model.training.pace import cost_of, duration, fitted
from fovea.model.training.trainer import Beginning, fastest_precision, measured_pace, require_free, train


@dataclass(frozen=True)
class Options:
    """The options of the command; None leaves the choice to the data."""

    out: Path
    data: Path | None
    choices: Choices
    """Choices for reading `data` where its layout is ambiguous."""
    net: str | None
    size: int | None
    start: str | None
    """Initial weights: `hf:owner/repository`, a file or a folder; None initialises by `seed`."""
    teachers: list[Path]
    epochs: int | None
    minutes: float | None
    """Target duration of the run, in minutes, with reading and report; it determines the epochs."""
    seed: int
    validation: float
    flip: bool
    resume: bool
    tensorboard: bool
    command: str


def run(options: Options, console: Console) -> tuple[Checkpoint, Data] | None:
    """Train a network; return None if Ctrl-C stopped the run.

    Raises a `FoveaError` whose message says what to do.
    """
    began = time.monotonic()
    if options.epochs is not None and options.minutes is not None:
        raise RecipeError(
            "--epochs and --minutes exclude each other: --minutes chooses the epochs; leave one out"
        )
    require_free(options.out, options.resume)
    require_offered(options.net, options.size)  # fails before hours of reading
    data = _load(options, console)
    beginning = _beginning(options, data)
    recipe = _recipe(options, data, beginning.net)
    if options.minutes is not None and not _is_resumed(options):
        recipe = _fitted(recipe, options.minutes * 60, began, data, beginning, console)
    with _watching(options) as watch:
        trained = train(
            data, recipe, options.out, beginning, resume=options.resume, console=console, watch=watch
        )
    if trained is None:
        return None
    return finish(trained, data, options.out, console), data


def _load(options: Options, console: Console) -> Data:
    data = load(
        options.data,
        size=options.size,
        validation=options.validation,
        seed=options.seed,
        cache=options.out,
        choices=options.choices,
        say=lambda line: console.print(line, style="yellow", soft_wrap=True),
    )
    skipped = [f"skipped {line}" for line in data.unreadable]
    for line in (*data.inventory.notes, *data.warnings, *skipped):
        console.print(line, style="yellow", soft_wrap=True)
    held = len(data.validation) + len(data.conformal)
    console.print(
        f"{data.name}: {len(data.labels)} labels, {len(data.train)} images to train on, "
        f"{held} held out, {len(data.test)} to test"
    )
    for line in data.description:
        console.print(f"  {line}", soft_wrap=True, highlight=False)
    if unused := [*data.unreadable, *data.inventory.lines()]:
        write(options.out / LEFT_OUT, "".join(f"{line}\n" for line in unused))
        console.print(f"  all files that are not used: {options.out / LEFT_OUT}", soft_wrap=True)
    shown = ", ".join(
        f"{label} {count}" for label, count in list(zip(data.labels, data.counts, strict=True))[:_SHOWN]
    )
    more = ", …" if len(data.labels) > _SHOWN else ""
    console.print(
        f"{data.geometry.width} x {data.geometry.height} px; to train on: {shown}{more}", soft_wrap=True
    )
    return data


_SHOWN: Final = 20
"""Maximum number of labels whose image counts are printed."""

LEFT_OUT: Final = "left-out.txt"
"""File in a run's folder that lists each unused file of the source with the reason."""


def load_again(about: dict[str, Any], source: Path | None, cache: Path) -> Data:
    """Load the data that a checkpoint was trained on, with the same split; `source` replaces the source.

    Raises `DataError`.
    """
    given = source or (Path(about["source"]) if about["source"] else None)
    recipe = about["recipe"]
    return load(
        given,
        size=about["geometry"]["height"],
        validation=recipe["validation"],
        seed=recipe["seed"],
        cache=cache if source is None else None,
        choices=Choices.from_dict(about.get("choices", {})),
    )


def _is_resumed(options: Options) -> bool:
    """Return whether the run continues an earlier run."""
    return options.resume and (options.out / RESUME).exists()


def _recipe(options: Options, data: Data, net: Net) -> Recipe:
    """Return the recipe for the size of the set, the network and the processor.

    A resumed run keeps its precision and, unless the options set others, its epochs.
    """
    precision, epochs, epoch_steps = fastest_precision(), options.epochs, None
    if _is_resumed(options):
        recipe = checkpoint.load_about(options.out, RESUME)["recipe"]
        precision = Precision(recipe.get("precision", precision))
        if epochs is None:
            epochs, epoch_steps = recipe["epochs"], recipe.get("epoch_steps")
    return recipe_for(
        len(data.train),
        epochs=epochs,
        tuned=options.start is not None,
        cost=1.0 if epochs else cost_of(net, precision),
        epoch_steps=epoch_steps,
        precision=precision,
        **(_TAUGHT if options.teachers else {}),
        flip=options.flip,
        validation=options.validation,
        seed=options.seed,
    )


def _fitted(
    recipe: Recipe, seconds: float, began: float, data: Data, beginning: Beginning, console: Console
) -> Recipe:
    """Measure a few steps and fit the epochs to the rest of `seconds`, which are counted from `began`."""
    pace = measured_pace(data, recipe, beginning, seconds * _PROBE)
    left = seconds - (time.monotonic() - began)
    recipe = fitted(recipe, data, pace, left, seconds * _LEAST_SHARE)
    if left < seconds * _LEAST_SHARE:
        console.print(
            f"reading and measuring took {duration(time.monotonic() - began)}; training has "
            f"{duration(seconds * _LEAST_SHARE)} all the same",
            style="yellow",
            soft_wrap=True,
        )
    steps = recipe.epoch_steps or max(1, len(data.train) // recipe.batch)
    console.print(
        f"{duration(seconds)}: {count(recipe.epochs, 'epoch')} of {steps * recipe.batch} images, at "
        f"{recipe.batch / pace.step:.0f} images/s",
        soft_wrap=True,
    )
    if recipe.epochs * steps < _LEAST_STEPS:
        console.print(
            f"{duration(seconds)} are little for these images: {recipe.epochs * steps} steps are hardly a "
            "beginning",
            style="yellow",
            soft_wrap=True,
        )
    return recipe


_PROBE: Final = 0.04
"""Approximate maximum share of the time that is spent on measuring."""

_LEAST_SHARE: Final = 0.5
"""Minimum share of the time for training, however long reading takes."""

_LEAST_STEPS: Final = 100
"""Number of steps below which a network learns almost nothing."""

_TAUGHT: Final = {"teaching": 0.8, "label_smoothing": 0.0, "cutout": 3 / 8}
"""Recipe fields for distillation.

Teacher logits are soft already, so label smoothing is off. A student also tolerates a larger cutout.
"""


def _beginning(options: Options, data: Data) -> Beginning:
    """Return the network at step 0, with random or loaded weights, and its teachers."""
    torch.manual_seed(options.seed)
    known = read(options.start) if options.start else None
    name = options.net or (known and known.net) or "cnn"
    if known and known.mean and known.std:  # the loaded kernels expect this normalisation
        mean, std = known.mean, known.std
    else:
        mean, std = statistics(data.train.pixels)
    net = Net(NetConfig(data.task, len(data.labels), name, data.geometry.height, mean=mean, std=std))
    net.observe(data.train.pixels)
    start: dict[str, str] = {}
    if known:
        known.load_into(net, data.labels)
        start["from"] = known.source
    teachers = [_teacher(folder, data) for folder in options.teachers]
    if teachers:
        digests = [hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() for folder in options.teachers]
        start["teachers"] = " ".join(digests)
    source = None if options.data is None else str(options.data)
    return Beginning(net, teachers, start, source, printable(options.command), options.choices)


def _teacher(folder: Path, data: Data) -> Net:
    """Return the network in `folder`.

    Raises `CheckpointError` unless the labels and the input are the same.
    """
    taught = checkpoint.load(folder)
    for what, was, now in (
        ("set of labels", taught.about["labels"], list(data.labels)),
        ("input", taught.about["geometry"], asdict(data.geometry)),
    ):
        if was != now:
            raise CheckpointError(f"the teacher in {folder} has another {what}: {was}, not {now}")
    return taught.net()


@contextmanager
def _watching(options: Options) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yield a function that writes an epoch's figures for TensorBoard, or does nothing if disabled.

    Raises `CheckpointError` if the package is missing.
    """
    if not options.tensorboard:
        yield lambda entry: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise CheckpointError("--tensorboard needs the package: pip install tensorboard") from None
    with SummaryWriter(options.out / "tensorboard") as writer:
        yield lambda entry: _write(writer, entry)


def _write(writer: Any, entry: dict[str, float]) -> None:
    epoch = int(entry["epoch"])
    for name, value in entry.items():
        if name != "epoch":
            writer.add_scalar(name, value, epoch)
    writer.flush()
