"""The options of an import, completed by the facts of its source. Options come before facts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fovea.export.importer.foreign_model import ImportRefused, MissingInformation, read_model
from fovea.export.importer.graph_input import Layout, read_graph_input
from fovea.export.importer.input_forms import prepare_input
from fovea.export.importer.inspect import ImportRequest
from fovea.export.importer.missing_facts import (
    build_refusal,
    find_missing_facts,
    has_label_names,
    has_own_labels,
)
from fovea.export.importer.preprocessing import PreprocessingOptions
from fovea.export.importer.sources.background import drop_background, drop_background_label
from fovea.export.importer.sources.facts import Provenance, Source, SourceFacts, StatedGeometry
from fovea.service.artifact.contract import Task
from fovea.service.artifact.geometry import FractionCropStep, Interpolation, ResizeStep, Step


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
    settings: tuple[tuple[str, str], ...] = ()
    """Names and values of inputs besides the image."""
    tolerance: float | None = None


def complete_request(options: GivenOptions, source: Source) -> ImportRequest:
    """Return the request with the source's facts for everything that the options leave open.

    Raises `ImportRefused` that names everything that neither states, with an example of a command.
    """
    if options.drops_background:
        source = replace(drop_background(source), original=source.original or source.file)
    if source.facts.labels and options.labels is None and has_label_names(source.file):
        source = replace(source, facts=replace(source.facts, labels=None))
    facts = source.facts
    labels = options.labels or (facts.labels.value if facts.labels else None)
    name = options.name or facts.name
    task = options.task or (facts.task.value if facts.task else None)
    layout, size, is_uint8 = _complete_input(options, source)
    preprocessing, provenance = _complete_preprocessing(options, source, is_uint8=is_uint8)
    if size is not None and options.size is None and facts.geometry:
        provenance = replace(provenance, size=facts.geometry.origin)
    if layout is not None and options.layout is None and facts.layout:
        provenance = replace(provenance, layout=facts.layout.origin)

    def find_questions(file: Path | None) -> list[MissingInformation]:
        return find_missing_facts(
            file,
            preprocessing,
            layout,
            size,
            dict(options.settings),
            labels=labels,
            output=options.output,
            task=task,
            has_geometry=provenance.steps is not None,
        )

    missing_options = [] if labels or has_own_labels(source.file) else ["--labels"]
    if name is None:
        missing_options.append("--name")
    # The file may state what the options lack. Only then is its graph run here; the import runs it again.
    if name is None or missing_options or find_questions(None):
        questions = find_questions(source.file)
        if name is None or missing_options or questions:
            raise build_refusal(options.command, missing_options, questions, facts.problems)
    if options.drops_background and labels:
        labels = drop_background_label(labels, source)
    return ImportRequest(
        file=source.file,
        labels=labels,
        name=name,
        out=options.out,
        preprocessing=preprocessing,
        task=task,
        layout=layout,
        size=size,
        output=options.output,
        settings=options.settings,
        tolerance=options.tolerance,
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
    is_uint8: bool


def _complete_input(options: GivenOptions, source: Source) -> _CompletedInput:
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
        notes = prepare_input(model, dict(options.settings), layout)
        try:
            graph_input = read_graph_input(model, layout, size, given_size, notes)
        except MissingInformation:
            layout = layout or (source.facts.layout.value if source.facts.layout else None)
            size = size or (None if given_size else stated_size)
            graph_input = read_graph_input(model, layout, size, given_size, notes)
    except MissingInformation:  # it is asked for with everything else
        return _CompletedInput(layout, size, False)
    graph_size = (graph_input.height, graph_input.width)
    if geometry and uses_geometry and stated_size != graph_size:
        raise ImportRefused(
            f"{geometry.origin} makes images of {geometry.value.height} x {geometry.value.width} pixels, but "
            f"the graph takes {graph_size[0]} x {graph_size[1]}; give --preset, or --resize, --crop and "
            "--interpolation"
        )
    return _CompletedInput(layout, size, graph_input.dtype == np.uint8)


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
        original=source.original,
        note=facts.note,
        labels=facts.labels.origin if facts.labels and options.labels is None else None,
        licence=facts.licence,
        library=facts.library,
        task=facts.task.origin if facts.task and options.task is None else None,
    )
    if source.reference:
        if preprocessing != PreprocessingOptions() or _changes_size(options, facts):
            reason = "options replace the source's preprocessing"
            provenance = replace(provenance, not_compared=reason)
        else:
            provenance = replace(provenance, reference=source.reference)
    elif source.network and options.output:
        reason = "--output chooses a tensor that its own network may not give"
        provenance = replace(provenance, not_compared=reason)
    else:
        provenance = replace(provenance, network=source.network, not_compared=source.not_compared)
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
        if size is not None and not isinstance(step, FractionCropStep):
            new_step = replace(
                step,
                height=round(step.height * size[0] / geometry.height),
                width=round(step.width * size[1] / geometry.width),
            )
        if interpolation is not None and isinstance(new_step, ResizeStep):
            new_step = replace(new_step, interpolation=interpolation)
        steps.append(new_step)
    return tuple(steps)


def _find_interpolation(steps: tuple[Step, ...]) -> Interpolation | None:
    return next((step.interpolation for step in steps if isinstance(step, ResizeStep)), None)


def _changes_size(options: GivenOptions, facts: SourceFacts) -> bool:
    """Return whether the options set another size of the input than the source's."""
    stated_size = (facts.geometry.value.height, facts.geometry.value.width) if facts.geometry else None
    return options.size not in (None, stated_size)


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
