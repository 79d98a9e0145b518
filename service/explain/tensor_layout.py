"""The layout of a tensor's values over the image: maps with channels first or last, or tokens.

The layout is derived only from the contract's layer table. Tokens are those of transformers: places of the
image row by row, after a few tokens that are not places, such as the class token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any, Final, NamedTuple

import numpy.typing as npt

from fovea.service.artifact.contract import Contract, Layer

_AXIS_ORDERS: Final = ("CHW", "HWC", "CT", "TC")

RESHAPE_KINDS: Final = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Operators that keep all values in their order."""

_MAP_KINDS: Final = frozenset(
    {"Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool", "LpPool",
     "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "DepthToSpace", "SpaceToDepth"}
)  # fmt: skip
"""Operators whose output has channels first, as ONNX defines them."""

_RESIZE_KINDS: Final = frozenset(
    {"Resize", "Upsample", "Pad", "Slice", "ReduceMean", "ReduceMax", "ReduceSum"}
)
"""Operators that keep the order of the axes, but not the sizes."""


class TensorLayout(NamedTuple):
    """The layout of one tensor."""

    axes: str
    """Meaning of each axis except the batch's: `C` channels, `H` rows, `W` columns, `T` tokens."""
    channels: int
    height: int
    width: int
    leading_tokens: int = 0
    """Number of tokens before the tokens of places."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the maps: (channels, height, width)."""
        return self.channels, self.height, self.width

    def to_maps(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rearrange a tensor for n images, (n, …), into maps (n, channels, height, width).

        Leading tokens are omitted.
        """
        order = "CT" if "T" in self.axes else "CHW"
        # (n, channels, tokens) or (n, channels, height, width)
        channels_first = values.transpose(0, *(1 + self.axes.index(axis) for axis in order))
        return channels_first[:, :, self.leading_tokens :].reshape(len(values), *self.shape)

    def fit_shape(
        self, shape: Sequence[int | None], *, is_reshaped: bool, is_concatenated: bool
    ) -> TensorLayout | None:
        """Return the layout of the same places in a tensor of another shape, or None if it does not fit.

        `is_reshaped` allows other axes. `is_concatenated` means that tokens were put before the others.
        """
        channels_first = self.axes[0] == "C"
        others = sorted(_AXIS_ORDERS, key=lambda axes: (axes[0] == "C") != channels_first)
        for axes in [self.axes, *(others if is_reshaped else ())]:
            sizes = dict(zip(axes, shape, strict=False))
            if len(axes) == len(shape) and (fit := self._fit_axes(axes, sizes, is_concatenated)):
                return fit
        return None

    def is_partitioned(self, shape: Sequence[int | None]) -> bool:
        """Return True if a tensor of this shape has no axis of tokens and no axes of rows and columns.

        Rows beside each other in the batch, (W * C,), are not cut: every value keeps its place.
        """
        if self.axes == "HWC" and tuple(shape) == (self.width * self.channels,):
            return False
        tokens = self.leading_tokens + self.height * self.width
        return tokens not in shape and (self.height, self.width) not in pairwise(shape)

    def fit_patches(
        self, partitioned_shape: Sequence[int | None], shape: Sequence[int | None]
    ) -> TensorLayout | None:
        """Return the layout of tokens that are whole patches, or None.

        The places were cut into rows of patches, columns of patches, and the pixels within each patch.
        """
        if len(shape) != 2 or len(partitioned_shape) < 2:
            return None
        patch_rows, patch_columns, tokens, channels = (size or 0 for size in (*partitioned_shape[:2], *shape))
        fits = tokens == patch_rows * patch_columns > 0 and tokens * channels == prod(self.shape)
        if fits and self.height % patch_rows == 0 and self.width % patch_columns == 0:
            return TensorLayout("TC", channels, patch_rows, patch_columns)
        return None

    def _fit_axes(
        self, axes: str, sizes: dict[str, int | None], is_concatenated: bool
    ) -> TensorLayout | None:
        channels = sizes["C"]
        if channels is None:
            return None
        if "T" not in axes:
            is_same_size = (sizes["H"], sizes["W"]) == (self.height, self.width)
            return self._replace(axes=axes, channels=channels, leading_tokens=0) if is_same_size else None
        positions = self.height * self.width
        leading_tokens = (sizes["T"] or 0) - positions
        if leading_tokens in (0, self.leading_tokens) or (is_concatenated and 0 < leading_tokens < positions):
            return self._replace(axes=axes, channels=channels, leading_tokens=leading_tokens)
        return None


def find_image_tensors(contract: Contract) -> set[str]:
    """Return the tensors that depend on the image: all except shapes and tensors computed from constants."""
    image_tensors = {contract.input_name}
    for layer in contract.layers:
        if layer.kind not in ("Shape", "Size") and not image_tensors.isdisjoint(layer.inputs):
            # An omitted output has no name, and an omitted input has the same empty name.
            image_tensors.update(filter(None, layer.outputs))
    return image_tensors


def find_layouts(contract: Contract) -> dict[str, TensorLayout]:
    """Return the layouts of the tensors that lie over the image, by name."""
    return _LayoutFinder(contract).layouts


class _LayoutFinder:
    """A pass through the layers in the order of computation."""

    def __init__(self, contract: Contract) -> None:
        geometry = contract.input
        pixels = TensorLayout("HWC", 3, geometry.height, geometry.width)
        self.layouts = {contract.input_name: pixels}
        self._last_layouts: dict[str, TensorLayout | None] = dict(self.layouts)
        """Last known layout before each tensor that depends on the image; None if the places were cut."""
        self._partitions: dict[str, tuple[TensorLayout, Layer]] = {}
        """Layout before the cut, and the layer that made the tensor, for tensors whose places were cut."""
        self._concatenated_tensors: set[str] = set()
        """Tensors to which leading tokens were added and whose number of leading tokens is not known yet."""
        image_tensors = find_image_tensors(contract)
        for layer in contract.layers:
            if not image_tensors.isdisjoint(layer.outputs):
                self._visit_layer(layer)

    def _visit_layer(self, layer: Layer) -> None:
        inputs = [name for name in layer.inputs if name in self._last_layouts]
        layout = self._find_layout(layer, inputs)
        partition = None if layout else self._find_partition(layer, inputs[0])
        for tensor in filter(None, layer.outputs):
            self._last_layouts[tensor] = layout or (None if partition else self._last_layouts[inputs[0]])
            if layout:
                self.layouts[tensor] = layout
            elif partition:
                self._partitions[tensor] = partition, layer
            elif self._is_concatenated(layer, inputs):
                self._concatenated_tensors.add(tensor)

    def _find_layout(self, layer: Layer, inputs: Sequence[str]) -> TensorLayout | None:
        if layer.kind in _MAP_KINDS:
            return _create_layout("CHW", layer.shape)
        if layer.kind == "Transpose" and inputs[0] in self.layouts:
            return _transpose_layout(self.layouts[inputs[0]], layer.attributes.get("perm"))
        if layer.kind in RESHAPE_KINDS and inputs[0] in self._partitions:
            source_layout, producer = self._partitions[inputs[0]]
            return source_layout.fit_patches(producer.shape, layer.shape)
        options = {
            "is_reshaped": layer.kind in RESHAPE_KINDS,
            "is_concatenated": self._is_concatenated(layer, inputs),
        }
        known_layouts = [last_layout for name in inputs if (last_layout := self._last_layouts[name])]
        fit = next(
            (fit for last_layout in known_layouts if (fit := last_layout.fit_shape(layer.shape, **options))),
            None,
        )
        return fit or (
            _create_layout(known_layouts[0].axes, layer.shape)
            if known_layouts and layer.kind in _RESIZE_KINDS
            else None
        )

    def _find_partition(self, layer: Layer, tensor: str) -> TensorLayout | None:
        """Return the layout before a reshape that cuts the places into windows or patches, or None."""
        if layer.kind == "Transpose" and tensor in self._partitions:
            return self._partitions[tensor][0]
        layout = self.layouts.get(tensor) if layer.kind in RESHAPE_KINDS else None
        return layout if layout and layout.is_partitioned(layer.shape) else None

    def _is_concatenated(self, layer: Layer, inputs: Sequence[str]) -> bool:
        """Return True if tokens are put before the tokens of places, which come last."""
        if layer.kind == "Concat":
            return layer.inputs[-1] in self._last_layouts
        return not self._concatenated_tensors.isdisjoint(inputs)


def _create_layout(axes: str, shape: Sequence[int | None]) -> TensorLayout | None:
    """Return the layout of maps with another size."""
    if "T" in axes or len(shape) != len(axes):
        return None
    channels, height, width = (shape[axes.index(axis)] for axis in "CHW")
    if channels is None or height is None or width is None:
        return None
    return TensorLayout(axes, channels, height, width)


def _transpose_layout(layout: TensorLayout, permutation: Any) -> TensorLayout | None:
    """Return the layout after a transpose; `permutation` is ONNX's `perm` of all axes."""
    if permutation is None or len(permutation) != len(layout.axes) + 1 or permutation[0] != 0:
        return None
    return layout._replace(axes="".join(layout.axes[axis - 1] for axis in permutation[1:]))
