"""Inspection of a foreign file: all facts that are known without labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from onnx import ModelProto

from fovea.export.importer.dynamic_batch import any_batch, sized
from fovea.export.importer.foreign_model import Arithmetic, ImportRefused, Plain, Values, arithmetic_of, read
from fovea.export.importer.graph_input import Layout, Taken, taken_by
from fovea.export.importer.graph_output import Given, by_hand, given_by, rows_of, task_of
from fovea.export.importer.label_file import Labels, require_count
from fovea.export.importer.preprocessing import Normalization, Wishes
from fovea.export.importer.wrap import Wrapped, wrap
from fovea.export.verify import VerificationError
from fovea.model.data.pixels import get_thread_count
from fovea.service.artifact.contract import Task
from fovea.service.inference.preprocess import Pixels

BATCHES: Final = (1, 2, 3)
"""Batch sizes at which an import is compared with the original file."""

TOLERANCE: Final = {Arithmetic.FLOAT32: 1e-5, Arithmetic.FLOAT16: 5e-3, Arithmetic.INT8: 5e-3}
"""Maximum difference of a probability, by the graph's arithmetic.

float32: the sums are the same, and only the normalisation is rounded differently. float16 has 11 bits. The
position of ONNX Runtime's casts depends on the neighbouring nodes. A logit near 10 with another rounding
differs by 0.008, its probability by a quarter of that, and several roundings add up. int8: a normalised value
between two levels may be rounded to either.
"""

_SEEN: Final = 14
"""Number of images for determining the kind of the graph's output."""

_SAME_PLACE: Final = 1e-5
"""Maximum difference of an answer with other neighbours in a batch of the same size.

The difference is relative to the largest value. The sums are the same in any arithmetic.
"""

_EXTREME: Final = 1000.0
"""Factor on the graph's normal input; logits do not stay between 0 and 1 under it."""


@dataclass(frozen=True)
class Request:
    """An import request with its options."""

    file: Path
    labels: Path
    name: str
    out: Path
    wishes: Wishes
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


@dataclass(frozen=True)
class Foreign:
    """A file after inspection."""

    model: ModelProto
    """Model for any batch size if `free`, else for one image."""
    plain: Plain
    """Original file in plain ONNX Runtime."""
    taken: Taken
    given: Given
    task: Task
    normalization: Normalization | None
    """Normalisation; None for a graph that takes uint8 pixels directly."""
    free: bool
    arithmetic: Arithmetic
    facts: tuple[tuple[str, str], ...]
    """Facts with their origin."""

    def wrapped(self, normalization: Normalization | None) -> Wrapped:
        """Return the model from pixels to probabilities."""
        return wrap(self.model, self.taken, normalization, self.given, self.task, free=self.free)

    def by_hand(self, pixels: Pixels) -> Values:
        """Return the probabilities of pixels (n, H, W, 3), computed with numpy and the original file.

        A file with a fixed batch size gets different images in its places, unlike during inspection. Raises
        `VerificationError` unless every value of a run belongs to one of its images.
        """
        values: Values = self.normalization(pixels) if self.normalization else pixels
        images, together = self.taken.of(values), self.taken.batch or 1
        rows = []
        for start in range(0, len(images), together):
            batch = images[start : start + together]
            filled = np.concatenate([batch, *([batch[-1:]] * (together - len(batch)))])
            whole = self.plain.together(filled)[self.given.name]
            if whole.size != together * self.given.count:
                raise VerificationError(
                    f"the output {self.given.name!r} has {whole.size} values for {together} images, and not "
                    f"{self.given.count} for each"
                )
            # (images, count)
            rows.append(whole.astype(np.float64).reshape(together, self.given.count)[: len(batch)])
        return by_hand(np.concatenate(rows), self.given.kind, self.task, self.given.total)


def look_at(request: Request, labels: Labels) -> Foreign:
    """Read the file, run it, and make its batch size dynamic.

    Raises `ImportRefused` if a fact must be given as an option.
    """
    model = read(request.file)
    taken = taken_by(model, request.layout, request.size)
    normalization = _normalization(request.wishes, taken)
    plain = Plain(model, threads=get_thread_count(), batch=taken.batch or 1)
    pixels = noise(_SEEN, taken)
    images = taken.of(normalization(pixels) if normalization else pixels)
    with np.errstate(over="ignore"):
        extreme = taken.of(normalization(pixels) * np.float32(_EXTREME)) if normalization else images
    given = given_by(model, plain, images, extreme, request.output, len(labels.names))
    require_count(request.labels, len(labels.names), given.count)
    task, why = task_of(given, request.task)
    arithmetic = arithmetic_of(model)
    alone = np.repeat(images[:1], taken.batch or 1, axis=0)
    free = any_batch(
        model,
        taken,
        lambda names: plain.seeing(*names).together(alone),
        partial(_runs_alike, plain, images, given, arithmetic),
    )
    if free is None and (taken.batch or 1) > 1:
        raise ImportRefused(
            f"the graph takes {taken.batch} images at a time, neither more nor fewer, and could not be "
            "changed, or what it says of one depends on the others; export it with a batch of any size, or "
            "of one"
        )
    facts = (
        *taken.said,
        ("arithmetic", arithmetic.value),
        ("batch", _batch_said(taken, free is not None)),
        ("output", f"{given.name} ({given.chosen})"),
        ("values", given.described),
        ("task", f"{task} ({why})"),
    )
    return Foreign(
        model=sized(model, taken, 1) if free is None else free,
        plain=plain,
        taken=taken,
        given=given,
        task=task,
        normalization=normalization,
        free=free is not None,
        arithmetic=arithmetic,
        facts=facts,
    )


def _normalization(wishes: Wishes, taken: Taken) -> Normalization | None:
    if taken.dtype != np.uint8:
        return wishes.normalization
    if wishes.arithmetic:
        raise ImportRefused(
            "the graph takes uint8 pixels and normalises them itself; leave out "
            f"{', '.join(wishes.arithmetic)}"
        )
    return None


def noise(count: int, taken: Taken) -> Pixels:
    """Return pixels, uint8 (n, H, W, 3): black, white, and colours with increasing noise; always the same."""
    random = np.random.default_rng(0)
    pixels = np.zeros((count, taken.height, taken.width, 3), np.uint8)
    pixels[1] = 255
    for image, share in zip(pixels[2:], np.linspace(0, 1, count - 2, dtype=np.float32), strict=True):
        colour = random.integers(0, 256, 3, dtype=np.uint8)
        image[:] = (1 - share) * colour + share * random.integers(0, 256, image.shape, dtype=np.uint8)
    return pixels


def _runs_alike(
    plain: Plain, images: Values, given: Given, arithmetic: Arithmetic, model: ModelProto
) -> bool:
    """Return whether the model gives in batches the results of the file for single images."""
    wanted = rows_of(plain(images)[given.name], len(images))
    if wanted is None:
        return False
    places = _different(wanted, max(BATCHES) + 1)
    if not _are_different(wanted[places], arithmetic):
        return False  # a row in the wrong place would not be noticed
    try:
        free = Plain(model, threads=1)
        batches = [places[:batch] for batch in BATCHES]
        for batch in (*batches, *(one[::-1] for one in batches)):
            said = free.together(images[batch])[given.name]
            if said.size != len(batch) * given.count:
                return False
            if not _alike(said.reshape(len(batch), given.count), wanted[batch], arithmetic):
                return False
        return all(_is_alone(free, given, images, place, places, wanted) for place in places)
    except ImportRefused:
        return False


def _is_alone(
    free: Plain, given: Given, images: Values, place: int, places: list[int], wanted: Values
) -> bool:
    """Return whether one image's answer is independent of the other image in a batch of two.

    The answer depends on the other image if values are rounded to a scale that the batch shares, as by
    DynamicQuantizeLinear.
    """
    batches = [[place, other] for other in places if other != place]
    outputs = [free.together(images[batch])[given.name] for batch in batches]
    # (pairs, count)
    rows = np.stack([output.reshape(2, given.count)[0].astype(np.float64) for output in outputs])
    return bool(np.ptp(rows, axis=0).max() <= _SAME_PLACE * max(1.0, float(np.abs(wanted).max())))


def _different(rows: Values, count: int) -> list[int]:
    """Return the positions of rows that are as far apart as possible."""
    places = [int(np.abs(rows - rows.mean(axis=0)).max(axis=1).argmax())]
    while len(places) < count:
        apart = np.min([np.abs(rows - rows[place]).max(axis=1) for place in places], axis=0)
        places.append(int(apart.argmax()))
    return places


def _are_different(rows: Values, arithmetic: Arithmetic) -> bool:
    """Return whether all rows are distinguishable."""
    return not any(
        _alike(rows[one], rows[other], arithmetic) for one in range(len(rows)) for other in range(one)
    )


def _alike(said: Values, wanted: Values, arithmetic: Arithmetic) -> bool:
    """Return whether the values agree up to rounding, relative to the largest value.

    A wrong row differs by about as much as the largest value.
    """
    share = 1e-5 if arithmetic is Arithmetic.FLOAT32 else 1e-2
    return bool(np.abs(said - wanted).max() <= share * max(1.0, float(np.abs(wanted).max())))


def _batch_said(taken: Taken, free: bool) -> str:
    if free and taken.batch is None:
        return f"any size (the file says so; proven at {_and(BATCHES)})"
    if free:
        return f"any size (the file says {taken.batch}; made free, and proven at {_and(BATCHES)})"
    own = "the file says so" if taken.batch else "the file says any, but it answers one alone"
    return f"1 ({own}; it could not be made free: images run one after the other)"


def _and(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
