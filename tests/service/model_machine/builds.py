"""The model files of the state machine: every file has labels and answers of its own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import helper, numpy_helper
from PIL import Image

from fovea.service.artifact.repository import MODEL_FILE, next_version
from fovea.service.inference.engine import Engine
from fovea.service.inference.preprocess import decode_image
from fovea.service.rollout.publish import publish_model
from tests.graphs import SMALL_GEOMETRY, build_model, read_contract, with_contract
from tests.pictures import encode_image

PICTURE: Final = encode_image(Image.new("RGB", (24, 24), (6, 3, 1)), "PNG")
"""A dark picture: random weights give no certain answer to it, so that every file gives another answer."""

_PIXELS: Final = decode_image(PICTURE, SMALL_GEOMETRY, max_pixels=10_000).pixels

BALLAST_BYTES: Final = 6 << 20
"""Memory that every model takes in a runner, in bytes.

It is more than `MALLOC_MMAP_THRESHOLD_` of a runner, so that unloading a model returns it to the system.
"""

TOLERANCE: Final = 1e-4
"""Largest difference of a probability between this process and the service."""


class FileKind(StrEnum):
    """A kind of model file."""

    GOOD = "good"
    BROKEN = "broken"
    """Not an ONNX file: refused for as long as it stays."""
    UNPROVEN = "unproven"
    """Fails its golden set: refused, and tried again later."""


@dataclass(eq=False)
class Build:
    """A published model file."""

    name: str
    version: str
    kind: FileKind
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """Answer to `PICTURE`: the probability of each label. No other file has these labels."""
    published_at: float = float("inf")
    removed_at: float = float("inf")

    @property
    def is_good(self) -> bool:
        """Return whether the file can be served."""
        return self.kind is FileKind.GOOD

    def __str__(self) -> str:
        return f"{self.name}/{self.version} ({self.kind})"

    def is_present(self, start: float, end: float) -> bool:
        """Return whether the file is in the repository at all times of the period."""
        return self.published_at <= start and end <= self.removed_at

    def may_be_present(self, start: float, end: float) -> bool:
        """Return whether the file is in the repository at any time of the period."""
        return self.published_at <= end and start <= self.removed_at


class ModelFiles:
    """A repository on disk, and every file that it ever had."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "zoo"
        self.root.mkdir(parents=True)
        self.builds: list[Build] = []
        self._staging = folder / "staging"
        self._staging.mkdir()
        self._trash_count = 0

    def prepare(self, name: str, kind: FileKind, version: str = "") -> Build:
        """Write a version of a model, by default the next one, which `publish` makes visible."""
        number = len(self.builds)
        version = version or next_version(self.root / name)
        file = self._staging / MODEL_FILE
        if kind is FileKind.BROKEN:
            file.write_bytes(b"no model at all")
            return Build(name, version, kind)
        labels = [f"{name} {version}, file {number}: {letter}" for letter in "abcd"]
        model = _add_ballast(build_model(labels=labels, seed=number))
        if kind is FileKind.UNPROVEN:
            other_contract = read_contract(build_model(labels=labels, seed=number + 10_000))
            model = with_contract(model, replace(read_contract(model), golden=other_contract.golden))
        onnx.save(model, file)
        probabilities = Engine.load(file, provider="cpu", threads=1).run(_PIXELS[None])[0]
        return Build(name, version, kind, dict(zip(labels, map(float, probabilities), strict=True)))

    def publish(self, build: Build) -> None:
        """Make a prepared file visible under its version."""
        self.builds.append(build)
        build.published_at = time.monotonic()
        file = self._staging / MODEL_FILE
        if build.is_good:
            assert publish_model(file, self.root, build.name).parent.name == build.version
        else:  # `publish_model` would refuse it
            hidden_folder = self.root / build.name / ".copying"
            hidden_folder.mkdir(parents=True)
            file.rename(hidden_folder / MODEL_FILE)
            hidden_folder.rename(self.root / build.name / build.version)

    def replace(self, old_build: Build, build: Build) -> None:
        """Put a prepared file in the place of another one."""
        self.builds.append(build)
        build.published_at = old_build.removed_at = time.monotonic()
        (self._staging / MODEL_FILE).replace(self.root / build.name / build.version / MODEL_FILE)

    def remove_version(self, build: Build) -> None:
        """Remove a version."""
        build.removed_at = time.monotonic()  # before the removal: from now on the file may be missing
        self._remove_folder(self.root / build.name / build.version)

    def remove_model(self, name: str) -> None:
        """Remove a model with all versions."""
        for build in self.list_present(name):
            build.removed_at = time.monotonic()
        self._remove_folder(self.root / name)

    def list_present(self, name: str) -> list[Build]:
        """Return the files of a model that are in the repository now, the latest last."""
        builds = [one for one in self.builds if one.name == name and one.removed_at == float("inf")]
        return sorted(builds, key=lambda one: int(one.version))

    def has_folder(self, name: str) -> bool:
        """Return whether the repository has a folder of this model."""
        return (self.root / name).is_dir()

    def find_build(self, name: str, labels: Mapping[str, float]) -> Build | None:
        """Return the file of a model with these labels."""
        return next(
            (one for one in self.builds if one.name == name and set(one.probabilities) == set(labels)), None
        )

    def _remove_folder(self, folder: Path) -> None:
        """Remove a folder at once, so that no scan sees half of it."""
        self._trash_count += 1
        trash = self.root.with_name(f"trash-{self._trash_count}")
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)  # the service may just write a verdict into it


def _add_ballast(model: onnx.ModelProto) -> onnx.ModelProto:
    """Add a large tensor of zeros. The graph reads one of them, by the number of images."""
    graph = model.graph
    index = next(place for place, node in enumerate(graph.node) if "scale" in node.input)
    graph.node[index].input[1] = "scaling"
    for node in (
        helper.make_node("Add", ["scale", "nothing"], ["scaling"]),
        helper.make_node("Gather", ["ballast", "images"], ["nothing"]),
        helper.make_node("Gather", ["sizes", "first"], ["images"]),
        helper.make_node("Shape", ["pixels"], ["sizes"]),
    ):
        graph.node.insert(index, node)
    for name, values in (
        ("ballast", np.zeros(BALLAST_BYTES // 4, np.float32)),
        ("first", np.array(0, np.int64)),
    ):
        graph.initializer.append(numpy_helper.from_array(values, name))
    return model
