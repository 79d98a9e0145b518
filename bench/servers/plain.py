"""Classification as handwritten services do it: Pillow, NumPy and a plain graph in ONNX Runtime.

The compared servers import this module, so all of them do the same work for an image. The variables
BENCH_MODEL, BENCH_SIZE, BENCH_RESIZE_TO and BENCH_THREADS name the graph, its geometry in pixels, and the
threads of ONNX Runtime (0: its own choice).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
"""ImageNet's standard deviation per channel, on a scale of 0 to 1, as in every tutorial."""


def open_session(model: Path, threads: int = 0) -> Any:
    """Return an ONNX Runtime session; with 0 threads, ONNX Runtime chooses the number."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def preprocess_image(image: bytes, size: int, resize_to: int) -> npt.NDArray[np.float32]:
    """Convert an encoded image to normalised float32 (1, 3, size, size), step by step as in tutorials."""
    return preprocess_picture(Image.open(BytesIO(image)), size, resize_to)


def preprocess_picture(picture: Image.Image, size: int, resize_to: int) -> npt.NDArray[np.float32]:
    """Convert a picture to normalised float32 (1, 3, size, size)."""
    picture = picture.convert("RGB")
    shorter = min(picture.size)
    width, height = (resize_to * side // shorter for side in picture.size)
    resized_picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    cropped_picture = resized_picture.crop((left, top, left + size, top + size))
    pixels = np.asarray(cropped_picture, np.float32) / np.float32(255)
    normalised_pixels: npt.NDArray[np.float32] = ((pixels - MEAN) / STD).transpose(2, 0, 1)[None]
    return normalised_pixels


class PlainClassifier:
    """A plain graph with its geometry, as the environment names them."""

    def __init__(self) -> None:
        self._session = open_session(Path(os.environ["BENCH_MODEL"]), int(os.environ["BENCH_THREADS"]))
        self._sizes = int(os.environ["BENCH_SIZE"]), int(os.environ["BENCH_RESIZE_TO"])

    def classify(self, images: Sequence[bytes]) -> list[dict[str, Any]]:
        """Return the five most probable labels of each encoded image; all images are one batch."""
        return self._run([preprocess_image(image, *self._sizes) for image in images])

    def classify_picture(self, picture: Image.Image) -> dict[str, Any]:
        """Return the five most probable labels of a picture."""
        return self._run([preprocess_picture(picture, *self._sizes)])[0]

    def _run(self, pixels: list[npt.NDArray[np.float32]]) -> list[dict[str, Any]]:
        batch = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)  # (B, 3, size, size)
        return [_build_answer(logits) for logits in self._session.run(None, {"pixels": batch})[0]]


def _build_answer(logits: npt.NDArray[np.float32]) -> dict[str, Any]:
    exponents = np.exp(logits - logits.max())
    probabilities = exponents / exponents.sum()
    return {
        "predictions": [
            {"label": f"label {index}", "index": int(index), "probability": float(probabilities[index])}
            for index in np.argsort(-probabilities)[:5]
        ]
    }
