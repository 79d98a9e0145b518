"""Facts that an import needs and that neither the file nor the options state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Final

import numpy as np
from onnx import ModelProto

from fovea.export.importer.foreign_model import (
    ImportRefused,
    MissingInformation,
    ReferenceModel,
    read_model,
)
from fovea.export.importer.graph_input import GraphInput, Layout, read_graph_input
from fovea.export.importer.graph_labels import add_output, read_graph_labels, replace_map_outputs
from fovea.export.importer.graph_output import choose_task, detect_graph_output
from fovea.export.importer.input_forms import prepare_input
from fovea.export.importer.inspect import ImportRequest, draw_probe_images
from fovea.export.importer.label_file import read_labels
from fovea.export.importer.large_weights import take_large_weights
from fovea.export.importer.preprocessing import ZERO_ONE, PreprocessingOptions
from fovea.service.allocator import trim_heap
from fovea.service.artifact.contract import Task
from fovea.service.resources.threads import get_thread_count

_USUAL_SIZE: Final = (224, 224)
"""Height and width, in pixels, for a graph that takes any size."""

_OPTION_EXAMPLES: Final = {"--labels": "--labels labels.txt", "--name": "--name pets"}


def has_own_labels(file: Path | None) -> bool:
    """Return whether the graph in a file holds labels itself."""
    return file is not None and read_graph_labels(read_model(file)) is not None


def has_label_names(file: Path) -> bool:
    """Return whether the graph in a file holds labels itself, and not only the numbers of its outputs."""
    labels = read_graph_labels(read_model(file))
    return labels is not None and labels.names != tuple(map(str, range(len(labels.names))))


def find_missing_facts(
    file: Path | None,
    preprocessing: PreprocessingOptions,
    layout: Layout | None,
    size: tuple[int, int] | None,
    settings: Mapping[str, str],
    *,
    labels: Path | None = None,
    output: str | None = None,
    task: Task | None = None,
    has_geometry: bool = False,
) -> list[MissingInformation]:
    """Return a sentence for each fact that is neither in the file nor in the options.

    `settings` are values of inputs besides the image. `has_geometry` says that the source states how images
    are resized. Raises `ImportRefused` if the file cannot be read.
    """
    questions: list[MissingInformation] = []
    input_size, is_uint8 = size or preprocessing.geometry_size or _USUAL_SIZE, False
    if file is not None:
        model = read_model(file)
        try:
            prepare_input(model, settings, layout)
            graph_input = read_graph_input(model, layout, size, preprocessing.geometry_size)
            size = input_size = (graph_input.height, graph_input.width)
            is_uint8 = graph_input.dtype == np.uint8
        except MissingInformation as error:
            questions.append(error)
        questions += _find_output_questions(model, layout, size, labels, output, task)
    checks: list[Callable[[], object]] = []
    if not has_geometry:
        checks.append(lambda: preprocessing.build_geometry(*input_size))
    if not is_uint8:
        checks.insert(0, lambda: preprocessing.normalization)
    for run_check in checks:
        try:
            run_check()
        except MissingInformation as error:
            questions.append(error)
        except ImportRefused:  # wrong options are reported once no option is missing
            continue
    return questions


def _find_output_questions(
    model: ModelProto,
    layout: Layout | None,
    size: tuple[int, int] | None,
    labels: Path | None,
    output: str | None,
    task: Task | None,
) -> list[MissingInformation]:
    """Return what must be asked about the outputs of a graph whose input is in the usual form.

    The graph runs with the usual layout, size and normalisation where its own are not known yet. Other faults
    are left to the import.
    """
    own_labels = read_graph_labels(model)
    replace_map_outputs(model)
    add_output(model, output)
    try:
        graph_input = _guess_input(model, layout, size)
        known_labels = read_labels(labels) if labels else own_labels
        normalization = None if graph_input.dtype == np.uint8 else ZERO_ONE.normalization
        model, weights = take_large_weights(model)
        trim_heap()  # of the model with its weights inside
        reference = ReferenceModel(
            model, threads=get_thread_count(), batch_size=graph_input.batch_size or 1, weights=weights
        )
        images, extreme_images = draw_probe_images(graph_input, normalization)
        if known_labels is None and len(model.graph.output) > 1 and output is None:
            return []  # the number of labels tells which output is meant
        count = len(known_labels.names) if known_labels else 0
        graph_output = detect_graph_output(model, reference, images, extreme_images, output, count)
        choose_task(graph_output, task)
    except MissingInformation as error:
        return [error]
    except ImportRefused:
        return []
    return []


def _guess_input(model: ModelProto, layout: Layout | None, size: tuple[int, int] | None) -> GraphInput:
    """Return the graph's input, with the usual layout and size for what is not known."""
    for guessed_layout, guessed_size in product((layout, Layout.NCHW), (size, _USUAL_SIZE)):
        try:
            return read_graph_input(model, guessed_layout, guessed_size)
        except MissingInformation:
            continue
    raise ImportRefused("the input is not known")


def find_request_questions(request: ImportRequest) -> list[MissingInformation]:
    """Return a sentence for each fact that neither the file nor a request states."""
    return find_missing_facts(
        request.file,
        request.preprocessing,
        request.layout,
        request.size,
        dict(request.settings),
        labels=request.labels,
        output=request.output,
        task=request.task,
        has_geometry=request.provenance is not None and request.provenance.steps is not None,
    )


def build_refusal(
    command: str,
    missing_options: Sequence[str],
    questions: Sequence[MissingInformation],
    reasons: Sequence[str] = (),
) -> ImportRefused:
    """Return an error that lists everything that is missing, with an example that extends `command`.

    `reasons` say why the source does not state it.
    """
    sentences = [f"`fovea import` needs {', '.join(missing_options)}"] if missing_options else []
    sentences += map(str, questions)
    explanation = f" ({'; '.join(reasons)})" if reasons else ""
    examples = [_OPTION_EXAMPLES[option] for option in missing_options]
    examples += dict.fromkeys(one.example for one in questions if one.example not in command)
    return ImportRefused(f"{'; '.join(sentences)}{explanation}; such as: {' '.join([command, *examples])}")
