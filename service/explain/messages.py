"""Messages between the service and an explaining process.

    service → process    ExplainerRequest: a question about a model, and the image behind it
    process → service    HeatmapProgress, repeated: a step of an occlusion
    process → service    ContentPart, repeated: a piece of the picture or array that belongs to the reply
    process → service    ExplainerReply, Refusal, or Failure: the last message of each request
    service → process    StopCommand, if the caller has left before that

All replies repeat the number of their request. The process answers one request at a time. Texts are checked
for their type only: the service passes them on as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, Literal, TypeAlias, TypeVar

from fovea.service.image_warnings import ImageWarning
from fovea.service.runners.load_messages import LoadCommand
from fovea.service.runners.messages import NumberedMessage

Method: TypeAlias = Literal["auto", "cam", "occlusion"]

MAX_CONTENT_BYTES: Final = 1 << 30
"""Limit of bytes in all `ContentPart` messages of a reply. The largest is a PNG of a photo."""


# --- results ---


@dataclass(frozen=True)
class HeatmapValues:
    """A heat map as rows of numbers; null where a value is not finite."""

    height: int
    width: int
    values: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Photo:
    """Format and size in pixels of a photo."""

    format: str
    width: int
    height: int


@dataclass(frozen=True)
class PreprocessingStep:
    """A step of the preprocessing."""

    step: str
    text: str


@dataclass(frozen=True)
class InputPicture:
    """The exact input of the model, and the steps that made it from the photo."""

    width: int
    height: int
    png: str
    """PNG as base64."""
    box: Sequence[float]
    """Left, top, right, bottom of the part that it shows, in the photo's pixels."""
    steps: Sequence[PreprocessingStep]


@dataclass(frozen=True)
class ModelInput:
    """The model's input, and the answer to it."""

    probabilities: Sequence[float]
    """Probability of every label, in the contract's order."""
    known_score: float | None
    """Likeness to the training images (`service.inference.known`); None if the model does not tell."""
    photo: Photo
    warnings: Sequence[ImageWarning]
    picture: InputPicture


@dataclass(frozen=True)
class HeatmapResult:
    """An explanation of one label of an image; its content is a PNG if that was requested."""

    input: ModelInput
    label: int
    """Index of the label."""
    method: Literal["cam", "occlusion"]
    samples: int
    """Number of masked images that were classified."""
    note: str | None
    """Reason why there is no class activation map, or None."""
    heatmap: HeatmapValues


@dataclass(frozen=True)
class MapsResult:
    """The output of a layer; its content is an array in NumPy's file format."""

    channels: int
    lowest: float
    """Lowest finite value of all channels."""
    highest: float


@dataclass(frozen=True)
class WeightsResult:
    """Weights of a layer; the content is an array in NumPy's file format."""

    channels: int
    """Number of outputs of the layer."""


@dataclass(frozen=True)
class LayerDescription:
    """A layer in the API's form (`LayerInfo` in `service.api.reply_schemas`)."""

    tensor: str
    name: str
    kind: str
    sources: Sequence[str]
    shape: Sequence[int | None]
    left_out: int
    direct: bool
    block: str | None
    kernel: Sequence[int] | None
    stride: Sequence[int] | None
    padding: Sequence[int] | None
    dilation: Sequence[int] | None
    groups: int
    parameters: int
    constants: Mapping[str, float | None]
    attributes: Mapping[str, Any]
    weights: Sequence[str]
    input: str | None
    order: str | None
    field: Mapping[str, Sequence[int]] | None


@dataclass(frozen=True)
class LayersResult:
    """The layers of a model in the order of computation."""

    layers: Sequence[LayerDescription]
    cam: bool
    """True if the network has class activation maps."""
    reason: str | None
    """Reason why the graph cannot be opened, or None."""


# --- questions ---

Result = TypeVar("Result")


@dataclass(frozen=True)
class Question(Generic[Result]):
    """The base class of the questions below. The reply to each has a result of its `result_type`."""

    result_type: ClassVar[type]


@dataclass(frozen=True)
class ExplanationRequest(Question[HeatmapResult]):
    """Request for an explanation: the label to explain, and the method."""

    result_type = HeatmapResult

    method: Method = "auto"
    label: int | None = None
    """Index of the label in the contract; None means the most probable label."""
    seed: int = 0
    samples: int = 0
    """Number of masked images of an occlusion; 0 means as many as the time allows."""
    seconds: float = 4.0
    """Time limit of an occlusion in seconds, if `samples` is 0."""
    picture: bool = False
    """True for a PNG of the photo under its heat map instead of numbers."""
    has_progress: bool = False
    """True if the caller wants the heat map after each step."""


@dataclass(frozen=True)
class MapsQuestion(Question[MapsResult]):
    """Request for the output of a layer for an image."""

    result_type = MapsResult

    tensor: str
    first: int
    count: int
    """Number of maps from `first` on; 0 for all."""
    indices: Sequence[int]
    """Indices of single maps instead of `first` and `count`; empty for none."""
    strength: bool
    """True for the mean absolute value of each map instead of the maps."""
    prepared: bool
    """True if the image is the model's input itself."""


@dataclass(frozen=True)
class WeightsQuestion(Question[WeightsResult]):
    """Request for the weights of a layer."""

    result_type = WeightsResult

    tensor: str
    part: str
    first: int
    count: int
    """Number of outputs from `first` on; 0 for all."""


@dataclass(frozen=True)
class LayersQuestion(Question[LayersResult]):
    """Request for the layers of a model."""

    result_type = LayersResult


# --- messages ---


@dataclass(frozen=True)
class ExplainerRequest(NumberedMessage):
    """A question about a model. The content is the image, if the question needs one."""

    load: LoadCommand
    contract_json: str | None
    """Contract of the model as JSON; None if the process has it."""
    question: ExplanationRequest | MapsQuestion | WeightsQuestion | LayersQuestion


@dataclass(frozen=True)
class StopCommand(NumberedMessage):
    """Notice that no caller waits for the reply to the request with this number."""


@dataclass(frozen=True)
class HeatmapProgress(NumberedMessage):
    """A step of an occlusion. Each message proves that the process is alive."""

    progress: float
    """Progress 0 … 1."""
    samples: int
    heatmap: HeatmapValues | None
    """Current heat map; None at the start, or if the caller wants no progress."""
    input: ModelInput | None
    """The model's input; only in the first step for a caller that wants progress."""


@dataclass(frozen=True)
class ContentPart(NumberedMessage):
    """A piece of the reply's content: large contents would block the event loop while they are copied."""


@dataclass(frozen=True)
class ExplainerReply(NumberedMessage):
    """The last message of a request. All of its `ContentPart` messages come before it."""

    result: HeatmapResult | MapsResult | WeightsResult | LayersResult | None
    """Result; None if the request was stopped."""
    content_size: int
    """Number of bytes in all parts of the content."""


@dataclass(frozen=True)
class Refusal(NumberedMessage):
    """The last message of a request that cannot be answered: an error of the image or the question."""

    code: str
    message: str
