"""Prediction: encoded images, or rows of a tensor, to probabilities, with one loaded model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fovea.service.artifact.contract import Task
from fovea.service.artifact.inputs import InputTensor
from fovea.service.errors import BadRequest, Internal, ModelError, RequestError
from fovea.service.image_warnings import ImageWarning
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.drift import brightness_of
from fovea.service.inference.engine import Engine, Floats, Values
from fovea.service.inference.preprocess import decode_image
from fovea.service.runners.messages import Answer, Image, Item, Load, Loaded, Plan, Query, Report, Work
from fovea.service.runners.shared_memory import Stored, fetch, fetch_into

_BATCH_MAX: Final = {"cpu": 4, "cuda": 32}
"""Default number of images in one model call.

On a CPU, larger batches gain nothing and delay other requests.
"""

_BATCH_BYTES: Final = {"cpu": 256 << 10, "cuda": 1 << 40}
"""Limit of the encoded bytes in one model call.

A batch of thumbnails saves time. Large photographs take long to decode one after the other, and a batch of
them saves nothing.
"""


class Model:
    """A model file that is loaded, warmed up and checked against its golden set."""

    def __init__(
        self,
        path: Path,
        plan: Plan,
        memory: DecodeMemory,
        *,
        file: Path | None = None,
        stamp: Sequence[int] = (),
        bodies: int = -1,
    ) -> None:
        """Load, warm up and check a model file.

        See `Engine.load` for `file` and `stamp`. `bodies` is the descriptor of the file with stored images.

        Raises `ModelError` that names the file.
        """
        started = time.monotonic()
        self._engine = Engine.load(
            path,
            provider=plan.provider,
            threads=plan.threads,
            wide_threads=plan.wide_threads,
            file=file,
            fingerprint=stamp,
        )
        self.contract = self._engine.contract
        batch_max = plan.batch_max or _BATCH_MAX[self._engine.provider]
        batch_max = min(batch_max, self._engine.batch_limit or batch_max)
        try:
            self._engine.warm_up(batch_max)
            proof = self._engine.check_golden_set()
        except ModelError as error:
            raise type(error)(f"{path}: {error}") from None
        self._tensors = {tensor.name: tensor for tensor in self._engine.tensors}
        self._image_pixels = plan.image_pixels
        self._memory = memory
        self._bodies = bodies
        self._map: Callable[..., Iterable[Any]] = map
        if plan.decode_threads > 1:
            self._map = ThreadPoolExecutor(plan.decode_threads, thread_name_prefix="decode").map
        self.loaded = Loaded(
            contract=self.contract.to_json(),
            provider=self._engine.provider,
            batch_max=batch_max,
            batch_bytes=_BATCH_BYTES[self._engine.provider],
            seconds=time.monotonic() - started,
            golden=asdict(proof),
        )

    @classmethod
    def of(cls, load: Load, memory: DecodeMemory, bodies: int = -1) -> Model:
        """Load the model that a `Load` message describes. Raises `ModelError` that names the file."""
        file = Path(load.file)
        return cls(Path(load.path), load.plan, memory, file=file, stamp=load.stamp, bodies=bodies)

    def answer(self, images: Sequence[Item], *, alone: bool = False) -> Report:
        """Decode and run one batch.

        A bad image gets an error as its answer and does not affect the other images.

        `alone` promises that nothing else runs: the call may use all processors.

        Raises `ModelError` when the graph does not run.
        """
        timed = list(self._map(self._prepare, images))
        logits = any(isinstance(image, Query) and image.logits for image in images)
        calls = {}
        for tensor in self._engine.tensors:
            inputs = [
                (one, *times) for one, *times in timed if isinstance(one, _Input) and one.tensor is tensor
            ]
            if inputs:
                calls[tensor.name] = self._run(tensor, inputs, alone=alone, logits=logits)
        # Each iterator yields the answers in the order of its inputs, which is the order of the images.
        answers = [
            next(calls[one.tensor.name].answers) if isinstance(one, _Input) else one for one, *_ in timed
        ]
        inference = sum(call.seconds for call in calls.values())
        ran = sum(call.images for call in calls.values())
        return Report(answers, [seconds for _, _, seconds in timed], inference, ran)

    def _prepare(self, image: Item) -> tuple[_Input | RequestError, float, float]:
        """Prepare an image as model input, and return also the start (monotonic) and the duration in seconds.

        A row of a tensor needs no decoding.
        """
        began = time.monotonic()
        outcome: _Input | RequestError
        try:
            outcome = self._input(image)
        except RequestError as error:
            outcome = error
        return outcome, began, time.monotonic() - began

    def _input(self, image: Item) -> _Input:
        """Decode an image, or take a row of a tensor. Raises `RequestError`."""
        geometry = self.contract.input
        content = image.content if isinstance(image, Query) else image
        logits = isinstance(image, Query) and image.logits
        if isinstance(image, Query) and image.tensor:
            tensor = self._tensors[image.tensor]
            return _Input(tensor, content, "", geometry.width, geometry.height, logits)
        encoded = fetch(self._bodies, content) if isinstance(content, Stored) else content
        decoded = decode_image(encoded, geometry, max_pixels=self._image_pixels, memory=self._memory)
        tensor, (width, height) = self._engine.tensors[0], (decoded.width, decoded.height)
        return _Input(tensor, decoded.pixels, decoded.format, width, height, logits, decoded.warnings)

    def _run(
        self, tensor: InputTensor, inputs: Sequence[tuple[_Input, float, float]], *, alone: bool, logits: bool
    ) -> _Call:
        """Run the model once on inputs of the same tensor."""
        started = time.monotonic()
        batch = np.empty((len(inputs), *tensor.shape), tensor.dtype)
        for row, (one, *_) in zip(batch, inputs, strict=True):
            self._fill(row, one.values)
        outputs = self._engine.run_tensor(tensor, batch, exclusive=alone, with_logits=logits)
        said = _said(outputs, None if tensor.preprocessing else batch, self.contract.task)
        inference = time.monotonic() - started
        answers = (
            Answer(
                one.format,
                one.width,
                one.height,
                brightness,
                entropy,
                probabilities,
                ranking,
                Work(began, seconds, started, inference, len(batch)),
                own,
                one.warnings,
            )
            for (one, began, seconds), (brightness, entropy, probabilities, ranking, own) in zip(
                inputs, said, strict=True
            )
        )
        finite: npt.NDArray[np.bool_] = np.all(np.isfinite(outputs[0]), axis=1)
        for own in outputs[1:]:  # logits may be -inf where the probability is 0: an error only if requested
            unasked = np.array([not one.logits for one, *_ in inputs])
            finite = np.logical_and(finite, np.logical_or(unasked, np.isfinite(own).all(axis=1)))
        return _Call(_refuse(answers, finite, tensor), inference, len(batch))

    def _fill(self, row: Values, values: Values | Image) -> None:
        """Write the values of one image into its row of the batch."""
        if isinstance(values, Stored):
            fetch_into(self._bodies, values, row.data.cast("B"))
        elif isinstance(values, np.ndarray):
            row[...] = values
        else:
            row.data.cast("B")[:] = values


class _Input(NamedTuple):
    """The model input of one image, and properties of the image."""

    tensor: InputTensor
    values: Values | Image
    """Array of the tensor's shape, or its bytes."""
    format: str
    width: int
    height: int
    logits: bool
    """True if the caller wants the logits too."""
    warnings: Sequence[ImageWarning] = ()


class _Call(NamedTuple):
    """The result of one model call."""

    answers: Iterator[Answer | RequestError]
    seconds: float
    images: int


def _refuse(
    answers: Iterator[Answer], finite: Iterable[bool], tensor: InputTensor
) -> Iterator[Answer | RequestError]:
    """Replace answers that are not finite by errors.

    JSON cannot represent NaN or infinity, and any sum or mean that includes such a value would not be a
    number.

    For a floating-point tensor the caller sent the faulty values (`BadRequest`). All 256 values of a pixel
    are legal, so for pixels the model is at fault (`Internal`).
    """
    error: RequestError
    if np.issubdtype(tensor.dtype, np.floating):
        error = BadRequest(
            f"the model's answer is not finite: NaN, infinite or too large values in {tensor.name!r}"
        )
    else:
        error = Internal("the model's answer to this image is not finite (NaN or infinite)")
    return (answer if good else error for answer, good in zip(answers, finite, strict=True))


_Said: TypeAlias = tuple[float | None, float, Any, Any, Any]


def _said(outputs: Sequence[Floats], pixels: Values | None, task: Task) -> Iterator[_Said]:
    """Yield brightness, entropy, probabilities, ranking and logits of each image.

    The last three are memory views; the logits are None if the model did not return them.
    """
    probabilities, *logits = outputs
    rankings = np.argsort(-probabilities, kind="stable").astype(np.int32)
    count = len(probabilities)
    return zip(
        [None] * count if pixels is None else brightness_of(pixels).tolist(),
        entropy_of(probabilities, task).tolist(),
        (row.data for row in np.ascontiguousarray(probabilities)),
        (row.data for row in rankings),
        (row.data for row in np.ascontiguousarray(logits[0])) if logits else [None] * count,
        strict=True,
    )


def entropy_of(probabilities: Floats, task: Task) -> Floats:
    """Return the normalised entropy of each row, float32 (n,), from 0 (certain) to 1 (all labels equal).

    This is Shannon's entropy divided by its maximum. For `multilabel` it is the mean over the labels.
    """
    if task is Task.MULTILABEL:
        undecided: Floats = (_bits(probabilities) + _bits(1 - probabilities)).mean(axis=1)
    else:
        most = np.log2(max(2, probabilities.shape[1]))  # a model of one label: always certain
        undecided = _bits(probabilities).sum(axis=1) / np.float32(most)
    return undecided


def _bits(probabilities: Floats) -> Floats:
    bits: Floats = -probabilities * np.log2(np.maximum(probabilities, np.finfo(np.float32).tiny))
    return bits
