"""A foreign file, looked at and run: all that can be known of it without labelled images."""

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
from fovea.model.data.pixels import processors
from fovea.service.artifact.contract import Task
from fovea.service.inference.preprocess import Pixels

BATCHES: Final = (1, 2, 3)
"""At which an import is compared with what it was made of."""

TOLERANCE: Final = {Arithmetic.FLOAT32: 1e-5, Arithmetic.FLOAT16: 5e-3, Arithmetic.INT8: 5e-3}
"""Largest difference of a probability, by the graph's arithmetic. float32: sums are the same, and only the
normalisation is rounded otherwise. float16 has 11 bits: where ONNX Runtime puts its casts depends on what is
around a node, and a logit near 10 that is rounded otherwise differs by 0.008, its probability by a quarter
of that; several roundings come together. int8: a normalised value between two levels may fall on either."""

_SEEN: Final = 14
"""Images that tell what the graph gives."""

_SAME_PLACE: Final = 1e-5
"""Largest difference, in proportion to the largest value, of an answer among other neighbours in a batch of
the same size: the sums are the same then, in any arithmetic."""

_EXTREME: Final = 1000.0
"""Times what the graph is normally given: logits do not stay from 0 to 1 under that."""


@dataclass(frozen=True)
class Request:
    """What is to be imported, and what was said of it."""

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
    """Accept a recipe though another does better."""
    default: bool = False
    """Make it the model that answers where a request names none."""
    command: str = "fovea import"


@dataclass(frozen=True)
class Foreign:
    """A file that has been looked at and run."""

    model: ModelProto
    """For batches of any size, if `free`, else of one image."""
    plain: Plain
    """The file as it was."""
    taken: Taken
    given: Given
    task: Task
    normalization: Normalization | None
    """Null for a graph that takes the pixels as they are."""
    free: bool
    arithmetic: Arithmetic
    facts: tuple[tuple[str, str], ...]
    """What was found, and how that is known."""

    def wrapped(self, normalization: Normalization | None) -> Wrapped:
        """The model, from pixels to probabilities."""
        return wrap(self.model, self.taken, normalization, self.given, self.task, free=self.free)

    def by_hand(self, pixels: Pixels) -> Values:
        """Probabilities of pixels (n, H, W, 3): numpy, then the file as it was, then numpy.

        A file for several images at a time gets different ones in its places, unlike where it was looked at.
        Raises `VerificationError` unless every value of a run belongs to an image of it.
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
            rows.append(whole.astype(np.float64).reshape(together, self.given.count)[: len(batch)])
        return by_hand(np.concatenate(rows), self.given.kind, self.task, self.given.total)


def look_at(request: Request, labels: Labels) -> Foreign:
    """Read it, run it, and make it free of its batch. Raises `ImportRefused` where something must be told."""
    model = read(request.file)
    taken = taken_by(model, request.layout, request.size)
    normalization = _normalization(request.wishes, taken)
    plain = Plain(model, threads=processors(), batch=taken.batch or 1)
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
    """Pixels (n, H, W, 3): black, white, and from one colour to noise, the same each time."""
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
    """Does the model give in batches what the file gives for each image alone, whoever is beside it?"""
    wanted = rows_of(plain(images)[given.name], len(images))
    if wanted is None:
        return False
    places = _different(wanted, max(BATCHES) + 1)
    if not _are_different(wanted[places], arithmetic):
        return False  # a row in the wrong place would not be seen
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
    """Is one image's answer the same whichever other is beside it in a batch of two?

    It is not where values are rounded to a scale that the whole batch shares, as by DynamicQuantizeLinear.
    """
    batches = [[place, other] for other in places if other != place]
    outputs = [free.together(images[batch])[given.name] for batch in batches]
    rows = np.stack([output.reshape(2, given.count)[0].astype(np.float64) for output in outputs])
    return bool(np.ptp(rows, axis=0).max() <= _SAME_PLACE * max(1.0, float(np.abs(wanted).max())))


def _different(rows: Values, count: int) -> list[int]:
    """The places of rows that are as far from each other as can be had."""
    places = [int(np.abs(rows - rows.mean(axis=0)).max(axis=1).argmax())]
    while len(places) < count:
        apart = np.min([np.abs(rows - rows[place]).max(axis=1) for place in places], axis=0)
        places.append(int(apart.argmax()))
    return places


def _are_different(rows: Values, arithmetic: Arithmetic) -> bool:
    """Is each of the rows told apart from every other?"""
    return not any(
        _alike(rows[one], rows[other], arithmetic) for one in range(len(rows)) for other in range(one)
    )


def _alike(said: Values, wanted: Values, arithmetic: Arithmetic) -> bool:
    """Up to rounding, in proportion to the largest value: a wrong row is off by as much as that."""
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
