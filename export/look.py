"""A foreign file, looked at and run: all that can be known of it without labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from onnx import ModelProto

from export.any_batch import any_batch, sized
from export.foreign import Arithmetic, ImportRefused, Plain, Values, arithmetic_of, read
from export.given import Given, by_hand, given_by, rows_of, task_of
from export.label_file import Labels, require_count
from export.presets import Normalization, Wishes
from export.taken import Layout, Taken, taken_by
from export.verify import VerificationError
from export.wrap import Wrapped, wrap
from model.pixels import processors
from service.contract import Task
from service.images import Pixels

BATCHES: Final = (1, 2, 3)
"""At which an import is compared with what it was made of."""

TOLERANCE: Final = {Arithmetic.FLOAT32: 1e-5, Arithmetic.FLOAT16: 5e-3, Arithmetic.INT8: 5e-3}
"""Largest difference of a probability, by the graph's arithmetic. float32: sums are the same, and only the
normalisation is rounded otherwise. float16 has 11 bits: where ONNX Runtime puts its casts depends on what is
around a node, and a logit near 10 that is rounded otherwise differs by 0.008, its probability by a quarter
of that; several roundings come together. int8: a normalised value between two levels may fall on either."""

_SEEN: Final = 12
"""Images that tell what the graph gives."""

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
        """Probabilities of pixels (n, H, W, 3): numpy, then the file as it was, then numpy."""
        values: Values = self.normalization(pixels) if self.normalization else pixels
        rows = rows_of(self.plain(self.taken.of(values))[self.given.name], len(pixels))
        if rows is None:
            raise VerificationError(f"the output {self.given.name!r} changes its shape with the image")
        return by_hand(rows, self.given.kind, self.task)


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
        partial(_runs_alike, plain, images[: max(BATCHES)], given, arithmetic),
    )
    if free is None and (taken.batch or 1) > 1:
        raise ImportRefused(
            f"the graph takes {taken.batch} images at a time, neither more nor fewer, and could not be "
            "changed; export it with a batch of any size, or of one"
        )
    facts = (
        *taken.said,
        ("arithmetic", arithmetic.value),
        ("batch", _batch_said(taken, free is not None)),
        ("output", f"{given.name} ({given.chosen})"),
        ("values", f"{given.count} {given.kind} (as seen when it is run)"),
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
    """Pixels (n, H, W, 3) from one colour to noise, the same each time."""
    random = np.random.default_rng(0)
    pixels = np.empty((count, taken.height, taken.width, 3), np.uint8)
    for image, share in zip(pixels, np.linspace(0, 1, count, dtype=np.float32), strict=True):
        colour = random.integers(0, 256, 3, dtype=np.uint8)
        image[:] = (1 - share) * colour + share * random.integers(0, 256, image.shape, dtype=np.uint8)
    return pixels


def _runs_alike(
    plain: Plain, images: Values, given: Given, arithmetic: Arithmetic, model: ModelProto
) -> bool:
    """Does the model give in batches what the file gives for each image alone?"""
    wanted = plain(images)[given.name]
    try:
        free = Plain(model, threads=1)
        for batch in BATCHES:
            said = free.together(images[:batch])[given.name]
            if said.shape != wanted[:batch].shape or not _alike(said, wanted[:batch], arithmetic):
                return False
    except ImportRefused:
        return False
    return True


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
