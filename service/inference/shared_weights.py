"""Weights of a model that all sessions of all processes on this machine share.

ONNX Runtime keeps a copy of the weights in each session. Here the first process optimizes the graph and
writes it into a memory file: all weights, the optimized graph without them, and the size of the graph. The
file is then sealed: no process can change it any more. Every session, in any process, opens the optimized
graph with the weights where they lie.

Until the file is sealed, processes must trust each other. At the start of the service the first runner
writes, when no runner has read an image. Later a process that reads no images writes
(`service.rollout.trial.ShadowTests.write_weights`), and runners get sealed files only.

The results are the same bit for bit, and so is the speed, as the weights keep the alignment that ONNX Runtime
gives them.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
import struct
from typing import Any, Final

import numpy as np
import onnxruntime

from fovea.service.artifact.model_file import WEIGHTS_SEALS, MemoryFile
from fovea.service.artifact.onnx_edit import list_external_weights
from fovea.service.inference.session import SharedWeights, open_session

_MIN_WEIGHT_BYTES: Final = "1024"
"""Size from which a weight is shared, in bytes. Smaller weights stay in the graph, of which each session has
a copy."""

_GRAPH_SIZE: Final = struct.Struct("<Q")
"""Size of the optimized graph in bytes, at the end of the file; the graph lies before it."""

_DTYPES: Final[dict[int, Any]] = {
    1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 10: np.float16, 11: np.float64,
}  # fmt: skip
"""NumPy types by the type number of a tensor (onnx.proto, `TensorProto.DataType`)."""


def share_weights(model: bytes, file: MemoryFile) -> SharedWeights | None:
    """Return the weights of a model from a memory file, and write them if no other process has.

    `file` is a memory file that allows seals, empty or from an earlier call for the same model. The call
    waits while another process writes.

    Return None, and leave the file empty, for a model whose weights cannot be shared: NumPy lacks the type of
    a weight, a weight is inside of If, Loop or Scan, or ONNX Runtime cannot load the model. In the last case,
    loading the model in the usual way finds the reason.

    Raises `OSError` when the file cannot be opened, because its model has been unloaded.
    """
    descriptor = file.open()
    try:
        # The system releases the lock when this process dies while it writes.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE:
            try:
                _write_optimized(model, descriptor)
                open_session(b"", "cpu", 1, weights=_map_weights(descriptor))
            except (OSError, MemoryError):  # it may succeed another time
                os.ftruncate(descriptor, 0)
                return None
            except Exception:  # ONNX Runtime raises a dozen classes without a common base
                os.ftruncate(descriptor, 0)  # no session can use the file
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, WEIGHTS_SEALS)
        # Not by `close`: the mapping below keeps the file open.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return _map_weights(descriptor) if os.fstat(descriptor).st_size else None
    finally:
        os.close(descriptor)


def _write_optimized(model: bytes, descriptor: int) -> None:
    """Write the weights of the optimized graph, then the graph and its size, into an open file."""
    graph_descriptor = os.memfd_create("graph")
    with contextlib.closing(os.fdopen(graph_descriptor, "rb")) as graph_file:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4  # FATAL: the caller handles errors
        # Both files lie in the folder of this process's open files.
        options.optimized_model_filepath = f"/proc/self/fd/{graph_descriptor}"
        for name, value in (
            ("optimized_model_external_initializers_file_name", str(descriptor)),
            ("optimized_model_external_initializers_min_size_in_bytes", _MIN_WEIGHT_BYTES),
            ("model_external_initializers_file_folder_path", "/dev/null/no external data"),
        ):
            options.add_session_config_entry(f"session.{name}", value)
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        graph = graph_file.read()
    os.lseek(descriptor, 0, os.SEEK_END)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(graph)
        file.write(_GRAPH_SIZE.pack(len(graph)))


def _map_weights(descriptor: int) -> SharedWeights:
    """Return the graph and the weights in a file.

    Raises `KeyError` if NumPy has no type for one of the weights.
    """
    content = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    graph_end = len(content) - _GRAPH_SIZE.size
    (graph_size,) = _GRAPH_SIZE.unpack_from(content, graph_end)
    graph = content[graph_end - graph_size : graph_end]
    weights = list_external_weights(graph)
    values = [
        onnxruntime.OrtValue.ortvalue_from_numpy(
            np.frombuffer(
                content, _DTYPES[one.type_number], count=math.prod(one.shape), offset=one.offset
            ).reshape(one.shape)
        )
        for one in weights
    ]
    return SharedWeights(graph, [one.name for one in weights], values)
