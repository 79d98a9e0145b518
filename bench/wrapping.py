"""The `make bench-wrap` benchmark: the cost of the steps that Fovea puts around a graph.

A bare graph takes a preprocessed tensor of its own layout and type. The wrapped graph is the same graph with
the steps of `fovea import` or `fovea export` around it: it takes uint8 pixels (batch, H, W, 3). Both run by
turns in one process on the same images, and the ratio is taken per pair of calls. The bare graph's time has
no preprocessing in it, so the difference is the whole price of the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import ModelProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

from fovea.bench.mixed import describe_machine
from fovea.bench.workloads import CACHE, BenchError
from fovea.export.from_checkpoint import export_classifier_graph, export_graph
from fovea.export.importer.graph_input import GraphInput, Layout, read_graph_input
from fovea.export.importer.graph_output import GraphOutput, ValueKind
from fovea.export.importer.preprocessing import IMAGENET
from fovea.export.importer.wrap import wrap_model
from fovea.model.data.dataset import square_geometry
from fovea.model.networks.network import NETS, NetConfig, Normalize
from fovea.service.artifact.contract import Task
from fovea.service.atomic_files import write_file
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.session import open_session

SIDE: Final = 224
LABELS: Final = 1000

NETWORKS: Final = ("mobilenet_v2", "resnet50")

KINDS: Final = ("float32", "float16", "int8", "uint8")
"""Kinds of graph. `int8` is a QDQ graph that takes float32. `uint8` is the same graph without its first
QuantizeLinear, so it takes bytes."""

MAX_OVERHEAD: Final = 0.02
"""Maximum share of the bare graph's time that the steps may add."""

_IMAGE_COUNT: Final = 8
"""Number of different batches, so that no tensor stays in the nearest cache between two calls."""

_CALIBRATION_COUNT: Final = 8

_LOGIT_TOLERANCE: Final = {"float32": 1e-3, "float16": 5e-2, "int8": 5e-2, "uint8": 1e-3}
"""Maximum difference of a logit, relative to the largest logit; a wrong step differs by far more."""


@dataclass(frozen=True)
class Pair:
    """A bare graph and the wrapped graph with the same weights."""

    network: str
    kind: str
    layout: str
    """`nchw` and `nhwc` of imported graphs; `own` for a network that Fovea exports."""
    bare: bytes
    wrapped: bytes
    graph_input: GraphInput
    logits: str
    """Name of the output with the logits in both graphs."""

    def prepare(self, pixels: Pixels) -> npt.NDArray[Any]:
        """Return the tensor that the bare graph takes for pixels (n, H, W, 3)."""
        values = pixels if self.kind == "uint8" else IMAGENET.normalization(pixels)
        return self.graph_input.from_pixel_values(values)


@dataclass(frozen=True)
class Overhead:
    """The cost of the steps around one graph."""

    network: str
    kind: str
    layout: str
    threads: int
    batch: int
    bare_seconds: float
    """Median time of a call of the bare graph, in seconds."""
    ratios: tuple[float, ...]
    """Time of the wrapped graph over the bare graph's time, by pair of calls."""

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Quartiles of the share of the bare graph's time that the steps add; the second is the median."""
        low, middle, high = statistics.quantiles(self.ratios, n=4)
        return low - 1, middle - 1, high - 1


def main() -> int:
    """Measure as the command line asks, print a table, write JSON; return 1 if a claim fails."""
    options = _parse_arguments()
    results = []
    try:
        for network, kind in product(options.networks, options.kinds):
            for pair in build_pairs(network, kind, SIDE):
                for threads, batch in product(options.threads, options.batches):
                    results.append(measure_pair(pair, threads, batch, options.seconds))
                    print(format_row(results[-1]), flush=True)
    except BenchError as error:
        print(f"wrapping: {error}", file=sys.stderr)
        return 2
    document = {"machine": describe_machine(), "overheads": [asdict(result) for result in results]}
    write_file(options.out, json.dumps(document, indent=1) + "\n")
    return _show_table(results)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.wrapping", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each row (default: 4)")
    parser.add_argument("--out", type=Path, default=CACHE / "wrapping.json")
    return parser.parse_args()


# --- graphs --------------------------------------------------------------------------------------


def build_pairs(network: str, kind: str, side: int) -> Iterator[Pair]:
    """Yield the pairs of one network and kind: both layouts, and Fovea's own export for float32."""
    for layout in Layout:
        bare = _build_bare_graph(network, kind, side)
        yield wrap_as_imported(network, kind, to_channels_last(bare) if layout is Layout.NHWC else bare)
    if kind == "float32":
        bare = _build_bare_graph(network, kind, side)
        own = _build_once(f"{network}-own-{side}", lambda: _export_own_graph(network, side))
        graph_input = read_graph_input(bare, None, None)
        yield Pair(
            network, kind, "own", bare.SerializeToString(), own.SerializeToString(), graph_input, "logits"
        )


def wrap_as_imported(network: str, kind: str, bare: ModelProto) -> Pair:
    """Return a graph with the same graph as `fovea import` wraps it."""
    graph_input = read_graph_input(bare, None, None)
    (output,) = bare.graph.output
    labels = output.type.tensor_type.shape.dim[1].dim_value
    graph_output = GraphOutput(
        output.name, np.dtype(np.float32), labels, ValueKind.LOGITS, None, "the only one"
    )
    normalization = None if kind == "uint8" else IMAGENET.normalization
    wrapped = wrap_model(bare, graph_input, normalization, graph_output, Task.MULTICLASS, dynamic_batch=True)
    return Pair(
        network,
        kind,
        graph_input.layout.value,
        bare.SerializeToString(),
        wrapped.model.SerializeToString(),
        graph_input,
        wrapped.logits,
    )


def _build_bare_graph(network: str, kind: str, side: int) -> ModelProto:
    """Return a graph from a preprocessed tensor (batch, 3, side, side) to logits."""

    def build() -> ModelProto:
        if kind == "int8":
            return quantize_graph(_build_bare_graph(network, "float32", side), side)
        if kind == "uint8":
            return _remove_first_quantize(_build_bare_graph(network, "int8", side))
        dtype = torch.float16 if kind == "float16" else torch.float32
        example = torch.zeros(2, 3, side, side, dtype=dtype)
        return export_graph(_build_network(network, side).to(dtype), example, ["logits_of_file"])

    return _build_once(f"{network}-{kind}-{side}", build)


def _build_once(name: str, build: Callable[[], ModelProto]) -> ModelProto:
    """Return the graph from its file, or build it and write the file."""
    path = CACHE / "wrapping" / f"{name}.onnx"
    if not path.exists():
        write_file(path, build().SerializeToString())
    return onnx.load(path)


def _build_network(network: str, side: int) -> nn.Sequential:
    torch.manual_seed(0)
    features = NETS[network](NetConfig(Task.MULTICLASS, LABELS, network, side))
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(features, pool, nn.Linear(features.channels, LABELS))


def _export_own_graph(network: str, side: int) -> ModelProto:
    normalize = Normalize(IMAGENET.normalization.mean, IMAGENET.normalization.std)
    net = nn.Sequential(normalize, _build_network(network, side))
    return export_classifier_graph(net, Task.MULTICLASS, square_geometry(side))


class _ImageReader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """The images for the calibration, one by one."""

    def __init__(self, name: str, images: npt.NDArray[np.float32]) -> None:
        self._inputs = iter([{name: image[None]} for image in images])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._inputs, None)


def quantize_graph(graph: ModelProto, side: int) -> ModelProto:
    """Return the int8 version of a graph: QDQ, per channel, uint8 activations and int8 weights."""
    images = IMAGENET.normalization(draw_pixels(_CALIBRATION_COUNT, side)).transpose(0, 3, 1, 2)
    reader = _ImageReader(graph.graph.input[0].name, np.ascontiguousarray(images))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        quantize_static(
            graph,
            str(path),
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(path)


def _remove_first_quantize(graph: ModelProto) -> ModelProto:
    """Return the graph without its first QuantizeLinear: it takes the quantised image."""
    (value,) = graph.graph.input
    (node,) = [one for one in graph.graph.node if value.name in one.input]
    if node.op_type != "QuantizeLinear":
        raise BenchError(f"the graph begins with {node.op_type}; expected QuantizeLinear")
    value.name = node.output[0]
    value.type.tensor_type.elem_type = onnx.TensorProto.UINT8
    graph.graph.node.remove(node)
    return graph


def to_channels_last(graph: ModelProto) -> ModelProto:
    """Return the graph for (batch, H, W, 3): it begins with a Transpose, as tf2onnx writes it."""
    copy = ModelProto()
    copy.CopyFrom(graph)
    (value,) = copy.graph.input
    planes, kind = value.name, value.type.tensor_type.elem_type
    batch, _, height, width = value.type.tensor_type.shape.dim
    shape = [batch.dim_param, height.dim_value, width.dim_value, 3]
    value.CopyFrom(helper.make_tensor_value_info(f"{planes}_nhwc", kind, shape))
    node = helper.make_node("Transpose", [value.name], [planes], "channels_first", perm=[0, 3, 1, 2])
    copy.graph.node.insert(0, node)
    return copy


def draw_pixels(count: int, side: int) -> Pixels:
    """Return random pixels, uint8 (count, side, side, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


# --- measurement ---------------------------------------------------------------------------------


def measure_pair(pair: Pair, threads: int, batch: int, seconds: float) -> Overhead:
    """Run both graphs by turns for `seconds`; the one that comes first changes with every pair of calls.

    Raises `BenchError` if the graphs give different logits.
    """
    side = pair.graph_input.height
    pixels = draw_pixels(_IMAGE_COUNT * batch, side).reshape(_IMAGE_COUNT, batch, side, side, 3)
    bare = _make_call(pair.bare, threads, [pair.prepare(images) for images in pixels])
    wrapped = _make_call(pair.wrapped, threads, list(pixels), pair.logits)
    for _ in range(_IMAGE_COUNT):
        _compare_logits(pair, bare(), wrapped())
    bare_times: list[float] = []
    ratios: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(ratios) < _IMAGE_COUNT:
        if len(ratios) % 2:
            wrapped_seconds, bare_seconds = _measure_seconds(wrapped), _measure_seconds(bare)
        else:
            bare_seconds, wrapped_seconds = _measure_seconds(bare), _measure_seconds(wrapped)
        bare_times.append(bare_seconds)
        ratios.append(wrapped_seconds / bare_seconds)
    return Overhead(
        pair.network, pair.kind, pair.layout, threads, batch, statistics.median(bare_times), tuple(ratios)
    )


def _make_call(
    model: bytes, threads: int, inputs: list[npt.NDArray[Any]], *outputs: str
) -> Callable[[], npt.NDArray[Any]]:
    """Return a function that runs the graph on the next input and returns its first output."""
    session = open_session(model, "cpu", threads)
    (graph_input,) = session.get_inputs()
    feeds = cycle([{graph_input.name: values} for values in inputs])

    def call() -> npt.NDArray[Any]:
        result: npt.NDArray[Any] = session.run(outputs or None, next(feeds))[0]
        return result

    return call


def _compare_logits(pair: Pair, bare: npt.NDArray[Any], wrapped: npt.NDArray[Any]) -> None:
    difference = float(np.abs(bare.astype(np.float32) - wrapped).max() / np.abs(bare).max())
    if not difference <= _LOGIT_TOLERANCE[pair.kind]:  # a NaN is a difference too
        raise BenchError(
            f"the logits of {pair.network}, {pair.kind}, {pair.layout} differ by {difference:.2g} of the "
            f"largest logit; at most {_LOGIT_TOLERANCE[pair.kind]:g}"
        )


def _measure_seconds(call: Callable[[], Any]) -> float:
    started_at = time.perf_counter()
    call()
    return time.perf_counter() - started_at


# --- table ---------------------------------------------------------------------------------------


def format_row(result: Overhead) -> str:
    """Return a row of the table, with all shares in percent."""
    low, median, high = (100 * share for share in result.quartiles)
    return (
        f"| {result.network} | {result.kind} | {result.layout} | {result.threads} | {result.batch} | "
        f"{1000 * result.bare_seconds:.2f} | {median:+.1f} | {low:+.1f} … {high:+.1f} |"
    )


def _show_table(results: list[Overhead]) -> int:
    """Print the table; return 1 if the steps cost more than they may, else 0."""
    print("\n| network | graph | layout | threads | batch | bare, ms | added, % | quartiles |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(map(format_row, results)))
    print(f"\n{describe_machine()}.")
    worst = max(results, key=lambda result: result.quartiles[1])
    if worst.quartiles[1] <= MAX_OVERHEAD:
        print(f"The steps add at most {MAX_OVERHEAD:.0%} everywhere.")
        return 0
    count = sum(result.quartiles[1] > MAX_OVERHEAD for result in results)
    print(f"{count} of {len(results)} rows are above {MAX_OVERHEAD:.0%}; the worst is {format_row(worst)}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
