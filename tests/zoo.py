"""Publish models in a repository, and read the answers of a service."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import onnx

from fovea.service.rollout.publish import publish_model
from tests.graphs import build_model
from tests.pictures import make_jpeg
from tests.servers import Server

PICTURES = [make_jpeg(seed=number) for number in range(4)]


def publish_variant(zoo: Path, seed: int, name: str = "small", **options: Any) -> str:
    """Publish a model with weights from this seed; return its version."""
    folder = zoo.parent / f"made-{time.monotonic_ns()}"
    folder.mkdir()
    onnx.save(build_model(seed=seed, **options), folder / "model.onnx")
    version = publish_model(folder / "model.onnx", zoo, name).parent.name
    shutil.rmtree(folder)
    return version


def classify_pictures(server: Server, *pictures: bytes, name: str = "small") -> dict[str, Any]:
    """Classify the pictures, or the first test picture, and return the JSON of the answer."""
    files = [("image", picture) for picture in pictures or PICTURES[:1]]
    reply = server.client.post(f"/v1/models/{name}/classify?top_k=0", files=files)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def get_served_version(server: Server, name: str = "small") -> str:
    """Return the version of the model that answers."""
    return str(classify_pictures(server, name=name)["model"]["version"])


def get_status(server: Server, path: str) -> int:
    """Return the status of the answer to one picture."""
    return server.client.post(path, content=PICTURES[0]).status_code
