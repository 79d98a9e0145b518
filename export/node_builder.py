"""New nodes and their constants for a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]


class NodeBuilder:
    """A sequence of new nodes and their constants, all with names that begin with `prefix`."""

    def __init__(self, prefix: str = "fovea/") -> None:
        self._prefix = prefix
        self.constants: list[TensorProto] = []
        self._nodes: list[NodeProto] = []
        self._node_count = 0

    def pop_nodes(self) -> list[NodeProto]:
        """Return the nodes so far and start a new sequence."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def add(
        self, op_type: str, *inputs: str | Array, output_name: str | None = None, **attributes: Any
    ) -> str:
        """Add a node with these tensors and constants as inputs; return the name of its output."""
        self._node_count += 1
        name = f"{self._prefix}{op_type.lower()}_{self._node_count}"
        tensors = [self._add_constant(name, one) if isinstance(one, np.ndarray) else one for one in inputs]
        self._nodes.append(helper.make_node(op_type, tensors, [output_name or name], name, **attributes))
        return output_name or name

    def _add_constant(self, name: str, value: Array) -> str:
        constant_name = f"{name}/{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, constant_name))
        return constant_name
