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
        Path | None,
        typer.Option(help="Labels of the outputs: a file with one label per line, or a JSON list or map."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in the repository.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Repository, such as zoo; the file is <name>/<next version>/model.onnx in it."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Preprocessing: imagenet, keras-mobilenet, inception, clip, zero-one, raw or caffe. The "
            "options below override single values of the preset."
        ),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean to subtract from each channel, in channel order: A,B,C.")
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="Standard deviation by which each channel is then divided: A,B,C.")
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="Factor for pixels 0 … 255 before mean and std, such as 1/255; default: derived from mean "
            "and std."
        ),
    ] = None,
    bgr: Annotated[
        bool | None,
        typer.Option("--bgr/--rgb", help="Order of the channels; default: that of the preset, or RGB."),
    ] = None,
    resize: Annotated[
        int | None, typer.Option(min=1, help="Length of the shorter side before the crop, in pixels.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--crop",
            "--size",
            help="Size of the centre crop and of the input, in pixels: 224, or height x width as 224x320. "
            "Required if the graph takes any size.",
        ),
    ] = None,
    interpolation: Annotated[
        str | None, typer.Option(help="Resize filter: nearest, box, bilinear, hamming, bicubic or lanczos.")
    ] = None,
    stretch: Annotated[
        bool, typer.Option("--stretch", help="Stretch images to the input's size instead of cropping.")
    ] = False,
    geometry: Annotated[
        str | None,
        typer.Option(
            help="All steps from an image to the input, in place of --resize, --stretch and --interpolation: "
            "'resize stretch 256 x 256 bilinear, crop 224 x 224'."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Kind of classifier: multiclass, binary or multilabel.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="Order of the input's axes, nchw or nhwc, if its shape is ambiguous.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(help="Name of the output with the labels, if there are several, or of an inner tensor."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Value of an input besides the image, as NAME=VALUE; may be repeated."),
    ] = None,
    tolerance: Annotated[
        str | None,
        typer.Option(
            help="Largest difference of a probability from the file's, for a network that is sensitive to "
            "rounding; default: 1e-5, or 5e-3 for float16 and int8."
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images in one sub-folder per label, to measure accuracy and verify the preset."
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Keep the preset although another is clearly better on the images of --check."
        ),
    ] = False,
    default: Annotated[
        bool, typer.Option("--default", help="Make it the default model, for requests that name no model.")
    ] = False,
) -> None:
    """Import an ONNX classifier from another tool, add what is missing, and verify the result."""
    from fovea.export.importer.display import show_report
    from fovea.export.importer.foreign_model import MissingInformation
    from fovea.export.importer.graph_input import Layout
    from fovea.export.importer.inspect import ImportRequest
    from fovea.export.importer.missing_facts import build_refusal, find_missing_facts, has_own_labels
    from fovea.export.importer.option_values import (
        find_preset,
        parse_channel_values,
        parse_choice,
        parse_geometry,
        parse_number,
        parse_settings,
        parse_size,
        parse_tolerance,
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
        geometry=None if geometry is None else parse_geometry("--geometry", geometry),
    )
    chosen_task = None if task is None else parse_choice("--task", Task, task)
    chosen_layout = None if layout is None else parse_choice("--layout", Layout, layout)
    input_size = None if size is None else parse_size("--crop", size)
    chosen_settings = parse_settings(settings or ())
    required_options = {"the ONNX file": file, "--labels": labels, "--name": name, "--out": out}
    if labels is None and has_own_labels(file):
        del required_options["--labels"]
    missing_options = [option for option, value in required_options.items() if value is None]

    def find_questions(path: Path | None) -> list[MissingInformation]:
        return find_missing_facts(
            path,
            preprocessing,
            chosen_layout,
            input_size,
            dict(chosen_settings),
            labels=labels,
            output=output,
            task=chosen_task,
        )

    questions = find_questions(None)
    if missing_options or questions:
        # The file may state what the options lack. Only then is it read here; the import reads it again.
        questions = find_questions(file)
    if file is None or name is None or out is None or missing_options or questions:
        raise build_refusal(EXAMPLES["import"], missing_options, questions)
    try:
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
                settings=chosen_settings,
                tolerance=None if tolerance is None else parse_tolerance("--tolerance", tolerance),
                check=check,
                force=force,
                default=default,
                command=format_command_line(),
            )
        )
    except MissingInformation as error:  # found on the way: all other questions go into the same message
        raise build_refusal(EXAMPLES["import"], [], find_questions(file) or [error]) from None
    show_report(report, out)
