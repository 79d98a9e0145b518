"""Models that come into a repository, and what a service says by them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import onnx

from fovea.service.rollout.publish import publish_model
from tests.graphs import build
from tests.pictures import jpeg
from tests.servers import Server

PICTURES = [jpeg(seed=number) for number in range(4)]


def put(zoo: Path, seed: int, name: str = "small", **options: Any) -> str:
    """Publish a model with weights of its own; return its version."""
    made = zoo.parent / f"made-{time.monotonic_ns()}"
    made.mkdir()
    onnx.save(build(seed=seed, **options), made / "model.onnx")
    version = publish_model(made / "model.onnx", zoo, name).parent.name
    shutil.rmtree(made)
    return version


def ask(running: Server, *pictures: bytes, name: str = "small") -> dict[str, Any]:
    files = [("image", picture) for picture in pictures or PICTURES[:1]]
    reply = running.client.post(f"/v1/models/{name}/classify?top_k=0", files=files)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def version_of(running: Server, name: str = "small") -> str:
    return str(ask(running, name=name)["model"]["version"])


def status_of(running: Server, path: str) -> int:
    """Of one picture."""
    return running.client.post(path, content=PICTURES[0]).status_code
