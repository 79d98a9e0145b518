"""`fovea quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fovea.commands.command_line import format_command_line


def quantize(
    model: Annotated[Path, typer.Argument(help="Folder of a version in a repository, such as zoo/pets/1.")],
    images: Annotated[
        Path,
        typer.Option(
            help="Folder of images that the model was not trained on, in one sub-folder for each label; "
            "without sub-folders the answers are compared with the float model's."
        ),
    ],
    calibration: Annotated[
        int,
        typer.Option(
            min=8,
            max=10_000,
            help="Number of images, at most half of all, that set the ranges of the activations; the others "
            "compare both models.",
        ),
    ] = 100,
    max_loss: Annotated[
        float,
        typer.Option(
            min=0,
            max=100,
            help="Largest loss of top-1 accuracy, in percentage points; without labels, "
            "largest share of changed answers.",
        ),
    ] = 0.5,
    min_speedup: Annotated[
        float,
        typer.Option(
            min=0,
            max=100,
            help="Smallest speed, relative to the float model on this host; 0 to skip the measurement.",
        ),
    ] = 1.2,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Ignore the names of sub-folders.")
    ] = False,
    reduced_range: Annotated[
        bool | None,
        typer.Option(
            "--reduced-range/--full-range",
            help="Weights of 7 bits, for x86 processors without VNNI, whose int8 saturates; default: by this "
            "host's processor.",
        ),
    ] = None,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Convert to float16 for CUDA instead of int8.")
    ] = False,
) -> None:
    """Write the next version of a model in int8, if it is as accurate as the float model and faster."""
    from fovea.export.quantize.display import show_report
    from fovea.export.quantize.gate import Limits
    from fovea.export.quantize.pipeline import QuantizeRequest, quantize_model
    from fovea.service.inference.preprocess import configure_pillow

    configure_pillow()
    report, version_folder = quantize_model(
        QuantizeRequest(
            model=model,
            images=images,
            calibration_images=calibration,
            limits=Limits(max_loss / 100, min_speedup),
            is_unlabelled=unlabelled,
            is_reduced=reduced_range,
            is_float16=fp16,
            command=format_command_line(),
        ),
        say=lambda line: print(line, flush=True),
    )
    show_report(report, version_folder)
