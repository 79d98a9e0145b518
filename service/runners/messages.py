"""Messages between the service and its runner processes, and their encoding on the socket.

    service → runner    Setup, once, before any other message
    runner → service    SetupReply, or Failure: the models are loaded, or the reason why not
    service → runner    Batch                       ┐ repeated; replies come in the order of the batches;
    runner → service    BatchReport, or Failure     ┘ a runner may run several batches together
    service → runner    DropCommand: the caller of an image in a batch has left
    service → runner    LoadCommand: one more model, to be loaded while batches run
    runner → service    LoadReply: the model is loaded, or the reason why not; between any two reports
    service → runner    UnloadCommand: a model that will get no more batches

BatchReport and Failure repeat the number of their Batch. Each message consists of two lengths (uint32,
little-endian), a JSON object, and the bytes that belong to it. The stream has no other marks: whoever writes
must write a message as a whole before the next message begins.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import orjson

from fovea.service.errors import GoldenError, ModelError, RequestError, error_from_dict
from fovea.service.image_warnings import ImageWarning
from fovea.service.runners.shared_memory import SharedRef

BytesLike: TypeAlias = bytes | memoryview
"""Bytes of one encoded image."""

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


Item: TypeAlias = Image | ImageRequest
"""Entry of a batch: one image."""


def weight_of(item: Item) -> int:
    """Return the number of bytes to decode; 0 for a row of a tensor."""
    if isinstance(item, ImageRequest):
        return 0 if item.tensor_name else len(item.content)
    return len(item)


Frame: TypeAlias = tuple[dict[str, Any], memoryview]
"""Received message: its JSON object, and the bytes behind the object."""

_LENGTHS: Final = struct.Struct("<II")

MAX_PIECE_BYTES: Final = 256 << 10
"""Limit of bytes in one write. A copy of 32 MB would block the event loop for up to 10 ms."""


MAX_EXPLAINER_MODELS: Final = 2
"""Number of models that an explaining process holds at the same time, each in its own session."""


@dataclass(frozen=True)
class ProcessPlan:
    """Settings for running models in a process."""

    provider: Literal["auto", "cpu", "cuda"]
    batch_max: int
    """Largest number of images in one model call; 0 for the provider's default."""
    threads: int
    """Number of CPU threads inside one model call."""
    wide_threads: int
    """Number of CPU threads inside an exclusive model call; 0 if it gets no extra threads."""
    decode_threads: int
    """Number of images of one batch that are decoded at the same time."""
    image_pixels: int
    """Pixel limit of one image."""
    decode_bytes: int
    """Memory limit for images being decoded, in bytes, for all processes together."""
    processes: int
    """Number of runner processes."""

    @property
    def max_threads(self) -> int:
        """Largest number of CPU threads inside a model call."""
        return max(self.threads, self.wide_threads)


@dataclass(frozen=True)
class LoadCommand:
    """Request to load a model, with its settings."""

    model_id: int
    """Id of the model in batches."""
    path: str
    """Path of the model, for messages."""
    file: str
    """Path from which the model is read."""
    fingerprint: Sequence[int]
    """Fingerprint of `file` (`service.artifact.model_file.fingerprint_of`)."""
    plan: ProcessPlan

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        return _encode_frame({"load": asdict(self)})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoadCommand:
        """Restore the result of `asdict`."""
        return cls(**{**values, "plan": ProcessPlan(**values["plan"])})


class UnloadCommand(NamedTuple):
    """Request to unload the model with this id, which gets no more batches. There is no reply."""

    model_id: int

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        return _encode_frame({"unload": self.model_id})


@dataclass(frozen=True)
class Setup:
    """First message to a runner: the models to load at its start, and the `plan` of the process."""

    plan: ProcessPlan
    models: Sequence[LoadCommand]

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        return _encode_frame(asdict(self))

    @classmethod
    def from_frame(cls, frame: Frame) -> Setup:
        """Decode a received message."""
        values, _ = frame
        return cls(
            ProcessPlan(**values["plan"]), [LoadCommand.from_dict(model) for model in values["models"]]
        )


@dataclass(frozen=True)
class LoadedModel:
    """A model that a process has loaded, warmed up and checked."""

    contract_json: str
    """Contract as JSON."""
    provider: Literal["cpu", "cuda"]
    batch_max: int
    batch_bytes: float
    """Limit of the encoded bytes in one batch of several images."""
    load_seconds: float
    """Time to load, warm up and check the model, in seconds."""
    golden_differences: dict[str, float]
    """Differences of this host from the golden set."""


@dataclass(frozen=True)
class SetupReply:
    """Reply to `Setup`: the loaded models in the order of the setup, and the capabilities of the process."""

    models: Sequence[LoadedModel]
    onnxruntime_version: str
    """Version of ONNX Runtime."""
    providers: Sequence[str]
    """Available execution providers."""
    formats: Sequence[str]
    """Image formats that the process can decode."""

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        return _encode_frame(asdict(self))

    @classmethod
    def from_frame(cls, frame: Frame) -> SetupReply | Failure:
        """Decode a received message, which may be a `Failure`."""
        values, _ = frame
        if failure := Failure.from_dict(values):
            return failure
        return cls(**{**values, "models": [LoadedModel(**model) for model in values["models"]]})


class LoadReply(NamedTuple):
    """Reply to a `LoadCommand`."""

    model_id: int
    outcome: LoadedModel | Failure

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        outcome = self.outcome.to_dict() if isinstance(self.outcome, Failure) else asdict(self.outcome)
        return _encode_frame({"told": self.model_id, **outcome})

    @classmethod
    def from_frame(cls, frame: Frame) -> LoadReply | None:
        """Decode a received message; return None if it is another kind of message."""
        values, _ = frame
        if "told" not in values:
            return None
        model_id = values.pop("told")
        return cls(model_id, Failure.from_dict(values) or LoadedModel(**values))


class Batch(NamedTuple):
    """Images for one model.

    The bytes of an image are either part of the message or lie in shared memory (`SharedRef`). Bytes in
    shared memory must be complete before the batch is sent: the message is the only signal that they can be
    read.
    """

    number: int
    """Sequence number among the batches of one runner."""
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
    def weight(self) -> int:
        """Number of bytes to decode in this batch."""
        return sum(map(weight_of, self.images))

    def to_pieces(self) -> Iterator[memoryview]:
        """Yield the pieces of the encoded message in order.

        Large images are not copied, and images in shared memory are not sent. The pieces are views of the
        images, which must not change until the last piece is written. No other message may be written between
        two pieces.
        """
        contents = (image.content if isinstance(image, ImageRequest) else image for image in self.images)
        inline_contents = [content for content in contents if not isinstance(content, SharedRef)]
        values = {
            "number": self.number,
            "model": self.model_id,
            "images": [_describe_image(image) for image in self.images],
            "deadlines": self.deadlines,
            "alone": self.exclusive,
            "apart": self.separate,
            "memory": self.reserved_bytes,
        }
        size = sum(map(len, inline_contents))
        if size <= MAX_PIECE_BYTES:
            yield memoryview(_encode_frame(values, inline_contents))
            return
        yield memoryview(_encode_header(values, size))
        for image in inline_contents:
            for start in range(0, len(image), MAX_PIECE_BYTES):
                yield memoryview(image)[start : start + MAX_PIECE_BYTES]


class DropCommand(NamedTuple):
    """Notice that no caller waits any more for the image at `image_index` of the batch with this number.

    The runner still answers the whole batch. If it reads the notice before it begins the batch, it does no
    work for the image, and the answer is an error that no caller receives.
    """

    batch_number: int
    image_index: int

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        return _encode_frame({"drop": [self.batch_number, self.image_index]})


def _describe_image(image: Item) -> Any:
    """Return the JSON value that describes an image.

    This is the size of an image in the message or the location of an image in shared memory, with the options
    of an `ImageRequest`.
    """
    if isinstance(image, ImageRequest):
        return {
            "place": _describe_image(image.content),
            "tensor": image.tensor_name,
            "logits": image.include_logits,
        }
    return (image.offset, image.size) if isinstance(image, SharedRef) else len(image)


def parse_message(frame: Frame) -> Batch | DropCommand | LoadCommand | UnloadCommand:
    """Decode a message that a runner received.

    The images of a batch are views into the frame, or locations in shared memory, which is not read here.
    """
    values, content = frame
    if "drop" in values:
        return DropCommand(*values["drop"])
    if "load" in values:
        return LoadCommand.from_dict(values["load"])
    if "unload" in values:
        return UnloadCommand(values["unload"])
    images, start = [], 0
    for entry in values["images"]:
        options = entry if isinstance(entry, dict) else None
        location = options["place"] if options else entry
        image: Image
        if isinstance(location, int):
            image, start = content[start : start + location], start + location
        else:
            image = SharedRef(*location)
        images.append(ImageRequest(image, options["tensor"], options["logits"]) if options else image)
    return Batch(
        values["number"],
        values["model"],
        images,
        values["deadlines"],
        values["alone"],
        values["apart"],
        values["memory"],
    )


class ImageTiming(NamedTuple):
    """Timing of one image: start times on the system's monotonic clock, and durations, in seconds."""

    decode_started_at: float
    decode_seconds: float
    inference_started_at: float
    inference_seconds: float
    batch_size: int
    """Number of images in the model call."""


class Answer(NamedTuple):
    """Result of one image, with the probability of every label.

    Sizes are in pixels, after EXIF orientation. In the service, the arrays are views into the received frame.
    """

    format: str
    """Image format; empty for a tensor."""
    width: int
    height: int
    brightness: float | None
    """Mean of all values of the model's input, from 0 to 1; None if unknown."""
    entropy: float
    """Normalised entropy of the probabilities, from 0 (certain) to 1 (all labels equal)."""
    probabilities: memoryview[float]
    """Probabilities, float32 (labels,), in the contract's order."""
    ranking: memoryview[int]
    """Label indices, int32 (labels,), most probable first. Equal probabilities keep their order."""
    timing: ImageTiming
    logits: memoryview[float] | None = None
    """Logits, float32 (`contract.logit_count`,); None if no caller in the batch wanted them."""
    warnings: Sequence[ImageWarning] = ()
    """Warnings about the conversion of the image to pixels."""


class BatchReport(NamedTuple):
    """Reply to a `Batch`: an answer or an error for each image, in order, and durations in seconds."""

    answers: Sequence[Answer | RequestError]
    decode_seconds: Sequence[float]
    """Decoding time of each image, in seconds."""
    inference_seconds: float
    """Duration of the model call, in seconds."""
    batch_size: int
    """Number of images in the model call; 0 if there was no call, or if another report counts the call."""
    batch_number: int = 0
    """Sequence number of the answered batch."""

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        heads: list[Any] = []
        parts: list[memoryview] = []
        logits: list[memoryview] = []
        for answer in self.answers:
            if isinstance(answer, RequestError):
                heads.append(answer.to_dict())
            else:
                *head, probabilities, ranking, timing, image_logits, warnings = answer
                heads.append([[*map(list, warnings)], *head, *timing])
                parts += [probabilities.cast("B"), ranking.cast("B")]
                if image_logits is not None:
                    logits.append(image_logits.cast("B"))
        values = {
            "answers": heads,
            "decode": self.decode_seconds,
            "inference": self.inference_seconds,
            "batch": self.batch_size,
            "number": self.batch_number,
            "logits": sum(map(len, logits)),
        }
        return _encode_frame(values, [*parts, *logits])

    @classmethod
    def from_frame(cls, frame: Frame) -> BatchReport | Failure:
        """Decode a received message, which may be a `Failure`."""
        values, content = frame
        if failure := Failure.from_dict(values):
            return failure
        answers: list[Answer | RequestError] = []
        heads = values["answers"]
        answer_count = sum(isinstance(head, list) for head in heads)
        # Order of the bytes: probabilities and ranking, answer by answer; then the logits of all answers.
        end = len(content) - values["logits"]
        rows = split_content(
            content, [end // (2 * answer_count)] * (2 * answer_count) if answer_count else []
        )
        logits = (
            split_content(content[end:], [values["logits"] // answer_count] * answer_count)
            if values["logits"]
            else None
        )
        for head in heads:
            if isinstance(head, list):
                warning_values, image_format, width, height, brightness, entropy, *timing = head
                row = (next(rows).cast("f"), next(rows).cast("i"))
                image_logits = next(logits).cast("f") if logits else None
                warnings = [ImageWarning(*one) for one in warning_values]
                answers.append(
                    Answer(
                        image_format,
                        width,
                        height,
                        brightness,
                        entropy,
                        *row,
                        ImageTiming(*timing),
                        image_logits,
                        warnings,
                    )
                )
            else:
                answers.append(error_from_dict(head))
        return cls(answers, values["decode"], values["inference"], values["batch"], values["number"])


@dataclass(frozen=True)
class Failure:
    """Reply to a setup, load or batch that failed.

    A failed setup or load means that the model cannot be served. A failed batch is a bug in Fovea.
    """

    reason: str
    is_golden_error: bool = False
    """True if the golden set was not reproduced."""
    trace: str = ""
    """Traceback of a bug in Fovea."""
    batch_number: int = 0
    """Sequence number of the failed batch; 0 if a setup or a load failed."""

    def to_exception(self) -> ModelError:
        """Return the failure as an exception."""
        return (GoldenError if self.is_golden_error else ModelError)(self.reason)

    def to_bytes(self) -> bytes:
        """Return the encoded message."""
        return _encode_frame(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the values as types that JSON supports."""
        return {
            "failure": self.reason,
            "golden": self.is_golden_error,
            "trace": self.trace,
            "number": self.batch_number,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Failure | None:
        """Return the failure in a frame's object, or None if it holds none."""
        if "failure" not in values:
            return None
        return cls(values["failure"], values["golden"], values["trace"], values.get("number", 0))


# --- frames --------------------------------------------------------------------------------------


def _encode_frame(values: dict[str, Any], parts: Sequence[BytesLike] = ()) -> bytes:
    return b"".join((_encode_header(values, sum(len(part) for part in parts)), *parts))


def _encode_header(values: dict[str, Any], payload_size: int) -> bytes:
    header = orjson.dumps(values)
    return _LENGTHS.pack(len(header), payload_size) + header


def split_content(content: memoryview, sizes: Sequence[int]) -> Iterator[memoryview]:
    """Yield parts of these sizes from the bytes behind a message."""
    start = 0
    for size in sizes:
        yield content[start : start + size]
        start += size


def send_message(connection: socket.socket, values: dict[str, Any], parts: Sequence[BytesLike] = ()) -> None:
    """Write one message, and block until it is written.

    The caller must be the only writer of the socket. Do not call this on the event loop.
    """
    connection.sendall(_encode_header(values, sum(map(len, parts))))
    for part in parts:
        connection.sendall(part)


def receive_message(connection: socket.socket) -> Frame | None:
    """Block until one message has arrived; return None at the end of the stream.

    Exactly one message is read, so another reader (`FrameDecoder`) can take over the socket afterwards.
    Raises `TimeoutError` if the socket has a time limit.
    """
    lengths = _receive_exactly(connection, _LENGTHS.size)
    if lengths is None:
        return None
    header_size, payload_size = _LENGTHS.unpack(lengths)
    content = _receive_exactly(connection, header_size + payload_size)
    return None if content is None else _parse_frame(content, header_size)


def _receive_exactly(connection: socket.socket, size: int) -> memoryview | None:
    """Return exactly `size` bytes; None when the stream ends before that."""
    content = memoryview(bytearray(size))
    position = 0
    while position < size:
        count = connection.recv_into(content[position:])
        if not count:
            return None
        position += count
    return content


def _parse_frame(content: memoryview, header_size: int) -> Frame:
    return orjson.loads(content[:header_size]), content[header_size:]


class FrameDecoder:
    """A decoder of messages from a stream that arrives in pieces."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._buffered_bytes = 0
        self._needed_bytes = _LENGTHS.size
        """Number of bytes needed to complete the next message."""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Add received bytes, and yield every complete message.

        Exhaust the iterator before the next call: the rest of the bytes is stored only at its end. A caller
        that stops earlier must not use the decoder again. The frames are views of bytes that are never
        overwritten.
        """
        self._pieces.append(data)
        self._buffered_bytes += len(data)
        if self._buffered_bytes < self._needed_bytes:
            return
        data = b"".join(self._pieces)
        start, self._needed_bytes = 0, _LENGTHS.size
        while len(data) - start >= _LENGTHS.size:
            header_size, payload_size = _LENGTHS.unpack_from(data, start)
            end = start + _LENGTHS.size + header_size + payload_size
            if len(data) < end:
                self._needed_bytes = end - start
                break
            yield _parse_frame(memoryview(data)[start + _LENGTHS.size : end], header_size)
            start = end
        self._pieces, self._buffered_bytes = [data[start:]], len(data) - start
