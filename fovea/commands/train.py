"""`fovea train`."""

from __future__ import annotations

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
            help="Folder, or tar or ZIP archive, of images in one sub-folder per label, or a CSV file with a "
            "column of paths and one of labels; default CIFAR-10."
        ),
    ] = None,
    path_column: Annotated[
        str | None, typer.Option(help="Column of the CSV file that names the images; default by its name.")
    ] = None,
    label_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Column that names the label; default by its name. More than once where each label has a "
            "column of 1 and 0."
        ),
    ] = None,
    label_depth: Annotated[
        int | None,
        typer.Option(min=1, help="Folder from the top that is the label, where that is not clear: 1, 2, …"),
    ] = None,
    label_case: Annotated[
        Literal["merge", "keep"] | None,
        typer.Option(help="Labels such as Cat and cat: one label (merge) or two (keep); default an error."),
    ] = None,
    net: Annotated[
        str | None,
        typer.Option(help="cnn, cnn_large, resnet18, resnet34, resnet50 or mobilenet_v2; default cnn."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the model's input in pixels, 16 … 384; default by the data.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Weights to start from: hf:owner/repository, a file, a run, or a version in zoo/.",
        ),
    ] = None,
    teacher: Annotated[
        list[Path] | None,
        typer.Option(help="A finished run whose answers are learned too (distillation); may be repeated."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the training images; default by their number.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="In about how many minutes it is to end; chooses the epochs."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same data, same machine: same weights.")
    ] = 0,
    validation: Annotated[float, typer.Option(min=0.01, max=0.5, help="Fraction held out.")] = 0.1,
    flip: Annotated[
        bool, typer.Option(help="Learn mirror images too; not where left and right matter, as in letters.")
    ] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write events for TensorBoard into the run's folder.")
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            help="Export the result there and make it the repository's default: "
            "<repository>/<name>/<version>, such as zoo/pets/1."
        ),
    ] = None,
) -> None:
    """Train a network on labelled images. Ctrl-C leaves a checkpoint that --resume goes on from."""
    from rich.console import Console

    from fovea.export.from_checkpoint import require_new_version
    from fovea.model.data.choices import Choices
    from fovea.model.run import TrainingOptions, run_training
    from fovea.service.inference.preprocess import configure_pillow

    configure_pillow()
    console = Console(markup=False)  # a file's name may hold brackets
    if export:
        require_new_version(export)
    options = TrainingOptions(
        out=out or Path("runs") / (data.absolute().name.split(".")[0] if data else "cifar10"),
        data=data,
        choices=Choices(path_column, tuple(label_column or ()), label_depth, label_case),
        net=net,
        size=size,
        start=start,
        teachers=teacher or [],
        epochs=epochs,
        minutes=minutes,
        seed=seed,
        validation=validation,
        flip=flip,
        resume=resume,
        tensorboard=tensorboard,
        command=format_command_line(),
    )
    result = run_training(options, console)
    if result is None:
        raise typer.Exit(130)
    if export:
        export_and_report(*result, export, default=True)
        console.print(f"next: fovea serve --models {export.parent.parent}", soft_wrap=True)
    else:
        console.print(f"next: fovea export {options.out} --out zoo/NAME/1", soft_wrap=True)
