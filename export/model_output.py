"""The files of an exported or imported model: the graph with its contract, and the report."""

from __future__ import annotations

from typing import Final

import onnx

from fovea.service.artifact.contract import METADATA_KEY, Contract

REPORT_FILE: Final = "report.json"


def embed_contract(graph: onnx.ModelProto, contract: Contract) -> bytes:
    """Return the file's bytes: graph and contract, without the exporter's notes on the source code."""
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    for part in (model.graph, *model.graph.node, *values, *model.graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA_KEY, value=contract.to_json())
    content: bytes = model.SerializeToString()
    return content
