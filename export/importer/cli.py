"""The command line of `fovea import`: parsing of options and display of results."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console

from fovea.export.importer.foreign_model import ImportRefused, MissingInformation, read_model
from fovea.export.importer.graph_input import Layout, read_graph_input
from fovea.export.importer.inspect import ImportRequest
from fovea.export.importer.pipeline import ImportReport
from fovea.export.importer.pipeline import import_model as run
from fovea.export.importer.preprocessing import (
    PreprocessingOptions,
    find_preset,
    parse_channel_values,
    parse_number,
    parse_size,
)
from fovea.export.importer.recipe_check import CheckReport
from fovea.service.artifact.contract import Interpolation, Task
from fovea.service.artifact.repository import MODEL_FILE
from fovea.service.inference.preprocess import configure_pillow


def import_model(
    file: Path | None,
    *,
    labels: Path | None,
    name: str | None,
    out: Path | None,
    preset: str | None,
    mean: str | None,
    std: str | None,
    scale: str | None,
    bgr: bool | None,
    resize: int | None,
    size: str | None,
    interpolation: str | None,
    stretch: bool,
    task: str | None,
    layout: str | None,
    output: str | None,
    check: Path | None,
    force: bool,
    default: bool,
    command: str,
    example: str,
) -> None:
    """Import a model and print the result.

    Raises `ImportRefused` and the errors of `export.importer.pipeline`. All missing options are reported at
    once, with `example`, a complete call.
    """
    configure_pillow()
    preprocessing = PreprocessingOptions(
        preset=find_preset(preset) if preset is not None else None,
        mean=parse_channel_values("--mean", mean) if mean is not None else None,
        std=parse_channel_values("--std", std) if std is not None else None,
        scale=parse_number("--scale", scale) if scale is not None else None,
        bgr=bgr,
        resize=resize,
        stretch=stretch,
        interpolation=_parse_choice("--interpolation", Interpolation, interpolation),
    )
    task_and_layout = _parse_choice("--task", Task, task), _parse_choice("--layout", Layout, layout)
    input_size = parse_size("--size", size) if size is not None else None
    required_options = {"the ONNX file": file, "--labels": labels, "--name": name, "--out": out}
    missing_options = [option for option, value in required_options.items() if value is None]
    missing_facts = []
    if missing_options or _find_missing_facts(
        None, preprocessing, None, input_size
    ):  # else this extra reading of the file is not needed
        missing_facts = _find_missing_facts(file, preprocessing, task_and_layout[1], input_size)
    if missing_options or missing_facts:
        problems = [f"`fovea import` needs {', '.join(missing_options)}"] if missing_options else []
        raise ImportRefused(f"{'; '.join([*problems, *missing_facts])}; such as: {example}")
    if file is None or labels is None or name is None or out is None:
        raise RuntimeError("what is absent was told")
    report = run(
        ImportRequest(
            file=file,
            labels=labels,
            name=name,
            out=out,
            preprocessing=preprocessing,
            task=task_and_layout[0],
            layout=task_and_layout[1],
            size=input_size,
            output=output,
            check=check,
            force=force,
            default=default,
            command=command,
        )
    )
    show_report(report, out)


def _find_missing_facts(
    file: Path | None,
    preprocessing: PreprocessingOptions,
    layout: Layout | None,
    size: tuple[int, int] | None,
) -> list[str]:
    """Return a sentence for each fact that is neither in the file nor in the options.

    The sentences cover the graph's input. Raises `ImportRefused` if the file cannot be read.
    """
    sentences = []
    input_size, is_uint8 = size or (224, 224), False
    if file is not None:
        try:
            graph_input = read_graph_input(read_model(file), layout, size)
            input_size, is_uint8 = (graph_input.height, graph_input.width), graph_input.dtype == np.uint8
        except MissingInformation as error:
            sentences.append(str(error))
    checks: list[Callable[[], object]] = [lambda: preprocessing.build_geometry(*input_size)]
    if not is_uint8:
        checks.insert(0, lambda: preprocessing.normalization)
    for run_check in checks:
        try:
            run_check()
        except MissingInformation as error:
            sentences.append(str(error))
        except ImportRefused:  # wrong options are reported once no option is missing
            continue
    return sentences


EnumT = TypeVar("EnumT", bound=StrEnum)


def _parse_choice(option: str, enum_class: type[EnumT], text: str | None) -> EnumT | None:
    choices = [member.value for member in enum_class]
    if text is not None and text.lower() not in choices:
        raise ImportRefused(f"{option} is {text!r}; it takes {', '.join(choices)}")
    return None if text is None else enum_class(text.lower())


def show_report(report: ImportReport, out: Path) -> None:
    """Print the facts that were read, given and assumed, one per line, then the measurements."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for fact_name, fact in report.facts:
        console.print(f"{fact_name:<10}  {fact}")
    for agreement in report.agreement:
        console.print(
            f"batch {agreement.batch}: probabilities agree with the file's to {agreement.probabilities:.1e}"
        )
    console.print(
        f"golden set: {report.golden.images} images, logits to {report.golden.logit_difference:.1e}"
    )
    if report.check:
        _show_check_report(console, report.check)
    console.print(f"wrote {out / report.model / report.version / MODEL_FILE}, {report.bytes / 1e6:.1f} MB")
    console.print(f"next: fovea serve --models {out}")


def _show_check_report(console: Console, report: CheckReport) -> None:
    console.print(
        f"top-1 {report.top1:.2%}, top-5 {report.top5:.2%} of {report.images} images ({report.data})"
    )
    if len(report.others) > 1:
        console.print(f"recipes on {report.tried} of them:")
        for recipe, (top1, true) in report.others.items():
            console.print(f"  {recipe:<24}  top-1 {top1:.1%}, the true label has {true:.3f}")
    if report.unreadable:
        console.print(f"{len(report.unreadable)} files cannot be read, and were left out:")
        for path, reason in report.unreadable.items():
            console.print(f"  {path.encode(errors='replace').decode()}: {reason}")
