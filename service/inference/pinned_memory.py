"""Page-locked memory for batches on their way to a GPU, and model calls that read from it.

A GPU reads page-locked memory directly. A batch in ordinary memory is first copied into page-locked memory by
the driver. Everything here also runs with ordinary memory on a CPU, where tests compare the answers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime


def find_pinned_memory() -> Any:
    """Return ONNX Runtime's description of the first GPU's page-locked memory; None if there is none."""
    kind = onnxruntime.OrtDeviceMemoryType.HOST_ACCESSIBLE
    devices = [
        one
        for one in onnxruntime.get_ep_devices()
        if one.device.type == onnxruntime.OrtHardwareDeviceType.GPU
    ]
    return next((info for one in devices if (info := one.memory_info(kind))), None)


def pad_size(count: int) -> int:
    """Return the number of images in the batch for `count` images: the next power of two.

    cuDNN tunes itself again, and TensorRT may compile again, for each batch size that it has not seen.
    """
    return 1 << (count - 1).bit_length()


class PinnedBatches(threading.local):
    """Buffers for the batches of one thread: one for each shape and type of an image.

    A buffer grows to the largest batch and is then kept.
    """

    def __init__(self, memory_info: Any) -> None:
        """Use the memory that `memory_info` describes; None for ordinary memory."""
        self._memory_info = memory_info
        self._buffers: dict[tuple[tuple[int, ...], np.dtype[Any]], tuple[Any, npt.NDArray[Any]]] = {}

    def allocate(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array (n, ...) for a batch. The next call with images of this shape reuses its memory."""
        count, *image_shape = shape
        return self._get_buffer(count, tuple(image_shape), np.dtype(dtype))[:count]

    def pad_batch(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return a batch (n, ...) with its number of images padded to `pad_size`, in a buffer.

        The batch is copied unless it comes from `allocate`. The added images are those of an earlier batch.
        """
        size = pad_size(len(batch))
        buffer = self._get_buffer(size, batch.shape[1:], batch.dtype)[:size]
        if batch.ctypes.data != buffer.ctypes.data:
            buffer[: len(batch)] = batch
        return buffer

    def _get_buffer(self, count: int, image_shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return the buffer for such images with room for at least `count` of them."""
        key = (image_shape, dtype)
        if key not in self._buffers or len(self._buffers[key][1]) < count:
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                [pad_size(count), *image_shape], dtype, memory_info=self._memory_info
            )
            values: npt.NDArray[Any] = value.numpy()  # a view of the same memory
            values[...] = 0
            self._buffers[key] = (value, values)  # the memory belongs to `value`
        return self._buffers[key][1]


def run_bound(
    session: Any, names: Sequence[str], input_name: str, batch: npt.NDArray[Any]
) -> list[npt.NDArray[Any]]:
    """Return the named outputs for a batch, which is copied to the device once, without a copy before."""
    binding = session.io_binding()
    binding.bind_cpu_input(input_name, batch)
    for name in names:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    outputs: list[npt.NDArray[Any]] = binding.copy_outputs_to_cpu()
    return outputs
