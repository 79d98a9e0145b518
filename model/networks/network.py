"""Networks that map uint8 pixels to logits, with interchangeable backbones.

Every backbone is followed by one linear layer, the head. All but `tiny_vgg` have global average pooling
before the head. The class activation map of a label is then exactly the label's row of the head times the
feature maps (Zhou et al., 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from fovea.model.data.pixels import Pixels
from fovea.model.networks.cnn import DEFAULT_WIDTHS, LARGE_WIDTHS, Cnn, Whitening
from fovea.model.networks.mobilenet import MobileNetV2
from fovea.model.networks.resnet import DEPTHS, ResNet
from fovea.model.networks.tiny_vgg import TinyVgg
from fovea.service.artifact.contract import Task
from fovea.service.errors import FoveaError

SIZES: Final = range(16, 385)
"""Supported input sides, in pixels."""


class NetError(FoveaError):
    """The network does not exist or does not support the input size."""


@dataclass(frozen=True)
class NetConfig:
    """The configuration from which a network is built.

    Raises `NetError` for an unknown network or an unsupported size.
    """

    task: Task
    labels: int
    name: str = "cnn"
    """Name of the network, a key of `NETS`."""
    size: int = 32
    """Side of the input, in pixels."""
    widths: tuple[int, ...] = ()
    """Channels of the `cnn`'s stem and stages; empty selects the network's default."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of the training pixels per channel (R, G, B), on a scale of 0 to 1."""
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    """Standard deviation of the training pixels per channel (R, G, B), on a scale of 0 to 1."""

    def __post_init__(self) -> None:
        require_supported_net(self.name, self.size)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that survive a round trip through JSON unchanged."""
        values = asdict(self)
        return {**values, **{key: list(values[key]) for key in ("widths", "mean", "std")}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NetConfig:
        """Build the configuration from the output of `to_dict`."""
        sequences = {key: tuple(values[key]) for key in ("widths", "mean", "std")}
        return cls(**{**values, "task": Task(values["task"]), **sequences})


NETS: Final[dict[str, Callable[[NetConfig], Any]]] = {
    "cnn": lambda config: Cnn(config.size, config.widths or DEFAULT_WIDTHS),
    "cnn_large": lambda config: Cnn(config.size, config.widths or LARGE_WIDTHS),
    **{name: lambda config: ResNet(config.name, config.size) for name in DEPTHS},
    "mobilenet_v2": lambda config: MobileNetV2(config.size),
    "tiny_vgg": lambda config: TinyVgg(config.size),
}
"""Backbones by name: modules from normalised images (B, 3, H, W) to feature maps (B, `channels`, h, w).

`tiny_vgg` flattens its last maps to (B, `channels`) itself.
"""


def require_supported_net(name: str | None, size: int | None) -> None:
    """Raise `NetError` for an unknown network or an unsupported input side in pixels; None skips a check."""
    if name is not None and name not in NETS:
        raise NetError(f"there is no network {name!r}; choose one of {', '.join(NETS)}")
    if size is not None and size not in SIZES:
        raise NetError(f"size {size} px: the networks take {SIZES[0]} to {SIZES[-1]}")


class Normalize(nn.Module):
    """Normalisation from uint8 (B, H, W, 3), 0 to 255, to float32 (B, 3, H, W), zero mean, unit deviation."""

    scale: Tensor
    offset: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        scale = 1 / (255 * torch.tensor(std))
        self.register_buffer("scale", scale.view(1, 3, 1, 1))  # (1, 3, 1, 1)
        # (1, 3, 1, 1)
        self.register_buffer("offset", -255 * torch.tensor(mean).view(1, 3, 1, 1) * self.scale)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.permute(0, 3, 1, 2).float() * self.scale + self.offset  # (B, 3, H, W)


class Net(nn.Module):
    """A network from uint8 (B, H, W, 3) to logits, float32 (B, labels); one logit for `binary`."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.normalize = Normalize(config.mean, config.std)
        self.features = NETS[config.name](config)
        logits = 1 if config.task is Task.BINARY else config.labels
        self.head = nn.Linear(self.features.channels, logits)

    @property
    def has_temperature(self) -> bool:
        """Return whether logits are divided by a fitted temperature.

        The network for teaching ends with the softmax alone, because a temperature would be one more layer.
        """
        return self.config.name != "tiny_vgg"

    @torch.no_grad()
    def fit_whitening(self, pixels: Pixels) -> None:
        """Initialise the whitening layer from training pixels, uint8 (N, H, W, 3), before training starts."""
        stems = [layer for layer in self.modules() if isinstance(layer, Whitening)]
        if stems:
            step = -(-len(pixels) * self.config.size**2 // _WHITENING_PIXELS)
            sample = pixels[torch.arange(0, len(pixels), max(1, step))]
            stems[0].fit_kernels(self.normalize(sample))

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.features(self.normalize(pixels))  # (B, channels, h, w) or (B, channels)
        values = features.mean(dim=(2, 3)) if features.ndim == 4 else features  # (B, channels)
        logits: Tensor = self.head(values)  # (B, n)
        return logits


_WHITENING_PIXELS: Final = 1_000_000
"""Number of pixels that `fit_whitening` reads, from images spread evenly over the training set."""


def to_probabilities(logits: Tensor, task: Task, temperature: float = 1.0) -> Tensor:
    """Return probabilities from logits (B, n) divided by `temperature`.

    The shape is (B, labels); for `binary` it is (B, 2) = [1 - p, p].
    """
    if temperature != 1.0:
        logits = logits / temperature
    if task is Task.MULTICLASS:
        return logits.softmax(dim=1)
    positive = logits.sigmoid()
    return torch.cat([1 - positive, positive], dim=1) if task is Task.BINARY else positive


def compute_loss(
    logits: Tensor, targets: Tensor, task: Task, *, label_smoothing: float, weights: Tensor | None = None
) -> Tensor:
    """Return the mean loss.

    `targets` are label indices, int64 (B,), or flags, float32 (B, labels), for `multilabel`. `weights`,
    float32 (labels,), weight the images of each label; for `multilabel` they weight only the true labels.
    """
    if task is Task.MULTICLASS:
        return nn.functional.cross_entropy(logits, targets, weight=weights, label_smoothing=label_smoothing)
    flags = targets.float().view_as(logits)
    soft_flags = flags * (1 - label_smoothing) + label_smoothing / 2
    element_weights = None
    if weights is not None:
        # (B, 1) for binary, else (B, labels)
        element_weights = (
            weights[targets][:, None] if task is Task.BINARY else torch.where(flags > 0.5, weights, 1.0)
        )
    loss_sum = nn.functional.binary_cross_entropy_with_logits(
        logits, soft_flags, element_weights, reduction="sum"
    )
    return loss_sum / (logits.numel() if element_weights is None else element_weights.sum())


def compute_other_loss(logits: Tensor, other_logits: Tensor) -> Tensor:
    """Return the loss of images of other things.

    `logits`, float32 (B, n), are of labelled images, and `other_logits`, float32 (O, n), of others. The first
    part makes the score of `known`, the free energy of the logits, a classifier: positive for labelled images
    and negative for others (after Liu et al., 2020, with the logistic loss). The second part makes all labels
    equally likely for others (Hendrycks, Mazeika and Dietterich, 2019).
    """
    known_score, other_score = logits.logsumexp(dim=1), other_logits.logsumexp(dim=1)  # (B,), (O,)
    score_loss = nn.functional.softplus(-known_score).mean() + nn.functional.softplus(other_score).mean()
    return score_loss - other_logits.log_softmax(dim=1).mean()


def distillation_loss(logits: Tensor, teacher_logits: Tensor, task: Task, *, softness: float) -> Tensor:
    """Return the distillation loss: mean Kullback-Leibler divergence of student from teacher.

    Both arguments are logits (B, n), divided by the temperature `softness`. The factor `softness`^2 keeps the
    scale of the gradient (Hinton, Vinyals and Dean, 2015). For `binary` and `multilabel`, each label is an
    independent two-class problem.
    """
    if task is not Task.MULTICLASS:
        # (B, n) -> (B n, 2)
        logits, teacher_logits = (
            torch.stack([one, -one], dim=-1).flatten(0, -2) / 2 for one in (logits, teacher_logits)
        )
    student_log_probabilities, teacher_log_probabilities = (
        (one / softness).log_softmax(dim=-1) for one in (logits, teacher_logits)
    )
    return softness**2 * nn.functional.kl_div(
        student_log_probabilities, teacher_log_probabilities, reduction="batchmean", log_target=True
    )
