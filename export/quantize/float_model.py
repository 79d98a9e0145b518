"""The float model from which a quantization starts: a version in a repository, with named nodes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
from onnx import ModelProto, TensorProto

from fovea.export.quantize.refusal import QuantizeRefused
from fovea.service.artifact.contract import METADATA_KEY, Contract
from fovea.service.artifact.repository import MODEL_FILE
from fovea.service.errors import ModelError, to_one_line
from fovea.service.inference.engine import Engine

_INTEGER_OPERATORS: Final = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger",
     "QLinearConv", "QLinearMatMul", "QGemm", "QLinearAdd"}
)  # fmt: skip
"""Operators that only a quantized graph has."""

_MIN_OPSET: Final = 13
"""Lowest opset whose QuantizeLinear has a scale for each channel."""


@dataclass(frozen=True)
class FloatModel:
    """A float model and its contract."""

    path: Path
    """Path of the model file, `…/<name>/<version>/model.onnx`."""
    content: bytes
    graph: ModelProto
    """The graph without its contract; every node has a unique name."""
    contract: Contract
    layer_names: dict[str, str]
    """Names of the contract's layers by node name and by the name of the node's first output."""

    @property
    def name(self) -> str:
        """Name of the model in the repository."""
        return self.folder.name

    @property
    def folder(self) -> Path:
        """Folder of the model in the repository, which holds its versions."""
        return self.path.absolute().parent.parent

    @property
    def version(self) -> str:
        """Version of the model in the repository."""
        return self.path.absolute().parent.name

    @property
    def sha256(self) -> str:
        """Digest of the model file."""
        return hashlib.sha256(self.content).hexdigest()


def load_float_model(path: Path) -> FloatModel:
    """Load a version, given its folder or its model file, and prove it on its golden set.

    Raises `QuantizeRefused` for a model that is not float32, and `ModelError` for a model that this host
    cannot serve.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.is_file():
        versions = [one for one in path.glob(f"*/{MODEL_FILE}") if one.parent.name.isdecimal()]
        example = max((one.parent for one in versions), key=lambda one: int(one.name), default="zoo/pets/1")
        raise QuantizeRefused(
            f"there is no {file}; give the folder of a version in a repository, such as {example}"
        )
    if not file.absolute().parent.name.isdecimal():
        raise QuantizeRefused(
            f"{file} is not a version in a repository, <name>/<number>/{MODEL_FILE}; "
            f"add it to one with `fovea publish {file} --models zoo`"
        )
    engine = Engine.load(file, provider="cpu", threads=1)
    try:
        engine.check_golden_set()
    except ModelError as error:
        raise type(error)(f"{file}: {error}") from None
    content = file.read_bytes()
    graph = onnx.load_from_string(content)
    _require_float32(file, graph, engine.contract)
    _name_nodes(graph)
    names = [layer.name for layer in engine.contract.layers]
    layer_names = {
        key: name
        for node, name in zip(graph.graph.node, names, strict=False)
        for key in (node.name, node.output[0])
    }
    for index in reversed(range(len(graph.metadata_props))):
        if graph.metadata_props[index].key == METADATA_KEY:
            del graph.metadata_props[index]
    return FloatModel(file, content, graph, engine.contract, layer_names)


def modernize_graph(graph: ModelProto) -> ModelProto:
    """Return the graph with an opset that can be quantized, and batch norms folded into convolutions.

    Raises `QuantizeRefused` if a node cannot be converted to the opset.
    """
    opset = next((one.version for one in graph.opset_import if one.domain in ("", "ai.onnx")), 0)
    if opset < _MIN_OPSET:
        try:
            graph = onnx.version_converter.convert_version(graph, _MIN_OPSET)
        except Exception as error:  # the converter raises RuntimeError, and others for operators it lacks
            raise QuantizeRefused(
                f"the graph has opset {opset}, int8 needs {_MIN_OPSET}, and it cannot be converted: "
                f"{to_one_line(error)}; export the model again with opset {_MIN_OPSET} or higher"
            ) from None
        _name_nodes(graph)
    if any(node.op_type == "BatchNormalization" for node in graph.graph.node):
        graph = _fold_batch_norms(graph)
        _name_nodes(graph)
    return graph


def _fold_batch_norms(graph: ModelProto) -> ModelProto:
    from onnxscript import ir
    from onnxscript.rewriter import RewriteRuleSet
    from onnxscript.rewriter.rules.common import (
        fuse_batchnorm_into_conv_rule,
        fuse_batchnorm_into_conv_transpose_rule,
        fuse_batchnorm_into_gemm_rule,
    )

    rules = RewriteRuleSet(
        [
            fuse_batchnorm_into_conv_rule,
            fuse_batchnorm_into_conv_transpose_rule,
            fuse_batchnorm_into_gemm_rule,
        ]
    )
    model = ir.serde.deserialize_model(graph)
    if not rules.apply_to_model(model):
        return graph
    folded_graph: ModelProto = ir.serde.serialize_model(model)
    return folded_graph


def _require_float32(file: Path, graph: ModelProto, contract: Contract) -> None:
    if contract.quantization:
        source = contract.quantization.source_version
        raise QuantizeRefused(
            f"{file} is {contract.quantization.precision} already; quantize version {source}, from which it "
            "was made"
        )
    integer_operators = sorted(
        {node.op_type for node in graph.graph.node if node.op_type in _INTEGER_OPERATORS}
    )
    if integer_operators:
        raise QuantizeRefused(
            f"{file} is int8 already: it has {', '.join(integer_operators)}; import the float model "
            "from which it was made, and quantize that"
        )
    types = {tensor.data_type for tensor in graph.graph.initializer if len(tensor.dims) > 1}
    if TensorProto.FLOAT16 in types or TensorProto.BFLOAT16 in types:
        raise QuantizeRefused(
            f"{file} has 16-bit weights; import the float32 model from which it was made, and quantize that"
        )


def _name_nodes(graph: ModelProto) -> None:
    """Give every node a unique name: the quantizer selects nodes by name."""
    used_names: set[str] = set()
    for number, node in enumerate(graph.graph.node):
        if not node.name or node.name in used_names:
            node.name = _find_free_name(f"{node.op_type}_{number}", used_names)
        used_names.add(node.name)


def _find_free_name(name: str, used_names: Iterable[str]) -> str:
    return next(
        one for one in (name, *(f"{name}_{suffix}" for suffix in range(1 << 16))) if one not in used_names
    )
