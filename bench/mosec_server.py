"""A mosec server (https://mosecorg.github.io/mosec/), configured for two cores as in its documentation.

The variables BENCH_MODEL, BENCH_SIZE and BENCH_RESIZE_TO name the plain model and its geometry in pixels.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from mosec import Server, Worker

from fovea.bench.bare import open_session, preprocess_image


class ClassifyWorker(Worker):
    """A worker from an encoded image to labels."""

    def __init__(self) -> None:
        super().__init__()
        self.session = open_session(Path(os.environ["BENCH_MODEL"]), threads=1)
        self.sizes = int(os.environ["BENCH_SIZE"]), int(os.environ["BENCH_RESIZE_TO"])

    def deserialize(self, data: bytes) -> bytes:
        """Return the body, which is the image."""
        return data

    def forward(self, data: bytes) -> Any:
        """Classify one image; mosec's dynamic batching is off."""
        return build_response(self.session.run(None, {"pixels": preprocess_image(data, *self.sizes)})[0][0])


def build_response(logits: Any) -> Any:
    """Return the five most probable labels."""
    exponents = np.exp(logits - logits.max())
    probabilities = exponents / exponents.sum()
    return {
        "predictions": [
            {"label": f"label {index}", "index": int(index), "probability": float(probabilities[index])}
            for index in np.argsort(-probabilities)[:5]
        ]
    }


if __name__ == "__main__":
    server = Server()
    server.append_worker(ClassifyWorker, num=len(os.sched_getaffinity(0)))
    server.run()
