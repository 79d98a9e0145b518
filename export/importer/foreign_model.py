"""Loading of foreign ONNX files with their external weights, or refusal with a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, inliner, version_converter

from fovea.service.errors import FoveaError, to_one_line

MAX_BYTES: Final = (1 << 31) - (64 << 20)
"""Maximum size of a file with all its weights, in bytes.

Protobuf limits a message to 2 GiB; 64 MiB are left for the contract.
"""

_DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
"""Domains of the operators that ONNX Runtime itself implements."""

_OPSET: Final = 8
"""Lowest operator set version that is kept; added nodes need `Expand` and `Max` of two shapes."""

_CONVERTED: Final = 13
"""Operator set version to which lower versions are converted."""

_IR: Final = 4
"""Lowest IR version in which weights need not be inputs too."""

_OTHERS: Final = (
    (b"PK\x03\x04", "a ZIP archive, as PyTorch and Keras write them"),
    (b"\x89HDF", "an HDF5 file, as Keras writes them"),
    (b"\x80\x02", "a Python pickle, as older PyTorch writes them"),
)
"""First bytes of files that users mistake for ONNX."""


class ImportRefused(FoveaError):
    """A model cannot be imported, or needs more options; the message says what to do."""


class NotTold(ImportRefused):
    """A fact that is not in the file must be given as an option."""


def read(path: Path) -> ModelProto:
    """Read a model with all its weights.

    Raises `ImportRefused`.
    """
    model = _parsed(path, _content(path))
    _take_in(model, path)
    if model.functions:
        model = inliner.inline_local_functions(model)
    _require_known_operators(path, model)
    return _modern(path, model)


def _content(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ImportRefused(f"{path} has {size / 1e9:.1f} GB; at most 2 GB fit into one ONNX file")
        return path.read_bytes()
    except OSError as error:
        raise ImportRefused(f"cannot read {path}: {error.strerror}") from None


def _parsed(path: Path, content: bytes) -> ModelProto:
    for start, kind in _OTHERS:
        if content.startswith(start):
            raise ImportRefused(f"{path} is {kind}, not ONNX; export the model to ONNX first")
    try:
        model: ModelProto = ModelProto.FromString(content)
    except Exception:  # protobuf's own exception, whose module has no types
        raise ImportRefused(f"{path} is not an ONNX file, or it is cut short") from None
    if not model.graph.node or not model.opset_import:
        raise ImportRefused(f"{path} is not an ONNX file, or it is cut short: it has no operators")
    return model


def _require_known_operators(path: Path, model: ModelProto) -> None:
    foreign = {
        f"{node.domain}.{node.op_type}" for node in all_nodes(model.graph) if node.domain not in _DOMAINS
    }
    if foreign:
        raise ImportRefused(
            f"{path} has operators that ONNX Runtime does not bring: {', '.join(sorted(foreign)[:3])}; "
            "export it without them"
        )


def _modern(path: Path, model: ModelProto) -> ModelProto:
    """Convert the model to a supported operator set, and remove weights from its inputs."""
    if opset_of(model) < _OPSET:
        try:
            model = version_converter.convert_version(model, _CONVERTED)
        except Exception as error:  # the C++ side can raise anything
            raise ImportRefused(
                f"{path} has operators of version {opset_of(model)}, which cannot be converted to "
                f"{_CONVERTED}: {to_one_line(error)}"
            ) from None
    model.ir_version = max(model.ir_version, _IR)
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return model


def opset_of(model: ModelProto) -> int:
    """Return the version of the standard operators."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


# --- external weights ----------------------------------------------------------------------------


def _take_in(model: ModelProto, path: Path) -> None:
    """Read the weights that lie in files beside the model.

    Raises `ImportRefused` for weights elsewhere.
    """
    held = model.ByteSize()
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            held += _take_in_one(tensor, path, MAX_BYTES - held)


def _take_in_one(tensor: TensorProto, path: Path, room: int) -> int:
    """Read one tensor's values, at most `room` bytes; return their number of bytes."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    place = _beside(path, entries.get("location", ""), tensor.name)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", "-1"))
        with place.open("rb") as file:
            size = place.stat().st_size
            length = size - offset if length < 0 else length
            if length > room:
                raise ImportRefused(
                    f"{path} has more than 2 GB of weights; at most that fits into one ONNX file"
                )
            if not 0 <= offset <= offset + length <= size:
                raise ImportRefused(f"{path} needs bytes of {place.name} that are not there; it is cut short")
            file.seek(offset)
            values = file.read(length)
    except (OSError, ValueError) as error:
        raise ImportRefused(
            f"{path} keeps weights in {place}, which cannot be read: {to_one_line(error)}"
        ) from None
    tensor.raw_data = values
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]
    return length


def _beside(path: Path, location: str, tensor: str) -> Path:
    """Return the resolved path of external weights.

    Raises `ImportRefused` unless it is a regular file in the model's folder or below.
    """
    folder = path.parent.resolve()
    if Path(location).is_absolute() or ".." in Path(location).parts or "\0" in location:
        inside = False
    else:
        inside = (folder / location).resolve().is_relative_to(folder)
    if not inside:
        raise ImportRefused(
            f"{path} keeps the weights {tensor!r} in {location!r}, outside its own folder; "
            "only files in there are read"
        )
    place = (folder / location).resolve()
    if not place.is_file():
        raise ImportRefused(f"{path} keeps weights in {place}, which is not there; copy it beside the model")
    return place


# --- graph contents ------------------------------------------------------------------------------


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield the nodes of a graph and of its inner graphs."""
    for node in graph.node:
        yield node
        for inner in _graphs(node.attribute):
            yield from all_nodes(inner)


def _graphs(attributes: Iterable[AttributeProto]) -> Iterator[GraphProto]:
    for attribute in attributes:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield all tensors with values: weights and constants, also in inner graphs and functions."""
    yield from _tensors_of(model.graph)
    for function in model.functions:
        yield from _tensors_in(function.node)


def _tensors_of(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_in(graph.node)


def _tensors_in(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for inner in _graphs(node.attribute):
            yield from _tensors_of(inner)


def tensor_names(graph: GraphProto) -> set[str]:
    """Return the names of all tensors, including those in inner graphs."""
    names = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    for node in all_nodes(graph):
        names.update(node.input, node.output)
        for inner in _graphs(node.attribute):
            names.update(value.name for value in (*inner.input, *inner.initializer))
    return names


def names_needed(node: NodeProto) -> set[str]:
    """Return the names that a node reads: its inputs, and the names that its inner graphs may capture."""
    names = set(node.input)
    for inner in _graphs(node.attribute):
        names.update(name for nested in all_nodes(inner) for name in nested.input)
        names.update(value.name for value in inner.output)
    return names


class Arithmetic(StrEnum):
    """The arithmetic of a graph, by its lowest precision."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"


def arithmetic_of(model: ModelProto) -> Arithmetic:
    """Return the arithmetic of all weights and operators; input and output may still be float32."""
    if any("Quantize" in node.op_type or "QLinear" in node.op_type for node in all_nodes(model.graph)):
        return Arithmetic.INT8
    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    if any(tensor.data_type in halves for tensor in _tensors(model)):
        return Arithmetic.FLOAT16
    return Arithmetic.FLOAT32


# --- execution in ONNX Runtime -------------------------------------------------------------------

Values: TypeAlias = npt.NDArray[Any]


class Plain:
    """A graph in plain ONNX Runtime, one image at a time; the reference for verifying an import."""

    def __init__(self, model: ModelProto, *, threads: int, batch: int = 1, also: Sequence[str] = ()) -> None:
        """Load the graph.

        `batch` is the only batch size that the graph accepts, if it is fixed. `also` names tensors to return
        besides the outputs. Raises `ImportRefused` if ONNX Runtime cannot load the graph.
        """
        self._model, self._threads, self._batch = model, threads, batch
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # errors are raised as exceptions
        extra = ModelProto()
        known = {output.name for output in model.graph.output}
        extra.graph.output.extend(onnx.ValueInfoProto(name=name) for name in also if name not in known)
        content = model.SerializeToString() + extra.SerializeToString()
        try:
            self._session: Any = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a dozen classes without a common base class
            raise ImportRefused(f"ONNX Runtime cannot load the model: {to_one_line(error)}") from None
        self.names: list[str] = [output.name for output in self._session.get_outputs()]
        self._input: str = self._session.get_inputs()[0].name

    def seeing(self, *names: str) -> Plain:
        """Return the same graph with additional tensors among its outputs."""
        return Plain(self._model, threads=self._threads, batch=self._batch, also=names)

    def __call__(self, images: Values) -> dict[str, Values]:
        """Return each output for images (n, …), run one at a time, with the image axis in front.

        The whole output of a run belongs to its one image, whatever its shape; nothing is sliced off. A graph
        with a fixed batch size gets the same image in all places. Its outputs are those of one image if all
        places agree. Outputs whose shape differs between images are left out. Raises `ImportRefused` if the
        graph does not run.
        """
        runs = [self.together(np.repeat(image[None], self._batch, axis=0)) for image in images]
        shapes = {name: {run[name].shape for run in runs} for name in self.names}
        return {
            name: np.stack([self._of_one(run[name]) for run in runs])
            for name in self.names
            if len(shapes[name]) == 1
        }

    def _of_one(self, output: Values) -> Values:
        """Return the part of an output that belongs to one of `batch` equal images."""
        if output.shape[:1] != (self._batch,):
            return output
        alike = self._batch == 1 or (output.dtype.kind == "f" and np.allclose(output, output[:1], 1e-3, 1e-6))
        return output[0] if alike else output

    def together(self, batch: Values) -> dict[str, Values]:
        """Return each output for a batch that is run as given."""
        try:
            outputs = self._session.run(self.names, {self._input: batch})
            return {name: np.atleast_1d(value) for name, value in zip(self.names, outputs, strict=True)}
        except Exception as error:  # as above, and outputs that are not tensors
            raise ImportRefused(f"the graph does not run on an image: {to_one_line(error)}") from None
