"""Inspection of a foreign file: all facts that are known without labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from fovea.export.importer.dynamic_batch import make_batch_dynamic, with_input_size
from fovea.export.importer.foreign_model import (
    Arithmetic,
    Array,
    ImportRefused,
    ReferenceModel,
    arithmetic_of,
    read_model,
)
from fovea.export.importer.graph_input import GraphInput, Layout, read_graph_input
from fovea.export.importer.graph_output import (
    GraphOutput,
    choose_task,
    detect_graph_output,
    to_probabilities,
    to_rows,
)
from fovea.export.importer.graph_resize import describe_own_resize
from fovea.export.importer.label_file import Labels, require_label_count
from fovea.export.importer.preprocessing import Normalization, PreprocessingOptions
from fovea.export.importer.sources.facts import Provenance
from fovea.export.importer.wrap import WrappedModel, wrap_model
from fovea.export.verify import VerificationError
from fovea.model.data.pixels import get_thread_count
from fovea.service.artifact.contract import Task
from fovea.service.inference.pixels import Pixels

BATCHES: Final = (1, 2, 3)
"""Batch sizes at which an import is compared with the original file."""

TOLERANCE: Final = {Arithmetic.FLOAT32: 1e-5, Arithmetic.FLOAT16: 5e-3, Arithmetic.INT8: 5e-3}
"""Maximum difference of a probability, by the graph's arithmetic.

float32: the sums are the same, and only the normalisation is rounded differently. float16 has 11 bits. The
position of ONNX Runtime's casts depends on the neighbouring nodes. A logit near 10 with another rounding
differs by 0.008, its probability by a quarter of that, and several roundings add up. int8: a normalised value
between two levels may be rounded to either.
"""

_PROBE_IMAGE_COUNT: Final = 14
"""Number of images for determining the kind of the graph's output."""

_NEIGHBOUR_TOLERANCE: Final = 1e-5
"""Maximum difference of an answer with other neighbours in a batch of the same size.

The difference is relative to the largest value. The sums are the same in any arithmetic.
"""

_EXTREME_FACTOR: Final = 1000.0
"""Factor on the graph's normal input; logits do not stay between 0 and 1 under it."""


@dataclass(frozen=True)
class ImportRequest:
    """An import request with its options."""

    file: Path
    labels: Path
    name: str
    out: Path
    preprocessing: PreprocessingOptions
    task: Task | None = None
    layout: Layout | None = None
    size: tuple[int, int] | None = None
    """Height and width, in pixels."""
    output: str | None = None
    check: Path | None = None
    force: bool = False
    """Flag to accept a recipe although another recipe does better."""
    default: bool = False
    """Flag to make the model the default model for requests without a model name."""
    command: str = "fovea import"
    provenance: Provenance | None = None
    """Source of the file and of its facts; None for a file alone."""


@dataclass(frozen=True)
class ForeignModel:
    """A file after inspection."""

    model: ModelProto
    """Model for any batch size if `has_dynamic_batch`, else for one image."""
    reference: ReferenceModel
    """Original file in plain ONNX Runtime."""
    graph_input: GraphInput
    graph_output: GraphOutput
    task: Task
    normalization: Normalization | None
    """Normalisation; None for a graph that takes uint8 pixels directly."""
    has_dynamic_batch: bool
    arithmetic: Arithmetic
    facts: tuple[tuple[str, str], ...]
    """Facts with their origin."""

    def wrap(self, normalization: Normalization | None, *, merges: bool = True) -> WrappedModel:
        """Return the model from pixels to probabilities; `merges` as in `wrap_model`."""
        return wrap_model(
            self.model,
            self.graph_input,
            normalization,
            self.graph_output,
            self.task,
            dynamic_batch=self.has_dynamic_batch,
            merges=merges,
        )

    def compute_probabilities(self, pixels: Pixels) -> Array:
        """Return the probabilities of pixels (n, H, W, 3), computed with numpy and the original file.

        A file with a fixed batch size gets different images in its places, unlike during inspection. Raises
        `VerificationError` unless every value of a run belongs to one of its images.
        """
        values: Array = self.normalization(pixels) if self.normalization else pixels
        images, batch_size = self.graph_input.from_pixel_values(values), self.graph_input.batch_size or 1
        rows = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            full_batch = np.concatenate([batch, *([batch[-1:]] * (batch_size - len(batch)))])
            output = self.reference.run_batch(full_batch)[self.graph_output.name]
            if output.size != batch_size * self.graph_output.count:
                raise VerificationError(
                    f"the output {self.graph_output.name!r} has {output.size} values for {batch_size} "
                    f"images; expected {self.graph_output.count} for each"
                )
            # (images, count)
            rows.append(output.astype(np.float64).reshape(batch_size, self.graph_output.count)[: len(batch)])
        return to_probabilities(
            np.concatenate(rows), self.graph_output.kind, self.task, self.graph_output.total
        )


def inspect_model(request: ImportRequest, labels: Labels) -> ForeignModel:
    """Read the file, run it, and make its batch size dynamic.

    Raises `ImportRefused` if a fact must be given as an option.
    """
    model = read_model(request.file)
    graph_input = read_graph_input(model, request.layout, request.size, request.preprocessing.geometry_size)
    normalization = _choose_normalization(request.preprocessing, graph_input)
    reference = ReferenceModel(model, threads=get_thread_count(), batch_size=graph_input.batch_size or 1)
    images, extreme_images = _draw_probe_images(graph_input, normalization)
    graph_output = detect_graph_output(
        model, reference, images, extreme_images, request.output, len(labels.names)
    )
    require_label_count(request.labels, len(labels.names), graph_output.count)
    task, reason = choose_task(graph_output, request.task)
    arithmetic = arithmetic_of(model)
    repeated_image = np.repeat(images[:1], graph_input.batch_size or 1, axis=0)
    # `make_batch_dynamic` calls both functions in this thread, before it returns: the first to read tensors
    # of the unchanged file, the second for each candidate graph. A candidate may not run at all.
    dynamic_model = make_batch_dynamic(
        model,
        graph_input,
        lambda names: reference.with_outputs(*names).run_batch(repeated_image),
        partial(_is_equivalent, reference, images, graph_output, arithmetic),
    )
    if dynamic_model is None and (graph_input.batch_size or 1) > 1:
        raise ImportRefused(
            f"the graph takes exactly {graph_input.batch_size} images at a time and cannot be converted to "
            "other batch sizes, or its answer for one image depends on the others; export it with a dynamic "
            "batch size, or with a batch of 1"
        )
    return ForeignModel(
        model=with_input_size(model, graph_input, 1) if dynamic_model is None else dynamic_model,
        reference=reference,
        graph_input=graph_input,
        graph_output=graph_output,
        task=task,
        normalization=normalization,
        has_dynamic_batch=dynamic_model is not None,
        arithmetic=arithmetic,
        facts=(
            *graph_input.facts,
            *describe_own_resize(model, graph_input),
            ("arithmetic", arithmetic.value),
            ("batch", _describe_batch(graph_input, dynamic_model is not None)),
            ("output", f"{graph_output.name} ({graph_output.choice_reason})"),
            ("values", graph_output.description),
            ("task", f"{task} ({reason})"),
        ),
    )


def _draw_probe_images(
    graph_input: GraphInput, normalization: Normalization | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return random images as the graph takes them, and the same images far outside the usual range.

    Without a normalization there is no range to leave, and both are the same.
    """
    pixels = draw_noise(_PROBE_IMAGE_COUNT, graph_input)
    if normalization is None:
        images = graph_input.from_pixel_values(pixels)
        return images, images
    with np.errstate(over="ignore"):
        extreme_pixels = normalization(pixels) * np.float32(_EXTREME_FACTOR)
        return (
            graph_input.from_pixel_values(normalization(pixels)),
            graph_input.from_pixel_values(extreme_pixels),
        )


def _choose_normalization(
    preprocessing: PreprocessingOptions, graph_input: GraphInput
) -> Normalization | None:
    if graph_input.dtype != np.uint8:
        return preprocessing.normalization
    if preprocessing.arithmetic_options:
        raise ImportRefused(
            "the graph takes uint8 pixels and normalises them itself; leave out "
            f"{', '.join(preprocessing.arithmetic_options)}"
        )
    return None


def draw_noise(count: int, graph_input: GraphInput) -> Pixels:
    """Return pixels, uint8 (n, H, W, 3): black, white, and colours with increasing noise; always the same."""
    random = np.random.default_rng(0)
    pixels = np.zeros((count, graph_input.height, graph_input.width, 3), np.uint8)
    pixels[1] = 255
    for image, share in zip(pixels[2:], np.linspace(0, 1, count - 2, dtype=np.float32), strict=True):
        colour = random.integers(0, 256, 3, dtype=np.uint8)
        image[:] = (1 - share) * colour + share * random.integers(0, 256, image.shape, dtype=np.uint8)
    return pixels


def _is_equivalent(
    reference: ReferenceModel,
    images: Array,
    graph_output: GraphOutput,
    arithmetic: Arithmetic,
    model: ModelProto,
) -> bool:
    """Return whether the model gives in batches the results of the file for single images."""
    expected_rows = to_rows(reference(images)[graph_output.name], len(images))
    if expected_rows is None:
        return False
    indices = _pick_different_rows(expected_rows, max(BATCHES) + 1)
    if not _are_different(expected_rows[indices], arithmetic):
        return False  # a row in the wrong place would not be noticed
    try:
        candidate = ReferenceModel(model, threads=1)
        batches = [indices[:batch] for batch in BATCHES]
        for batch in (*batches, *(one[::-1] for one in batches)):
            output = candidate.run_batch(images[batch])[graph_output.name]
            if output.size != len(batch) * graph_output.count:
                return False
            if not _are_close(
                output.reshape(len(batch), graph_output.count), expected_rows[batch], arithmetic
            ):
                return False
        return all(
            _is_independent(candidate, graph_output, images, index, indices, expected_rows)
            for index in indices
        )
    except ImportRefused:
        return False


def _is_independent(
    candidate: ReferenceModel,
    graph_output: GraphOutput,
    images: Array,
    index: int,
    indices: list[int],
    expected_rows: Array,
) -> bool:
    """Return whether one image's answer is independent of the other image in a batch of two.

    The answer depends on the other image if values are rounded to a scale that the batch shares, as by
    DynamicQuantizeLinear.
    """
    batches = [[index, other] for other in indices if other != index]
    outputs = [candidate.run_batch(images[batch])[graph_output.name] for batch in batches]
    # (pairs, count)
    rows = np.stack([output.reshape(2, graph_output.count)[0].astype(np.float64) for output in outputs])
    return bool(
        np.ptp(rows, axis=0).max() <= _NEIGHBOUR_TOLERANCE * max(1.0, float(np.abs(expected_rows).max()))
    )


def _pick_different_rows(rows: Array, count: int) -> list[int]:
    """Return the positions of rows that are as far apart as possible."""
    indices = [int(np.abs(rows - rows.mean(axis=0)).max(axis=1).argmax())]
    while len(indices) < count:
        distances = np.min([np.abs(rows - rows[index]).max(axis=1) for index in indices], axis=0)
        indices.append(int(distances.argmax()))
    return indices


def _are_different(rows: Array, arithmetic: Arithmetic) -> bool:
    """Return whether all rows are distinguishable."""
    return not any(
        _are_close(rows[one], rows[other], arithmetic) for one in range(len(rows)) for other in range(one)
    )


def _are_close(actual: Array, expected: Array, arithmetic: Arithmetic) -> bool:
    """Return whether the values agree up to rounding, relative to the largest value.

    A wrong row differs by about as much as the largest value.
    """
    tolerance = 1e-5 if arithmetic is Arithmetic.FLOAT32 else 1e-2
    return bool(np.abs(actual - expected).max() <= tolerance * max(1.0, float(np.abs(expected).max())))


def _describe_batch(graph_input: GraphInput, is_dynamic: bool) -> str:
    if is_dynamic and graph_input.batch_size is None:
        return f"any size (the file says so; verified at {_join_numbers(BATCHES)})"
    if is_dynamic:
        proof = f"made dynamic and verified at {_join_numbers(BATCHES)}"
        return f"any size (the file says {graph_input.batch_size}; {proof})"
    origin = (
        "the file says so"
        if graph_input.batch_size
        else "the file says any size, but answers depend on the batch"
    )
    return f"1 ({origin}; it cannot be made dynamic: images run one after the other)"


def _join_numbers(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
