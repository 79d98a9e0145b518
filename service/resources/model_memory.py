"""The memory of a loaded model, and the check that a container has it."""

from __future__ import annotations

from typing import Final

from fovea.service.errors import Interrupted
from fovea.service.resources.cgroup import Cgroup

MODEL_COPIES: Final = 3
"""Memory of a loaded model, as a multiple of its file size.

It holds the weights, ONNX Runtime's prepared weights, and the activations of a batch.
"""


def check_container_memory(model_bytes: int) -> None:
    """Raise `Interrupted` if the container has no memory to load a model of this file size once more.

    Otherwise the kernel would kill a process. Without a limit, or if the use is unknown, nothing is checked.
    """
    cgroup = Cgroup()
    limit, used_bytes = cgroup.memory_limit_bytes(), cgroup.memory_working_set_bytes()
    if limit is None or used_bytes is None:
        return
    needed_bytes, free_bytes = MODEL_COPIES * model_bytes, max(0, limit - used_bytes)
    if needed_bytes > free_bytes:
        raise Interrupted(
            f"loading the model once more takes about {_to_megabytes(needed_bytes)} MB, and of the "
            f"container's {_to_megabytes(limit)} MB only {_to_megabytes(free_bytes)} MB are free"
        )


def _to_megabytes(size: int) -> int:
    return round(size / (1 << 20))
