"""The command line of `fovea import`: parsing of options and display of results."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console

from fovea.export.importer.foreign_model import ImportRefused, NotTold, read
from fovea.export.importer.graph_input import Layout, taken_by
from fovea.export.importer.inspect import Request
from fovea.export.importer.pipeline import Report
from fovea.export.importer.pipeline import import_model as run
from fovea.export.importer.preprocessing import Wishes, number, preset_named, side, triple
from fovea.export.importer.recipe_check import Checked
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
    wishes = Wishes(
        preset=preset_named(preset) if preset is not None else None,
        mean=triple("--mean", mean) if mean is not None else None,
        std=triple("--std", std) if std is not None else None,
        scale=number("--scale", scale) if scale is not None else None,
        bgr=bgr,
        resize=resize,
        stretch=stretch,
        interpolation=_one_of("--interpolation", Interpolation, interpolation),
    )
    kinds = _one_of("--task", Task, task), _one_of("--layout", Layout, layout)
    sides = side("--size", size) if size is not None else None
    given = {"the ONNX file": file, "--labels": labels, "--name": name, "--out": out}
    absent = [option for option, value in given.items() if value is None]
    untold = []
    if absent or _untold(None, wishes, None, sides):  # else this extra reading of the file is not needed
        untold = _untold(file, wishes, kinds[1], sides)
    if absent or untold:
        needed = [f"`fovea import` needs {', '.join(absent)}"] if absent else []
        raise ImportRefused(f"{'; '.join([*needed, *untold])}; such as: {example}")
    if file is None or labels is None or name is None or out is None:
        raise RuntimeError("what is absent was told")
    report = run(
        Request(
            file=file,
            labels=labels,
            name=name,
            out=out,
            wishes=wishes,
            task=kinds[0],
            layout=kinds[1],
            size=sides,
            output=output,
            check=check,
            force=force,
            default=default,
            command=command,
        )
    )
    show(report, out)


def _untold(
    file: Path | None, wishes: Wishes, layout: Layout | None, size: tuple[int, int] | None
) -> list[str]:
    """Return a sentence for each fact that is neither in the file nor in the options.

    The sentences cover the graph's input. Raises `ImportRefused` if the file cannot be read.
    """
    sentences = []
    sides, takes_bytes = size or (224, 224), False
    if file is not None:
        try:
            taken = taken_by(read(file), layout, size)
            sides, takes_bytes = (taken.height, taken.width), taken.dtype == np.uint8
        except NotTold as error:
            sentences.append(str(error))
    questions: list[Callable[[], object]] = [lambda: wishes.geometry(*sides)]
    if not takes_bytes:
        questions.insert(0, lambda: wishes.normalization)
    for question in questions:
        try:
            question()
        except NotTold as error:
            sentences.append(str(error))
        except ImportRefused:  # wrong options are reported once no option is missing
            continue
    return sentences


Known = TypeVar("Known", bound=StrEnum)


def _one_of(option: str, kind: type[Known], text: str | None) -> Known | None:
    known = [member.value for member in kind]
    if text is not None and text.lower() not in known:
        raise ImportRefused(f"{option} is {text!r}; it takes {', '.join(known)}")
    return None if text is None else kind(text.lower())


def show(report: Report, out: Path) -> None:
    """Print the facts that were read, given and assumed, one per line, then the measurements."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for what, said in report.facts:
        console.print(f"{what:<10}  {said}")
    for agreed in report.agreement:
        console.print(
            f"batch {agreed.batch}: probabilities agree with the file's to {agreed.probabilities:.1e}"
        )
    console.print(
        f"golden set: {report.golden.images} images, logits to {report.golden.logit_difference:.1e}"
    )
    if report.check:
        _show_check(console, report.check)
    console.print(f"wrote {out / report.model / report.version / MODEL_FILE}, {report.bytes / 1e6:.1f} MB")
    console.print(f"next: fovea serve --models {out}")


def _show_check(console: Console, check: Checked) -> None:
    console.print(f"top-1 {check.top1:.2%}, top-5 {check.top5:.2%} of {check.images} images ({check.data})")
    if len(check.others) > 1:
        console.print(f"recipes on {check.tried} of them:")
        for recipe, (top1, true) in check.others.items():
            console.print(f"  {recipe:<24}  top-1 {top1:.1%}, the true label has {true:.3f}")
    if check.unreadable:
        console.print(f"{len(check.unreadable)} files cannot be read, and were left out:")
        for path, reason in check.unreadable.items():
            console.print(f"  {path.encode(errors='replace').decode()}: {reason}")
