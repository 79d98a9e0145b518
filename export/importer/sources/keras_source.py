"""`.keras` files: conversion in a child process."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fovea.export.importer.graph_input import Layout
from fovea.export.importer.sources.answers import create_network
from fovea.export.importer.sources.conversion import run_converter
from fovea.export.importer.sources.facts import Source, SourceFacts, Stated
from fovea.export.importer.sources.keras_resizing import read_resizing

_CHILD: Final = "fovea.export.importer.sources.keras_child"


def convert_keras_file(path: Path, name: str | None, work: Path) -> Source:
    """Return a model of Keras as ONNX.

    The file states no labels, and how images are resized only if it begins with a layer `Resizing`. Raises
    `ImportRefused`.
    """
    file = work / "converted.onnx"
    geometry = read_resizing(path)
    size = [str(geometry.height), str(geometry.width)] if geometry else []
    run_converter(_CHILD, ["convert", path, file, *size], what=str(path))
    facts = SourceFacts(
        name,
        geometry=Stated(geometry, "layer Resizing of the file") if geometry else None,
        layout=Stated(Layout.NHWC, "Keras"),
        library="keras",
    )
    network = create_network(_CHILD, (path,), str(path), work)
    return Source(file, path.name, str(path), facts, work, network=network, original=path)
