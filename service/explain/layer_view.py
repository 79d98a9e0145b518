"""View of a layer, as the API and the page show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fovea.service.explain.receptive_field import ReceptiveField, Window
from fovea.service.explain.tensor_layout import TensorLayout


@dataclass(frozen=True)
class LayerView:
    """A layer as it is shown to people."""

    tensor: str
    """Output tensor, which identifies the layer."""
    name: str
    kind: str
    """ONNX operator; `Input` for the input of the network."""
    sources: tuple[str, ...]
    """Output tensors of the layers that this layer reads."""
    shape: tuple[int | None, ...]
    """(channels, height, width) of maps, (n,) of a vector."""
    layout: TensorLayout | None = None
    """Layout of the maps in the graph's tensor; None if the tensor is shown unchanged."""
    is_direct: bool = True
    """True if the layer reads its sources as shown; False if they are cut or rearranged in between."""
    block: str | None = None
    """Name of the block; adjacent layers with the same name belong together."""
    window: Window | None = None
    groups: int = 1
    parameters: int = 0
    constants: Mapping[str, float] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    """Tensor of each part, such as `weight`."""
    is_transposed: bool = False
    """True if the weight is (inputs, outputs), see `layers.is_transposed`."""
    input_tensor: str | None = None
    """Tensor of the vector that a linear layer multiplies with its weights; None for other layers. The source
    may have the same values as maps of one pixel, or have more values, such as the tokens of all places."""
    flattened_axes: str | None = None
    """Order in which a `Flatten` writes its source into one row, `CHW` or `HWC`; None if it is unknown, and
    for other layers."""
    receptive_field: ReceptiveField | None = None
    """Receptive field of one value; None if it is the whole input or the output is not a map."""
