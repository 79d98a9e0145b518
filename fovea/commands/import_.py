"""`fovea import`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fovea.commands.command_line import format_command_line
from fovea.commands.examples import EXAMPLES


def import_(
    source: Annotated[
        str | None,
        typer.Argument(help="ONNX file of an image classifier from any tool, or a folder with such a file."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Labels of the outputs: a file with one label per line, or a JSON list or map; default: "
            "those that the source states."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in the repository; default: that of the source.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Repository; the file is <name>/<next version>/model.onnx in it [FOVEA_MODELS, or zoo]."
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", help="File of the source if it has several, or a precision, such as fp16."),
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
    drop_background: Annotated[
        bool,
        typer.Option(
            "--drop-background",
            help="Leave out the first label, the background class of TensorFlow's ImageNet models.",
        ),
    ] = False,
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
    """Import a classifier from another tool, add what is missing, and verify the result."""
    from fovea.export.importer.display import show_report
    from fovea.export.importer.foreign_model import ImportRefused, MissingInformation
    from fovea.export.importer.graph_input import Layout
    from fovea.export.importer.missing_facts import build_refusal, find_request_questions
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
    from fovea.export.importer.sources.completion import GivenOptions, complete_request
    from fovea.export.importer.sources.resolve import resolve_source
    from fovea.service.artifact.contract import Interpolation, Task
    from fovea.service.inference.preprocess import configure_pillow

    configure_pillow()
    if source is None:
        raise ImportRefused(f"`fovea import` needs a source, such as: {EXAMPLES['import']}")
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
    options = GivenOptions(
        out=out or _find_repository(),
        preprocessing=preprocessing,
        labels=labels,
        name=name,
        task=None if task is None else parse_choice("--task", Task, task),
        layout=None if layout is None else parse_choice("--layout", Layout, layout),
        size=None if size is None else parse_size("--crop", size),
        output=output,
        settings=parse_settings(settings or ()),
        tolerance=None if tolerance is None else parse_tolerance("--tolerance", tolerance),
        check=check,
        force=force,
        default=default,
        drops_background=drop_background,
        command=format_command_line(),
    )
    with resolve_source(source, file, options.size) as resolved_source:
        request = complete_request(options, resolved_source)
        try:
            report = import_model(request)
        except MissingInformation as error:  # found on the way: all other questions go into the same message
            raise build_refusal(options.command, (), find_request_questions(request) or [error]) from None
    show_report(report, options.out)


def _find_repository() -> Path:
    """Return the repository of the settings, which need not exist yet."""
    from fovea.service.settings import ENVIRONMENT_PREFIX, Settings

    return Path(os.environ.get(f"{ENVIRONMENT_PREFIX}MODELS") or Settings.model_fields["models"].default)
