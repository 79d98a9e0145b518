"""The contract: what a model file says about itself, as one JSON document in its ONNX metadata.

A reader needs nothing but the standard library. Whatever is missing, of the wrong type, unknown or
contradictory raises `ContractError` with the path of the field: nothing is filled in by guessing.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

from fovea.service.errors import ContractError

FORMAT: Final = 1
"""The version of this document's layout. A reader refuses any other."""

GOLDEN_PIXELS: Final = 1 << 24
"""Most pixels in a golden image: they are small, and a contract with larger ones is not one of ours."""

METADATA_KEY: Final = "fovea.contract"
"""The key in ONNX `metadata_props` that holds the document."""


class Task(StrEnum):
    """What the probabilities mean."""

    MULTICLASS = "multiclass"
    """Exactly one label is true: softmax, the probabilities sum to 1."""
    BINARY = "binary"
    """The second of two labels is true or not: one logit, sigmoid, answered as [1 - p, p]."""
    MULTILABEL = "multilabel"
    """Any number of labels is true: one sigmoid each."""


class Resize(StrEnum):
    """How an image of any shape becomes one of the model's shape."""

    SHORTER = "shorter"
    """The shorter side becomes `resize_to`, the longer follows; then the centre is cropped."""
    STRETCH = "stretch"
    """Both sides become the model's, whatever that does to the aspect ratio."""


class Interpolation(StrEnum):
    """Pillow's resampling filters; all but `nearest` antialias when they shrink."""

    NEAREST = "nearest"
    BOX = "box"
    BILINEAR = "bilinear"
    HAMMING = "hamming"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class PixelPath(StrEnum):
    """How closely decoding and resizing follow a pipeline written by hand with Pillow."""

    EXACT = "exact"
    """Full decode, whole resize, crop: bit for bit."""
    FAST = "fast"
    """Scaled JPEG decoding, and only what the crop keeps is resized."""


@dataclass(frozen=True)
class Geometry:
    """From an image of any size to the model's input. Sizes in pixels."""

    height: int
    width: int
    resize: Resize
    resize_to: int
    """Length of the shorter side before the crop; for `stretch` it has no meaning and is 0."""
    interpolation: Interpolation
    pixel_path: PixelPath

    def __post_init__(self) -> None:
        _require(self.height > 0 and self.width > 0, "input: height and width must be positive")
        if self.resize is Resize.SHORTER:
            _require(
                self.resize_to >= max(self.height, self.width),
                f"input: resize_to {self.resize_to} is smaller than the crop",
            )
        else:
            _require(self.resize_to == 0, "input: resize_to must be 0 with resize 'stretch'")


@dataclass(frozen=True)
class Layer:
    """One node of the graph. Shapes leave out the batch axis; an unknown size is null."""

    name: str
    kind: str
    """The ONNX operator, such as `Conv`."""
    inputs: tuple[str, ...]
    """Tensor names, initializers included."""
    outputs: tuple[str, ...]
    shape: tuple[int | None, ...]
    """Shape of the first output."""
    attributes: dict[str, int | float | str | tuple[int, ...] | tuple[float, ...]]
    parameters: int
    """Number of values in this node's initializers."""


@dataclass(frozen=True)
class Training:
    """Where the weights come from. `commit` names the version of the code that made them."""

    data: str
    images: int
    commit: str
    command: str


@dataclass(frozen=True)
class Accuracy:
    """How well the exported graph did. `top1` is a fraction of `images`."""

    data: str
    images: int
    top1: float
    ece: float | None
    """Expected calibration error, of 15 bins of equal mass; null where it was not measured."""


@dataclass(frozen=True)
class Coverage:
    """A level of conformal sets: the labels whose 1 - probability is at most `quantile` hold the true one in
    `level` of all cases (split conformal prediction: Vovk et al., 2005; Angelopoulos and Bates, 2021)."""

    level: float
    quantile: float


@dataclass(frozen=True)
class Spread:
    """How a number was spread over bins: `counts` are of the images below the first edge, from each edge to
    the next, and from the last one on."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        _require(list(self.edges) == sorted(set(self.edges)), "reference: the edges must rise")
        _require(len(self.counts) == len(self.edges) + 1, "reference: edges and counts do not fit")
        _require(all(count >= 0 for count in self.counts), "reference: a count is negative")


@dataclass(frozen=True)
class Reference:
    """Statistics of held-out images and of the model's answers to them (see `service.inference.drift`)."""

    images: int
    labels: dict[str, int]
    """For how many of them each label was the most probable: the nine most frequent labels at most."""
    confidence: Spread
    """The most probable label's probability."""
    brightness: Spread
    """The mean of all values of the model's input, 0 black … 1 white."""

    def __post_init__(self) -> None:
        _require(0 < len(self.labels) <= 9, "reference: between 1 and 9 labels are needed")
        _require(all(count > 0 for count in self.labels.values()), "reference: a label was never predicted")
        _require(sum(self.labels.values()) <= self.images, "reference: labels of more images than there are")
        for spread in (self.confidence, self.brightness):
            _require(sum(spread.counts) == self.images, "reference: counts of other images")


@dataclass(frozen=True)
class GoldenImage:
    """One encoded image, the pixels it must become, and the logits those must give.

    A lossless format must give exactly `pixels`. JPEG decoders may differ in rounding: for it
    the mean absolute difference, in levels of 255, must not exceed `pixel_tolerance`.
    """

    name: str
    image: str
    """The encoded image, base64."""
    pixels: str
    """The pixels, uint8 (height, width, 3), as a PNG, base64."""
    pixel_tolerance: float
    logits: tuple[float, ...]


@dataclass(frozen=True)
class Golden:
    """What every host proves before it calls itself ready."""

    logit_tolerance: dict[str, float]
    """Largest absolute difference of a logit, by provider and dtype: `cpu/float32`."""
    images: tuple[GoldenImage, ...]

    def __post_init__(self) -> None:
        _require(0 < len(self.images) <= 8, "golden: between 1 and 8 images are needed")


@dataclass(frozen=True)
class Contract:
    """Everything a service must know to serve one model, and a reader to trust it."""

    format: int
    name: str
    version: str
    task: Task
    labels: tuple[str, ...]
    input_name: str
    """The graph's input: uint8 (batch, height, width, 3), RGB."""
    input: Geometry
    logits_name: str
    """Output of the last linear layer: float32 (batch, labels); (batch, 1) for `binary`."""
    probabilities_name: str
    """float32 (batch, labels); for `binary` (batch, 2) = [1 - p, p]."""
    feature_maps: tuple[str, ...]
    """Tensors worth looking at, from input to output."""
    thresholds: tuple[float, ...]
    """From which probability on a label is selected: none for `multiclass`; one for `binary`, of the second
    label, below which the first is; one for each label for `multilabel`."""
    temperature: float
    """What the logits are divided by before they become probabilities; 1 is uncalibrated."""
    coverage: tuple[Coverage, ...]
    """Rising levels; none where no set was measured, nor for `multilabel`."""
    training: Training
    accuracy: Accuracy | None
    reference: Reference | None
    """Null for a model that came without images: its drift cannot be told."""
    layers: tuple[Layer, ...]
    golden: Golden

    def __post_init__(self) -> None:
        _require(self.format == FORMAT, f"format is {self.format}; this reader knows {FORMAT}")
        _require(len(self.labels) >= 2, "labels: at least two are needed")
        _require(len(set(self.labels)) == len(self.labels), "labels: each must be unique")
        _require(self.task is not Task.BINARY or len(self.labels) == 2, "binary takes two labels")
        wanted = {Task.MULTICLASS: 0, Task.BINARY: 1, Task.MULTILABEL: len(self.labels)}[self.task]
        _require(len(self.thresholds) == wanted, f"thresholds: {self.task} takes {wanted}")
        _require(all(0 <= one <= 1 for one in self.thresholds), "thresholds: one is not in [0, 1]")
        _require(self.temperature > 0, "temperature must be positive")
        _require_coverage(self.coverage, self.task)
        if self.reference:
            _require(self.reference.labels.keys() <= set(self.labels), "reference: a label is unknown")
        for image in self.golden.images:
            _require(
                len(image.logits) == self.logit_count,
                f"golden image {image.name!r} has {len(image.logits)} logits",
            )

    @property
    def logit_count(self) -> int:
        """How many logits the graph gives for one image."""
        return 1 if self.task is Task.BINARY else len(self.labels)

    def to_json(self) -> str:
        """The document as it is stored in the ONNX metadata."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, document: str) -> Contract:
        """Read a document. Raises `ContractError` for anything that is not exactly a contract."""
        try:
            value = json.loads(document)
        except (ValueError, RecursionError) as error:
            raise ContractError(f"the contract is not JSON: {error}") from None
        try:
            return from_plain(cls, value, "contract")
        except (OverflowError, UnicodeEncodeError) as error:
            raise ContractError(f"the contract has a value that cannot be used: {error}") from None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Contract:
        """Read the contract from ONNX `metadata_props`. Raises `ContractError`."""
        if METADATA_KEY not in metadata:
            raise ContractError(
                "the model has no contract; `fovea export` writes one, "
                "and `fovea import` gives one to a model from elsewhere"
            )
        return cls.from_json(metadata[METADATA_KEY])


def _require_coverage(coverage: tuple[Coverage, ...], task: Task) -> None:
    levels, quantiles = [one.level for one in coverage], [one.quantile for one in coverage]
    _require(not coverage or task is not Task.MULTILABEL, "coverage: multilabel has none")
    _require(all(0 < level < 1 for level in levels), "coverage: a level is not between 0 and 1")
    _require(levels == sorted(set(levels)), "coverage: the levels must rise")
    _require(all(0 <= one <= 1 for one in quantiles), "coverage: a quantile is not in [0, 1]")
    _require(quantiles == sorted(quantiles), "coverage: the quantiles must not fall")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(message)


T = TypeVar("T")


def from_plain(kind: type[T], value: Any, path: str) -> T:
    """Turn parsed JSON into `kind`, a dataclass of this file, strictly; `path` names the place in messages.

    Raises `ContractError`.
    """
    decoded: Any = _decode_any(kind, value, path)
    return typing.cast(T, decoded)


def _decode_any(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return _decode_dataclass(typing.cast(type[Any], kind), value, path)
    if origin is types.UnionType:
        return _decode_union(arguments, value, path)
    if origin is tuple:
        _require(isinstance(value, list), f"{path} must be a list")
        return tuple(_decode_any(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        _require(isinstance(value, dict), f"{path} must be an object")
        return {key: _decode_any(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if kind is types.NoneType:
        _require(value is None, f"{path} must be null")
        return None
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        known = [member.value for member in kind]
        _require(value in known, f"{path} is {value!r}; known are {', '.join(known)}")
        return kind(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is str:
        value.encode()  # half a surrogate pair could not be sent to anyone
    _require(type(value) is kind, f"{path} must be {kind.__name__}, not {type(value).__name__}")
    _require(kind is not float or math.isfinite(value), f"{path} must be finite")
    return value


def _decode_dataclass(kind: type[Any], value: Any, path: str) -> Any:
    _require(isinstance(value, dict), f"{path} must be an object")
    known = {field.name for field in fields(kind)}
    for word, names in (("lacks", known - value.keys()), ("has unknown", value.keys() - known)):
        _require(not names, f"{path} {word} {', '.join(sorted(names))}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _decode_any(hints[name], value[name], f"{path}.{name}") for name in known})


def _decode_union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    """The first kind that it fits; what the first has against it where none does."""
    refusals = []
    for kind in kinds:
        try:
            return _decode_any(kind, value, path)
        except ContractError as error:
            refusals.append(error)
    raise refusals[0]
