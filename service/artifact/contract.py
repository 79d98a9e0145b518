"""The contract: the description of a model, stored as one JSON document in the ONNX metadata.

A reader needs only the standard library. A field that is missing, unknown, contradictory or of the wrong type
raises `ContractError` with the path of the field. No value is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final, TypeAlias

from fovea.service.artifact.geometry import Geometry as Geometry
from fovea.service.artifact.geometry import Interpolation as Interpolation
from fovea.service.artifact.geometry import PixelPath as PixelPath
from fovea.service.artifact.geometry_upgrade import upgrade_geometry
from fovea.service.artifact.strict_json import from_plain, require
from fovea.service.errors import ContractError

FORMAT_VERSION: Final = 3
"""Version of the document's layout that Fovea writes. It reads this version and all earlier ones.

Raise it with every change of a field or of a field's meaning, and add the step from the previous version to
`_UPGRADES`: `docs/models.md` has the policy.
"""

MAX_GOLDEN_PIXELS: Final = 1 << 24
"""Pixel limit of a golden image. Golden images are small; Fovea writes no contract with larger images."""

METADATA_KEY: Final = "fovea.contract"
"""Key in ONNX `metadata_props` that holds the document."""


class Task(StrEnum):
    """The meaning of the probabilities."""

    MULTICLASS = "multiclass"
    """Exactly one label is true: softmax, and the probabilities sum to 1."""
    BINARY = "binary"
    """The second of two labels is true or false: one logit and a sigmoid, returned as [1 - p, p]."""
    MULTILABEL = "multilabel"
    """Any number of labels is true: one sigmoid for each label."""


@dataclass(frozen=True)
class Layer:
    """One node of the graph. Shapes exclude the batch axis; an unknown size is null."""

    name: str
    kind: str
    """ONNX operator, such as `Conv`."""
    inputs: tuple[str, ...]
    """Tensor names, including initializers."""
    outputs: tuple[str, ...]
    shape: tuple[int | None, ...]
    """Shape of the first output."""
    attributes: dict[str, int | float | str | tuple[int, ...] | tuple[float, ...]]
    parameters: int
    """Number of values in the initializers of this node."""


@dataclass(frozen=True)
class Training:
    """The origin of the weights. `commit` identifies the version of the training code."""

    data: str
    images: int
    commit: str
    command: str


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of the exported graph. `top1` is a fraction of `images`."""

    data: str
    images: int
    top1: float
    ece: float | None
    """Expected calibration error, with 15 bins of equal mass; null if it was not measured."""


@dataclass(frozen=True)
class Coverage:
    """One level of conformal prediction sets.

    The labels whose 1 - probability is at most `quantile` contain the true label in a share `level` of all
    cases (split conformal prediction: Vovk et al., 2005; Angelopoulos and Bates, 2021).
    """

    level: float
    quantile: float


@dataclass(frozen=True)
class Histogram:
    """A histogram.

    `counts` holds the number of images below the first edge, from each edge to the next, and from the last
    edge on.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        require(list(self.edges) == sorted(set(self.edges)), "reference: the edges must rise")
        require(len(self.counts) == len(self.edges) + 1, "reference: edges and counts do not fit")
        require(all(count >= 0 for count in self.counts), "reference: a count is negative")


@dataclass(frozen=True)
class DriftReference:
    """Statistics of held-out images and of the model's answers to them (see `service.inference.drift`)."""

    images: int
    labels: dict[str, int]
    """Number of images for each most probable label; at most the nine most frequent labels."""
    confidence: Histogram
    """Probability of the most probable label."""
    brightness: Histogram
    """Mean of all values of the model's input, from 0 (black) to 1 (white)."""

    def __post_init__(self) -> None:
        require(0 < len(self.labels) <= 9, "reference: between 1 and 9 labels are needed")
        require(all(count > 0 for count in self.labels.values()), "reference: a label was never predicted")
        require(sum(self.labels.values()) <= self.images, "reference: labels of more images than there are")
        for histogram in (self.confidence, self.brightness):
            require(sum(histogram.counts) == self.images, "reference: counts of other images")


@dataclass(frozen=True)
class KnownScore:
    """The score from which an image counts as like the training images (`service.inference.known`)."""

    threshold: float
    """Lowest score of an image that counts as known."""
    accepted: float
    """Share of held-out images with at least this score."""
    images: int
    """Number of held-out images."""

    def __post_init__(self) -> None:
        require(0 < self.accepted <= 1, "known: accepted is not in (0, 1]")
        require(self.images > 0, "known: images must be positive")

    def accepts(self, score: float) -> bool:
        """Return whether an image with this score counts as known."""
        return score >= self.threshold


@dataclass(frozen=True)
class GoldenImage:
    """One encoded image, its expected pixels, and the expected logits for these pixels.

    A lossless format must decode to exactly `pixels`. JPEG decoders may differ in rounding: for JPEG the mean
    absolute difference, in levels of 255, must not exceed `pixel_tolerance`.
    """

    name: str
    image: str
    """Encoded image, base64."""
    pixels: str
    """Pixels, uint8 (height, width, 3), as a PNG, base64."""
    pixel_tolerance: float
    logits: tuple[float, ...]


@dataclass(frozen=True)
class GoldenSet:
    """The golden set: every host must reproduce it before the host reports ready."""

    logit_tolerance: dict[str, float]
    """Largest absolute difference of a logit, by provider and dtype, such as `cpu/float32`.

    A provider without an entry has that of its `arithmetic` (`service.providers`).
    """
    images: tuple[GoldenImage, ...]

    def __post_init__(self) -> None:
        require(0 < len(self.images) <= 8, "golden: between 1 and 8 images are needed")


class Precision(StrEnum):
    """The arithmetic of a quantized model."""

    INT8 = "int8"
    FLOAT16 = "float16"


@dataclass(frozen=True)
class Quantization:
    """The conversion of a float model to this model, and the measurements on which it was accepted."""

    precision: Precision
    source_version: str
    """Version of the float model in the same repository."""
    source_sha256: str
    """Digest of the float model's file."""
    recipe: str
    """Description of the conversion for people."""
    calibration: str
    """Method that chose the ranges of the activations; empty if no ranges were needed."""
    calibration_images: int
    weight_bits: int
    """Bits of a weight: 8, 7 in reduced range, or 16."""
    float_layers: tuple[str, ...]
    """Layers with weights that compute in float32."""
    data: str
    """Name of the folder with the images."""
    images: int
    """Number of held-out images, on which both models were compared."""
    source_top1: float | None
    """Share of these images that the float model gets right; null without labels."""
    top1: float | None
    """Share of these images that this model gets right; null without labels."""
    agreement: float
    """Share of these images to which both models give the same answer."""
    loss: float
    """`source_top1` - `top1`, or 1 - `agreement` without labels."""
    loss_interval: tuple[float, ...]
    """Lower and upper limit of the loss at `confidence`."""
    confidence: float
    candidates: int
    """Number of conversions that were compared with the float model on these images."""
    speedup: float | None
    """Time of the float model divided by that of this model, one image in one thread; null if unmeasured."""
    processor: str
    """Name of the processor on which the conversion was made."""
    command: str

    def __post_init__(self) -> None:
        require(self.weight_bits in (7, 8, 16), "quantization: weight_bits must be 7, 8 or 16")
        require(self.images > 0, "quantization: images must be positive")
        require(len(self.loss_interval) == 2, "quantization: loss_interval takes two numbers")
        require((self.top1 is None) == (self.source_top1 is None), "quantization: only one top-1 is known")


@dataclass(frozen=True)
class Contract:
    """Everything that a service needs to serve one model, and that a reader needs to trust the model."""

    format: int
    name: str
    version: str
    task: Task
    labels: tuple[str, ...]
    input_name: str
    """Graph input: uint8 (batch, height, width, 3), RGB."""
    input: Geometry
    logits_name: str
    """Output of the last linear layer: float32 (batch, labels); (batch, 1) for `binary`."""
    probabilities_name: str
    """Output with the probabilities: float32 (batch, labels); (batch, 2) = [1 - p, p] for `binary`."""
    feature_maps: tuple[str, ...]
    """Names of tensors that are worth showing, from input to output."""
    thresholds: tuple[float, ...]
    """Probabilities from which a label is selected.

    `multiclass` has no thresholds. `binary` has one threshold for the second label, below which the first
    label is selected. `multilabel` has one threshold for each label.
    """
    temperature: float
    """Temperature by which logits are divided before they become probabilities; 1 means uncalibrated."""
    coverage: tuple[Coverage, ...]
    """Conformal sets in order of rising level; empty if none was measured, and for `multilabel`."""
    training: Training
    accuracy: Accuracy | None
    reference: DriftReference | None
    """Null for a model that was imported without images: its drift cannot be measured."""
    known: KnownScore | None
    """Null for a binary model and for one that was imported without images: they do not tell."""
    quantization: Quantization | None
    """Null for a model that computes as it was trained or imported."""
    layers: tuple[Layer, ...]
    golden: GoldenSet

    def __post_init__(self) -> None:
        require(self.format == FORMAT_VERSION, f"format is {self.format}; a contract has {FORMAT_VERSION}")
        require(len(self.labels) >= 2, "labels: at least two are needed")
        require(len(set(self.labels)) == len(self.labels), "labels: each must be unique")
        require(self.task is not Task.BINARY or len(self.labels) == 2, "binary takes two labels")
        threshold_count = {Task.MULTICLASS: 0, Task.BINARY: 1, Task.MULTILABEL: len(self.labels)}[self.task]
        require(len(self.thresholds) == threshold_count, f"thresholds: {self.task} takes {threshold_count}")
        require(all(0 <= one <= 1 for one in self.thresholds), "thresholds: one is not in [0, 1]")
        require(not self.known or self.task is not Task.BINARY, "known: binary has no score")
        require(self.temperature > 0, "temperature must be positive")
        _require_coverage(self.coverage, self.task)
        if self.reference:
            require(self.reference.labels.keys() <= set(self.labels), "reference: a label is unknown")
        for image in self.golden.images:
            require(
                len(image.logits) == self.logit_count,
                f"golden image {image.name!r} has {len(image.logits)} logits",
            )

    @property
    def logit_count(self) -> int:
        """Number of logits that the graph returns for one image."""
        return 1 if self.task is Task.BINARY else len(self.labels)

    def to_json(self) -> str:
        """Return the document in the form stored in the ONNX metadata."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, document: str) -> Contract:
        """Parse a document. Raises `ContractError` for anything that is not exactly a contract."""
        try:
            value = json.loads(document)
        except (ValueError, RecursionError) as error:
            raise ContractError(f"the contract is not JSON: {error}") from None
        try:
            return from_plain(cls, _upgrade(value), "contract")
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
    require(not coverage or task is not Task.MULTILABEL, "coverage: multilabel has none")
    require(all(0 < level < 1 for level in levels), "coverage: a level is not between 0 and 1")
    require(levels == sorted(set(levels)), "coverage: the levels must rise")
    require(all(0 <= one <= 1 for one in quantiles), "coverage: a quantile is not in [0, 1]")
    require(quantiles == sorted(quantiles), "coverage: the quantiles must not fall")


Upgrade: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]

_UPGRADES: Final[dict[int, Upgrade]] = {
    1: lambda document: {**document, "quantization": None},
    2: lambda document: {
        **document,
        "input": upgrade_geometry(document.get("input"), "contract.input"),
        "known": None,
    },
}
"""Functions that convert a parsed document of one version to the next version, by the old version."""


def _upgrade(document: Any) -> Any:
    """Return a parsed document in the layout of `FORMAT_VERSION`. Raises `ContractError` if it is newer."""
    version = document.get("format") if isinstance(document, dict) else None
    if type(version) is not int:
        return document  # the decoder says what is wrong
    require(
        1 <= version <= FORMAT_VERSION,
        f"format is {version}; this version of Fovea reads 1 to {FORMAT_VERSION}. Update Fovea to serve it",
    )
    for number in range(version, FORMAT_VERSION):
        document = {**_UPGRADES[number](document), "format": number + 1}
    return document
