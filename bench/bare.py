"""The bare in-process loop: handwritten code around ONNX Runtime, without a server.

The loop runs in its own process. The process reads a number of seconds per line and answers each line with a
line of JSON: the number of images and the time of each image.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from fovea.service.artifact.contract import Contract, Geometry
from fovea.service.inference.preprocess import decode_image

ImageClassifier: TypeAlias = Callable[[bytes], npt.NDArray[np.float32]]
"""Function from an encoded image to its logits, float32 (n,)."""

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
"""ImageNet's standard deviation per channel, on a scale of 0 to 1, as in every tutorial."""


def preprocess_image(image: bytes, size: int, resize_to: int) -> npt.NDArray[np.float32]:
    """Convert an encoded image to normalised float32 (1, 3, size, size), step by step as in tutorials."""
    picture = Image.open(BytesIO(image)).convert("RGB")
    shorter = min(picture.size)
    width, height = (resize_to * side // shorter for side in picture.size)
    resized_picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    cropped_picture = resized_picture.crop((left, top, left + size, top + size))
    pixels = np.asarray(cropped_picture, np.float32) / np.float32(255)
    normalised_pixels: npt.NDArray[np.float32] = ((pixels - MEAN) / STD).transpose(2, 0, 1)[None]
    return normalised_pixels


def open_session(model: Path, threads: int = 0) -> Any:
    """Return an ONNX Runtime session; with 0 threads, ONNX Runtime chooses the number."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def make_plain_classifier(model: Path, size: int, resize_to: int, threads: int) -> ImageClassifier:
    """Return a classifier from Pillow, NumPy and the plain graph."""
    session = open_session(model, threads)

    def classify(image: bytes) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = session.run(
            None, {"pixels": preprocess_image(image, size, resize_to)}
        )[0][0]
        return logits

    return classify


def make_fovea_classifier(model: Path, threads: int) -> ImageClassifier:
    """Return a classifier from Fovea's decoding and model file, without the service."""
    session = open_session(model, threads)
    contract = Contract.from_metadata(session.get_modelmeta().custom_metadata_map)

    def classify(image: bytes) -> npt.NDArray[np.float32]:
        pixels = decode_image(image, contract.input, max_pixels=1 << 26).pixels
        logits: npt.NDArray[np.float32] = session.run([contract.logits_name], {"pixels": pixels[None]})[0][0]
        return logits

    return classify


def preprocessing_sizes(geometry: Geometry) -> tuple[int, int]:
    """Return the arguments of `preprocess_image` for a geometry: the side of the crop and of the resize."""
    return geometry.height, geometry.resize_to


def main() -> None:
    """Run the loop once per input line, until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["plain", "fovea"])
    parser.add_argument("model", type=Path)
    parser.add_argument("list", type=Path, help="file that lists the images, one per line")
    parser.add_argument("--size", type=int)
    parser.add_argument("--resize-to", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--first", type=int, default=0, help="index of the first image")
    options = parser.parse_args()
    images = [Path(line).read_bytes() for line in options.list.read_text().splitlines()]
    classify = (
        make_plain_classifier(options.model, options.size, options.resize_to, options.threads)
        if options.kind == "plain"
        else make_fovea_classifier(options.model, options.threads)
    )
    image_cycle = islice(cycle(images), options.first, None)
    for line in sys.stdin:
        print(json.dumps(_run_loop(classify, image_cycle, float(line))), flush=True)


def _run_loop(classify: ImageClassifier, images: Any, seconds: float) -> dict[str, Any]:
    started_at = now = time.monotonic()
    latencies = []
    while now < started_at + seconds:
        classify(next(images))
        latencies.append(time.monotonic() - now)
        now += latencies[-1]
    return {"seconds": now - started_at, "latencies": latencies}


if __name__ == "__main__":
    main()
