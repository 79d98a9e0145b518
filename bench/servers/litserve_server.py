"""A LitServe server (https://lightning.ai/docs/litserve).

BENCH_PORT, BENCH_WORKERS, BENCH_BATCH and BENCH_WAIT_MS configure it.
"""
# LitServe reads the annotations of `decode_request`, which must not be strings: no `annotations` import here.

import os
from typing import Annotated, Any

import litserve
from fastapi import Body

from fovea.bench.servers.plain import PlainClassifier


class ClassifyApi(litserve.LitAPI):
    """A LitServe API from encoded images to labels."""

    def setup(self, device: str) -> None:
        """Open the model in a worker."""
        self.classifier = PlainClassifier()

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/jpeg")]) -> bytes:
        """Return the body, which is the image."""
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """Return the images as they are: `predict` makes one array of them."""
        return inputs

    def predict(self, x: Any) -> Any:
        """Classify one image, or a list of images if LitServe forms batches."""
        return self.classifier.classify([x])[0] if self.max_batch_size == 1 else self.classifier.classify(x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the answers, one for each image."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Return the answer, which is JSON already."""
        return output


if __name__ == "__main__":
    server = litserve.LitServer(
        ClassifyApi(
            max_batch_size=int(os.environ["BENCH_BATCH"]),
            batch_timeout=int(os.environ["BENCH_WAIT_MS"]) / 1000,
        ),
        accelerator="cpu",
        workers_per_device=int(os.environ["BENCH_WORKERS"]),
    )
    server.run(
        host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), log_level="error", generate_client_file=False
    )
