"""TFLite files and exports of Teachable Machine: conversion in a child process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto
from PIL import Image, ImageOps

from fovea.export.importer.foreign_model import Array, ImportRefused
from fovea.export.importer.graph_input import Layout
from fovea.export.importer.preprocessing import Normalization
from fovea.export.importer.sources.answers import create_network
from fovea.export.importer.sources.conversion import run_converter
from fovea.export.importer.sources.facts import (
    ReferenceAnswers,
    ReferenceNetwork,
    ReferencePipeline,
    Source,
    SourceFacts,
    Stated,
    StatedGeometry,
)
from fovea.export.importer.sources.folder import has_safetensors, list_files
from fovea.export.importer.sources.model_config import write_labels
from fovea.export.importer.sources.tflite_metadata import read_tflite_metadata
from fovea.service.artifact.geometry import AspectCropStep, Fit, Interpolation, ResizeStep, Rounding

TFLITE_PREFIX: Final = "tflite:"

TEACHABLE_MODELS: Final = ("model_unquant.tflite", "model.tflite")
"""Names of the models in exports of Teachable Machine; only one of them is there."""

KERAS_MODEL: Final = "keras_model.h5"
LABELS_FILE: Final = "labels.txt"

_CHILD: Final = "fovea.export.importer.sources.tflite_child"
_TEACHABLE: Final = "Teachable Machine"
_SIDE: Final = 224
"""Side of the input of a model of Teachable Machine, in pixels."""


def convert_tflite_file(path: Path, name: str | None, work: Path) -> Source:
    """Return a TFLite file as ONNX, with the facts in its metadata. Raises `ImportRefused`."""
    file = work / "converted.onnx"
    run_converter(_CHILD, ["convert", path, file], what=str(path))
    metadata = read_tflite_metadata(path)
    origin = "metadata of the file"
    labels = None
    if metadata.labels is not None:
        (work / LABELS_FILE).write_text(metadata.labels)
        labels = Stated(work / LABELS_FILE, f"{metadata.labels_file} in the file")
    facts = SourceFacts(
        name,
        labels=labels,
        normalization=Stated(metadata.normalization, origin) if metadata.normalization else None,
        layout=Stated(Layout.NHWC, "TFLite"),
        library="tflite",
        problems=metadata.problems,
    )
    network = create_network(_CHILD, (path,), str(path), work)
    return Source(file, path.name, str(path), facts, work, network=network, original=path)


def find_teachable_model(folder: Path) -> Path | None:
    """Return the TFLite model of an unpacked export of Teachable Machine, or None."""
    if not (folder / LABELS_FILE).is_file():
        return None
    return next((folder / one for one in TEACHABLE_MODELS if (folder / one).is_file()), None)


def find_tflite_model(folder: Path) -> Path | None:
    """Return the TFLite model of a folder without safetensors, or None.

    Raises `ImportRefused` if there are several.
    """
    files = list_files(folder)
    models = sorted(name for name in files if name.endswith(".tflite"))
    if not models or has_safetensors(files):
        return None
    if len(models) > 1:
        raise ImportRefused(
            f"{folder} has several TFLite files: import one of {', '.join(models[:5])} itself"
        )
    return folder / models[0]


def convert_teachable_machine(model: Path, origin: str, name: str | None, work: Path) -> Source:
    """Return an unpacked export of Teachable Machine with the preprocessing of its example program.

    The program crops the centre to a square, resizes it by Lanczos, and gives x / 127.5 - 1 to models of
    float32. Raises `ImportRefused`.
    """
    source = convert_tflite_file(model, name, work)
    value = onnx.load(source.file).graph.input[0].type.tensor_type
    normalization = Normalization(1 / 127.5, (1.0,) * 3, (1.0,) * 3)
    sides = tuple(side.dim_value for side in value.shape.dim)[1:3]
    if sides != (_SIDE, _SIDE):
        raise ImportRefused(
            f"{origin} takes images of {' x '.join(map(str, sides))} pixels; models of {_TEACHABLE} take "
            f"{_SIDE} x {_SIDE}: import {model.name} alone, as tflite:FILE"
        )
    takes_pixels = value.elem_type == TensorProto.UINT8
    steps = (
        AspectCropStep(_SIDE, _SIDE, Rounding.NONE),
        ResizeStep(Fit.STRETCH, _SIDE, _SIDE, Interpolation.LANCZOS),
    )
    write_labels(read_numbered_labels(model.parent / LABELS_FILE), work / "labels.json")
    facts = replace(
        source.facts,
        labels=Stated(work / "labels.json", LABELS_FILE),
        normalization=None if takes_pixels else Stated(normalization, f"example program of {_TEACHABLE}"),
        geometry=Stated(StatedGeometry(_SIDE, _SIDE, steps), f"example program of {_TEACHABLE}"),
        library="teachable-machine",
        problems=(),
    )
    network = source.network
    if network is None:
        raise ImportRefused(f"{origin} has no network")
    reference = _create_pipeline(network, None if takes_pixels else normalization)
    return replace(source, facts=facts, origin=origin, reference=reference, network=None)


def _create_pipeline(network: ReferenceNetwork, normalization: Normalization | None) -> ReferencePipeline:
    """Return the pipeline of Teachable Machine's example program, in Pillow and the file's interpreter."""

    def run(images: Sequence[Path]) -> ReferenceAnswers:
        squares = []
        for path in images:
            with Image.open(path) as image:
                fitted = ImageOps.fit(image.convert("RGB"), (_SIDE, _SIDE), Image.Resampling.LANCZOS)
            squares.append(np.asarray(fitted))
        pixels = np.stack(squares)  # (n, H, W, 3)
        values: Array = pixels if normalization is None else pixels.astype(np.float32) / 127.5 - 1
        answers = network.run(values)
        planes = values.transpose(0, 3, 1, 2).astype(np.float32)
        return ReferenceAnswers(f"ImageOps.fit and {answers.name}", planes, answers.outputs)

    return ReferencePipeline(_TEACHABLE, run, has_network=True)


def read_numbered_labels(path: Path) -> tuple[str, ...]:
    """Return the labels of lines such as `0 Class 1`, in order. Raises `ImportRefused`."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ImportRefused(f"{path.name} is not text in UTF-8; export the model again") from None
    matches = [re.fullmatch(r"(\d+) (.*\S)\s*", line) for line in lines]
    for index, match in enumerate(matches):
        if match is None or int(match[1]) != index:
            raise ImportRefused(
                f"line {index + 1} of {path.name} is {lines[index]!r}; {_TEACHABLE} writes '{index} LABEL'"
            )
    return tuple(match[2] for match in matches if match)


def refuse_keras_export(origin: str) -> None:
    """Raise `ImportRefused` for an export of Teachable Machine with a model of Keras 2."""
    raise ImportRefused(
        f"{origin} is an export of {_TEACHABLE} with a model of Keras 2 ({KERAS_MODEL}), which cannot be "
        "read safely; in Teachable Machine, choose Export Model, TensorFlow Lite, Floating point, and import "
        "that archive"
    )
