"""Conversion of a TFLite file to ONNX by tf2onnx, and answers of TFLite's own interpreter.

Runs as a process of its own: `python -m fovea.export.importer.sources.tflite_child`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fovea.export.importer.foreign_model import Array, ImportRefused
from fovea.export.importer.sources.answers import write_outputs
from fovea.export.importer.sources.child import run_child

_OPSET: Final = 17
"""Operator set version of the converted file."""

_INT8: Final = 9
"""Type of a tensor of int8 in TFLite's schema."""


def convert(action: str, file: str, *arguments: str) -> None:
    """Run `convert FILE OUT` or `answer FILE INPUTS RESULT`."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # read when TensorFlow is imported
    warnings.simplefilter("ignore")
    if action == "convert":
        convert_file(Path(file), Path(*arguments))
    else:
        answer_inputs(file, *arguments)


def convert_file(file: Path, out: Path) -> None:
    """Convert a classifier of float32, int8 or uint8. Raises `ImportRefused`."""
    import tensorflow  # noqa: F401 - tf2onnx needs it for TFLite too, and says nothing of use without it
    import tf2onnx

    quantization = read_input_quantization(file)
    try:
        tf2onnx.convert.from_tflite(str(file), opset=_OPSET, output_path=str(out))
    except Exception as error:  # tf2onnx raises anything
        message = " ".join(str(error).split())[:300]
        raise ImportRefused(f"tf2onnx {tf2onnx.__version__} cannot convert {file.name}: {message}") from None
    model = onnx.load(out)
    for output in model.graph.output:
        if output.type.tensor_type.elem_type in (TensorProto.INT8, TensorProto.UINT8):
            take_output_before_rounding(model, output.name)
    if quantization:
        take_float_input(model, quantization)
    out.write_bytes(model.SerializeToString())


class Quantization(NamedTuple):
    """The meaning of whole numbers: (number - zero_point) * scale."""

    scale: float
    zero_point: int

    def quantize(self, values: Array) -> Array:
        """Return int8 for values, rounded and clipped as ONNX's `QuantizeLinear`."""
        rounded = np.rint(values / np.float32(self.scale)) + self.zero_point
        quantized: Array = np.clip(rounded, -128, 127).astype(np.int8)
        return quantized


def read_input_quantization(file: Path) -> Quantization | None:
    """Return the quantisation of an input of int8; None for other types.

    Pixels of uint8 are what such graphs take; int8 needs values. Raises `ImportRefused`.
    """
    from tf2onnx.tflite.Model import Model

    try:
        subgraph = Model.GetRootAsModel(file.read_bytes(), 0).Subgraphs(0)
        tensor = subgraph.Tensors(subgraph.Inputs(0))
        if tensor.Type() != _INT8:
            return None
        return Quantization(float(tensor.Quantization().Scale(0)), int(tensor.Quantization().ZeroPoint(0)))
    except Exception as error:  # of FlatBuffers, for damaged files
        raise ImportRefused(f"{file.name} is damaged: {error}; copy or download it again") from None


def take_output_before_rounding(model: ModelProto, name: str) -> None:
    """Let the graph give the values before their rounding to whole numbers, if the file ends in it.

    Probabilities of whole levels do not sum to 1.
    """
    makers = {one: node for node in model.graph.node for one in node.output}
    tensor = name
    while (node := makers.get(tensor)) is not None and _is_rounding(node, makers):
        tensor = node.input[0]
    if tensor == name:
        return
    output = next(one for one in model.graph.output if one.name == name)
    output.name = tensor
    output.type.tensor_type.elem_type = TensorProto.FLOAT
    kept = [one for one in model.graph.value_info if one.name != tensor]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    _remove_unused_nodes(model)


def _is_rounding(node: NodeProto, makers: dict[str, NodeProto]) -> bool:
    """Return whether a node rounds to whole numbers, or reads those that were just rounded."""
    if node.op_type == "QuantizeLinear":
        return True
    maker = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    return maker is not None and maker.op_type == "QuantizeLinear" and maker.output[0] == node.input[0]


def _remove_unused_nodes(model: ModelProto) -> None:
    needed = {one.name for one in model.graph.output}
    nodes = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))


def take_float_input(model: ModelProto, quantization: Quantization) -> None:
    """Let the graph take float32, and quantise them as its users do by hand."""
    value = model.graph.input[0]
    name = value.name
    rounded = f"{name}_int8"
    for node in model.graph.node:
        for index, one in enumerate(node.input):
            if one == name:
                node.input[index] = rounded
    value.type.tensor_type.elem_type = TensorProto.FLOAT
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(quantization.scale, np.float32), f"{name}_scale"),
            numpy_helper.from_array(np.array(quantization.zero_point, np.int8), f"{name}_zero_point"),
        ]
    )
    inputs = [name, f"{name}_scale", f"{name}_zero_point"]
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", inputs, [rounded]))


# --- the file's own interpreter ------------------------------------------------------------------


def answer_inputs(file: str, inputs_file: str, result: str) -> None:
    """Write the outputs of TFLite's interpreter for inputs (n, H, W, channels)."""
    interpreter, name = open_interpreter(file)
    interpreter.allocate_tensors()
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    if len(inputs) != 1 or len(outputs) != 1:
        raise ImportRefused(f"{Path(file).name} has {len(inputs)} inputs and {len(outputs)} outputs")
    scale, zero_point = inputs[0]["quantization"]

    def run(one: Array) -> Array:
        values = Quantization(scale, zero_point).quantize(one) if inputs[0]["dtype"] is np.int8 else one
        interpreter.set_tensor(inputs[0]["index"], values)
        interpreter.invoke()
        scores: Array = interpreter.get_tensor(outputs[0]["index"])
        output_scale, output_zero_point = outputs[0]["quantization"]
        if scores.dtype in (np.int8, np.uint8):
            scores = (scores.astype(np.float32) - output_zero_point) * np.float32(output_scale)
        return scores

    write_outputs(inputs_file, result, name, run)


def open_interpreter(file: str) -> tuple[Any, str]:
    """Return TFLite's interpreter, and its name for people. Raises `ModuleNotFoundError`."""
    create: Callable[..., Any]
    try:
        from ai_edge_litert.interpreter import Interpreter

        create, name = Interpreter, "the file in LiteRT"
    except ImportError:
        import tensorflow

        create, name = tensorflow.lite.Interpreter, f"the file in TensorFlow Lite {tensorflow.__version__}"
    return create(model_path=file, num_threads=1), name


if __name__ == "__main__":
    run_child(convert)
