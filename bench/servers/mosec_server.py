"""A mosec server (https://mosecorg.github.io/mosec/) whose workers decode and run the model.

The pipeline of mosec's documentation, with a process for each step, was slower at every load on two cores.
BENCH_WORKERS, BENCH_BATCH and BENCH_WAIT_MS configure it.
"""

from __future__ import annotations

import os
from typing import Any

from mosec import Server, Worker

from fovea.bench.servers.plain import PlainClassifier


class ClassifyWorker(Worker):
    """A worker from encoded images to labels."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = PlainClassifier()
        self.has_batches = os.environ["BENCH_BATCH"] != "1"

    def deserialize(self, data: bytes) -> bytes:
        """Return the body, which is the image."""
        return data

    def forward(self, data: Any) -> Any:
        """Classify one image, or a list of images if mosec forms batches."""
        return self.classifier.classify(data) if self.has_batches else self.classifier.classify([data])[0]


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        ClassifyWorker,
        num=int(os.environ["BENCH_WORKERS"]),
        max_batch_size=int(os.environ["BENCH_BATCH"]),
        max_wait_time=int(os.environ["BENCH_WAIT_MS"]),  # 0 means the command's --wait, which is 0 too
    )
    server.run()
