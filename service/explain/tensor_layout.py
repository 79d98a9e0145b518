"""The layout of a tensor's values over the image: maps with channels first or last, or tokens.

The layout is derived from the contract's layer table alone. Tokens are those of transformers: places of the
image row by row, after a few tokens that are not places, such as the class token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any, Final, NamedTuple

import numpy.typing as npt

from fovea.service.artifact.contract import Contract, Layer

_ORDERS: Final = ("CHW", "HWC", "CT", "TC")

RESHAPES: Final = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Operators that keep all values in their order."""

_MAKES_MAPS: Final = frozenset(
    {"Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool", "LpPool",
     "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "DepthToSpace", "SpaceToDepth"}
)  # fmt: skip
"""Operators whose output has channels first, as ONNX defines them."""

_RESIZES: Final = frozenset({"Resize", "Upsample", "Pad", "Slice", "ReduceMean", "ReduceMax", "ReduceSum"})
"""Operators that keep the order of the axes, but not the sizes."""


class Arrangement(NamedTuple):
    """The layout of one tensor."""

    axes: str
    """Meaning of each axis except the batch's: `C` channels, `H` rows, `W` columns, `T` tokens."""
    channels: int
    height: int
    width: int
    leading: int = 0
    """Number of tokens before the tokens of places."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the maps: (channels, height, width)."""
        return self.channels, self.height, self.width

    def maps(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rearrange a tensor for n images, (n, …), into maps (n, channels, height, width).

        Leading tokens are omitted.
        """
        order = "CT" if "T" in self.axes else "CHW"
        # (n, channels, tokens) or (n, channels, height, width)
        first = values.transpose(0, *(1 + self.axes.index(axis) for axis in order))
        return first[:, :, self.leading :].reshape(len(values), *self.shape)

    def fitted(self, shape: Sequence[int | None], *, reshaped: bool, joined: bool) -> Arrangement | None:
        """Return the layout of the same places in a tensor of another shape, or None if it does not fit.

        `reshaped` allows other axes. `joined` means that tokens were put before the others.
        """
        channels_first = self.axes[0] == "C"
        others = sorted(_ORDERS, key=lambda axes: (axes[0] == "C") != channels_first)
        for axes in [self.axes, *(others if reshaped else ())]:
            sizes = dict(zip(axes, shape, strict=False))
            if len(axes) == len(shape) and (fit := self._with(axes, sizes, joined)):
                return fit
        return None

    def is_cut(self, shape: Sequence[int | None]) -> bool:
        """Return True if a tensor of this shape has no axis of tokens and no axes of rows and columns."""
        tokens = self.leading + self.height * self.width
        return tokens not in shape and (self.height, self.width) not in pairwise(shape)

    def patches(self, cut: Sequence[int | None], shape: Sequence[int | None]) -> Arrangement | None:
        """Return the layout of tokens that are whole patches, or None.

        The places were cut into rows of patches, columns of patches, and the inside of each patch.
        """
        if len(shape) != 2 or len(cut) < 2:
            return None
        down, across, tokens, channels = (size or 0 for size in (*cut[:2], *shape))
        fits = tokens == down * across > 0 and tokens * channels == prod(self.shape)
        if fits and self.height % down == 0 and self.width % across == 0:
            return Arrangement("TC", channels, down, across)
        return None

    def _with(self, axes: str, sizes: dict[str, int | None], joined: bool) -> Arrangement | None:
        channels = sizes["C"]
        if channels is None:
            return None
        if "T" not in axes:
            alike = (sizes["H"], sizes["W"]) == (self.height, self.width)
            return self._replace(axes=axes, channels=channels, leading=0) if alike else None
        places = self.height * self.width
        leading = (sizes["T"] or 0) - places
        if leading in (0, self.leading) or (joined and 0 < leading < places):
            return self._replace(axes=axes, channels=channels, leading=leading)
        return None


def made_of_image(contract: Contract) -> set[str]:
    """Return the tensors that depend on the image: all except shapes and tensors computed from constants."""
    made = {contract.input_name}
    for layer in contract.layers:
        if layer.kind not in ("Shape", "Size") and not made.isdisjoint(layer.inputs):
            # An omitted output has no name, and an omitted input has the same empty name.
            made.update(filter(None, layer.outputs))
    return made


def arrangements(contract: Contract) -> dict[str, Arrangement]:
    """Return the layouts of the tensors that lie over the image, by name."""
    return _Arranger(contract).found


class _Arranger:
    """A pass through the layers in the order of computation."""

    def __init__(self, contract: Contract) -> None:
        geometry = contract.input
        pixels = Arrangement("HWC", 3, geometry.height, geometry.width)
        self.found = {contract.input_name: pixels}
        self._last: dict[str, Arrangement | None] = dict(self.found)
        """Last known layout before each tensor that depends on the image; None if the places were cut."""
        self._cut: dict[str, tuple[Arrangement, Layer]] = {}
        """Layout before the cut, and the layer that made the tensor, for tensors whose places were cut."""
        self._joined: set[str] = set()
        """Tensors to which leading tokens were added and whose number of leading tokens is not known yet."""
        made = made_of_image(contract)
        for layer in contract.layers:
            if not made.isdisjoint(layer.outputs):
                self._arrange(layer)

    def _arrange(self, layer: Layer) -> None:
        given = [name for name in layer.inputs if name in self._last]
        own = self._own(layer, given)
        cut = None if own else self._cut_by(layer, given[0])
        for tensor in filter(None, layer.outputs):
            self._last[tensor] = own or (None if cut else self._last[given[0]])
            if own:
                self.found[tensor] = own
            elif cut:
                self._cut[tensor] = cut, layer
            elif self._is_joined(layer, given):
                self._joined.add(tensor)

    def _own(self, layer: Layer, given: Sequence[str]) -> Arrangement | None:
        if layer.kind in _MAKES_MAPS:
            return _new("CHW", layer.shape)
        if layer.kind == "Transpose" and given[0] in self.found:
            return _transposed(self.found[given[0]], layer.attributes.get("perm"))
        if layer.kind in RESHAPES and given[0] in self._cut:
            before, maker = self._cut[given[0]]
            return before.patches(maker.shape, layer.shape)
        options = {"reshaped": layer.kind in RESHAPES, "joined": self._is_joined(layer, given)}
        known = [last for name in given if (last := self._last[name])]
        fit = next((fit for last in known if (fit := last.fitted(layer.shape, **options))), None)
        return fit or (_new(known[0].axes, layer.shape) if known and layer.kind in _RESIZES else None)

    def _cut_by(self, layer: Layer, given: str) -> Arrangement | None:
        """Return the layout before a reshape that cuts the places into windows or patches, or None."""
        if layer.kind == "Transpose" and given in self._cut:
            return self._cut[given][0]
        before = self.found.get(given) if layer.kind in RESHAPES else None
        return before if before and before.is_cut(layer.shape) else None

    def _is_joined(self, layer: Layer, given: Sequence[str]) -> bool:
        """Return True if tokens are put before the tokens of places, which come last."""
        if layer.kind == "Concat":
            return layer.inputs[-1] in self._last
        return not self._joined.isdisjoint(given)


def _new(axes: str, shape: Sequence[int | None]) -> Arrangement | None:
    """Return the layout of maps with another size."""
    if "T" in axes or len(shape) != len(axes):
        return None
    channels, height, width = (shape[axes.index(axis)] for axis in "CHW")
    if channels is None or height is None or width is None:
        return None
    return Arrangement(axes, channels, height, width)


def _transposed(before: Arrangement, order: Any) -> Arrangement | None:
    """Return the layout after a transpose; `order` is ONNX's `perm` of all axes."""
    if order is None or len(order) != len(before.axes) + 1 or order[0] != 0:
        return None
    return before._replace(axes="".join(before.axes[at - 1] for at in order[1:]))
