"""Imports for the tests: a graph and labels are written to files and imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fovea.export.importer.inspect import ImportRequest
from fovea.export.importer.pipeline import ImportReport, import_model
from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
from fovea.service.artifact.contract import Contract
from fovea.service.inference.engine import Engine
from fovea.service.inference.preprocess import decode_image
from fovea.service.runners.load_messages import ProcessPlan
from tests.export.classifiers import Array

ZOO = "zoo"
PLAN = ProcessPlan("cpu", 4, 1, 0, 1, 10_000_000, 1 << 30, 1)
"""Plan for explanations of imported models."""


@dataclass(frozen=True)
class ImportedModel:
    """An imported model."""

    report: ImportReport
    path: Path
    engine: Engine

    @property
    def contract(self) -> Contract:
        """Contract of the model."""
        return self.engine.contract

    @property
    def facts(self) -> dict[str, str]:
        """Facts of the import report, by name."""
        return dict(self.report.facts)

    def __call__(self, image: bytes) -> Array:
        """Return the probabilities (1, labels) of an encoded image, as the service computes them."""
        return self.engine.run(self.pixels(image)[None])

    def pixels(self, image: bytes) -> Array:
        """Return the pixels of an encoded image, as the service decodes them."""
        return np.array(decode_image(image, self.contract.input, max_pixels=10_000_000).pixels)


def make_labels(count: int) -> list[str]:
    """Return `count` different labels."""
    return [f"label {number}" for number in range(count)]


def import_graph(
    model: onnx.ModelProto | bytes,
    folder: Path,
    labels: int | Sequence[str] | None = 5,
    preprocessing: PreprocessingOptions | None = None,
    **options: Any,
) -> ImportedModel:
    """Import a graph as `thing`, with torchvision's preset unless `preprocessing` is given.

    Without `labels` the graph has labels of its own.
    """
    model_file, label_file = folder / "foreign.onnx", folder / "labels.txt"
    model_file.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    if labels is not None:
        names = make_labels(labels) if isinstance(labels, int) else labels
        label_file.write_text("\n".join(names) + "\n")
    preprocessing = preprocessing or PreprocessingOptions(preset=IMAGENET)
    report = import_model(
        ImportRequest(
            model_file,
            None if labels is None else label_file,
            "thing",
            folder / ZOO,
            preprocessing,
            **options,
        )
    )
    path = folder / ZOO / report.model / report.version / "model.onnx"
    return ImportedModel(report, path, Engine.load(path, provider="cpu", threads=1))


def has_no_output(folder: Path) -> bool:
    """Return whether an import has left no file behind."""
    return not (folder / ZOO).exists()
