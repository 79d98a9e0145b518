"""`fovea train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from fovea.commands.command_line import format_command_line
from fovea.commands.export import export_and_report


def train(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints and the report; default runs/<name of the data>."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Images: a folder, tar or ZIP archive with one sub-folder per label, or a CSV file with a "
            "column of paths and a column of labels; default CIFAR-10."
        ),
    ] = None,
    path_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the CSV file with the paths of the images; default: found by its heading."
        ),
    ] = None,
    label_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Column of the CSV file with the labels; default: found by its heading. Repeat the option "
            "if each label has its own column of 1 and 0."
        ),
    ] = None,
    label_depth: Annotated[
        int | None,
        typer.Option(
            min=1, help="Level of the folders that name the labels, if it is ambiguous: 1 for the top, 2, …"
        ),
    ] = None,
    label_case: Annotated[
        Literal["merge", "keep"] | None,
        typer.Option(
            help="Treat labels such as Cat and cat as one label (merge) or two (keep); default: an error."
        ),
    ] = None,
    other: Annotated[
        str | None,
        typer.Option(
            help="Label whose images show other things. It is no label of the model, which learns to say "
            "`known: false` to such images."
        ),
    ] = None,
    net: Annotated[
        str | None,
        typer.Option(
            help="Network: cnn, cnn_large, resnet18, resnet34, resnet50, mobilenet_v2, or tiny_vgg for "
            "teaching; default cnn."
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Side of the model's input in pixels, 16 … 384; default: chosen from the data."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Weights to start from: hf:owner/repository, a file, a run's folder, a version in zoo/, "
            "backbone or scratch; default: backbone for up to 10,000 images, else scratch (random weights).",
        ),
    ] = None,
    teacher: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a finished run to distil into the network; may be repeated."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of passes over the training images; default: chosen from their number."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="Approximate duration of the training in minutes; determines the epochs."),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**32 - 1, help="Seed; the same seed, data and machine give the same weights."
        ),
    ] = 0,
    validation: Annotated[
        float, typer.Option(min=0.01, max=0.5, help="Fraction of the images held out for validation.")
    ] = 0.1,
    flip: Annotated[
        bool,
        typer.Option(help="Train on mirrored images too; turn off if left and right matter, as in letters."),
    ] = True,
    augment: Annotated[
        Literal["shift", "crop", "photo"],
        typer.Option(
            help="What a step sees: the image moved a little (shift), a random part of it (crop), or a part "
            "or a small view of it with other colours, blur and JPEG quality (photo)."
        ),
    ] = "shift",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard events into the folder of the run.")
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            help="Export the result to <repository>/<name>/<version>, such as zoo/pets/1, and make it the "
            "default model of the repository."
        ),
    ] = None,
) -> None:
    """Train a network on labelled images. Ctrl-C saves a checkpoint, from which --resume continues."""
    from rich.console import Console

    from fovea.export.from_checkpoint import require_new_version
    from fovea.model.data.choices import Choices
    from fovea.model.recipe import Augmentation
    from fovea.model.run import TrainingOptions, run_training
    from fovea.service.inference.preprocess import configure_pillow

    configure_pillow()
    console = Console(markup=False)  # a file's name may hold brackets
    if export:
        require_new_version(export)
    options = TrainingOptions(
        out=out or Path("runs") / (data.absolute().name.split(".")[0] if data else "cifar10"),
        data=data,
        choices=Choices(path_column, tuple(label_column or ()), label_depth, label_case, other),
        net=net,
        size=size,
        start=start,
        teachers=teacher or [],
        epochs=epochs,
        minutes=minutes,
        seed=seed,
        validation=validation,
        flip=flip,
        augmentation=Augmentation(augment),
        resume=resume,
        tensorboard=tensorboard,
        command=format_command_line(),
    )
    result = run_training(options, console)
    if result is None:
        raise typer.Exit(130)
    if export:
        export_and_report(*result, export, default=True)
        console.print(f"next: fovea serve --models {shlex.quote(str(export.parent.parent))}", soft_wrap=True)
    else:
        console.print(f"next: fovea export {shlex.quote(str(options.out))} --out zoo/NAME/1", soft_wrap=True)
