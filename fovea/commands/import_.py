"""`fovea import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fovea.commands.command_line import format_command_line
from fovea.commands.examples import EXAMPLES


def import_(
    file: Annotated[
        Path | None, typer.Argument(help="ONNX file of an image classifier, from any tool.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="What its outputs are called: one a line, or a JSON list or map.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the model is to be called.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Repository to write to, as <name>/<next version>/model.onnx, such as zoo."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="How it wants its images: imagenet, keras-mobilenet, inception, clip or zero-one. "
            "The options below take the place of what it says."
        ),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="What is taken from each channel, in the order of the channels: A,B,C.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="What each is divided by after that: A,B,C.")] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="What pixels 0 … 255 are multiplied by first, such as 1/255; default by the size of mean "
            "and std."
        ),
    ] = None,
    bgr: Annotated[
        bool | None,
        typer.Option("--bgr/--rgb", help="Whether blue comes first; default red, or the preset's."),
    ] = None,
    resize: Annotated[int | None, typer.Option(min=1, help="Length of the shorter side, in pixels.")] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--crop",
            "--size",
            help="The middle that is kept, the input's size: 224, or height x width as 224x320. "
            "Needed where the graph takes any.",
        ),
    ] = None,
    interpolation: Annotated[
        str | None, typer.Option(help="nearest, box, bilinear, hamming, bicubic or lanczos.")
    ] = None,
    stretch: Annotated[
        bool, typer.Option("--stretch", help="Stretch to the input's size, and crop nothing.")
    ] = False,
    task: Annotated[str | None, typer.Option(help="multiclass, binary or multilabel.")] = None,
    layout: Annotated[str | None, typer.Option(help="nchw or nhwc, where its shape does not tell.")] = None,
    output: Annotated[str | None, typer.Option(help="Name of the output, where there are several.")] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Images in one sub-folder per label: how good it is, and whether the preset is right."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Keep the preset though another does clearly better on --check.")
    ] = False,
    default: Annotated[
        bool, typer.Option("--default", help="Make it the model that answers where a request names none.")
    ] = False,
) -> None:
    """Give an ONNX classifier from elsewhere all that it lacks, and prove that it still computes the same."""
    from fovea.export.importer.display import show_report
    from fovea.export.importer.foreign_model import ImportRefused
    from fovea.export.importer.graph_input import Layout
    from fovea.export.importer.inspect import ImportRequest
    from fovea.export.importer.missing_facts import find_missing_facts
    from fovea.export.importer.option_values import (
        find_preset,
        parse_channel_values,
        parse_choice,
        parse_number,
        parse_size,
    )
    from fovea.export.importer.pipeline import import_model
    from fovea.export.importer.preprocessing import PreprocessingOptions
    from fovea.service.artifact.contract import Interpolation, Task
    from fovea.service.inference.preprocess import configure_pillow

    configure_pillow()
    preprocessing = PreprocessingOptions(
        preset=None if preset is None else find_preset(preset),
        mean=None if mean is None else parse_channel_values("--mean", mean),
        std=None if std is None else parse_channel_values("--std", std),
        scale=None if scale is None else parse_number("--scale", scale),
        bgr=bgr,
        resize=resize,
        stretch=stretch,
        interpolation=None
        if interpolation is None
        else parse_choice("--interpolation", Interpolation, interpolation),
    )
    chosen_task = None if task is None else parse_choice("--task", Task, task)
    chosen_layout = None if layout is None else parse_choice("--layout", Layout, layout)
    input_size = None if size is None else parse_size("--size", size)
    required_options = {"the ONNX file": file, "--labels": labels, "--name": name, "--out": out}
    missing_options = [option for option, value in required_options.items() if value is None]
    missing_facts = find_missing_facts(None, preprocessing, None, input_size)
    if missing_options or missing_facts:  # else the file need not be read twice
        missing_facts = find_missing_facts(file, preprocessing, chosen_layout, input_size)
    if file is None or labels is None or name is None or out is None or missing_facts:
        problems = [f"`fovea import` needs {', '.join(missing_options)}"] if missing_options else []
        raise ImportRefused(f"{'; '.join([*problems, *missing_facts])}; such as: {EXAMPLES['import']}")
    report = import_model(
        ImportRequest(
            file=file,
            labels=labels,
            name=name,
            out=out,
            preprocessing=preprocessing,
            task=chosen_task,
            layout=chosen_layout,
            size=input_size,
            output=output,
            check=check,
            force=force,
            default=default,
            command=format_command_line(),
        )
    )
    show_report(report, out)
