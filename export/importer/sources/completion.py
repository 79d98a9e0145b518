"""The options of an import, completed by the facts of its source. Options come before facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fovea.export.importer.foreign_model import ImportRefused, MissingInformation, read_model
from fovea.export.importer.graph_input import Layout, read_graph_input
from fovea.export.importer.inspect import ImportRequest
from fovea.export.importer.preprocessing import PreprocessingOptions
from fovea.export.importer.sources.background import drop_background, drop_background_label
from fovea.export.importer.sources.facts import Provenance, Source, SourceFacts, StatedGeometry
from fovea.service.artifact.contract import Task
from fovea.service.artifact.geometry import Interpolation, ResizeStep, Step


@dataclass(frozen=True)
class GivenOptions:
    """The options of the command line; None means not given."""

    out: Path
    preprocessing: PreprocessingOptions
    labels: Path | None = None
    name: str | None = None
    task: Task | None = None
    layout: Layout | None = None
    size: tuple[int, int] | None = None
    """Height and width, in pixels."""
    output: str | None = None
    check: Path | None = None
    force: bool = False
    default: bool = False
    drops_background: bool = False
    """Flag to leave out the first label of the graph."""
    command: str = "fovea import"


def complete_request(options: GivenOptions, source: Source) -> ImportRequest:
    """Return the request with the source's facts for everything that the options leave open.

    Raises `ImportRefused` that names everything that neither states, with an example of a command.
    """
    if options.drops_background:
        source = drop_background(source)
    facts = source.facts
    problems: list[str] = []
    missing_flags: list[str] = []
    labels = options.labels or (facts.labels.value if facts.labels else None)
    name = options.name or facts.name
    graph_input = _complete_input(options, source, problems, missing_flags)
    layout, size, is_uint8 = graph_input.layout, graph_input.size, graph_input.is_uint8
    preprocessing, provenance = _complete_preprocessing(options, source, is_uint8=is_uint8)
    if size is not None and options.size is None and facts.geometry and provenance.steps is not None:
        provenance = replace(provenance, size=facts.geometry.origin)
    if layout is not None and options.layout is None and facts.layout:
        provenance = replace(provenance, layout=facts.layout.origin)
    _find_missing_preprocessing(
        preprocessing,
        graph_input.graph_size,
        problems,
        missing_flags,
        is_uint8=is_uint8,
        has_steps=provenance.steps is not None,
    )
    missing = [option for option, value in {"--labels": labels, "--name": name}.items() if value is None]
    if labels is None or name is None or problems:
        if missing:
            problems.insert(0, f"`fovea import` needs {', '.join(missing)}")
        flags = [
            *(["--labels", "labels.txt"] if labels is None else ()),
            *(["--name", "pets"] if name is None else ()),
            *dict.fromkeys(missing_flags),
        ]
        reasons = f" ({'; '.join(facts.problems)})" if facts.problems else ""
        raise ImportRefused(f"{'; '.join(problems)}{reasons}; such as: {' '.join([options.command, *flags])}")
    if options.drops_background:
        labels = drop_background_label(labels, source)
    return ImportRequest(
        file=source.file,
        labels=labels,
        name=name,
        out=options.out,
        preprocessing=preprocessing,
        task=options.task or (facts.task.value if facts.task else None),
        layout=layout,
        size=size,
        output=options.output,
        check=options.check,
        force=options.force,
        default=options.default,
        command=options.command,
        provenance=provenance,
    )


class _CompletedInput(NamedTuple):
    """The graph's input with the options and facts that it needs."""

    layout: Layout | None
    """Layout by the options or the source, if the graph leaves it open."""
    size: tuple[int, int] | None
    """Height and width by the options or the source, if the graph leaves them open."""
    graph_size: tuple[int, int] | None
    """Height and width of the input; None if nothing states them."""
    is_uint8: bool


def _complete_input(
    options: GivenOptions, source: Source, problems: list[str], missing_flags: list[str]
) -> _CompletedInput:
    """Return the input with the options and facts that its graph needs.

    The facts of the source count for what the graph leaves open. Raises `ImportRefused` if the graph's own
    size contradicts them.
    """
    model = read_model(source.file)
    geometry = source.facts.geometry
    stated_size = (geometry.value.height, geometry.value.width) if geometry else None
    given_size = options.preprocessing.geometry_size
    uses_geometry = options.preprocessing.preset is None and options.size is None and given_size is None
    layout, size = options.layout, options.size
    try:
        graph_input = read_graph_input(model, layout, size, given_size)
    except MissingInformation:
        layout = layout or (source.facts.layout.value if source.facts.layout else None)
        size = size or given_size or stated_size
        assumed_layout = layout
        for _ in range(2):  # layout and size are reported one after the other
            try:
                graph_input = read_graph_input(model, assumed_layout, size)
                break
            except MissingInformation as error:
                is_layout = assumed_layout is None and "--layout" in str(error)
                problems.append(str(error))
                missing_flags.append("--layout nchw" if is_layout else "--size 224")
                if not is_layout:
                    return _CompletedInput(layout, size, None, False)
                assumed_layout = Layout.NCHW
    graph_size = (graph_input.height, graph_input.width)
    if geometry and uses_geometry and stated_size != graph_size:
        raise ImportRefused(
            f"{geometry.origin} makes images of {geometry.value.height} x {geometry.value.width} pixels, but "
            f"the graph takes {graph_size[0]} x {graph_size[1]}; give --preset, or --resize, --crop and "
            "--interpolation"
        )
    return _CompletedInput(layout, size, graph_size, graph_input.dtype == np.uint8)


def _find_missing_preprocessing(
    preprocessing: PreprocessingOptions,
    size: tuple[int, int] | None,
    problems: list[str],
    missing_flags: list[str],
    *,
    is_uint8: bool,
    has_steps: bool,
) -> None:
    """Append a sentence and an example for each part of the preprocessing that nothing states."""
    checks: list[Callable[[], object]] = []
    if not is_uint8:
        checks.append(lambda: preprocessing.normalization)
    if not has_steps:
        checks.append(lambda: preprocessing.build_geometry(*(size or (224, 224))))
    for run_check in checks:
        try:
            run_check()
        except MissingInformation as error:
            problems.append(str(error))
            missing_flags.append("--scale 1/255" if "--scale 1/255" in str(error) else "--preset imagenet")
        except ImportRefused:  # wrong options are reported once no option is missing
            continue


# --- preprocessing -------------------------------------------------------------------------------


def _complete_preprocessing(
    options: GivenOptions, source: Source, *, is_uint8: bool
) -> tuple[PreprocessingOptions, Provenance]:
    """Return the preprocessing options with the source's values, and the origin of all facts."""
    facts, preprocessing = source.facts, options.preprocessing
    provenance = Provenance(
        source=source.origin,
        file=source.file_name,
        is_local=source.is_local,
        note=facts.note,
        labels=facts.labels.origin if facts.labels and options.labels is None else None,
        licence=facts.licence,
        library=facts.library,
        task=facts.task.origin if facts.task and options.task is None else None,
    )
    if source.reference:
        if _has_options(preprocessing):
            reason = "options replace the source's preprocessing"
            provenance = replace(provenance, not_compared=reason)
        else:
            provenance = replace(provenance, reference=source.reference)
    elif facts.library in ("transformers", "timm"):
        provenance = replace(
            provenance, not_compared=f"its own pipeline needs {facts.library}, which is not installed"
        )
    if preprocessing.preset is not None:  # a preset replaces the source's preprocessing as a whole
        return preprocessing, provenance
    if facts.normalization and not is_uint8:
        given = preprocessing.arithmetic_options
        preprocessing = _complete_normalization(preprocessing, facts)
        provenance = replace(provenance, normalization=", ".join([facts.normalization.origin, *given]))
    if facts.geometry and preprocessing.geometry is None:
        given_geometry = preprocessing.geometry_origin
        stated = facts.geometry.value
        steps = None
        if preprocessing.stretch or preprocessing.resize:
            interpolation = preprocessing.interpolation or _find_interpolation(stated.steps)
            preprocessing = replace(preprocessing, interpolation=interpolation)
        else:
            steps = adapt_steps(stated, preprocessing.interpolation, options.size)
        origins = [facts.geometry.origin, *([given_geometry] if given_geometry else ())]
        provenance = replace(provenance, geometry=", ".join(origins), steps=steps)
    return preprocessing, provenance


def adapt_steps(
    geometry: StatedGeometry, interpolation: Interpolation | None, size: tuple[int, int] | None
) -> tuple[Step, ...]:
    """Return the steps of a source with another filter or for another size.

    A box that is larger or smaller than the input keeps its proportion to the input.
    """
    steps: list[Step] = []
    for step in geometry.steps:
        new_step = step
        if size is not None:
            new_step = replace(
                new_step,
                height=round(step.height * size[0] / geometry.height),
                width=round(step.width * size[1] / geometry.width),
            )
        if interpolation is not None and isinstance(new_step, ResizeStep):
            new_step = replace(new_step, interpolation=interpolation)
        steps.append(new_step)
    return tuple(steps)


def _find_interpolation(steps: tuple[Step, ...]) -> Interpolation | None:
    return next((step.interpolation for step in steps if isinstance(step, ResizeStep)), None)


def _has_options(preprocessing: PreprocessingOptions) -> bool:
    return preprocessing != PreprocessingOptions()


def _complete_normalization(preprocessing: PreprocessingOptions, facts: SourceFacts) -> PreprocessingOptions:
    if facts.normalization is None:
        return preprocessing
    normalization = facts.normalization.value
    scale = preprocessing.scale
    if scale is None and not (preprocessing.mean and preprocessing.std):
        scale = normalization.scale
    return replace(
        preprocessing,
        mean=preprocessing.mean or normalization.mean,
        std=preprocessing.std or normalization.std,
        scale=scale,
        bgr=normalization.bgr if preprocessing.bgr is None else preprocessing.bgr,
    )
