"""A BentoML service (https://docs.bentoml.com).

BentoML's batches join lists that clients send, and each client here sends one image: there are no batches.
BENCH_WORKERS is the number of its processes.
"""
# BentoML reads the annotations of the API, which must not be strings: no `annotations` import here.

import os
from typing import Any

import bentoml
from PIL.Image import Image

from fovea.bench.servers.plain import PlainClassifier


@bentoml.service(workers=int(os.environ["BENCH_WORKERS"]))
class ClassifyService:
    """A service from a picture to labels."""

    def __init__(self) -> None:
        self.classifier = PlainClassifier()

    @bentoml.api
    def classify(self, image: Image, /) -> dict[str, Any]:
        """Return the five most probable labels."""
        return self.classifier.classify_picture(image)
