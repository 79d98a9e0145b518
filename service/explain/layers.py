"""The inside of a model in a readable form: its layers, their connections, and their receptive fields.

The sources are the contract's layer table and an opened graph (see `introspection`). The graph adds the
shapes of the weights, and constants.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import prod
from typing import Any, Final, NamedTuple

import numpy.typing as npt

from fovea.service.artifact.contract import Contract, Layer
from fovea.service.explain.tensor_layout import RESHAPES, Arrangement, arrangements, made_of_image

Constants = Mapping[str, npt.NDArray[Any]]
"""Values of small tensors that do not depend on the image, by name."""

Shapes = Mapping[str, Sequence[int]]
"""Shapes of tensors that do not depend on the image, by name."""

_PLUMBING: Final = frozenset(
    {"Identity", "Cast", "CastLike", "Dropout", "Transpose", "Shape", "Constant", "Expand",
     "ConstantOfShape", "Gather", "Slice", "Split", "Range", "Where", "Size"}
)  # fmt: skip
"""Operators that change no value or work on shapes."""

_ELEMENTWISE: Final = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish",
     "Tanh", "Softplus", "Softsign", "Gelu", "Mish", "Erf", "Exp", "Log", "Sqrt", "Abs", "Neg", "Pow",
     "Reciprocal", "ThresholdedRelu", "Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean",
     "BatchNormalization", "LRN", "Silu", "Swish", "Concat"}
)  # fmt: skip
"""Elementwise operators: each value depends only on values at the same place, in any channel."""

_LINEAR: Final = frozenset({"Gemm", "MatMul"})
_MAKERS: Final = frozenset({"Conv", "ConvInteger", "QLinearConv", *_LINEAR})
"""Operators that can be the first layer of a network; everything before it prepares the input."""

_COMPOSED: Final = (
    ({"Erf", "Mul"}, {"Div", "Add", "Pow"}, "Gelu"),
    ({"Softplus", "Tanh", "Mul"}, set[str](), "Mish"),
    ({"HardSigmoid", "Mul"}, set[str](), "HardSwish"),
    ({"Sigmoid", "Mul"}, set[str](), "Silu"),
    ({"ReduceMean", "Sub", "Sqrt", "Div"}, {"Pow", "Mul", "Add", "Cast"}, "LayerNormalization"),
)
"""Layers that export tools write as several operators: required operators, optional operators, and the layer.

If there are no optional operators, each required operator occurs exactly once.
"""

_PARTS: Final = {
    "Conv": ("weight", "bias"),
    "Gemm": ("weight", "bias"),
    "MatMul": ("weight",),
    "BatchNormalization": ("scale", "bias", "mean", "variance"),
    **dict.fromkeys(("LayerNormalization", "InstanceNormalization", "GroupNormalization"), ("scale", "bias")),
    "ConvTranspose": ("weight", "bias"),
}
"""Names of an operator's weights, from its second input on."""

_SCALARS: Final = {
    "Clip": ("", "min", "max"),
    **dict.fromkeys(("Pow", "Add", "Sub", "Mul", "Div", "Max", "Min"), ("left", "right")),
}
"""Names of scalar constants, by their position among the inputs."""

_BLOCK: Final = 16
"""Maximum number of layers that fold into a block; a bottleneck of a ResNet has 10."""


class Span(NamedTuple):
    """A receptive field along one axis.

    The value at place r depends on the places `jump` * r + `low` … `jump` * r + `high` of the input, both
    inclusive (Araujo, Norris and Sim, 2019, "Computing Receptive Fields of CNNs").
    """

    jump: int
    low: int
    high: int

    def through(self, window: int, stride: int, before: int, dilation: int) -> Span:
        """Return the span after a layer with a sliding window.

        The layer's value r reads `window` places from stride * r - before on, `dilation` apart.
        """
        last = dilation * (window - 1) - before
        return Span(self.jump * stride, self.low - self.jump * before, self.high + self.jump * last)


class Field(NamedTuple):
    """A receptive field, in pixels of the input."""

    rows: Span
    columns: Span


@dataclass(frozen=True)
class Window:
    """The sliding window of a convolution or a pooling. Pairs are (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    """Top, left, bottom and right padding."""
    dilation: tuple[int, int]


@dataclass(frozen=True)
class Shown:
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
    arrangement: Arrangement | None = None
    """Layout of the maps in the graph's tensor; None if the tensor is shown unchanged."""
    direct: bool = True
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
    transposed: bool = False
    """True if the weight is (inputs, outputs), see `is_transposed`."""
    seen: Field | None = None
    """Receptive field of one value; None if it is the whole input or the output is not a map."""


def describe(contract: Contract, shapes: Shapes, constants: Constants) -> list[Shown]:
    """Return the layers in the order of computation.

    `shapes` and `constants` are empty if the graph cannot be opened; sliding windows that only they define
    are then missing.
    """
    reader = _Reader(contract, shapes, constants)
    return _with_blocks(_composed(reader.layers()))


def is_transposed(layer: Layer) -> bool:
    """Return True if a linear layer's weight is (inputs, outputs) instead of (outputs, inputs)."""
    return layer.kind == "MatMul" or (layer.kind == "Gemm" and not layer.attributes.get("transB"))


def field_of(contract: Contract, tensor: str) -> Field | None:
    """Return the receptive field of one value of the maps, or None if it is unknown."""
    reader = _Reader(contract, {}, {})
    reader.layers()
    return reader.field_of(tensor)


_SAME: Final = frozenset({"Identity", "Cast", "Dropout"})
"""Operators that are not shown and leave each value at its place."""

_REARRANGES: Final = frozenset({"Transpose", *RESHAPES})


class _Reader:
    """A reader of the layer table of one contract."""

    def __init__(self, contract: Contract, shapes: Shapes, constants: Constants) -> None:
        self._contract = contract
        self._shapes = shapes
        self._constants = constants
        self._makers = {tensor: layer for layer in contract.layers for tensor in layer.outputs}
        self._readers = Counter(name for layer in contract.layers for name in layer.inputs)
        self._made = made_of_image(contract)
        self._arrangements = arrangements(contract)
        self._given = self._input_tensor()
        self._shown: dict[str, Shown] = {}
        self._sources: dict[str, tuple[str, ...]] = {}
        """Shown layers from which each tensor is computed."""

    def layers(self) -> list[Shown]:
        """Return all layers; the first is the input."""
        self._shown[self._given] = self._input()
        hidden = self._ancestors(self._given)
        self._sources[self._given] = (self._given,)
        for layer in self._contract.layers:
            self._follow(layer)
            if layer.outputs[0] not in hidden and self._is_shown(layer):
                shown = self._read(layer)
                product = self._shown.get(next(iter(shown.sources), ""))
                if product and self._readers[product.tensor] == 1 and _is_bias(shown, product):
                    del self._shown[product.tensor]
                    shown = _with_bias(product, shown)
                self._shown[shown.tensor] = shown
                self._sources[layer.outputs[0]] = (shown.tensor,)
        return list(self._shown.values())

    def field_of(self, tensor: str) -> Field | None:
        """Return the receptive field of a tensor's values; call `layers` first."""
        shown = self._shown.get(self._behind(tensor))
        return shown.seen if shown else None

    def _input(self) -> Shown:
        arrangement = self._arrangements.get(self._given)
        return Shown(
            self._given,
            "input",
            "Input",
            (),
            arrangement.shape if arrangement else self._shape(self._given),
            arrangement,
            seen=arrangement and self._patch(arrangement),
        )

    def _patch(self, arrangement: Arrangement) -> Field | None:
        """Return the receptive field of one value of the input: a pixel, or the patch of a token."""
        geometry = self._contract.input
        down, across = geometry.height // arrangement.height, geometry.width // arrangement.width
        if (down, across) != (1, 1) and "T" not in arrangement.axes:  # the network itself resizes the image
            return None
        return Field(Span(down, 0, down - 1), Span(across, 0, across - 1))

    def _follow(self, layer: Layer) -> None:
        sources = dict.fromkeys(one for name in layer.inputs for one in self._sources.get(name, ()))
        for tensor in layer.outputs:
            if tensor != self._given and tensor in self._made:
                self._sources[tensor] = tuple(sources)

    def _input_tensor(self) -> str:
        """Return the tensor that the first layer with weights reads."""
        for layer in self._contract.layers:
            if layer.kind in _MAKERS and layer.inputs[0] in self._made:
                return layer.inputs[0]
        return self._contract.input_name

    def _ancestors(self, tensor: str) -> set[str]:
        """Return a tensor and all tensors from which it is computed."""
        found: set[str] = set()
        open_ = [tensor]
        while open_:
            name = open_.pop()
            if name not in found:
                found.add(name)
                open_ += self._makers[name].inputs if name in self._makers else ()
        return found

    def _shape(self, tensor: str) -> tuple[int | None, ...]:
        geometry = self._contract.input
        if tensor == self._contract.input_name:
            return geometry.height, geometry.width, 3
        return self._makers[tensor].shape

    def _is_shown(self, layer: Layer) -> bool:
        if layer.kind in _PLUMBING or layer.outputs[0] not in self._made:
            return False
        if layer.kind in RESHAPES:  # only flattening of maps counts, not a reshape of one value per channel
            shape = self._shape(layer.inputs[0])
            return len(shape) == 3 and len(layer.shape) == 1 and len(_without_ones(shape)) > 1
        return True

    def _read(self, layer: Layer) -> Shown:
        sources = self._sources[layer.outputs[0]]
        window = self._window(layer)
        weights = self._weights(layer)
        arrangement = self._arrangements.get(layer.outputs[0])
        shown = Shown(
            layer.outputs[0],
            layer.name,
            "Flatten" if layer.kind in RESHAPES else layer.kind,
            sources,
            arrangement.shape if arrangement else layer.shape,
            arrangement,
            self._is_direct(layer),
            window=window,
            # ONNX defines `group` as an integer.
            groups=int(layer.attributes.get("group", 1)),  # type: ignore[arg-type]
            parameters=self._parameters(layer, weights),
            constants=self._scalars(layer),
            attributes={key: value for key, value in layer.attributes.items() if key not in _WINDOW},
            weights=weights,
            transposed=is_transposed(layer),
        )
        return replace(shown, seen=self._field(layer, shown))

    def _weights(self, layer: Layer) -> dict[str, str]:
        if layer.kind == "Add":  # a vector that is added may be the bias of a product
            vectors = [name for name in layer.inputs if len(self._shapes.get(name, ())) == 1]
            return {"bias": vectors[0]} if vectors else {}
        parts = zip(_PARTS.get(layer.kind, ()), layer.inputs[1:], strict=False)
        return {part: name for part, name in parts if name and name not in self._made}

    def _parameters(self, layer: Layer, weights: Mapping[str, str]) -> int:
        """Return the number of learned parameters, without paddings, sizes and scalar constants."""
        many = layer.kind in _ELEMENTWISE and layer.parameters >= len(layer.inputs)
        if many or layer.kind == "PRelu":
            return layer.parameters
        # The weights may be outputs of Constant nodes.
        stored = sum(prod(self._shapes.get(name, (0,))) for name in weights.values())
        return layer.parameters or stored if weights else 0

    def _scalars(self, layer: Layer) -> dict[str, float]:
        names = _SCALARS.get(layer.kind, ())
        # Clip had attributes before opset 11
        found: dict[str, Any] = {name: layer.attributes.get(name) for name in names}
        for name, tensor in zip(names, layer.inputs, strict=False):
            if tensor not in self._made and (value := self._constant(tensor)) is not None and value.size == 1:
                found[name] = value.item()
        return {name: float(value) for name, value in found.items() if value is not None}

    def _constant(self, name: str) -> npt.NDArray[Any] | None:
        """Return the value of an initializer, also through operators that change no value."""
        layer = self._makers.get(name)
        if layer and layer.kind in _PLUMBING and len(layer.inputs) == 1:
            return self._constant(layer.inputs[0])
        return self._constants.get(name)

    # --- windows ---

    def _window(self, layer: Layer) -> Window | None:
        kernel = layer.attributes.get("kernel_shape")
        if kernel is None and layer.kind == "Conv":
            kernel = tuple(self._shapes.get(layer.inputs[1], ())[2:])
        if not isinstance(kernel, tuple) or len(kernel) != 2:
            return None
        rows, columns = int(kernel[0]), int(kernel[1])
        stride = _pair(layer, "strides", 1)
        dilation = _pair(layer, "dilations", 1)
        padding = self._padding(layer, (rows, columns), stride, dilation)
        return padding and Window((rows, columns), stride, padding, dilation)

    def _padding(
        self, layer: Layer, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
    ) -> tuple[int, int, int, int] | None:
        auto = layer.attributes.get("auto_pad", "NOTSET")
        if auto in ("NOTSET", ""):
            return tuple(map(int, layer.attributes.get("pads", (0, 0, 0, 0))))  # type: ignore[return-value,arg-type]
        if auto == "VALID":
            return 0, 0, 0, 0
        before, behind = [], []
        given_shape = self._shape(layer.inputs[0])
        if len(given_shape) != 3 or len(layer.shape) != 3:
            return None
        sizes = zip(given_shape[1:], layer.shape[1:], kernel, stride, dilation, strict=True)
        for given, made, window, step, apart in sizes:
            if given is None or made is None:
                return None
            total = max(0, (made - 1) * step + apart * (window - 1) + 1 - given)
            before.append(total // 2 if auto == "SAME_UPPER" else total - total // 2)
            behind.append(total - before[-1])
        return before[0], before[1], behind[0], behind[1]

    def _field(self, layer: Layer, shown: Shown) -> Field | None:
        """Return the receptive field of one value of a map."""
        sources = [self._shown[source] for source in shown.sources]
        fields = [source.seen for source in sources if source.seen]
        if not shown.arrangement or not shown.direct or not sources or len(fields) < len(sources):
            return None
        seen = _union(fields)
        if layer.kind == "Pad":
            before = self._pad(layer, shown.arrangement.axes)
            return seen and before and _slid(seen, Window((1, 1), (1, 1), (*before, 0, 0), (1, 1)))
        if layer.kind in ("Conv", "MaxPool", "AveragePool", "LpPool"):
            return _slid(seen, shown.window) if seen and shown.window else None
        alike = all(source.shape[1:] == shown.shape[1:] for source in sources)
        return seen if alike and self._keeps_places(layer, shown) else None

    def _keeps_places(self, layer: Layer, shown: Shown) -> bool:
        """Return True if each value depends only on values at the same place, in any channel."""
        if layer.kind not in ("LayerNormalization", "MatMul"):
            return layer.kind in _ELEMENTWISE or layer.kind == "ReduceMean"
        given = self._arrangements.get(layer.inputs[0])
        if given is None or given.axes[-1] != "C":
            return False
        if layer.kind == "MatMul":
            return "weight" in shown.weights
        return layer.attributes.get("axis", -1) in (-1, len(given.axes))

    def _is_direct(self, layer: Layer) -> bool:
        """Return True if the layer reads its sources as they are shown.

        Only operators that move no value may lie in between, and the layer must not read tokens that are left
        out.
        """
        own = self._arrangements.get(layer.outputs[0])
        for name in layer.inputs:
            behind, given = self._behind(name), self._arrangements.get(name)
            if name in self._made and behind not in self._shown:
                return False
            if given and given.leading and (own is None or own.leading != given.leading):
                return False
            if given and layer.kind in RESHAPES and given.axes != "CHW":
                return False
        return True

    def _behind(self, tensor: str) -> str:
        """Return the shown tensor before operators that move no value, or else the last one reached."""
        while tensor not in self._shown and tensor in self._makers and self._moves_nothing(tensor):
            tensor = self._makers[tensor].inputs[0]
        return tensor

    def _moves_nothing(self, tensor: str) -> bool:
        """Return True if the tensor is shown in the same layout as its input."""
        layer = self._makers[tensor]
        if layer.kind not in _REARRANGES:
            return layer.kind in _SAME
        if {layer.inputs[0], tensor} <= self._arrangements.keys():
            return True
        given, made = (_without_ones(self._shape(name)) for name in (layer.inputs[0], tensor))
        return layer.kind != "Transpose" and given == made

    def _pad(self, layer: Layer, axes: str) -> tuple[int, int] | None:
        """Return the padding above and left of a map, or None if it is unknown."""
        pads: Any = layer.attributes.get("pads")
        if pads is None and len(layer.inputs) > 1:
            pads = self._constant(layer.inputs[1])
        known = pads is not None and len(pads) == 8  # the beginnings and the ends of four axes
        return (int(pads[1 + axes.index("H")]), int(pads[1 + axes.index("W")])) if known else None


_WINDOW: Final = frozenset(
    {"kernel_shape", "strides", "pads", "dilations", "group", "auto_pad", "storage_order"}
)
"""Attributes that `Window` contains or that change no value."""


def _without_ones(shape: Sequence[int | None]) -> list[int | None]:
    return [size for size in shape if size != 1]


def _pair(layer: Layer, name: str, default: int) -> tuple[int, int]:
    values: Any = layer.attributes.get(name, (default, default))
    return int(values[0]), int(values[1])


def _slid(seen: Field, window: Window) -> Field:
    spans = (
        span.through(window.kernel[axis], window.stride[axis], window.padding[axis], window.dilation[axis])
        for axis, span in enumerate(seen)
    )
    return Field(*spans)


def _union(fields: Sequence[Field]) -> Field | None:
    """Return the union of receptive fields, or None if their jumps differ."""
    spans = []
    for axis in zip(*fields, strict=True):
        if len({span.jump for span in axis}) > 1:
            return None
        spans.append(Span(axis[0].jump, min(one.low for one in axis), max(one.high for one in axis)))
    return Field(*spans)


# --- merging operators into layers and blocks ----------------------------------------------------


def _is_bias(layer: Shown, product: Shown) -> bool:
    return (
        product.kind == "MatMul"
        and layer.kind == "Add"
        and layer.direct
        and layer.sources == (product.tensor,)
        and "bias" in layer.weights
        and layer.shape == product.shape
    )


def _with_bias(product: Shown, addition: Shown) -> Shown:
    """Merge a matrix product and the addition of its bias into one linear layer."""
    return replace(
        product,
        tensor=addition.tensor,
        weights={**product.weights, **addition.weights},
        parameters=product.parameters + addition.parameters,
    )


def _composed(layers: Sequence[Shown]) -> list[Shown]:
    """Merge the operators of activations and norms that export tools write as several operators."""
    result: list[Shown] = []
    for _, group in groupby(layers, key=lambda layer: _scope(layer.name)):
        run = list(group)
        whole = _as_one(run, layers)
        result += [whole] if whole else run
    return result


def _as_one(run: Sequence[Shown], layers: Sequence[Shown]) -> Shown | None:
    """Merge the layers of a module if they form a known layer and no other layer reads their inner values."""
    kind = _composed_kind(run) if _scope(run[0].name) else None
    inside = {layer.tensor for layer in run}
    sources = {source for layer in run for source in layer.sources} - inside
    if not kind or len(sources) != 1:
        return None
    inner = inside - {run[-1].tensor}
    if any(not inner.isdisjoint(layer.sources) for layer in layers if layer.tensor not in inside):
        return None
    return replace(
        run[-1],
        kind=kind,
        sources=tuple(sources),
        direct=all(layer.direct for layer in run),
        parameters=sum(layer.parameters for layer in run),
        constants={},
        attributes={},
        weights={},
    )


def _composed_kind(run: Sequence[Shown]) -> str | None:
    kinds = {layer.kind for layer in run}
    means = [layer.shape for layer in run if layer.kind == "ReduceMean"]
    # The mean is over places, or over some of the channels.
    if any(shape != (1, *run[-1].shape[1:]) for shape in means):
        return None
    found = (
        kind
        for some, more, kind in _COMPOSED
        if some <= kinds <= some | more and (more or len(run) == len(some))
    )
    return next(found, None)


def _scope(name: str) -> str:
    """Return the module of a node.

    A name from torch's newer exporter is the module; a name from the older one is the node in the module.
    """
    return name.rpartition("/")[0] if name.startswith("/") else name


def _path(name: str) -> list[str]:
    return [part for part in re.split(r"[./]", name) if part]


def _with_blocks(layers: Sequence[Shown]) -> list[Shown]:
    """Assign each layer its block.

    A block is the shortest module path whose layers are adjacent and at most `_BLOCK` in number.
    """
    places: dict[str, list[int]] = {}
    for place, layer in enumerate(layers):
        path = _path(layer.name)
        for length in range(1, len(path) + 1):
            places.setdefault(".".join(path[:length]), []).append(place)
    good = {
        name
        for name, found in places.items()
        if 2 <= len(found) <= _BLOCK and found[-1] - found[0] == len(found) - 1
    }
    return [replace(layer, block=_block(layer, good)) for layer in layers]


def _block(layer: Shown, good: set[str]) -> str | None:
    path = _path(layer.name)
    names = (".".join(path[:length]) for length in range(1, len(path) + 1))
    return next((name for name in names if name in good), None)
