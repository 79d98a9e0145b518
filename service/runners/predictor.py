"""Prediction: encoded images, or rows of a tensor, to probabilities, with one loaded model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from fovea.service.artifact.contract import Task
from fovea.service.artifact.inputs import InputTensor
from fovea.service.artifact.model_file import MemoryFile
from fovea.service.errors import (
    BadRequest,
    DeadlineExceeded,
    Internal,
    ModelError,
    NoEmbedding,
    RequestError,
)
from fovea.service.image_warnings import ImageWarning
from fovea.service.inference.boxes import Boxes, check_inside
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.engine import Engine, Floats, Values
from fovea.service.inference.engine_cache import lock_engine_cache
from fovea.service.inference.known import compute_known_scores
from fovea.service.inference.pixels import brightness_of
from fovea.service.inference.preprocess import UprightImage, decode_image, open_upright
from fovea.service.providers import PROVIDERS
from fovea.service.runners.batch_messages import (
    Answer,
    BatchReport,
    BoxAnswers,
    Image,
    ImageRequest,
    ImageTiming,
    Item,
)
from fovea.service.runners.load_messages import LoadCommand, LoadedModel, ProcessPlan
from fovea.service.runners.shared_memory import SharedRef, read_shared, read_shared_into

_DEFAULT_BATCH_MAX: Final = {False: 4, True: 32}
"""Default number of images in one model call, without and with a GPU.

On a CPU, larger batches gain nothing and delay other requests.
"""

_MAX_BATCH_BYTES: Final = {False: 256 << 10, True: 1 << 40}
"""Limit of the encoded bytes in one model call, without and with a GPU.

A batch of thumbnails saves time. Large photographs take long to decode one after the other, and a batch of
them saves nothing.
"""


_TINY: Final = np.finfo(np.float32).tiny
"""Smallest normal float32: its logarithm is finite."""


class Predictor:
    """A model file that is loaded, warmed up and checked against its golden set."""

    def __init__(
        self,
        path: Path,
        plan: ProcessPlan,
        memory: DecodeMemory,
        *,
        file: Path | None = None,
        fingerprint: Sequence[int] = (),
        weights_file: MemoryFile | None = None,
        bodies_descriptor: int = -1,
    ) -> None:
        """Load, warm up and check a model file.

        See `Engine.load` for `file`, `fingerprint` and `weights_file`. `bodies_descriptor` is the descriptor
        of the shared memory from which images are read (`service.runners.shared_memory`).

        Raises `ModelError` that names the file.
        """
        started_at = time.monotonic()
        self._engine = Engine.load(
            path,
            provider=plan.provider,
            threads=plan.threads,
            wide_threads=plan.wide_threads,
            engine_cache=plan.engine_cache,
            file=file,
            fingerprint=fingerprint,
            weights_file=weights_file,
        )
        self.contract = self._engine.contract
        batch_max, batch_bytes = _find_batch_limits(self._engine, plan)
        try:
            self._engine.warm_up(batch_max)
            proof = self._engine.check_golden_set()
        except ModelError as error:
            raise type(error)(f"{path}: {error}") from None
        self._tensors = {tensor.name: tensor for tensor in self._engine.tensors}
        self._image_pixels = plan.image_pixels
        self._memory = memory
        self._bodies_descriptor = bodies_descriptor
        # `_prepare_image` may run in several threads at once: it must not change `self`.
        self._map_images: Callable[..., Iterable[Any]] = map
        if plan.decode_threads > 1:
            self._map_images = ThreadPoolExecutor(plan.decode_threads, thread_name_prefix="decode").map
        self.loaded_model = LoadedModel(
            contract_json=self.contract.to_json(),
            provider=self._engine.provider,
            batch_max=batch_max,
            batch_bytes=batch_bytes,
            load_seconds=time.monotonic() - started_at,
            golden_differences=asdict(proof),
        )

    @classmethod
    def from_load(cls, load: LoadCommand, memory: DecodeMemory, bodies_descriptor: int = -1) -> Predictor:
        """Load the model that a `LoadCommand` message describes. Raises `ModelError` that names the file."""
        file = Path(load.file)
        with lock_engine_cache(load.plan.engine_cache):
            return cls(
                Path(load.path),
                load.plan,
                memory,
                file=file,
                fingerprint=load.fingerprint,
                weights_file=load.weights_file,
                bodies_descriptor=bodies_descriptor,
            )

    def predict_batch(
        self, images: Sequence[Item], *, exclusive: bool = False, deadlines: Sequence[float | None] = ()
    ) -> BatchReport:
        """Decode and run one batch. Several threads may call this at once.

        A bad image gets an error as its answer and does not affect the other images.

        `exclusive` promises that no other batch runs: the call may use all processors. If another batch runs
        all the same, both are slower.

        `deadlines` are those of the images (monotonic, in seconds); an image with boxes gets no further batch
        after its deadline. None, or no `deadlines`, for no deadline.

        Raises `ModelError` when the graph does not run.
        """
        requests = [image for image in images if isinstance(image, ImageRequest)]
        if any(request.boxes is not None for request in requests):
            return self._predict_with_boxes(images, deadlines or [None] * len(images), exclusive=exclusive)
        return self._predict_inputs(
            list(self._map_images(self._prepare_image, images)),
            exclusive=exclusive,
            include_logits=any(request.include_logits for request in requests),
        )

    def predict_stream(self, images: Iterable[Image]) -> BatchReport:
        """Decode and run one batch like `predict_batch`, and take each image when the one before is decoded.

        So one encoded image is in memory at a time, unless the plan has several `decode_threads`.
        """
        inputs = list(self._map_images(self._prepare_image, images))
        return self._predict_inputs(inputs, exclusive=False, include_logits=False)

    def _predict_inputs(
        self,
        timed_inputs: Sequence[tuple[_Input | RequestError, float, float]],
        *,
        exclusive: bool,
        include_logits: bool,
    ) -> BatchReport:
        """Run the model once for each tensor among the inputs. Errors among them stay in their places."""
        calls = {}
        for tensor in self._engine.tensors:
            inputs = [
                (one, started_at, seconds)
                for one, started_at, seconds in timed_inputs
                if isinstance(one, _Input) and one.tensor is tensor
            ]
            if inputs:
                calls[tensor.name] = self._run_tensor(
                    tensor, inputs, exclusive=exclusive, include_logits=include_logits
                )
        # Each iterator yields the answers in the order of its inputs, which is the order of the images.
        answers = [
            next(calls[one.tensor.name].answers) if isinstance(one, _Input) else one
            for one, *_ in timed_inputs
        ]
        inference = sum(call.seconds for call in calls.values())
        image_count = sum(call.image_count for call in calls.values())
        return BatchReport(answers, [seconds for _, _, seconds in timed_inputs], inference, image_count)

    def _predict_with_boxes(
        self, images: Sequence[Item], deadlines: Sequence[float | None], *, exclusive: bool
    ) -> BatchReport:
        """Run a batch in which images have boxes: each of these on its own, and the others together."""
        plain_images: list[Item] = []
        box_reports = []
        for image, deadline in zip(images, deadlines, strict=True):
            if isinstance(image, ImageRequest) and image.boxes is not None:
                is_alone = exclusive and len(images) == 1
                box_reports.append(self._predict_boxes(image, image.boxes, deadline, exclusive=is_alone))
            else:
                plain_images.append(image)
        reports = [*box_reports, *([self.predict_batch(plain_images)] if plain_images else [])]
        box_outcomes = ((one.answers[0], one.decode_seconds[0]) for one in box_reports)
        plain_outcomes = zip(reports[-1].answers, reports[-1].decode_seconds, strict=True)
        outcomes = [
            next(
                box_outcomes
                if isinstance(image, ImageRequest) and image.boxes is not None
                else plain_outcomes
            )
            for image in images
        ]
        return BatchReport(
            [answer for answer, _ in outcomes],
            [seconds for _, seconds in outcomes],
            sum(report.inference_seconds for report in reports),
            max(report.batch_size for report in reports),
        )

    def _predict_boxes(
        self, image: ImageRequest, boxes: Boxes, deadline: float | None, *, exclusive: bool
    ) -> BatchReport:
        """Decode an image once, and classify its boxes, as many at once as a batch has images.

        Only one batch of boxes is in memory at a time. A box that fails fails the image, and so does a
        deadline that passes before the last batch: nobody waits for the others.
        """
        started_at = box_started_at = time.monotonic()
        # The session for exclusive calls runs single images only.
        batch_max = 1 if exclusive and self._engine.has_exclusive_session else self.loaded_model.batch_max
        geometry, tensor = self.contract.input, self._engine.tensors[0]
        inference = 0.0
        answers: list[Answer] = []
        outcome: BoxAnswers | RequestError
        try:
            self._check_embedding(image)
            with self._open_upright(image, boxes) as upright:
                check_inside(boxes, upright.image.size)
                for start in range(0, len(boxes), batch_max):
                    if deadline is not None and time.monotonic() >= deadline:
                        raise DeadlineExceeded(f"{start} of {len(boxes)} boxes were classified in time")
                    inputs = []
                    for box in boxes[start : start + batch_max]:
                        decoded = upright.decode_box(box, geometry)
                        box_input = _Input(
                            tensor,
                            decoded.pixels,
                            "",
                            decoded.width,
                            decoded.height,
                            image.include_logits,
                            image.include_embedding,
                            decoded.warnings,
                        )
                        now = time.monotonic()
                        inputs.append((box_input, box_started_at, now - box_started_at))
                        box_started_at = now
                    call = self._run_tensor(
                        tensor, inputs, exclusive=exclusive, include_logits=image.include_logits
                    )
                    inference += call.seconds
                    for answer in call.answers:
                        if isinstance(answer, RequestError):
                            raise type(answer)(f"box {len(answers)}: {answer}")
                        answers.append(answer)
                    box_started_at = time.monotonic()
                outcome = BoxAnswers(answers, upright.format, *upright.image.size, upright.warnings)
        except RequestError as error:
            outcome = error.with_traceback(None)  # its frames would keep the image alive
        decode = time.monotonic() - started_at - inference
        return BatchReport([outcome], [decode], inference, min(batch_max, len(answers)))

    def _open_upright(self, image: ImageRequest, boxes: Boxes) -> AbstractContextManager[UprightImage]:
        content = image.content
        return open_upright(
            read_shared(self._bodies_descriptor, content) if isinstance(content, SharedRef) else content,
            self.contract.input,
            boxes,
            max_pixels=self._image_pixels,
            memory=self._memory,
        )

    def _prepare_image(self, image: Item) -> tuple[_Input | RequestError, float, float]:
        """Return the model input of an image or an error, the start (monotonic) and the duration in seconds.

        A row of a tensor needs no decoding.
        """
        started_at = time.monotonic()
        outcome: _Input | RequestError
        try:
            outcome = self._create_input(image)
        except RequestError as error:
            outcome = error.with_traceback(None)  # its frames would keep the image alive
        return outcome, started_at, time.monotonic() - started_at

    def _create_input(self, image: Item) -> _Input:
        """Decode an image, or take a row of a tensor. Raises `RequestError`."""
        geometry = self.contract.input
        content = image.content if isinstance(image, ImageRequest) else image
        include_logits = isinstance(image, ImageRequest) and image.include_logits
        include_embedding = isinstance(image, ImageRequest) and image.include_embedding
        if isinstance(image, ImageRequest):
            self._check_embedding(image)
        if isinstance(image, ImageRequest) and image.tensor_name:
            tensor = self._tensors[image.tensor_name]
            if include_embedding and tensor.preprocessing:
                raise BadRequest(f"embedding: only images have one, and {tensor.name!r} is another input")
            return _Input(
                tensor, content, "", geometry.width, geometry.height, include_logits, include_embedding
            )
        encoded = read_shared(self._bodies_descriptor, content) if isinstance(content, SharedRef) else content
        decoded = decode_image(encoded, geometry, max_pixels=self._image_pixels, memory=self._memory)
        tensor, (width, height) = self._engine.tensors[0], (decoded.width, decoded.height)
        return _Input(
            tensor,
            decoded.pixels,
            decoded.format,
            width,
            height,
            include_logits,
            include_embedding,
            decoded.warnings,
        )

    def _check_embedding(self, image: ImageRequest) -> None:
        """Raise `NoEmbedding` for the embedding of a model without one."""
        if image.include_embedding and self._engine.embedding is None:
            raise NoEmbedding(f"model {self.contract.name!r} has no embedding; see `embedding` in /v1/models")

    def _run_tensor(
        self,
        tensor: InputTensor,
        inputs: Sequence[tuple[_Input, float, float]],
        *,
        exclusive: bool,
        include_logits: bool,
    ) -> _ModelCall:
        """Run the model once on inputs of the same tensor."""
        started_at = time.monotonic()
        batch = self._engine.allocate_batch((len(inputs), *tensor.shape), tensor.dtype)
        for row, (one, *_) in zip(batch, inputs, strict=True):
            self._fill_row(row, one.values)
        contract = self.contract
        with_logits = include_logits or contract.known is not None
        embeddings: Sequence[Any] = ()
        if any(one.include_embedding for one, *_ in inputs):
            try:
                self._engine.prepare_embedding()
            except ModelError as error:
                return self._run_without_embedding(tensor, inputs, error, include_logits=include_logits)
            outputs, rows = self._engine.run_with_embedding(
                batch, exclusive=exclusive, with_logits=with_logits
            )
            embeddings = list(rows)
        else:
            if tensor.preprocessing:
                try:
                    self._engine.prepare_tensor(tensor)
                except ModelError as error:
                    failure = Internal(f"the input {tensor.name!r} cannot be used: {error}")
                    return _ModelCall(iter([failure] * len(inputs)), 0.0, 0)
            outputs = self._engine.run_tensor(tensor, batch, exclusive=exclusive, with_logits=with_logits)
        known_scores = compute_known_scores(outputs[1], contract.task) if contract.known else None
        if not include_logits:
            del outputs[1:]
        pixels = None if tensor.preprocessing else batch
        results = _split_outputs(outputs, pixels, contract.task, known_scores)
        inference = time.monotonic() - started_at
        answers: Iterator[Answer | RequestError] = (
            Answer(
                one.format,
                one.width,
                one.height,
                brightness,
                entropy,
                known_score,
                probabilities,
                ranking,
                ImageTiming(decode_started_at, decode_seconds, started_at, inference, len(batch)),
                image_logits,
                one.warnings,
                embeddings[index].data if one.include_embedding else None,
            )
            for index, (
                (one, decode_started_at, decode_seconds),
                (
                    brightness,
                    entropy,
                    known_score,
                    probabilities,
                    ranking,
                    image_logits,
                ),
            ) in enumerate(zip(inputs, results, strict=True))
        )
        finite = [math.isfinite(total) for total in np.add.reduce(outputs[0], axis=1).tolist()]
        for logits in outputs[1:]:  # they may be -inf where the probability is 0: an error only if requested
            for index, (one, *_) in enumerate(inputs):
                finite[index] &= not one.include_logits or bool(np.isfinite(logits[index]).all())
        for index, embedding in enumerate(embeddings):
            finite[index] &= not inputs[index][0].include_embedding or bool(np.isfinite(embedding).all())
        if not all(finite):
            answers = _replace_nonfinite(answers, finite, tensor)
        return _ModelCall(answers, inference, len(batch))

    def _run_without_embedding(
        self,
        tensor: InputTensor,
        inputs: Sequence[tuple[_Input, float, float]],
        failure: ModelError,
        *,
        include_logits: bool,
    ) -> _ModelCall:
        """Fail the images that need an embedding, and run the model on the others."""
        others = [one for one in inputs if not one[0].include_embedding]
        call = _ModelCall(iter(()), 0.0, 0)
        if others:
            call = self._run_tensor(tensor, others, exclusive=False, include_logits=include_logits)
        error = Internal(f"the model's embedding cannot be computed: {failure}")
        answers = (error if one.include_embedding else next(call.answers) for one, *_ in inputs)
        return call._replace(answers=answers)

    def _fill_row(self, row: Values, values: Values | Image) -> None:
        """Write the values of one image into its row of the batch."""
        if isinstance(values, SharedRef):
            read_shared_into(self._bodies_descriptor, values, row.data.cast("B"))
        elif isinstance(values, np.ndarray):
            row[...] = values
        else:
            row.data.cast("B")[:] = values


def _find_batch_limits(engine: Engine, plan: ProcessPlan) -> tuple[int, int]:
    """Return the largest number of images in one model call, and the limit of their encoded bytes."""
    is_gpu = PROVIDERS[engine.provider].is_gpu
    batch_max = plan.batch_max or _DEFAULT_BATCH_MAX[is_gpu]
    return min(batch_max, engine.batch_limit or batch_max), _MAX_BATCH_BYTES[is_gpu]


class _Input(NamedTuple):
    """The model input of one image, and properties of the image."""

    tensor: InputTensor
    values: Values | Image
    """Array of the tensor's shape, or its bytes."""
    format: str
    width: int
    height: int
    include_logits: bool
    """True if the caller wants the logits too."""
    include_embedding: bool
    """True if the caller wants the embedding too."""
    warnings: Sequence[ImageWarning] = ()


class _ModelCall(NamedTuple):
    """The result of one model call."""

    answers: Iterator[Answer | RequestError]
    seconds: float
    image_count: int


def _replace_nonfinite(
    answers: Iterator[Answer | RequestError], finite: Iterable[bool], tensor: InputTensor
) -> Iterator[Answer | RequestError]:
    """Replace answers that are not finite by errors.

    JSON cannot represent NaN or infinity, and one such value would spoil every sum and mean of the metrics.

    For a floating-point tensor the caller sent the faulty values (`BadRequest`). All 256 values of a pixel
    are legal, so for pixels the model is at fault (`Internal`).
    """
    error: RequestError
    if tensor.is_float:
        error = BadRequest(
            f"the model's answer is not finite: NaN, infinite or too large values in {tensor.name!r}"
        )
    else:
        error = Internal("the model's answer to this image is not finite (NaN or infinite)")
    return (answer if is_finite else error for answer, is_finite in zip(answers, finite, strict=True))


_ImageResult: TypeAlias = tuple[float | None, float, float | None, Any, Any, Any]


def _split_outputs(
    outputs: Sequence[Floats], pixels: Values | None, task: Task, known_scores: Floats | None
) -> Iterator[_ImageResult]:
    """Yield brightness, entropy, known score, probabilities, ranking and logits of each image.

    The last three are memory views; the logits are None if the model did not return them.
    """
    probabilities, *logits = outputs
    rankings = (-probabilities).argsort(axis=1, kind="stable").astype(np.int32)
    count = len(probabilities)
    return zip(
        [None] * count if pixels is None else brightness_of(pixels).tolist(),
        entropy_of(probabilities, task).tolist(),
        [None] * count if known_scores is None else known_scores.tolist(),
        (row.data for row in np.ascontiguousarray(probabilities)),
        (row.data for row in rankings),
        (row.data for row in np.ascontiguousarray(logits[0])) if logits else [None] * count,
        strict=True,
    )


def entropy_of(probabilities: Floats, task: Task) -> Floats:
    """Return the normalised entropy of each row, float32 (n,), from 0 (certain) to 1 (all labels equal).

    This is Shannon's entropy divided by its maximum. For `multilabel` it is the mean over the labels.
    """
    label_count = probabilities.shape[1]
    negative_bits = _negative_bits(probabilities)
    if task is Task.MULTILABEL:
        negative_bits += _negative_bits(1 - probabilities)
        max_bits = float(label_count)
    else:
        max_bits = math.log2(max(2, label_count))  # a model of one label: always certain
    entropy = np.add.reduce(negative_bits, axis=1) / -max_bits
    clipped: Floats = np.minimum(np.maximum(entropy, 0), 1)  # rounding can lead outside by some 1e-7
    return clipped


def _negative_bits(probabilities: Floats) -> Floats:
    """Return p log2(p) of each probability p; 0 for 0."""
    terms: Floats = np.maximum(probabilities, _TINY)
    np.log2(terms, out=terms)
    terms *= probabilities
    return terms
