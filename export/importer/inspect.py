"""Inspection of a foreign file: all facts that are known without labelled images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from fovea.export.importer.batch_check import BATCHES, is_equivalent
from fovea.export.importer.dynamic_batch import ReadTensors, make_batch_dynamic, with_input_size
from fovea.export.importer.foreign_model import (
    Arithmetic,
    Array,
    ImportRefused,
    MissingInformation,
    ReferenceModel,
    arithmetic_of,
    read_model,
)
from fovea.export.importer.graph_input import GraphInput, Layout, read_graph_input
from fovea.export.importer.graph_labels import (
    add_output,
    read_graph_labels,
    replace_map_outputs,
    require_same_order,
)
from fovea.export.importer.graph_output import (
    GraphOutput,
    ValueKind,
    choose_task,
    detect_graph_output,
    to_probabilities,
)
from fovea.export.importer.graph_resize import describe_own_resize
from fovea.export.importer.grey import to_grey
from fovea.export.importer.input_forms import prepare_input
from fovea.export.importer.label_file import Labels, read_labels, require_label_count
from fovea.export.importer.large_weights import take_large_weights
from fovea.export.importer.own_normalization import find_own_normalization
from fovea.export.importer.preprocessing import Normalization, PreprocessingOptions
from fovea.export.importer.sources.facts import Provenance
from fovea.export.importer.wrap import WrappedModel, wrap_model
from fovea.export.verification_error import VerificationError
from fovea.service.allocator import trim_heap
from fovea.service.artifact.contract import Task
from fovea.service.inference.pixels import Pixels
from fovea.service.resources.threads import get_thread_count

TOLERANCE: Final = {Arithmetic.FLOAT32: 1e-5, Arithmetic.FLOAT16: 5e-3, Arithmetic.INT8: 5e-3}
"""Maximum difference of a probability, by the graph's arithmetic.

float32: the sums are the same, and only the normalisation is rounded differently. float16 has 11 bits. The
position of ONNX Runtime's casts depends on the neighbouring nodes. A logit near 10 with another rounding
differs by 0.008, its probability by a quarter of that, and several roundings add up. int8: a normalised value
between two levels may be rounded to either.
"""

_PROBE_IMAGE_COUNT: Final = 14
"""Number of images for determining the kind of the graph's output."""

_EXTREME_FACTOR: Final = 1000.0
"""Factor on the graph's normal input; logits do not stay between 0 and 1 under it."""


@dataclass(frozen=True)
class ImportRequest:
    """An import request with its options."""

    file: Path
    labels: Path | None
    """File of the labels; None for a graph with labels of its own."""
    name: str
    out: Path
    preprocessing: PreprocessingOptions
    task: Task | None = None
    layout: Layout | None = None
    size: tuple[int, int] | None = None
    """Height and width, in pixels."""
    output: str | None = None
    """Name of the output, or of a tensor inside the graph."""
    settings: tuple[tuple[str, str], ...] = ()
    """Names and values of inputs besides the image, as given."""
    tolerance: float | None = None
    """Maximum difference of a probability from the original file; None for the usual one."""
    check: Path | None = None
    force: bool = False
    """Flag to accept a recipe although another recipe does better."""
    default: bool = False
    """Flag to make the model the default model for requests without a model name."""
    command: str = "fovea import"
    provenance: Provenance | None = None
    """Source of the file and of its facts; None for a file alone."""

    @property
    def normalization_origin(self) -> str:
        """Source or options that state the normalisation."""
        stated_origin = self.provenance.normalization if self.provenance else None
        return stated_origin or self.preprocessing.arithmetic_origin


@dataclass(frozen=True)
class ForeignModel:
    """A file after inspection."""

    model: ModelProto
    """Model for any batch size if `has_dynamic_batch`, else for one image."""
    reference: ReferenceModel
    """Original file in plain ONNX Runtime."""
    graph_input: GraphInput
    graph_output: GraphOutput
    labels: Labels
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

    def open_wrapped(self, wrapped_model: WrappedModel) -> ReferenceModel:
        """Return a wrapped model in plain ONNX Runtime."""
        return ReferenceModel(wrapped_model.model, threads=get_thread_count(), weights=self.reference.weights)

    def compute_probabilities(self, pixels: Pixels) -> Array:
        """Return the probabilities of pixels (n, H, W, 3), computed with numpy and the original file.

        A file with a fixed batch size gets different images in its places, unlike during inspection. Raises
        `VerificationError` unless every value of a run belongs to one of its images.
        """
        rows = self._run_rows(pixels, self.graph_output.name)
        return to_probabilities(rows, self.graph_output.kind, self.task, self.graph_output.total)

    def compute_logits(self, pixels: Pixels) -> Array | None:
        """Return the logits of pixels (n, H, W, 3) in the original file; None if it has only probabilities.

        Raises `VerificationError` as `compute_probabilities` does.
        """
        output = self.graph_output
        has_logits = output.kind in (ValueKind.LOGITS, ValueKind.LOG_PROBABILITIES)
        if output.logits_tensor is None and not has_logits:
            return None
        if output.kind is ValueKind.INDEPENDENT and output.count > 1 and self.task is not Task.MULTILABEL:
            return None  # the logits are those of shares of a sum
        rows = self._run_rows(pixels, output.logits_tensor or output.name)
        if self.task is Task.BINARY and output.count == 2:
            return rows[:, 1:] - rows[:, :1]  # (n, 1)
        return rows

    def prepare_values(self, pixels: Pixels) -> Array:
        """Return the graph's input for pixels (n, H, W, 3), in its layout and type."""
        return self.graph_input.from_pixel_values(
            _prepare_values(pixels, self.graph_input, self.normalization)
        )

    def _run_rows(self, pixels: Pixels, tensor: str) -> Array:
        """Return a tensor of the original file, float64 (n, count), for pixels (n, H, W, 3)."""
        images, batch_size = self.prepare_values(pixels), self.graph_input.batch_size or 1
        rows = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            full_batch = np.concatenate([batch, *([batch[-1:]] * (batch_size - len(batch)))])
            output = self.reference.run_batch(full_batch)[tensor]
            if output.size != batch_size * self.graph_output.count:
                raise VerificationError(
                    f"the output {tensor!r} has {output.size} values for {batch_size} "
                    f"images; expected {self.graph_output.count} for each"
                )
            # (images, count)
            rows.append(output.astype(np.float64).reshape(batch_size, self.graph_output.count)[: len(batch)])
        return np.concatenate(rows)


def inspect_model(request: ImportRequest) -> ForeignModel:
    """Read the file and its labels, run it, and make its batch size dynamic.

    Raises `ImportRefused` if a fact must be given as an option.
    """
    given_labels = read_labels(request.labels) if request.labels else None
    model = read_model(request.file)
    labels = _choose_labels(model, given_labels)
    replace_map_outputs(model)
    add_output(model, request.output)
    notes = prepare_input(model, dict(request.settings), request.layout)
    geometry_size = request.preprocessing.geometry_size
    graph_input = read_graph_input(model, request.layout, request.size, geometry_size, notes)
    normalization = _choose_normalization(request, graph_input)
    arithmetic = arithmetic_of(model)
    model, weights = take_large_weights(model)
    trim_heap()  # of the model with its weights inside
    reference = ReferenceModel(
        model, threads=get_thread_count(), batch_size=graph_input.batch_size or 1, weights=weights
    )
    images, extreme_images = draw_probe_images(graph_input, normalization)
    graph_output = detect_graph_output(
        model, reference, images, extreme_images, request.output, len(labels.names)
    )
    require_label_count(
        request.labels or "the graph's own list of labels", len(labels.names), graph_output.count
    )
    task, reason = choose_task(graph_output, request.task)
    repeated_image = np.repeat(images[:1], graph_input.batch_size or 1, axis=0)

    # `make_batch_dynamic` calls both functions in this thread, before it returns: the first to read tensors
    # of the unchanged file, the second for each candidate graph. A candidate may not run at all.
    def read_tensors(names: Iterable[str]) -> dict[str, Array]:
        return reference.with_outputs(*names).run_batch(repeated_image)

    dynamic_model = make_batch_dynamic(
        model,
        graph_input,
        read_tensors,
        partial(is_equivalent, reference, images, graph_output, arithmetic),
    )
    if dynamic_model is None and (graph_input.batch_size or 1) > 1:
        raise ImportRefused(
            f"the graph takes exactly {graph_input.batch_size} images at a time and cannot be converted to "
            "other batch sizes, or its answer for one image depends on the others; export it with a dynamic "
            "batch size, or with a batch of 1"
        )
    tensor = graph_output.logits_tensor
    return ForeignModel(
        model=with_input_size(model, graph_input, 1) if dynamic_model is None else dynamic_model,
        reference=reference if tensor is None else reference.with_outputs(tensor),
        graph_input=graph_input,
        graph_output=graph_output,
        labels=labels,
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
            *_find_warnings(model, graph_input, normalization, request.normalization_origin, read_tensors),
        ),
    )


def _find_warnings(
    model: ModelProto,
    graph_input: GraphInput,
    normalization: Normalization | None,
    origin: str,
    read_tensors: ReadTensors,
) -> Iterator[tuple[str, str]]:
    """Yield facts that may be mistakes. `origin` is that of the normalisation."""
    if normalization is None or not normalization.operations:
        return
    own_normalization = find_own_normalization(model, graph_input.name, read_tensors)
    if own_normalization is not None:
        levels = np.array([[[[0] * graph_input.channels]], [[[255] * graph_input.channels]]], np.uint8)
        values = normalization(levels)
        yield (
            "warning",
            "pixels are normalised twice: the graph begins with a normalisation of its own "
            f"({own_normalization}), and gets {values.min():.3g} … {values.max():.3g} from "
            f"{origin}; if it takes 0 … 255, import it with --preset raw",
        )


def _choose_labels(model: ModelProto, given_labels: Labels | None) -> Labels:
    own_labels = read_graph_labels(model)
    if given_labels:
        require_same_order(given_labels, own_labels)
        return given_labels
    if own_labels is None:
        raise MissingInformation("the file has no labels: give them with --labels")
    return own_labels


def draw_probe_images(
    graph_input: GraphInput, normalization: Normalization | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return random images as the graph takes them, and the same images far outside the usual range.

    Without a normalization there is no range to leave, and both are the same.
    """
    pixels = draw_noise(_PROBE_IMAGE_COUNT, graph_input)
    values = _prepare_values(pixels, graph_input, normalization)
    images = graph_input.from_pixel_values(values)
    if normalization is None:
        return images, images
    with np.errstate(over="ignore"):
        return images, graph_input.from_pixel_values(values * np.float32(_EXTREME_FACTOR))


def _prepare_values(pixels: Pixels, graph_input: GraphInput, normalization: Normalization | None) -> Array:
    """Return the values of pixels (n, H, W, 3) that the graph takes, (n, H, W, channels)."""
    levels: Array = to_grey(pixels) if graph_input.channels == 1 else pixels
    return normalization(levels) if normalization else levels


def _choose_normalization(request: ImportRequest, graph_input: GraphInput) -> Normalization | None:
    preprocessing = request.preprocessing
    if graph_input.dtype != np.uint8:
        normalization = preprocessing.normalization
        if graph_input.channels == 1 and not normalization.is_uniform:
            raise ImportRefused(
                f"the input {graph_input.name!r} has one channel, grey, but the normalisation differs "
                f"between channels ({request.normalization_origin}): give one number each, such as "
                "--mean 0.5 --std 0.5, and leave out --bgr"
            )
        return normalization
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
