"""Messages between the service and its runner processes, and their encoding on the socket.

    service → runner    Setup, once
    runner → service    Ready, or Failure: the models are loaded, or the reason why not
    service → runner    Batch                  ┐ repeated, in the same order; a batch may wait
    runner → service    Report, or Failure     ┘ for another, and batches may run together
    service → runner    Drop: the caller of an image in a batch has left
    service → runner    Load: one more model, to be loaded beside the batches
    runner → service    Told: the model is loaded, or the reason why not
    service → runner    Unload: a model that will get no more batches

Report and Failure repeat the number of their Batch. Each message consists of two lengths (uint32,
little-endian), a JSON object, and the bytes that belong to it.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import orjson

from fovea.service.errors import GoldenError, ModelError, RequestError, error_from
from fovea.service.image_warnings import ImageWarning
from fovea.service.runners.shared_memory import Stored

Sent: TypeAlias = bytes | memoryview
"""Bytes of one encoded image."""

Image: TypeAlias = Sent | Stored
"""Bytes of one encoded image, or their location in the memory that service and runners share."""


@dataclass(frozen=True, slots=True)
class Query:
    """One image with options, beside its bytes."""

    content: Image
    tensor: str | None = None
    """Name of the model's tensor of which `content` is a row; None for an encoded image.

    See `service.artifact.inputs`.
    """
    logits: bool = False
    """True if the caller wants the logits too."""


Item: TypeAlias = Image | Query
"""Entry of a batch: one image."""


def weight_of(item: Item) -> int:
    """Return the number of bytes to decode; 0 for a row of a tensor."""
    if isinstance(item, Query):
        return 0 if item.tensor else len(item.content)
    return len(item)


Frame: TypeAlias = tuple[dict[str, Any], memoryview]
"""Received message: its JSON object, and the bytes behind the object."""

_LENGTHS: Final = struct.Struct("<II")

PIECE: Final = 256 << 10
"""Limit of bytes in one write. A copy of 32 MB would block the event loop for up to 10 ms."""


HELD: Final = 2
"""Number of models that an explaining process holds at the same time, each in its own session."""


@dataclass(frozen=True)
class Plan:
    """Settings for running models in a process."""

    provider: Literal["auto", "cpu", "cuda"]
    batch_max: int
    """Largest number of images in one model call; 0 for the provider's default."""
    threads: int
    """Number of CPU threads inside one model call."""
    wide_threads: int
    """Number of CPU threads inside a call that runs alone; 0 if such a call gets no extra threads."""
    decode_threads: int
    """Number of images of one batch that are decoded at the same time."""
    image_pixels: int
    """Pixel limit of one image."""
    decode_bytes: int
    """Memory limit for images being decoded, in bytes, for all processes together."""
    processes: int
    """Number of runner processes."""

    @property
    def most_threads(self) -> int:
        """Number of CPU threads inside the widest model call."""
        return max(self.threads, self.wide_threads)


@dataclass(frozen=True)
class Load:
    """Request to load a model, with its settings."""

    slot: int
    """Id of the model in batches."""
    path: str
    """Path of the model, for messages."""
    file: str
    """Path from which the model is read."""
    stamp: Sequence[int]
    """Stamp of `file` (`service.artifact.model_file.fingerprint_of`)."""
    plan: Plan

    def write(self) -> bytes:
        """Return the encoded message."""
        return _frame({"load": asdict(self)})

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Load:
        """Restore the result of `asdict`."""
        return cls(**{**values, "plan": Plan(**values["plan"])})


class Unload(NamedTuple):
    """Request to unload the model in a slot."""

    slot: int

    def write(self) -> bytes:
        """Return the encoded message."""
        return _frame({"unload": self.slot})


@dataclass(frozen=True)
class Setup:
    """First message to a runner: the models to load at its start, and the `plan` of the process."""

    plan: Plan
    models: Sequence[Load]

    def write(self) -> bytes:
        """Return the encoded message."""
        return _frame(asdict(self))

    @classmethod
    def read(cls, frame: Frame) -> Setup:
        """Decode a received message."""
        values, _ = frame
        return cls(Plan(**values["plan"]), [Load.from_plain(model) for model in values["models"]])


@dataclass(frozen=True)
class Loaded:
    """A model that a process has loaded, warmed up and checked."""

    contract: str
    """Contract as JSON."""
    provider: Literal["cpu", "cuda"]
    batch_max: int
    batch_bytes: float
    """Limit of the encoded bytes in one batch of several images."""
    seconds: float
    """Time to load, warm up and check the model, in seconds."""
    golden: dict[str, float]
    """Differences of this host from the golden set."""


@dataclass(frozen=True)
class Ready:
    """Reply to `Setup`: the loaded models in the order of the setup, and the capabilities of the process."""

    models: Sequence[Loaded]
    onnxruntime: str
    """Version of ONNX Runtime."""
    providers: Sequence[str]
    """Available execution providers."""
    formats: Sequence[str]
    """Image formats that the process can decode."""

    def write(self) -> bytes:
        """Return the encoded message."""
        return _frame(asdict(self))

    @classmethod
    def read(cls, frame: Frame) -> Ready | Failure:
        """Decode a received message, which may be a `Failure`."""
        values, _ = frame
        if failure := Failure.read(values):
            return failure
        return cls(**{**values, "models": [Loaded(**model) for model in values["models"]]})


class Told(NamedTuple):
    """Reply to a `Load`."""

    slot: int
    outcome: Loaded | Failure

    def write(self) -> bytes:
        """Return the encoded message."""
        outcome = self.outcome.to_plain() if isinstance(self.outcome, Failure) else asdict(self.outcome)
        return _frame({"told": self.slot, **outcome})

    @classmethod
    def read(cls, frame: Frame) -> Told | None:
        """Decode a received message; return None if it is another kind of message."""
        values, _ = frame
        if "told" not in values:
            return None
        slot = values.pop("told")
        return cls(slot, Failure.read(values) or Loaded(**values))


class Batch(NamedTuple):
    """Images for one model. `alone` promises that nothing else runs: the call may use all processors."""

    number: int
    """Sequence number among the batches of one runner."""
    model: int
    """Slot of the model."""
    images: Sequence[Item]
    deadlines: Sequence[float | None]
    """Deadline of each image on the system's monotonic clock, in seconds; None for no deadline."""
    alone: bool
    apart: bool
    """True if the batch must not run together with other batches."""
    memory: int = 0
    """Bytes reserved for decoding the images (`service.inference.decode_memory`)."""

    @property
    def weight(self) -> int:
        """Number of bytes to decode in this batch."""
        return sum(map(weight_of, self.images))

    def pieces(self) -> Iterator[memoryview]:
        """Yield the pieces of the encoded message in order.

        Large images are not copied, and stored images are not sent.
        """
        contents = (image.content if isinstance(image, Query) else image for image in self.images)
        sent = [content for content in contents if not isinstance(content, Stored)]
        values = {
            "number": self.number,
            "model": self.model,
            "images": [_place(image) for image in self.images],
            "deadlines": self.deadlines,
            "alone": self.alone,
            "apart": self.apart,
            "memory": self.memory,
        }
        size = sum(map(len, sent))
        if size <= PIECE:
            yield memoryview(_frame(values, sent))
            return
        yield memoryview(_head(values, size))
        for image in sent:
            for start in range(0, len(image), PIECE):
                yield memoryview(image)[start : start + PIECE]


class Drop(NamedTuple):
    """Notice that no caller waits any more for the image at `place` of the batch with this number."""

    number: int
    place: int

    def write(self) -> bytes:
        """Return the encoded message."""
        return _frame({"drop": [self.number, self.place]})


def _place(image: Item) -> Any:
    """Return the JSON value that describes an image.

    This is the size of a sent image or the location of a stored one, with the options of a `Query`.
    """
    if isinstance(image, Query):
        return {"place": _place(image.content), "tensor": image.tensor, "logits": image.logits}
    return (image.offset, image.size) if isinstance(image, Stored) else len(image)


def read_work(frame: Frame) -> Batch | Drop | Load | Unload:
    """Decode a received message. The images of a batch are views into the frame, or stored."""
    values, content = frame
    if "drop" in values:
        return Drop(*values["drop"])
    if "load" in values:
        return Load.from_plain(values["load"])
    if "unload" in values:
        return Unload(values["unload"])
    images, start = [], 0
    for place in values["images"]:
        told = place if isinstance(place, dict) else None
        where = told["place"] if told else place
        image: Image
        if isinstance(where, int):
            image, start = content[start : start + where], start + where
        else:
            image = Stored(*where)
        images.append(Query(image, told["tensor"], told["logits"]) if told else image)
    return Batch(
        values["number"],
        values["model"],
        images,
        values["deadlines"],
        values["alone"],
        values["apart"],
        values["memory"],
    )


class Work(NamedTuple):
    """Timing of one image: start times on the system's monotonic clock, and durations, in seconds."""

    decode_began: float
    decode: float
    inference_began: float
    inference: float
    batch: int
    """Number of images in the model call."""


class Answer(NamedTuple):
    """Result of one image, with the probability of every label.

    Sizes are in pixels, after EXIF orientation.
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
    work: Work
    logits: memoryview[float] | None = None
    """Logits, float32 (`contract.logit_count`,), if a caller in the batch wanted them."""
    warnings: Sequence[ImageWarning] = ()
    """Warnings about the conversion of the image to pixels."""


class Report(NamedTuple):
    """Reply to a `Batch`: an answer or an error for each image, in order, and durations in seconds."""

    answers: Sequence[Answer | RequestError]
    decode: Sequence[float]
    """Decoding time of each image, in seconds."""
    inference: float
    """Duration of the model call, in seconds."""
    batch: int
    """Number of images in the model call; 0 if there was no call, or if another report counts it."""
    number: int = 0
    """Sequence number of the answered batch."""

    def write(self) -> bytes:
        """Return the encoded message."""
        heads: list[Any] = []
        parts: list[memoryview] = []
        logits: list[memoryview] = []
        for answer in self.answers:
            if isinstance(answer, RequestError):
                heads.append(answer.to_dict())
            else:
                *head, probabilities, ranking, work, own, warnings = answer
                heads.append([[*map(list, warnings)], *head, *work])
                parts += [probabilities.cast("B"), ranking.cast("B")]
                if own is not None:
                    logits.append(own.cast("B"))
        values = {
            "answers": heads,
            "decode": self.decode,
            "inference": self.inference,
            "batch": self.batch,
            "number": self.number,
            "logits": sum(map(len, logits)),
        }
        return _frame(values, [*parts, *logits])

    @classmethod
    def read(cls, frame: Frame) -> Report | Failure:
        """Decode a received message, which may be a `Failure`."""
        values, content = frame
        if failure := Failure.read(values):
            return failure
        answers: list[Answer | RequestError] = []
        heads = values["answers"]
        good = sum(isinstance(head, list) for head in heads)
        end = len(content) - values["logits"]
        rows = parts(content, [end // (2 * good)] * (2 * good) if good else [])
        logits = parts(content[end:], [values["logits"] // good] * good) if values["logits"] else None
        for head in heads:
            if isinstance(head, list):
                said, kind, width, height, brightness, entropy, *work = head
                row = (next(rows).cast("f"), next(rows).cast("i"))
                own = next(logits).cast("f") if logits else None
                warnings = [ImageWarning(*one) for one in said]
                answers.append(
                    Answer(kind, width, height, brightness, entropy, *row, Work(*work), own, warnings)
                )
            else:
                answers.append(error_from(head))
        return cls(answers, values["decode"], values["inference"], values["batch"], values["number"])


@dataclass(frozen=True)
class Failure:
    """Reply to a setup, load or batch that failed.

    A failed setup or load means that the model cannot be served. A failed batch is a bug in Fovea.
    """

    reason: str
    golden: bool = False
    """True if the golden set was not reproduced."""
    trace: str = ""
    """Traceback of a bug in Fovea."""
    number: int = 0
    """Sequence number of the failed batch; 0 if it was no batch."""

    def error(self) -> ModelError:
        """Return the failure as an exception."""
        return (GoldenError if self.golden else ModelError)(self.reason)

    def write(self) -> bytes:
        """Return the encoded message."""
        return _frame(self.to_plain())

    def to_plain(self) -> dict[str, Any]:
        """Return the values as types that JSON supports."""
        return {
            "failure": self.reason,
            "golden": self.golden,
            "trace": self.trace,
            "number": self.number,
        }

    @classmethod
    def read(cls, values: dict[str, Any]) -> Failure | None:
        """Return the failure in a frame's object, or None if it holds none."""
        if "failure" not in values:
            return None
        return cls(values["failure"], values["golden"], values["trace"], values.get("number", 0))


# --- frames --------------------------------------------------------------------------------------


def _frame(values: dict[str, Any], parts: Sequence[Sent] = ()) -> bytes:
    return b"".join((_head(values, sum(len(part) for part in parts)), *parts))


def _head(values: dict[str, Any], payload: int) -> bytes:
    header = orjson.dumps(values)
    return _LENGTHS.pack(len(header), payload) + header


def parts(content: memoryview, sizes: Sequence[int]) -> Iterator[memoryview]:
    """Yield parts of these sizes from the bytes behind a message."""
    start = 0
    for size in sizes:
        yield content[start : start + size]
        start += size


def send(connection: socket.socket, values: dict[str, Any], parts: Sequence[Sent] = ()) -> None:
    """Write one message, and wait until it is written."""
    connection.sendall(_head(values, sum(map(len, parts))))
    for part in parts:
        connection.sendall(part)


def receive(connection: socket.socket) -> Frame | None:
    """Wait for one message; return None at the end of the stream."""
    lengths = _exactly(connection, _LENGTHS.size)
    if lengths is None:
        return None
    header, payload = _LENGTHS.unpack(lengths)
    content = _exactly(connection, header + payload)
    return None if content is None else _split(content, header)


def _exactly(connection: socket.socket, size: int) -> memoryview | None:
    """Return exactly `size` bytes; None when the stream ends before."""
    content = memoryview(bytearray(size))
    received = 0
    while received < size:
        count = connection.recv_into(content[received:])
        if not count:
            return None
        received += count
    return content


def _split(content: memoryview, header: int) -> Frame:
    return orjson.loads(content[:header]), content[header:]


class Stream:
    """A decoder of messages from a stream that arrives in pieces."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._wanted = _LENGTHS.size
        """Number of bytes needed to complete the next message."""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Add received bytes, and yield every complete message."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size < self._wanted:
            return
        data = b"".join(self._pieces)
        start, self._wanted = 0, _LENGTHS.size
        while len(data) - start >= _LENGTHS.size:
            header, payload = _LENGTHS.unpack_from(data, start)
            end = start + _LENGTHS.size + header + payload
            if len(data) < end:
                self._wanted = end - start
                break
            yield _split(memoryview(data)[start + _LENGTHS.size : end], header)
            start = end
        self._pieces, self._size = [data[start:]], len(data) - start
