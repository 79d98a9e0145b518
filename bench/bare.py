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

Classify: TypeAlias = Callable[[bytes], npt.NDArray[np.float32]]
"""Function from an encoded image to its logits, float32 (n,)."""

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
"""ImageNet's standard deviation per channel, on a scale of 0 to 1, as in every tutorial."""


def pipeline(image: bytes, size: int, resize_to: int) -> npt.NDArray[np.float32]:
    """Convert an encoded image to normalised float32 (1, 3, size, size), step by step as in tutorials."""
    opened = Image.open(BytesIO(image)).convert("RGB")
    shorter = min(opened.size)
    width, height = (resize_to * side // shorter for side in opened.size)
    resized = opened.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    cropped = resized.crop((left, top, left + size, top + size))
    pixels = np.asarray(cropped, np.float32) / np.float32(255)
    normalised: npt.NDArray[np.float32] = ((pixels - MEAN) / STD).transpose(2, 0, 1)[None]
    return normalised


def session(model: Path, threads: int = 0) -> Any:
    """Return an ONNX Runtime session; with 0 threads, ONNX Runtime chooses the number."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def by_hand(model: Path, size: int, resize_to: int, threads: int) -> Classify:
    """Return a classifier from Pillow, NumPy and the plain graph."""
    opened = session(model, threads)

    def classify(image: bytes) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = opened.run(None, {"pixels": pipeline(image, size, resize_to)})[0][0]
        return logits

    return classify


def by_us(model: Path, threads: int) -> Classify:
    """Return a classifier from Fovea's decoding and model file, without the service."""
    opened = session(model, threads)
    contract = Contract.from_metadata(opened.get_modelmeta().custom_metadata_map)

    def classify(image: bytes) -> npt.NDArray[np.float32]:
        pixels = decode_image(image, contract.input, max_pixels=1 << 26).pixels
        logits: npt.NDArray[np.float32] = opened.run([contract.logits_name], {"pixels": pixels[None]})[0][0]
        return logits

    return classify


def sizes(geometry: Geometry) -> tuple[int, int]:
    """Return the arguments of `pipeline` for a geometry: the side of the crop and of the resize."""
    return geometry.height, geometry.resize_to


def main() -> None:
    """Run the loop once per input line, until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["by_hand", "by_us"])
    parser.add_argument("model", type=Path)
    parser.add_argument("list", type=Path, help="file that names the images, a line each")
    parser.add_argument("--size", type=int)
    parser.add_argument("--resize-to", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--first", type=int, default=0, help="which image to begin with")
    given = parser.parse_args()
    images = [Path(line).read_bytes() for line in given.list.read_text().splitlines()]
    classify = (
        by_hand(given.model, given.size, given.resize_to, given.threads)
        if given.kind == "by_hand"
        else by_us(given.model, given.threads)
    )
    endless = islice(cycle(images), given.first, None)
    for line in sys.stdin:
        print(json.dumps(_work(classify, endless, float(line))), flush=True)


def _work(classify: Classify, images: Any, seconds: float) -> dict[str, Any]:
    started = now = time.monotonic()
    latencies = []
    while now < started + seconds:
        classify(next(images))
        latencies.append(time.monotonic() - now)
        now += latencies[-1]
    return {"seconds": now - started, "latencies": latencies}


if __name__ == "__main__":
    main()
