"""The `fovea train` command: from labelled images to calibrated weights and a report."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from fovea.model.data.choices import Choices
from fovea.model.data.dataset import Dataset, load_dataset
from fovea.model.data.inventory import format_count, to_printable
from fovea.model.data.pixels import compute_statistics
from fovea.model.evaluation.finalize import finalize_run
from fovea.model.networks import checkpoint
from fovea.model.networks.backbone import (
    BACKBONE,
    BACKBONE_FILE,
    BACKBONE_NET,
    BACKBONE_SIDE,
    SCRATCH,
    can_start_from_backbone,
    find_doubts,
    read_backbone,
    require_backbone_fits,
)
from fovea.model.networks.checkpoint import RESUME_FILE, WEIGHTS_FILE, Checkpoint, CheckpointError
from fovea.model.networks.network import Net, NetConfig, require_supported_net
from fovea.model.networks.pretrained import read_pretrained
from fovea.model.recipe import SMALL_SET, Augmentation, Precision, Recipe, RecipeError, build_recipe
from fovea.model.training.pace import estimate_cost, fit_epochs, format_duration, measure_pace
from fovea.model.training.trainer import require_unused_folder, train_net
from fovea.model.training.training_run import InitialState, choose_precision
from fovea.service.artifact.geometry import Geometry
from fovea.service.artifact.geometry_text import format_steps
from fovea.service.artifact.geometry_upgrade import read_geometry
from fovea.service.atomic_files import write_file


@dataclass(frozen=True)
class TrainingOptions:
    """The options of the command; None leaves the choice to the data."""

    out: Path
    data: Path | None
    choices: Choices
    """Choices for reading `data` where its layout is ambiguous."""
    net: str | None
    size: int | None
    start: str | None
    """Initial weights: `hf:owner/repository`, a file, a folder, `backbone` or `scratch`."""
    teachers: list[Path]
    epochs: int | None
    minutes: float | None
    """Target duration of the run, in minutes, with reading and report; it determines the epochs."""
    seed: int
    validation: float
    flip: bool
    augmentation: Augmentation
    resume: bool
    tensorboard: bool
    command: str


def run_training(options: TrainingOptions, console: Console) -> tuple[Checkpoint, Dataset] | None:
    """Train a network; return None if Ctrl-C stopped the run.

    Raises a `FoveaError` whose message says what to do.
    """
    started_at = time.monotonic()
    if options.epochs is not None and options.minutes is not None:
        raise RecipeError(
            "--epochs and --minutes exclude each other: --minutes chooses the epochs; leave one out"
        )
    # `train_net` checks this too, but only after `_load_data` has written the pixel cache to `out`.
    require_unused_folder(options.out, options.resume)
    require_supported_net(options.net, options.size)  # fails before hours of reading
    may_use_backbone = _may_use_backbone(options)
    data = _load_data(options, may_use_backbone, console)
    options = replace(options, start=_choose_start(options, may_use_backbone, data, console))
    initial_state = _build_initial_state(options, data)
    recipe = _choose_recipe(options, data, initial_state.net)
    if options.minutes is not None and not _is_resumed(options):
        recipe = _fit_recipe(recipe, options.minutes * 60, started_at, data, initial_state, console)
    with _open_epoch_writer(options) as on_epoch:
        trained_checkpoint = train_net(
            data,
            recipe,
            options.out,
            initial_state,
            resume=options.resume,
            console=console,
            on_epoch=on_epoch,
        )
    if trained_checkpoint is None:
        return None
    return finalize_run(trained_checkpoint, data, options.out, console), data


def _may_use_backbone(options: TrainingOptions) -> bool:
    """Return whether the run may start from the backbone. A resumed run starts as it did."""
    if options.start == BACKBONE:
        require_backbone_fits(options.net, options.size)
        return True
    if options.start or options.teachers:
        return False
    if _is_resumed(options):
        return bool(checkpoint.load_metadata(options.out, RESUME_FILE)["start"].get("from") == BACKBONE)
    return can_start_from_backbone(options.net, options.size) and BACKBONE_FILE.is_file()


def _choose_start(
    options: TrainingOptions, may_use_backbone: bool, data: Dataset, console: Console
) -> str | None:
    """Return the source of the initial weights, or None for random ones; print what speaks for another."""
    if options.start == SCRATCH:
        return None
    if not may_use_backbone or (options.start is None and not _suits_backbone(data)):
        return options.start
    require_backbone_fits(options.net, data.geometry.height)
    console.print(
        f"starts from the {BACKBONE}, a {BACKBONE_NET} trained on 190 classes of photographs; "
        f"--from {SCRATCH} starts from random weights",
        soft_wrap=True,
    )
    for line in find_doubts(data):
        console.print(line, style="yellow", soft_wrap=True)
    return BACKBONE


def _suits_backbone(data: Dataset) -> bool:
    return len(data.train) <= SMALL_SET and can_start_from_backbone(None, data.geometry.height)


def _load_data(options: TrainingOptions, may_use_backbone: bool, console: Console) -> Dataset:
    data = load_dataset(
        options.data,
        size=options.size or (BACKBONE_SIDE if options.start == BACKBONE else None),
        small_set_size=BACKBONE_SIDE if may_use_backbone else None,
        validation=options.validation,
        seed=options.seed,
        cache=options.out,
        choices=options.choices,
        on_warning=lambda line: console.print(line, style="yellow", soft_wrap=True),
    )
    skipped_lines = [f"skipped {line}" for line in data.unreadable_files]
    for line in (*data.inventory.notes, *data.warnings, *skipped_lines):
        console.print(line, style="yellow", soft_wrap=True)
    held_out_count = len(data.validation) + len(data.conformal)
    console.print(
        f"{data.name}: {len(data.labels)} labels, {len(data.train)} images to train on, "
        f"{held_out_count} held out, {len(data.test)} to test"
    )
    for line in data.description:
        console.print(f"  {line}", soft_wrap=True, highlight=False)
    if unused_files := [*data.unreadable_files, *data.inventory.list_skipped_files()]:
        write_file(options.out / SKIPPED_LIST, "".join(f"{line}\n" for line in unused_files))
        console.print(f"  list of all unused files: {options.out / SKIPPED_LIST}", soft_wrap=True)
    label_list = ", ".join(
        f"{label} {count}"
        for label, count in list(zip(data.labels, data.label_counts, strict=True))[:_MAX_LABELS]
    )
    more = ", …" if len(data.labels) > _MAX_LABELS else ""
    console.print(
        f"{data.geometry.width} x {data.geometry.height} px; training images: {label_list}{more}",
        soft_wrap=True,
    )
    return data


_MAX_LABELS: Final = 20
"""Maximum number of labels whose image counts are printed."""

SKIPPED_LIST: Final = "left-out.txt"
"""File in a run's folder that lists each unused file of the source with the reason."""


def reload_dataset(metadata: dict[str, Any], source: Path | None, cache: Path) -> Dataset:
    """Load the data that a checkpoint was trained on, with the same split; `source` replaces the source.

    Raises `DataError`.
    """
    path = source or (Path(metadata["source"]) if metadata["source"] else None)
    recipe = metadata["recipe"]
    return load_dataset(
        path,
        size=metadata["geometry"]["height"],
        validation=recipe["validation"],
        seed=recipe["seed"],
        cache=cache if source is None else None,
        choices=Choices.from_dict(metadata.get("choices", {})),
    )


def _is_resumed(options: TrainingOptions) -> bool:
    """Return whether the run continues an earlier run."""
    return options.resume and (options.out / RESUME_FILE).exists()


def _choose_recipe(options: TrainingOptions, data: Dataset, net: Net) -> Recipe:
    """Return the recipe for the size of the set, the network and the processor.

    A resumed run keeps its precision and, unless the options set others, its epochs.
    """
    precision, epochs, epoch_steps = choose_precision(), options.epochs, None
    if _is_resumed(options):
        recipe = checkpoint.load_metadata(options.out, RESUME_FILE)["recipe"]
        precision = Precision(recipe.get("precision", precision))
        if epochs is None:
            epochs, epoch_steps = recipe["epochs"], recipe.get("epoch_steps")
    return build_recipe(
        len(data.train),
        epochs=epochs,
        fine_tuning=options.start is not None,
        cost=1.0 if epochs else estimate_cost(net, precision),
        epoch_steps=epoch_steps,
        precision=precision,
        **{
            **(_WINDOW_FIELDS if options.augmentation is not Augmentation.SHIFT else {}),
            **_NET_FIELDS.get(net.config.name, {}),
            **(_DISTILLATION_FIELDS if options.teachers else {}),
        },
        augmentation=options.augmentation,
        flip=options.flip,
        validation=options.validation,
        seed=options.seed,
    )


def _fit_recipe(
    recipe: Recipe,
    seconds: float,
    started_at: float,
    data: Dataset,
    initial_state: InitialState,
    console: Console,
) -> Recipe:
    """Measure a few steps and fit the epochs to the rest of `seconds`, counted from `started_at`."""
    pace = measure_pace(data, recipe, initial_state, seconds * _PROBE_SHARE)
    remaining_seconds = seconds - (time.monotonic() - started_at)
    recipe = fit_epochs(recipe, data, pace, remaining_seconds, seconds * _MIN_TRAINING_SHARE)
    if remaining_seconds < seconds * _MIN_TRAINING_SHARE:
        console.print(
            f"reading and measuring took {format_duration(time.monotonic() - started_at)} of "
            f"{format_duration(seconds)}; training still gets "
            f"{format_duration(seconds * _MIN_TRAINING_SHARE)}, so the run takes longer",
            style="yellow",
            soft_wrap=True,
        )
    steps = recipe.epoch_steps or max(1, len(data.train) // recipe.batch)
    console.print(
        f"{format_duration(seconds)}: {format_count(recipe.epochs, 'epoch')} of {steps * recipe.batch} "
        f"images, at {recipe.batch / pace.step_seconds:.0f} images/s",
        soft_wrap=True,
    )
    if recipe.epochs * steps < _MIN_STEPS:
        console.print(
            f"{format_duration(seconds)} is too short for these images: a network learns almost nothing in "
            f"{recipe.epochs * steps} steps, and needs at least {_MIN_STEPS}; increase --minutes",
            style="yellow",
            soft_wrap=True,
        )
    return recipe


_PROBE_SHARE: Final = 0.04
"""Approximate maximum share of the time that is spent on measuring."""

_MIN_TRAINING_SHARE: Final = 0.5
"""Minimum share of the time for training, however long reading takes."""

_MIN_STEPS: Final = 100
"""Number of steps below which a network learns almost nothing."""

_NET_FIELDS: Final[dict[str, dict[str, float]]] = {
    "tiny_vgg": {
        "peak_lr": 0.05,
        "weight_decay": 5e-4,
        "label_smoothing": 0.0,
        "cutout": 0.0,
        "growth": 0.0,
    },
}
"""Recipe fields by network.

Without batch normalisation, the default rate of 0.375 silences all ReLUs of `tiny_vgg` in the second epoch.
Cutout and label smoothing are against overfitting, and 4,000 weights do not overfit. Its linear layer takes
images of one size.
"""

_WINDOW_FIELDS: Final = {"growth": 0.6, "cutout": 0.0, "weight_decay": 5e-4}
"""Recipe fields for windows: they hide parts of the image already, and longer runs need less decay."""

_DISTILLATION_FIELDS: Final = {"teaching": 0.8, "label_smoothing": 0.0, "cutout": 3 / 8}
"""Recipe fields for distillation.

Teacher logits are soft already, so label smoothing is off. A student also tolerates a larger cutout.
"""


def _build_initial_state(options: TrainingOptions, data: Dataset) -> InitialState:
    """Return the network at step 0, with random or loaded weights, and its teachers."""
    torch.manual_seed(options.seed)
    pretrained_weights = None
    if options.start:
        pretrained_weights = read_backbone() if options.start == BACKBONE else read_pretrained(options.start)
    name = options.net or (pretrained_weights and pretrained_weights.net) or "cnn"
    if (
        pretrained_weights and pretrained_weights.mean and pretrained_weights.std
    ):  # the loaded kernels expect this normalisation
        mean, std = pretrained_weights.mean, pretrained_weights.std
    else:
        mean, std = compute_statistics(data.train.pixels)
    net = Net(NetConfig(data.task, len(data.labels), name, data.geometry.height, mean=mean, std=std))
    net.fit_whitening(data.train.pixels)
    weight_sources: dict[str, str] = {}
    if pretrained_weights:
        pretrained_weights.load_into(net, data.labels)
        weight_sources["from"] = pretrained_weights.source
    teachers = [_load_teacher(folder, data) for folder in options.teachers]
    if teachers:
        digests = [
            hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest() for folder in options.teachers
        ]
        weight_sources["teachers"] = " ".join(digests)
    source = None if options.data is None else str(options.data)
    return InitialState(net, teachers, weight_sources, source, to_printable(options.command), options.choices)


def _load_teacher(folder: Path, data: Dataset) -> Net:
    """Return the network in `folder`.

    Raises `CheckpointError` unless the labels and the input are the same.
    """
    teacher = checkpoint.load_checkpoint(folder)
    for property_name, teacher_value, data_value in (
        ("set of labels", teacher.metadata["labels"], list(data.labels)),
        (
            "input",
            _describe_input(read_geometry(teacher.metadata["geometry"], "geometry")),
            _describe_input(data.geometry),
        ),
    ):
        if teacher_value != data_value:
            raise CheckpointError(
                f"the teacher in {folder} has another {property_name}: {teacher_value}, not {data_value}"
            )
    return teacher.build_net()


def _describe_input(geometry: Geometry) -> str:
    return f"{format_steps(geometry.steps)} ({geometry.pixel_path})"


@contextmanager
def _open_epoch_writer(options: TrainingOptions) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yield a function that writes an epoch's figures for TensorBoard, or does nothing if disabled.

    `train_net` calls the function on the main thread after each epoch. Raises `CheckpointError` if the
    package is missing.
    """
    if not options.tensorboard:
        yield lambda entry: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise CheckpointError("--tensorboard needs the package: pip install tensorboard") from None
    with SummaryWriter(options.out / "tensorboard") as writer:
        yield lambda entry: _write_scalars(writer, entry)


def _write_scalars(writer: Any, entry: dict[str, float]) -> None:
    epoch = int(entry["epoch"])
    for name, value in entry.items():
        if name != "epoch":
            writer.add_scalar(name, value, epoch)
    writer.flush()  # waits for TensorBoard's writer thread: a later kill does not lose this epoch
