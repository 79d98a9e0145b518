"""What the service and its runner processes say to each other, and how it is written on their socket.

    service → runner    Setup, once
    runner → service    Ready, or Failure: it has loaded its models, or why not
    service → runner    Batch                  ┐ again and again, in the same order; some batches
    runner → service    Report, or Failure     ┘ may wait for others' end, and some be run together
    service → runner    Drop: somebody has left who waited for a batch
    service → runner    Load: one model more; it is loaded beside the batches
    runner → service    Told: it has loaded it, or why not
    service → runner    Unload: a model for which no batch will come

Report and Failure repeat the number of their Batch. Each message is two lengths (uint32, little-endian), a
JSON object, and the bytes that belong to it.
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
"""One encoded image."""

Image: TypeAlias = Sent | Stored
"""The same, or where it is in the memory that service and runners share."""


@dataclass(frozen=True, slots=True)
class Query:
    """One image of which there is more to say than its encoded bytes."""

    content: Image
    tensor: str | None = None
    """It is not encoded, but a row of the model's tensor of this name (`service.artifact.inputs`)."""
    logits: bool = False
    """They are wanted too."""


Item: TypeAlias = Image | Query
"""What a batch has of each image."""


def weight_of(item: Item) -> int:
    """How much there is to decode, in bytes."""
    if isinstance(item, Query):
        return 0 if item.tensor else len(item.content)
    return len(item)


Frame: TypeAlias = tuple[dict[str, Any], memoryview]
"""A message as it is read: its JSON object, and the bytes behind it."""

_LENGTHS: Final = struct.Struct("<II")

PIECE: Final = 256 << 10
"""Most bytes that are written at once. On an event loop a copy of 32 MB takes up to 10 ms."""


HELD: Final = 2
"""Models that an explaining process holds at the same time, each in a session of its own."""


@dataclass(frozen=True)
class Plan:
    """How a process runs its models."""

    provider: Literal["auto", "cpu", "cuda"]
    batch_max: int
    """Most images in one model call; 0 for what suits the provider."""
    threads: int
    """CPU threads inside one model call."""
    wide_threads: int
    """CPU threads inside a call that is alone; 0 where it is like any other."""
    decode_threads: int
    """Images of one batch that are decoded at the same time."""
    image_pixels: int
    """Most pixels in one image."""
    decode_bytes: int
    """Most bytes held by images while they are decoded, in all processes together."""
    processes: int
    """How many there are."""

    @property
    def most_threads(self) -> int:
        """CPU threads inside the widest model call."""
        return max(self.threads, self.wide_threads)


@dataclass(frozen=True)
class Load:
    """A model that a runner must load, and how to run it."""

    slot: int
    """What batches call it."""
    path: str
    """What it is called."""
    file: str
    """Where it is read from."""
    stamp: Sequence[int]
    """Of that file, as `held.stamp_of` gives it."""
    plan: Plan

    def write(self) -> bytes:
        """For the socket."""
        return _frame({"load": asdict(self)})

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Load:
        """What `asdict` has made."""
        return cls(**{**values, "plan": Plan(**values["plan"])})


class Unload(NamedTuple):
    """The model in this slot is not needed any more."""

    slot: int

    def write(self) -> bytes:
        """For the socket."""
        return _frame({"unload": self.slot})


@dataclass(frozen=True)
class Setup:
    """What a runner must load at its start; `plan` is for the process."""

    plan: Plan
    models: Sequence[Load]

    def write(self) -> bytes:
        """For the socket."""
        return _frame(asdict(self))

    @classmethod
    def read(cls, frame: Frame) -> Setup:
        """From the socket."""
        values, _ = frame
        return cls(Plan(**values["plan"]), [Load.from_plain(model) for model in values["models"]])


@dataclass(frozen=True)
class Loaded:
    """A model that a process has loaded, warmed up and proven."""

    contract: str
    """The contract's JSON."""
    provider: Literal["cpu", "cuda"]
    batch_max: int
    batch_bytes: float
    """Most encoded bytes in one batch of several images."""
    seconds: float
    """Time to load, warm up and prove it."""
    golden: dict[str, float]
    """How closely this host came to the golden set."""


@dataclass(frozen=True)
class Ready:
    """The models that a process has loaded, in the order of its setup, and what it runs them with."""

    models: Sequence[Loaded]
    onnxruntime: str
    """Its version."""
    providers: Sequence[str]
    """Execution providers that it could use."""
    formats: Sequence[str]
    """Image formats that it decodes."""

    def write(self) -> bytes:
        """For the socket."""
        return _frame(asdict(self))

    @classmethod
    def read(cls, frame: Frame) -> Ready | Failure:
        """From the socket."""
        values, _ = frame
        if failure := Failure.read(values):
            return failure
        return cls(**{**values, "models": [Loaded(**model) for model in values["models"]]})


class Told(NamedTuple):
    """What became of a `Load`."""

    slot: int
    outcome: Loaded | Failure

    def write(self) -> bytes:
        """For the socket."""
        outcome = self.outcome.to_plain() if isinstance(self.outcome, Failure) else asdict(self.outcome)
        return _frame({"told": self.slot, **outcome})

    @classmethod
    def read(cls, frame: Frame) -> Told | None:
        """From the socket, if it is one."""
        values, _ = frame
        if "told" not in values:
            return None
        slot = values.pop("told")
        return cls(slot, Failure.read(values) or Loaded(**values))


class Batch(NamedTuple):
    """Images for one model. `alone`: nothing else is at work, all processors are there for it."""

    number: int
    """It counts a runner's batches."""
    model: int
    """Its slot."""
    images: Sequence[Item]
    deadlines: Sequence[float | None]
    """When each image's answer is of no more use, on the system's monotonic clock in seconds; None: never."""
    alone: bool
    apart: bool
    """It must not be run together with others."""
    memory: int = 0
    """Bytes that are reserved for decoding its images (`service.inference.decode_memory`)."""

    @property
    def weight(self) -> int:
        """Of its images."""
        return sum(map(weight_of, self.images))

    def pieces(self) -> Iterator[memoryview]:
        """For the socket, one after the other; large images are not copied, and stored ones not sent."""
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
    """Nobody waits any more for the image at this place of the batch with this number."""

    number: int
    place: int

    def write(self) -> bytes:
        """For the socket."""
        return _frame({"drop": [self.number, self.place]})


def _place(image: Item) -> Any:
    """The size of an image that is sent, or where a stored one is; and what else is said of it."""
    if isinstance(image, Query):
        return {"place": _place(image.content), "tensor": image.tensor, "logits": image.logits}
    return (image.offset, image.size) if isinstance(image, Stored) else len(image)


def read_work(frame: Frame) -> Batch | Drop | Load | Unload:
    """From the socket; the images of a batch are views into the frame, or stored."""
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
    """When an image was worked on: times on the system's monotonic clock, and durations, in seconds."""

    decode_began: float
    decode: float
    inference_began: float
    inference: float
    batch: int
    """Images in that model call."""


class Answer(NamedTuple):
    """One image's: what it is, and every label's probability. Sizes in pixels, EXIF orientation applied."""

    format: str
    """Empty where it came as a tensor."""
    width: int
    height: int
    brightness: float | None
    """The mean of all values of the model's input, 0 … 1; None where that is not known."""
    entropy: float
    """Of the probabilities, 0 sure of one label … 1 all are alike."""
    probabilities: memoryview[float]
    """float32 (labels,), in the contract's order."""
    ranking: memoryview[int]
    """int32 (labels,): the labels' places in that order, most probable first; equals keep their order."""
    work: Work
    logits: memoryview[float] | None = None
    """float32 (`contract.logit_count`,), if anybody in the batch wanted them."""
    warnings: Sequence[ImageWarning] = ()
    """What may surprise about how its pixels came about."""


class Report(NamedTuple):
    """A batch's answers in order, each its own or its own error; and the time they took, in seconds."""

    answers: Sequence[Answer | RequestError]
    decode: Sequence[float]
    """Of each image."""
    inference: float
    """Of the model call."""
    batch: int
    """Images in that call; 0 when there was none, or another report tells of it."""
    number: int = 0
    """Of the batch that it answers."""

    def write(self) -> bytes:
        """For the socket."""
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
        """From the socket."""
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
    """It did not work, and why: of a setup, a model that cannot be served; of a batch, our own bug."""

    reason: str
    golden: bool = False
    """The golden set was not met."""
    trace: str = ""
    """Of our own bug."""
    number: int = 0
    """Of the batch that has failed, if it is one."""

    def error(self) -> ModelError:
        """As it is raised."""
        return (GoldenError if self.golden else ModelError)(self.reason)

    def write(self) -> bytes:
        """For the socket."""
        return _frame(self.to_plain())

    def to_plain(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return {
            "failure": self.reason,
            "golden": self.golden,
            "trace": self.trace,
            "number": self.number,
        }

    @classmethod
    def read(cls, values: dict[str, Any]) -> Failure | None:
        """From a frame's object, if it is one."""
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
    """The bytes behind a message, taken apart."""
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
    """Wait for one message; None at the end of the stream."""
    lengths = _exactly(connection, _LENGTHS.size)
    if lengths is None:
        return None
    header, payload = _LENGTHS.unpack(lengths)
    content = _exactly(connection, header + payload)
    return None if content is None else _split(content, header)


def _exactly(connection: socket.socket, size: int) -> memoryview | None:
    """So many bytes; None when the stream ends before."""
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
    """Takes messages out of a stream that arrives in pieces."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._wanted = _LENGTHS.size
        """Bytes without which there is nothing to take out."""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Every message that is whole now."""
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
