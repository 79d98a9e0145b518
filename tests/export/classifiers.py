"""Classifiers with random weights as other tools write them, and preprocessing that users write by hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor, nn

from fovea.export.from_checkpoint import silence_exporter
from fovea.model.networks.network import NETS, NetConfig
from fovea.service.artifact.contract import Task

Array = npt.NDArray[Any]
GraphEnd = Literal["logits", "softmax", "log_softmax", "sigmoid", "hidden_softmax", "hidden_sigmoid"]

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)

# --- made with onnx.helper -----------------------------------------------------------------------

ONNX_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}


def build_classifier(
    *,
    layout: str = "nchw",
    dtype: str = "float32",
    batch: int | str | None = "N",
    size: int | None = 16,
    channels: int = 3,
    count: int = 5,
    end: GraphEnd = "logits",
    shape: Sequence[int] | None = None,
    opset: int = 17,
    ir_version: int = 8,
    seed: int = 0,
    spread: float = 3.0,
    names: tuple[str, str] = ("image", "scores"),
) -> onnx.ModelProto:
    """Build a graph of a convolution, a mean and a matrix, with a reshape to `shape` before the matrix."""
    random = np.random.default_rng(seed)
    image, scores = names
    inner_type = "float16" if dtype == "float16" else "float32"
    weights: dict[str, Array] = {
        "kernel": random.normal(0, 0.4, (8, channels, 3, 3)).astype(inner_type),
        "matrix": random.normal(0, spread, (8, count)).astype(inner_type),
        "bias": random.normal(0, 0.2, count).astype(inner_type),
    }
    nodes: list[NodeProto] = []
    last = image
    if layout == "nhwc":
        last = _add_node(nodes, "Transpose", [last], perm=[0, 3, 1, 2])
    if dtype == "uint8":
        weights["scale"] = np.array(1 / 64, np.float32)
        last = _add_node(nodes, "Mul", [_add_node(nodes, "Cast", [last], to=TensorProto.FLOAT), "scale"])
    last = _add_node(nodes, "Conv", [last, "kernel"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    last = _add_node(nodes, "GlobalAveragePool", [_add_node(nodes, "Relu", [last])])
    if shape is None:
        last = _add_node(nodes, "Flatten", [last], axis=1)
    else:
        weights["shape"] = np.array(shape, np.int64)
        last = _add_node(nodes, "Reshape", [last, "shape"])
    last = _add_node(nodes, "Add", [_add_node(nodes, "MatMul", [last, "matrix"]), "bias"])
    _add_end(nodes, last, scores, end, weights)
    sides: list[int | str | None] = (
        [batch, channels, size, size] if layout == "nchw" else [batch, size, size, channels]
    )
    inputs = [helper.make_tensor_value_info(image, ONNX_TYPES[dtype], sides)]
    if ir_version < 4:
        inputs += [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in weights.items()
        ]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "foreign",
            inputs,
            [helper.make_tensor_value_info(scores, ONNX_TYPES[inner_type], [batch, count])],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
    )


def _add_end(
    nodes: list[NodeProto], last: str, scores: str, end: GraphEnd, weights: dict[str, Array]
) -> None:
    """Append the nodes from logits to the output; `hidden_…` ends use unusual operators."""
    if end == "hidden_softmax":
        powers = _add_node(nodes, "Exp", [last])
        last = _add_node(nodes, "Div", [powers, _add_node(nodes, "ReduceL1", [powers], axes=[1], keepdims=1)])
    elif end == "hidden_sigmoid":
        weights["one"] = np.array(1, weights["bias"].dtype)
        powers = _add_node(nodes, "Exp", [_add_node(nodes, "Neg", [last])])
        last = _add_node(nodes, "Div", ["one", _add_node(nodes, "Add", [powers, "one"])])
    elif end == "sigmoid":
        last = _add_node(nodes, "Sigmoid", [last])
    elif end != "logits":
        last = _add_node(nodes, {"softmax": "Softmax", "log_softmax": "LogSoftmax"}[end], [last], axis=1)
    nodes.append(helper.make_node("Identity", [last], [scores]))


def _add_node(nodes: list[NodeProto], kind: str, inputs: list[str], **attributes: Any) -> str:
    name = f"{kind.lower()}_{len(nodes)}"
    nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
    return name


# --- made with torch -----------------------------------------------------------------------------


class BareNet(nn.Module):
    """A backbone and a head, from normalised pixels to logits, as users export them."""

    def __init__(self, name: str, size: int, labels: int) -> None:
        super().__init__()
        self.features = NETS[name](NetConfig(Task.MULTICLASS, labels, name, size))
        self.head = nn.Linear(self.features.channels, labels)

    def forward(self, planes: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(planes).mean(dim=(2, 3)))
        return logits


class Attention(nn.Module):
    """Self-attention as in timm: one product for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)  # (B, heads, tokens, width / heads)
        weights = (query * (width // self.heads) ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
        result: Tensor = self.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, width))
        return result


class Block(nn.Module):
    """A transformer block: attention and two layers, each with a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn: nn.Module = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class Vit(nn.Module):
    """A small vision transformer, shaped as timm's are: patches, a class token, positions, blocks."""

    def __init__(self, size: int, labels: int, width: int = 48, patch: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, 3) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, labels)

    def forward(self, planes: Tensor) -> Tensor:
        x = self.patch_embed(planes).flatten(2).transpose(1, 2)  # (B, patches, width)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


class TorchAttention(nn.Module):
    """A block as in torchvision: torch's own attention, in which the batch is not the first axis."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return result


def make_network(name: str, size: int, labels: int) -> nn.Module:
    """Return one of Fovea's networks without its normalisation, or the transformer."""
    torch.manual_seed(0)
    net = Vit(size, labels) if name.startswith("vit") else BareNet(name, size, labels)
    if name == "vit_of_torch":
        for block in net.modules():
            if isinstance(block, Block):
                block.attn = TorchAttention(48, 3)
    with torch.no_grad():
        pictures = nn.functional.interpolate(torch.randn(16, 3, 5, 5), (size, size), mode="bicubic")
        for _ in range(3):
            net.train()(pictures)
        logits = net.eval()(pictures)
        net.head.weight.div_(logits.std(dim=0).mean())
        net.head.bias.sub_(logits.mean(dim=0)).div_(logits.std(dim=0).mean())
    return net


@cache
def export_foreign(name: str, size: int = 64, labels: int = 7, batch: int | None = None) -> onnx.ModelProto:
    """Return a network as torch exports it; callers must not change the result."""
    return export_network(make_network(name, size, labels), size, batch=batch)


def export_network(net: nn.Module, size: int, *, batch: int | None = None) -> onnx.ModelProto:
    """Export as float32 NCHW for any number of images, or for `batch` images as torch does by default."""
    with silence_exporter():
        program = torch.onnx.export(
            net,
            (torch.randn(batch or 2, 3, size, size),),
            dynamo=True,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=None if batch else ({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def export_torchscript(net: nn.Module, size: int, opset: int = 17) -> onnx.ModelProto:
    """Export with torch's older exporter, for one image, which is its default."""
    content = BytesIO()
    with silence_exporter():
        torch.onnx.export(net, (torch.randn(1, 3, size, size),), content, dynamo=False, opset_version=opset)  # type: ignore[arg-type]  # its stub
    return onnx.load_from_string(content.getvalue())


# --- by hand -------------------------------------------------------------------------------------


def resize_and_crop(image: bytes, resize: int, crop: int, resample: Image.Resampling) -> Array:
    """Resize and crop the middle with Pillow: float32 (1, crop, crop, 3), 0 … 255."""
    picture = Image.open(BytesIO(image)).convert("RGB")
    shorter = min(picture.size)
    picture = picture.resize(
        (resize * picture.width // shorter, resize * picture.height // shorter), resample
    )
    left, top = round((picture.width - crop) / 2), round((picture.height - crop) / 2)
    picture = picture.crop((left, top, left + crop, top + crop))
    return np.asarray(picture, np.float32)[None]


def stretch_image(image: bytes, side: int, resample: Image.Resampling) -> Array:
    """Stretch both sides to `side` with Pillow: float32 (1, side, side, 3), 0 … 255."""
    picture = Image.open(BytesIO(image)).convert("RGB").resize((side, side), resample)
    return np.asarray(picture, np.float32)[None]


def prepare_imagenet(image: bytes, resize: int, crop: int) -> Array:
    """Prepare an image as torchvision does: float32 (1, 3, crop, crop)."""
    values = resize_and_crop(image, resize, crop, Image.Resampling.BILINEAR) / 255
    return ((values - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2)


def run_onnx(model: onnx.ModelProto | Path, values: Array) -> Array:
    """Return the first output in plain ONNX Runtime, as float64."""
    content = model if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content)
    input_name = session.get_inputs()[0].name
    return np.asarray(session.run(None, {input_name: np.ascontiguousarray(values)})[0], np.float64)


def softmax(logits: Array) -> Array:
    """Return the softmax over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def sigmoid(logits: Array) -> Array:
    """Return the sigmoid of each value."""
    return np.asarray(1 / (1 + np.exp(-logits)))
