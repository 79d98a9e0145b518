"""Facts that an import needs and that neither the file nor the options state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fovea.export.importer.foreign_model import ImportRefused, MissingInformation, read_model
from fovea.export.importer.graph_input import Layout, read_graph_input
from fovea.export.importer.preprocessing import PreprocessingOptions


def find_missing_facts(
    file: Path | None,
    preprocessing: PreprocessingOptions,
    layout: Layout | None,
    size: tuple[int, int] | None,
) -> list[str]:
    """Return a sentence for each fact that is neither in the file nor in the options.

    The sentences cover the graph's input. Raises `ImportRefused` if the file cannot be read.
    """
    sentences = []
    input_size, is_uint8 = size or preprocessing.geometry_size or (224, 224), False
    if file is not None:
        try:
            graph_input = read_graph_input(read_model(file), layout, size, preprocessing.geometry_size)
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
