"""Messages about batches of images, between the service and its runner processes.

    service → runner    Batch                       ┐ repeated; replies come in the order of the batches;
    runner → service    BatchReport, or Failure     ┘ a runner may run several batches together
    service → runner    DropCommand: the caller of an image in a batch has left

BatchReport and Failure repeat the number of their Batch. A runner gets no batches before it has replied to
its Setup (`service.runners.load_messages`). Batches and reports are on the way of every image. They are named
tuples and encoded by hand, which is faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from fovea.service.errors import RequestError, error_from_dict
from fovea.service.image_warnings import ImageWarning
from fovea.service.inference.boxes import Boxes
from fovea.service.runners.frames import BytesLike, Frame, FrameError, encode_frame
from fovea.service.runners.messages import Message
from fovea.service.runners.shared_memory import SharedRef

Image: TypeAlias = BytesLike | SharedRef
"""Bytes of one encoded image, or their location in the memory that service and runners share."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image with options, beside its bytes."""

    content: Image
    tensor_name: str | None = None
    """Name of the model's tensor of which `content` is a row; None for an encoded image.

    See `service.artifact.inputs`.
    """
    include_logits: bool = False
    """True if the caller wants the logits too."""
    include_embedding: bool = False
    """True if the caller wants the embedding too, which only models with one can give, for pixels."""
    boxes: Boxes | None = None
    """Regions to classify in place of the whole image, each on its own (`service.inference.boxes`)."""


Item: TypeAlias = Image | ImageRequest
"""Entry of a batch: one image."""


def weight_of(item: Item) -> float:
    """Return the number of bytes to decode; 0 for a row of a tensor.

    An image with boxes has infinite weight: it fills batches of its own.
    """
    if isinstance(item, ImageRequest):
        if item.boxes is not None:
            return math.inf
        return 0 if item.tensor_name else len(item.content)
    return len(item)


def count_results(item: Item) -> int:
    """Return the number of images for which an item counts: that of its boxes, and at least 1."""
    return len(item.boxes) or 1 if isinstance(item, ImageRequest) and item.boxes is not None else 1


class Batch(NamedTuple):
    """Images for one model.

    The bytes of an image are either part of the message or lie in shared memory (`SharedRef`). Bytes in
    shared memory must be complete before the batch is sent: the message is the only signal that they can be
    read.
    """

    number: int
    """Sequence number among the requests to one runner."""
    model_id: int
    """Id of the model."""
    images: Sequence[Item]
    deadlines: Sequence[float | None]
    """Deadline of each image on the system's monotonic clock, in seconds; None for no deadline."""
    exclusive: bool
    """True if no runner had another batch when this one was sent: the model call may use all processors."""
    separate: bool
    """True if the batch must not run together with other batches."""
    reserved_bytes: int = 0
    """Bytes reserved for decoding the images (`service.inference.decode_memory`)."""

    @property
    def weight(self) -> float:
        """Number of bytes to decode in this batch; infinite for boxes."""
        return sum(map(weight_of, self.images))

    def to_pieces(self) -> Iterator[memoryview]:
        """Yield the pieces of the encoded message. See `frames.encode_frame`.

        Images in shared memory are not sent. Each image is described by its size in the message or by its
        location in shared memory, with the options of an `ImageRequest`.
        """
        descriptions: list[Any] = []
        inline_contents: list[BytesLike] = []
        for image in self.images:
            content = image.content if isinstance(image, ImageRequest) else image
            location: Any
            if isinstance(content, SharedRef):
                location = (content.offset, content.size)
            else:
                location = len(content)
                inline_contents.append(content)
            if isinstance(image, ImageRequest):
                location = {
                    "content": location,
                    "tensor": image.tensor_name,
                    "logits": image.include_logits,
                    "embedding": image.include_embedding,
                    "boxes": image.boxes,
                }
            descriptions.append(location)
        values = {
            "number": self.number,
            "model": self.model_id,
            "images": descriptions,
            "deadlines": self.deadlines,
            "exclusive": self.exclusive,
            "separate": self.separate,
            "memory": self.reserved_bytes,
        }
        return encode_frame(type(self).__name__, values, inline_contents)

    @classmethod
    def from_frame(cls, frame: Frame) -> Batch:
        """Decode a message that a runner received.

        The images are views into the frame, or locations in shared memory, which is not read here.
        """
        values, content = frame.values, frame.content
        images, start = [], 0
        for entry in values["images"]:
            options = entry if isinstance(entry, dict) else None
            location = options["content"] if options else entry
            image: Image
            if isinstance(location, int):
                image, start = content[start : start + location], start + location
            else:
                image = SharedRef(*location)
            images.append(
                ImageRequest(
                    image,
                    options["tensor"],
                    options["logits"],
                    options["embedding"],
                    _to_boxes(options["boxes"]),
                )
                if options
                else image
            )
        return cls(
            values["number"],
            values["model"],
            images,
            values["deadlines"],
            values["exclusive"],
            values["separate"],
            values["memory"],
        )


def _to_boxes(values: list[list[int]] | None) -> Boxes | None:
    """Return the boxes of a message."""
    return (
        None if values is None else tuple((left, top, right, bottom) for left, top, right, bottom in values)
    )


@dataclass(frozen=True)
class DropCommand(Message):
    """Notice that no caller waits any more for the image at `image_index` of the batch with this number.

    The runner still answers the whole batch. If it reads the notice before it begins the batch, it does no
    work for the image, and the answer is an error that no caller receives.
    """

    batch_number: int
    image_index: int


class ImageTiming(NamedTuple):
    """Timing of one image: start times on the system's monotonic clock, and durations, in seconds."""

    decode_started_at: float
    decode_seconds: float
    inference_started_at: float
    inference_seconds: float
    batch_size: int
    """Number of images in the model call."""


class Answer(NamedTuple):
    """Result of one image or box, with the probability of every label.

    Sizes are in pixels, after EXIF orientation. In the service, the arrays are views into the received frame.
    """

    format: str
    """Image format; empty for a tensor and for a box."""
    width: int
    height: int
    brightness: float | None
    """Mean of all values of the model's input, from 0 to 1; None if unknown."""
    entropy: float
    """Normalised entropy of the probabilities, from 0 (certain) to 1 (all labels equal)."""
    known_score: float | None
    """Likeness to the training images (`service.inference.known`); None if the model does not tell."""
    probabilities: memoryview[float]
    """Probabilities, float32 (labels,), in the contract's order."""
    ranking: memoryview[int]
    """Label indices, int32 (labels,), most probable first. Equal probabilities keep their order."""
    timing: ImageTiming
    logits: memoryview[float] | None = None
    """Logits, float32 (`contract.logit_count`,); None if no caller in the batch wanted them."""
    warnings: Sequence[ImageWarning] = ()
    """Warnings about the conversion of the image to pixels."""
    embedding: memoryview[float] | None = None
    """Embedding, float32 (`service.artifact.embedding`); None if the caller did not want it."""


class BoxAnswers(NamedTuple):
    """Results of the boxes of one image, in order, and properties of the image."""

    answers: Sequence[Answer]
    """Results with the sizes of the boxes, and the warnings about them."""
    format: str
    width: int
    """Width of the image in pixels, after EXIF orientation."""
    height: int
    warnings: Sequence[ImageWarning] = ()
    """Warnings about the image as a whole."""


class BatchReport(NamedTuple):
    """Reply to a `Batch`: an outcome for each image, in order, and durations in seconds."""

    answers: Sequence[Answer | BoxAnswers | RequestError]
    """Outcomes: an answer, those of the image's boxes, or an error."""
    decode_seconds: Sequence[float]
    """Decoding time of each image, in seconds."""
    inference_seconds: float
    """Duration of the model call, in seconds."""
    batch_size: int
    """Number of images in the model call; 0 if there was no call, or if another report counts the call."""
    number: int = 0
    """Number of the answered batch."""

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        answers, groups = _flatten(self.answers)
        heads: list[Any] = []
        parts: list[memoryview] = []
        logits: list[memoryview] = []
        embeddings: list[memoryview] = []
        embedding_rows: list[int] = []
        for index, answer in enumerate(answers):
            if isinstance(answer, RequestError):
                heads.append(answer.to_dict())
            else:
                *head, probabilities, ranking, timing, image_logits, warnings, embedding = answer
                heads.append([warnings, *head, *timing])
                parts += [probabilities.cast("B"), ranking.cast("B")]
                if image_logits is not None:
                    logits.append(image_logits.cast("B"))
                if embedding is not None:
                    embeddings.append(embedding.cast("B"))
                    embedding_rows.append(index)
        values = {
            "answers": heads,
            "decode": self.decode_seconds,
            "inference": self.inference_seconds,
            "batch": self.batch_size,
            "number": self.number,
            "logits": sum(map(len, logits)),
            "embeddings": sum(map(len, embeddings)),
            "embedding_rows": embedding_rows,
            "boxes": groups,
        }
        return b"".join(encode_frame(type(self).__name__, values, [*parts, *logits, *embeddings]))

    @classmethod
    def from_frame(cls, frame: Frame) -> BatchReport:
        """Decode a received message. Raises `FrameError`."""
        try:
            return cls._parse(frame.values, frame.content)
        except (KeyError, TypeError, ValueError) as error:
            raise FrameError(f"sent a report that cannot be read: {error!r}") from None

    @classmethod
    def _parse(cls, values: dict[str, Any], content: memoryview) -> BatchReport:
        heads, logits_size = values["answers"], values["logits"]
        embeddings = _split_embeddings(values, content)
        content = content[: len(content) - values["embeddings"]]
        answer_count = 0
        for head in heads:
            answer_count += isinstance(head, list)
        # Order of the bytes: probabilities and ranking, answer by answer; then the logits of all answers. The
        # embeddings of the answers in `embedding_rows` came last, and are cut off already.
        end = len(content) - logits_size
        row_size = end // (2 * answer_count) if answer_count else 0
        logits_row_size = logits_size // answer_count if answer_count else 0
        if (
            not 0 <= logits_size <= len(content)
            or 2 * answer_count * row_size != end
            or answer_count * logits_row_size != logits_size
        ):
            raise ValueError("the content is not as long as its rows")
        answers: list[Answer | RequestError] = []
        start, logits_start = 0, end
        for index, head in enumerate(heads):
            if not isinstance(head, list):
                answers.append(error_from_dict(head))
                continue
            warning_values, image_format, width, height, brightness, entropy, known_score, *timing = head
            middle, stop, logits_stop = start + row_size, start + 2 * row_size, logits_start + logits_row_size
            answers.append(
                Answer(
                    image_format,
                    width,
                    height,
                    brightness,
                    entropy,
                    known_score,
                    content[start:middle].cast("f"),
                    content[middle:stop].cast("i"),
                    ImageTiming(*timing),
                    content[logits_start:logits_stop].cast("f") if logits_size else None,
                    [ImageWarning(*one) for one in warning_values],
                    embeddings.get(index),
                )
            )
            start, logits_start = stop, logits_stop
        outcomes = _group(answers, values["boxes"]) if values["boxes"] else answers
        return cls(outcomes, values["decode"], values["inference"], values["batch"], values["number"])


def _flatten(
    outcomes: Sequence[Answer | BoxAnswers | RequestError],
) -> tuple[Sequence[Answer | RequestError], list[list[Any]]]:
    """Return the answers one by one, those of boxes too, and what `_group` needs to group them again."""
    groups: list[list[Any]] = []
    answers: list[Answer | RequestError] = []
    for outcome in outcomes:
        if isinstance(outcome, BoxAnswers):
            box_answers, *image = outcome
            groups.append([len(answers), len(box_answers), *image])
            answers += box_answers
        else:
            answers.append(outcome)
    return answers, groups


def _group(
    answers: Sequence[Answer | RequestError], groups: Sequence[Sequence[Any]]
) -> list[Answer | BoxAnswers | RequestError]:
    """Return the outcomes of the images. Raises `ValueError` or `TypeError` unless the groups fit."""
    outcomes: list[Answer | BoxAnswers | RequestError] = []
    position = 0
    for start, count, image_format, width, height, warning_values in groups:
        box_answers = [one for one in answers[start : start + count] if isinstance(one, Answer)]
        if not position <= start <= len(answers) or not 0 <= count == len(box_answers):
            raise ValueError("the boxes have other answers than the report says")
        outcomes += answers[position:start]
        warnings = [ImageWarning(*one) for one in warning_values]
        outcomes.append(BoxAnswers(box_answers, image_format, width, height, warnings))
        position = start + count
    return [*outcomes, *answers[position:]]


def _split_embeddings(values: dict[str, Any], content: memoryview) -> dict[int, memoryview[float]]:
    """Return the embeddings at the end of a report's content, by the index of their answers.

    Raises `ValueError` or `TypeError` unless they are as long as the report says, and belong to answers.
    """
    size, rows, heads = values["embeddings"], values["embedding_rows"], values["answers"]
    row_size = size // len(rows) if rows else 0
    if not 0 <= size <= len(content) or row_size * len(rows) != size or bool(rows) != bool(size):
        raise ValueError("the embeddings are not as long as their rows")
    if rows != sorted(set(rows)) or not all(
        0 <= row < len(heads) and isinstance(heads[row], list) for row in rows
    ):
        raise ValueError("an embedding has no answer")
    start = len(content) - size
    return {
        row: content[start + place * row_size : start + (place + 1) * row_size].cast("f")
        for place, row in enumerate(rows)
    }
