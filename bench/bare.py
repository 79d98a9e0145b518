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
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fovea.bench.servers.plain import open_session, preprocess_image
from fovea.service.artifact.contract import Contract, Geometry
from fovea.service.inference.preprocess import decode_image

ImageClassifier: TypeAlias = Callable[[bytes], npt.NDArray[np.float32]]
"""Function from an encoded image to its logits, float32 (n,)."""


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
    return geometry.height, geometry.longest_resize_side


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
