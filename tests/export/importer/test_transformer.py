"""Tokens of vision transformers as feature maps, compared with torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import Tensor, nn

from fovea.service.explain.introspection import IntrospectedModel
from fovea.service.explain.layer_view import LayerView
from fovea.service.explain.receptive_field import ReceptiveField, Span
from fovea.service.explain.tensor_layout import TensorLayout
from tests.export.classifiers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Block,
    Vit,
    export_network,
    export_torchscript,
)
from tests.export.imports import PLAN, import_graph
from tests.tokens import LABELS, build_token_network

SIDE = 64
GRID = SIDE // 16
PIXELS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


@dataclass(frozen=True)
class TransformerCase:
    """A transformer and its graph."""

    net: Vit
    introspected: IntrospectedModel

    @property
    def planes(self) -> Tensor:
        """Return the network's input for the image."""
        return torch.tensor(self.introspected.compute_output(self.introspected.layers[0].tensor, PIXELS))[
            None
        ]

    def find_layer(self, name: str, kind: str = "") -> LayerView:
        """The last layer of a module."""
        return [one for one in self.introspected.layers if one.name == name and kind in ("", one.kind)][-1]


def make_transformer() -> Vit:
    """Return a network without equal weights: equal weights would be stored once, under one name."""
    torch.manual_seed(0)
    net = Vit(SIDE, len(LABELS), width=12, blocks=2).eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return net


def open_introspected(graph: onnx.ModelProto, folder: Path) -> IntrospectedModel:
    model = import_graph(graph, folder, LABELS)
    return IntrospectedModel(model.path.read_bytes(), model.contract, PLAN)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TransformerCase:
    net = make_transformer()
    return TransformerCase(net, open_introspected(export_network(net, SIDE), tmp_path_factory.mktemp("vit")))


def tokens_to_maps(tokens: Tensor) -> npt.NDArray[np.float32]:
    """(channels, rows, columns), without the class token."""
    return tokens.detach()[0, 1:].T.reshape(-1, GRID, GRID).numpy()


def record_outputs(net: nn.Module, planes: Tensor) -> list[tuple[str, nn.Module, Tensor]]:
    """Return the output of every module."""
    records: list[tuple[str, nn.Module, Tensor]] = []

    def make_hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, _, output: records.append((name, module, output))

    hooks = [module.register_forward_hook(make_hook(name)) for name, module in net.named_modules()]
    net(planes)
    for one in hooks:
        one.remove()
    return records


def test_every_layer_of_tokens_is_what_torch_has_there(made: TransformerCase) -> None:
    compared = set()
    for name, module, output in record_outputs(made.net, made.planes):
        is_layer = isinstance(module, Block) or not list(module.children())
        if is_layer and output.dim() == 3:
            layer = made.find_layer(name)
            assert layer.shape == (output.shape[2], GRID, GRID)
            assert layer.layout
            assert layer.layout.leading_tokens == 1
            difference = np.abs(
                made.introspected.compute_output(layer.tensor, PIXELS) - tokens_to_maps(output)
            )
            assert difference.max() < 1e-4, name
            compared.add(type(module))
    assert compared == {Block, nn.LayerNorm, nn.Linear, nn.GELU}


def test_a_value_sees_its_patch_and_after_the_attention_everything(made: TransformerCase) -> None:
    """By gradients."""
    net = made.net.double()
    planes = torch.rand(1, 3, SIDE, SIDE, dtype=torch.double, requires_grad=True)
    seen: dict[str, tuple[int, ...]] = {}
    for name, _, output in record_outputs(net, planes):
        if output.dim() == 3 and name in ("blocks.0.norm1", "blocks.0.attn.qkv", "blocks.0.attn.proj"):
            (gradient,) = torch.autograd.grad(output[0, 1 + GRID + 2].sum(), planes, retain_graph=True)
            rows, columns = gradient[0].abs().sum(dim=0).nonzero().T
            seen[name] = tuple(int(edge) for line in (rows, columns) for edge in (line.min(), line.max()))
    net.float()
    assert seen.pop("blocks.0.attn.proj") == (0, SIDE - 1, 0, SIDE - 1)
    assert len(seen) == 2
    for name, edges in seen.items():
        field = made.find_layer(name).receptive_field
        assert field
        assert field.rows == field.columns == Span(16, 0, 15)
        assert edges == (16, 31, 32, 47)  # of row 1, column 2
    behind = made.introspected.layers.index(made.find_layer("blocks.0.attn.qkv")) + 1
    assert all(layer.receptive_field is None for layer in made.introspected.layers[behind:])


def test_a_linear_layer_of_tokens_adds_up_at_every_place(made: TransformerCase) -> None:
    linear = [
        layer for layer in made.introspected.layers if layer.kind == "MatMul" and "weight" in layer.weights
    ]
    assert len(linear) == 2 * 4
    for layer in linear:
        weight, bias = (made.introspected.read_weights(layer.tensor, part) for part in ("weight", "bias"))
        value = made.introspected.compute_output(layer.tensor, PIXELS)
        assert layer.is_direct is (layer.name.split(".")[-1] != "proj")  # which reads what heads have made
        if layer.is_direct:
            given = made.introspected.compute_output(layer.sources[0], PIXELS)
            assert np.einsum("oi,ihw->ohw", weight, given) + bias[:, None, None] == pytest.approx(
                value, abs=1e-4
            )


def test_a_norm_of_tokens_is_told_with_its_numbers(made: TransformerCase) -> None:
    layer = made.find_layer("blocks.1.norm2", "LayerNormalization")
    norm = made.net.get_submodule("blocks.1.norm2")
    assert isinstance(norm, nn.LayerNorm)
    assert made.introspected.read_weights(layer.tensor, "scale") == pytest.approx(
        norm.weight.detach().numpy()
    )
    assert made.introspected.read_weights(layer.tensor, "bias") == pytest.approx(norm.bias.detach().numpy())


def test_all_parameters_are_counted_but_for_what_is_no_layer(made: TransformerCase) -> None:
    wanted = sum(weight.numel() for weight in made.net.parameters()) - made.net.cls_token.numel()
    assert sum(layer.parameters for layer in made.introspected.layers) == wanted


def test_what_reads_the_class_token_does_not_read_the_maps(made: TransformerCase) -> None:
    """Layers behind the class token or behind the split into heads do not read the maps."""
    indirect = [layer for layer in made.introspected.layers if not layer.is_direct]
    assert [layer.kind for layer in indirect] == 2 * ["Mul", "MatMul", "MatMul", "MatMul"] + ["Gemm"]
    assert indirect[-1].sources == (made.find_layer("norm").tensor,)


def test_an_older_exporter_s_norms_are_layers_too(made: TransformerCase, tmp_path: Path) -> None:
    """The exporter writes each as nine operators."""
    older = open_introspected(export_torchscript(make_transformer(), SIDE, opset=16), tmp_path)
    kinds = [layer.kind for layer in older.layers]
    assert kinds == [layer.kind for layer in made.introspected.layers]
    for one, other in zip(older.layers, made.introspected.layers, strict=True):
        assert (one.shape, one.receptive_field, one.parameters) == (
            other.shape,
            other.receptive_field,
            other.parameters,
        ), one
        difference = np.abs(
            older.compute_output(one.tensor, PIXELS) - made.introspected.compute_output(other.tensor, PIXELS)
        )
        assert difference.max() < 1e-4


def test_what_goes_across_places_sees_everything(tmp_path: Path) -> None:
    inside = open_introspected(build_token_network(), tmp_path)
    layers = {layer.tensor: layer for layer in inside.layers}
    patch = ReceptiveField(Span(4, 0, 3), Span(4, 0, 3))
    assert {name for name, layer in layers.items() if layer.receptive_field == patch} == {"maps", "norm"}
    assert layers["mixed"].shape == layers["across"].shape == layers["sum"].shape == (8, 4, 4)
    assert all(layers[name].is_direct for name in ("mixed", "across", "scores of tokens", "attended"))


def test_an_average_with_a_token_that_is_not_shown_is_none_of_the_maps(tmp_path: Path) -> None:
    inside = open_introspected(build_token_network(), tmp_path)
    layers = {layer.tensor: layer for layer in inside.layers}
    assert layers["all"].layout == TensorLayout("TC", 8, 4, 4, leading_tokens=1)
    assert not layers["average"].is_direct
    assert not inside.has_cam
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    assert inside.compute_output("all", pixels) == pytest.approx(inside.compute_output("sum", pixels))


class LinearPatchNet(nn.Module):
    """Patches without a convolution, as einops cuts them: rows and columns first, then the pixels inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16 * 16 * 3, 12)
        self.act = nn.GELU()
        self.head = nn.Linear(12, len(LABELS))

    def forward(self, planes: Tensor) -> Tensor:
        patches = planes.reshape(-1, 3, GRID, 16, GRID, 16).permute(0, 2, 4, 3, 5, 1)
        tokens = self.act(self.embed(patches.reshape(-1, GRID * GRID, 16 * 16 * 3)))
        logits: Tensor = self.head(tokens.mean(dim=1))
        return logits


def test_patches_need_no_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = LinearPatchNet()
    inside = open_introspected(export_torchscript(net, SIDE), tmp_path)
    planes = torch.tensor((PIXELS / 255 - IMAGENET_MEAN) / IMAGENET_STD, dtype=torch.float32)
    found = {name: output for name, _, output in record_outputs(net, planes.permute(2, 0, 1)[None])}
    layer = next(layer for layer in inside.layers if layer.kind == "Gelu")
    wanted = found["act"].detach()[0].T.reshape(-1, GRID, GRID).numpy()
    assert np.abs(inside.compute_output(layer.tensor, PIXELS) - wanted).max() < 1e-4
    assert layer.receptive_field == ReceptiveField(Span(16, 0, 15), Span(16, 0, 15))
    assert inside.has_cam
