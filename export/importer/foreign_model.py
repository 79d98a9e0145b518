"""Loading of foreign ONNX files with their external weights, or refusal with a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from onnx import (
    ModelProto,
    TensorProto,
    inliner,
    numpy_helper,
    version_converter,
)

from fovea.export.importer.file_format import describe_folder, describe_other_format
from fovea.export.importer.graph_contents import Array as Array
from fovea.export.importer.graph_contents import walk_nodes, walk_tensors
from fovea.export.importer.large_weights import NO_WEIGHTS, LargeWeights
from fovea.service.allocator import trim_heap
from fovea.service.errors import FoveaError, to_one_line

MAX_BYTES: Final = (1 << 31) - (64 << 20)
"""Maximum size of a file with all its weights, in bytes.

Protobuf limits a message to 2 GiB; 64 MiB are left for the contract.
"""

_KNOWN_DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
"""Domains of the operators that ONNX Runtime itself implements."""

_INTERNAL_DOMAINS: Final = ("com.microsoft.", "com.ms.")
"""Prefixes of ONNX Runtime's internal domains, such as `com.microsoft.nchwc`, which its optimiser writes."""

_MIN_OPSET: Final = 8
"""Lowest operator set version that is kept; added nodes need `Expand` and `Max` of two shapes."""

_TARGET_OPSET: Final = 13
"""Operator set version to which lower versions are converted."""

_MIN_IR_VERSION: Final = 4
"""Lowest IR version in which weights need not be inputs too."""

_HALVE_ADVICE: Final = (
    "convert it to float16, which halves it, such as with convert_float_to_float16 of onnxconverter-common"
)


class ImportRefused(FoveaError):
    """A model cannot be imported, or needs more options; the message says what to do."""


class MissingInformation(ImportRefused):
    """A fact that is not in the file must be given as an option.

    `example` is an option with a value that supplies it, such as `--layout nchw`.
    """

    def __init__(self, message: str, example: str = "") -> None:
        super().__init__(message)
        self.example = example


def read_model(path: Path) -> ModelProto:
    """Read a model with all its weights.

    Raises `ImportRefused`.
    """
    _require_onnx(path)
    model = _parse_model(path, _read_content(path))
    _load_external_weights(model, path)
    _require_whole_tensors(path, model)
    if model.functions:
        model = inliner.inline_local_functions(model)
    _require_known_operators(path, model)
    return _modernize_model(path, model)


def _require_onnx(path: Path) -> None:
    """Raise `ImportRefused` for files and folders of other formats, which are named."""
    try:
        description = describe_folder(path) if path.is_dir() else describe_other_format(path)
    except OSError as error:
        raise ImportRefused(f"cannot read {path}: {error.strerror}") from None
    if description:
        raise ImportRefused(description)


def _read_content(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ImportRefused(
                f"{path} has {size / 1e9:.1f} GB; at most 2 GB fit into one ONNX file: {_HALVE_ADVICE}"
            )
        return path.read_bytes()
    except OSError as error:
        raise ImportRefused(f"cannot read {path}: {error.strerror}") from None


def _parse_model(path: Path, content: bytes) -> ModelProto:
    try:
        model: ModelProto = ModelProto.FromString(content)
    except Exception:  # protobuf's own exception, whose module has no types
        raise ImportRefused(f"{path} is not an ONNX file, or it is cut short") from None
    if not model.graph.node or not model.opset_import:
        raise ImportRefused(f"{path} is not an ONNX file, or it is cut short: it has no operators")
    return model


def _require_whole_tensors(path: Path, model: ModelProto) -> None:
    """Raise `ImportRefused` if a weight or constant has more or fewer values than its shape."""
    for tensor in walk_tensors(model):
        try:
            numpy_helper.to_array(tensor)  # which copies no values that lie in `raw_data`
        except Exception as error:  # ValueError, TypeError and KeyError, for each fault another
            raise ImportRefused(
                f"{path} is damaged: the values of {tensor.name!r} do not fit its type and shape "
                f"({to_one_line(error)}); export or download it again"
            ) from None


def _require_known_operators(path: Path, model: ModelProto) -> None:
    unknown_operators = {
        f"{node.domain}.{node.op_type}"
        for node in walk_nodes(model.graph)
        if node.domain not in _KNOWN_DOMAINS or node.op_type == "EPContext"  # a compiled graph
    }
    internal_operators = [one for one in unknown_operators if one.startswith(_INTERNAL_DOMAINS)]
    if internal_operators:
        raise ImportRefused(
            f"{path} was optimised by ONNX Runtime for one kind of processor, with operators of its own such "
            f"as {min(internal_operators)}: import the file it was made from"
        )
    if unknown_operators:
        raise ImportRefused(
            f"{path} has operators that ONNX Runtime does not include: "
            f"{', '.join(sorted(unknown_operators)[:3])}; export it without them"
        )


def _modernize_model(path: Path, model: ModelProto) -> ModelProto:
    """Convert the model to a supported operator set, and remove weights from its inputs."""
    if opset_of(model) < _MIN_OPSET:
        try:
            model = version_converter.convert_version(model, _TARGET_OPSET)
        except Exception as error:  # the C++ side can raise anything
            raise ImportRefused(
                f"{path} has operators of version {opset_of(model)}, which cannot be converted to "
                f"{_TARGET_OPSET}: {to_one_line(error)}"
            ) from None
    model.ir_version = max(model.ir_version, _MIN_IR_VERSION)
    weight_names = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weight_names]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return model


def opset_of(model: ModelProto) -> int:
    """Return the version of the standard operators."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


# --- external weights ----------------------------------------------------------------------------


def _load_external_weights(model: ModelProto, path: Path) -> None:
    """Read the weights that lie in files beside the model.

    Raises `ImportRefused` for weights elsewhere.
    """
    tensors = [one for one in walk_tensors(model) if one.data_location == TensorProto.EXTERNAL]
    size = model.ByteSize() if tensors else 0  # protobuf writes the whole message to count its bytes
    for tensor in tensors:
        size += _load_external_tensor(tensor, path, MAX_BYTES - size)


def _load_external_tensor(tensor: TensorProto, path: Path, max_bytes: int) -> int:
    """Read one tensor's values, at most `max_bytes` bytes; return their number of bytes."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    weights_path = _resolve_weights_path(path, entries.get("location", ""), tensor.name)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", "-1"))
        with weights_path.open("rb") as file:
            size = weights_path.stat().st_size
            length = size - offset if length < 0 else length
            if length > max_bytes:
                raise ImportRefused(
                    f"{path} has more than 2 GB of weights, which is the limit for one ONNX file: "
                    f"{_HALVE_ADVICE}"
                )
            if not 0 <= offset <= offset + length <= size:
                raise ImportRefused(
                    f"{path} needs bytes {offset} to {offset + length} of {weights_path.name}, which has "
                    f"{size}; the file is incomplete: copy it again"
                )
            file.seek(offset)
            values = file.read(length)
    except (OSError, ValueError) as error:
        raise ImportRefused(
            f"{path} keeps weights in {weights_path}, which cannot be read: {to_one_line(error)}"
        ) from None
    tensor.raw_data = values
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]
    return length


def _resolve_weights_path(path: Path, location: str, tensor_name: str) -> Path:
    """Return the resolved path of external weights.

    Raises `ImportRefused` unless it is a regular file in the model's folder or below.
    """
    folder = path.parent.resolve()
    if Path(location).is_absolute() or ".." in Path(location).parts or "\0" in location:
        is_inside = False
    else:
        is_inside = (folder / location).resolve().is_relative_to(folder)
    if not is_inside:
        raise ImportRefused(
            f"{path} keeps the weights {tensor_name!r} in {location!r}, outside its own folder; "
            "only files inside it are read"
        )
    weights_path = (folder / location).resolve()
    if not weights_path.is_file():
        raise ImportRefused(
            f"{path} keeps weights in {weights_path}, which is not there; copy it beside the model"
        )
    return weights_path


# --- arithmetic ----------------------------------------------------------------------------------


class Arithmetic(StrEnum):
    """The arithmetic of a graph, by its lowest precision."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"


def arithmetic_of(model: ModelProto) -> Arithmetic:
    """Return the arithmetic of all weights and operators; input and output may still be float32."""
    if any("Quantize" in node.op_type or "QLinear" in node.op_type for node in walk_nodes(model.graph)):
        return Arithmetic.INT8
    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    if any(tensor.data_type in halves for tensor in walk_tensors(model)):
        return Arithmetic.FLOAT16
    return Arithmetic.FLOAT32


# --- execution in ONNX Runtime -------------------------------------------------------------------


class ReferenceModel:
    """A graph in plain ONNX Runtime, one image at a time; the reference for verifying an import."""

    def __init__(
        self,
        model: ModelProto,
        *,
        threads: int,
        batch_size: int = 1,
        extra_outputs: Sequence[str] = (),
        weights: LargeWeights = NO_WEIGHTS,
    ) -> None:
        """Load the graph.

        `batch_size` is the only batch size that the graph accepts, if it is fixed. `extra_outputs` names
        tensors to return besides the outputs. `weights` are those that `model` lacks. Raises `ImportRefused`
        if ONNX Runtime cannot load the graph.
        """
        self._model, self._threads, self._batch_size, self.weights = model, threads, batch_size, weights
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # errors are raised as exceptions
        extra = ModelProto()
        output_names = {output.name for output in model.graph.output}
        extra.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in extra_outputs if name not in output_names
        )
        content = model.SerializeToString()
        if extra.graph.output:
            content += extra.SerializeToString()
        weights.add_to(options, model)
        try:
            self._session: Any = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a dozen classes without a common base class
            raise ImportRefused(f"ONNX Runtime cannot load the model: {to_one_line(error)}") from None
        if weights.arrays:
            trim_heap()  # ONNX Runtime copies the weights while it loads
        self.output_names: list[str] = [output.name for output in self._session.get_outputs()]
        self._input_name: str = self._session.get_inputs()[0].name

    def close(self) -> None:
        """Free the session and the weights, after the last run."""
        self._session = None
        self.weights.clear()
        trim_heap()

    def with_outputs(self, *names: str) -> ReferenceModel:
        """Return the same graph with additional tensors among its outputs."""
        return ReferenceModel(
            self._model,
            threads=self._threads,
            batch_size=self._batch_size,
            extra_outputs=names,
            weights=self.weights,
        )

    def __call__(self, images: Array) -> dict[str, Array]:
        """Return each output for images (n, …), run one at a time, with the image axis in front.

        The whole output of a run belongs to its one image, whatever its shape; nothing is sliced off. A graph
        with a fixed batch size gets the same image in all places. Its outputs are those of one image if all
        places agree. Outputs whose shape differs between images are left out. Raises `ImportRefused` if the
        graph does not run.
        """
        runs = [self.run_batch(np.repeat(image[None], self._batch_size, axis=0)) for image in images]
        shapes = {name: {run[name].shape for run in runs} for name in self.output_names}
        return {
            name: np.stack([self._select_image(run[name]) for run in runs])
            for name in self.output_names
            if len(shapes[name]) == 1
        }

    def _select_image(self, output: Array) -> Array:
        """Return the part of an output that belongs to one of `batch` equal images."""
        if output.shape[:1] != (self._batch_size,):
            return output
        are_equal = self._batch_size == 1 or (
            output.dtype.kind == "f" and np.allclose(output, output[:1], 1e-3, 1e-6)
        )
        return output[0] if are_equal else output

    def run_batch(self, batch: Array) -> dict[str, Array]:
        """Return each output for a batch that is run as given."""
        try:
            outputs = self._session.run(self.output_names, {self._input_name: batch})
            return {
                name: np.atleast_1d(value) for name, value in zip(self.output_names, outputs, strict=True)
            }
        except Exception as error:  # as above, and outputs that are not tensors
            raise ImportRefused(f"the graph does not run on an image: {to_one_line(error)}") from None
