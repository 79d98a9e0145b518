"""The two benchmark networks with fixed random weights, as the files that each server needs.

The weights carry no knowledge, but the computation is that of the trained networks. The statistics of the
normalisation layers come from the workload's own images, so that activations neither vanish nor explode. The
first rows of the head are the feature directions of some of these images. Each image therefore has a clear
label: a wrong answer of a server shows, and a rounding difference does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from fovea.bench.servers.plain import MEAN, STD
from fovea.export.from_checkpoint import build_contract, export_classifier_graph, export_graph
from fovea.export.model_output import embed_contract
from fovea.model.evaluation.calibration import Calibration
from fovea.model.networks import mobilenet
from fovea.model.networks.network import Normalize
from fovea.service.artifact.contract import Geometry, PixelPath, Task, Training
from fovea.service.atomic_files import write_file
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.preprocess import decode_image

SEED: Final = 20


def build_models(name: str, network: str, geometry: Geometry, images: Sequence[Path], folder: Path) -> None:
    """Write `plain.onnx`, `exact.onnx` and `fast.onnx` to `folder`, all with the same weights.

    `plain.onnx` is the export of tutorials: normalised float32 (batch, 3, H, W) to logits. The others are
    Fovea's model files for the two pixel paths.
    """
    torch.manual_seed(SEED)
    net, labels = NETWORKS[network]()
    exact = replace(geometry, pixel_path=PixelPath.EXACT)
    pixels = np.stack([decode_image(path.read_bytes(), exact, max_pixels=1 << 24).pixels for path in images])
    normalize = Normalize(MEAN.tolist(), STD.tolist())
    calibrate_network(net, normalize(torch.from_numpy(pixels)))
    folder.mkdir(parents=True, exist_ok=True)
    example = torch.zeros(2, 3, geometry.height, geometry.width)
    write_file(folder / "plain.onnx", export_graph(net, example, ["logits"]).SerializeToString())
    full_net = nn.Sequential(normalize, net).eval()
    graph = export_classifier_graph(full_net, Task.MULTICLASS, geometry)
    for path in PixelPath:
        content = _build_model_file(graph, full_net, name, labels, replace(geometry, pixel_path=path))
        write_file(folder / f"{path.value}.onnx", content)


def _build_model_file(
    graph: onnx.ModelProto, net: nn.Module, name: str, labels: int, geometry: Geometry
) -> bytes:
    @torch.inference_mode()
    def compute_logits(pixels: Pixels) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = net(torch.tensor(pixels)).numpy()
        return logits

    contract = build_contract(
        graph,
        compute_logits,
        name=name,
        version="1",
        task=Task.MULTICLASS,
        labels=tuple(f"label {index}" for index in range(labels)),
        geometry=geometry,
        training=Training("random weights", 0, "none", "make bench"),
        calibration=Calibration(1.0, (), ()),
    )
    return embed_contract(graph, contract)


@torch.no_grad()
def calibrate_network(net: nn.Sequential, images: Tensor) -> None:
    """Set the normalisation statistics and the head from `images`, float32 (N, 3, H, W)."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the plain average of all batches; here there is one
            layer.reset_running_stats()
    net.train()
    net(images)
    net.eval()
    *body, head = net
    features = nn.Sequential(*body)(images)  # (N, features)
    if not isinstance(head, nn.Linear):
        raise TypeError("the last layer must be the head")
    mean = features.mean(dim=0)
    image_indices = torch.linspace(0, len(images) - 1, min(len(images), head.out_features)).long()
    head.weight[: len(image_indices)] = nn.functional.normalize(features[image_indices] - mean)
    head.bias.copy_(-head.weight @ mean)


@torch.no_grad()
def count_multiply_adds(net: nn.Module, side: int) -> int:
    """Return the multiply-adds of the convolutions and the head for one image of `side` x `side`."""
    counts: list[int] = []

    def add_count(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        weight = layer.weight
        if isinstance(weight, Tensor):
            counts.append(weight[0].numel() * output[0].numel())

    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(add_count) for layer in layers]
    net.eval()(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return sum(counts)


# --- ResNet-20 -----------------------------------------------------------------------------------


class _BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = _build_convolution(channels_in, channels, 3, stride=stride)
        self.second = _build_convolution(channels, channels, 3, activation=None)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = _build_convolution(channels_in, channels, 1, stride=stride, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


class ResNet20(nn.Sequential):
    """ResNet-20 for 32 x 32 px (He et al., 2015, section 4.2).

    Shortcuts are 1 x 1 convolutions if the width changes.
    """

    def __init__(self, labels: int) -> None:
        blocks = [_BasicBlock(16, 16, 1) for _ in range(3)]
        for channels in (32, 64):
            blocks += [
                _BasicBlock(channels // 2, channels, 2),
                *(_BasicBlock(channels, channels, 1) for _ in range(2)),
            ]
        super().__init__(_build_convolution(3, 16, 3), *blocks, _GlobalAveragePool(), nn.Linear(64, labels))


# --- MobileNetV2 ---------------------------------------------------------------------------------


class MobileNetV2(nn.Sequential):
    """MobileNetV2 of width 1.0 for 224 x 224 px."""

    def __init__(self, labels: int) -> None:
        body = mobilenet.MobileNetV2(224)
        super().__init__(body, _GlobalAveragePool(), nn.Linear(body.channels, labels))


class _GlobalAveragePool(nn.Module):
    """Global average pooling from (B, C, H, W) to (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def _build_convolution(
    channels_in: int,
    channels: int,
    size: int,
    *,
    stride: int = 1,
    activation: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    layers = [
        nn.Conv2d(channels_in, channels, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(channels),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))


def _build_resnet20() -> tuple[nn.Sequential, int]:
    return ResNet20(10), 10


def _build_mobilenetv2() -> tuple[nn.Sequential, int]:
    return MobileNetV2(1000), 1000


NETWORKS: Final = {"resnet20": _build_resnet20, "mobilenetv2": _build_mobilenetv2}
"""(network, number of labels) by name."""
