"""Facts in the metadata of an ONNX file, as Ultralytics, Azure Custom Vision and WinML write them."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import ModelProto

from fovea.export.importer.file_format import describe_other_format
from fovea.export.importer.foreign_model import MAX_BYTES, ImportRefused
from fovea.export.importer.preprocessing import Normalization
from fovea.export.importer.sources.facts import SourceFacts, Stated, StatedGeometry
from fovea.export.importer.sources.model_config import write_labels
from fovea.service.artifact.contract import Task
from fovea.service.artifact.geometry import CropStep, Fit, Interpolation, ResizeStep, Step

_MAX_TEXT: Final = 4 << 20
"""Maximum length of one value, in characters. The names of 21,841 labels have 1 MB."""

_ULTRALYTICS_TASKS: Final = {
    "detect": "an object detector",
    "segment": "a segmentation model",
    "semantic": "a segmentation model",
    "pose": "a detector of poses",
    "obb": "a detector of rotated boxes",
}
_PIXEL_FORMAT: Final = "Image.BitmapPixelFormat"
_PIXEL_RANGE: Final = "Image.NominalPixelRange"
_CUSTOM_VISION_PREFIX: Final = "CustomVision."

_SCALES: Final = {"NominalRange_0_255": 1.0, "Normalized_0_1": 1 / 255}
"""Factor on pixels by `Image.NominalPixelRange`."""

_PIXEL_FORMATS: Final = ("Rgb8", "Bgr8")
"""Values of `Image.BitmapPixelFormat` that Fovea can make."""


def add_metadata_facts(file: Path, origin: str, facts: SourceFacts, work: Path) -> SourceFacts:
    """Return the facts with those in the metadata of the file, which come before those beside the file.

    Raises `ImportRefused` if the metadata says that the model is no classifier. A file that cannot be read
    changes nothing: the import explains it.
    """
    try:
        if not file.is_file() or file.stat().st_size > MAX_BYTES or describe_other_format(file):
            return facts
        model = onnx.load_model(file, load_external_data=False)
    except Exception:  # protobuf's own exceptions, and OSError
        return facts
    values = {one.key: one.value for one in model.metadata_props if len(one.value) <= _MAX_TEXT}
    if "Ultralytics" in values.get("author", "") or {"names", "imgsz", "task"} <= values.keys():
        return _add_ultralytics_facts(values, model, origin, facts, work)
    if any(key.startswith(_CUSTOM_VISION_PREFIX) for key in values):
        return _add_custom_vision_facts(values, model, origin, facts)
    if _PIXEL_FORMAT in values or _PIXEL_RANGE in values:  # as tools for WinML write them
        return _add_pixel_facts(values, "metadata of the file", facts)
    return facts


def _add_ultralytics_facts(
    values: Mapping[str, str], model: ModelProto, origin: str, facts: SourceFacts, work: Path
) -> SourceFacts:
    """Return the facts of an export by Ultralytics, whose recipe is that of `classify_transforms`."""
    task = values.get("task", "classify")
    if task != "classify":
        kind = _ULTRALYTICS_TASKS.get(task, "a model for another task")
        raise ImportRefused(
            f"{origin} is {kind} (task {task!r} in its metadata); Fovea serves classifiers, such as "
            "yolo11n-cls.pt"
        )
    names = _parse_literal(values.get("names"))
    labels = facts.labels
    problems = facts.problems
    if isinstance(names, dict) and list(names) == list(range(len(names))) and len(names) > 1:
        write_labels(tuple(map(str, names.values())), work / "labels.json")
        labels = Stated(work / "labels.json", "names in the metadata")
    else:
        problems = (*problems, "names in the metadata do not map the numbers from 0 on to labels")
    size = _find_graph_size(model) or _to_size(_parse_literal(values.get("imgsz")))
    geometry = facts.geometry
    if size:
        height, width = size
        steps: tuple[Step, ...] = (ResizeStep(Fit.STRETCH, height, width, Interpolation.BILINEAR),)
        if height == width:
            steps = (
                ResizeStep(Fit.COVER, height, width, Interpolation.BILINEAR),
                CropStep(height, width),
            )
        geometry = Stated(
            StatedGeometry(height, width, steps), "classify_transforms of Ultralytics, imgsz in the metadata"
        )
    licence = values.get("license", "")
    return replace(
        facts,
        labels=labels,
        normalization=Stated(
            Normalization(1 / 255, (0.0,) * 3, (1.0,) * 3), "classify_transforms of Ultralytics"
        ),
        geometry=geometry,
        task=Stated(Task.MULTICLASS, "task in the metadata"),
        licence="agpl-3.0" if "AGPL-3.0" in licence else licence or facts.licence,
        library="ultralytics",
        problems=problems,
    )


def _add_custom_vision_facts(
    values: Mapping[str, str], model: ModelProto, origin: str, facts: SourceFacts
) -> SourceFacts:
    """Return the facts of an export by Azure Custom Vision.

    The recipe is that of `onnxruntime_predict.py` in the export: Pillow's `resize` to the input's size, whose
    filter is bicubic, then the order and range of the pixels that the metadata states.
    """
    method = values.get("CustomVision.Postprocess.Method", "")
    if "Yolo" in method or "Detection" in method:
        raise ImportRefused(f"{origin} is an object detector ({method} in its metadata); export a classifier")
    size = _find_graph_size(model)
    stretch = ResizeStep(Fit.STRETCH, *size, Interpolation.BICUBIC) if size else None
    task = {"ClassificationMultiClass": Task.MULTICLASS, "ClassificationMultiLabel": Task.MULTILABEL}.get(
        method
    )
    origin_text = "metadata of Azure Custom Vision"
    return replace(
        _add_pixel_facts(values, origin_text, facts),
        geometry=Stated(StatedGeometry(*size, (stretch,)), origin_text)
        if size and stretch
        else facts.geometry,
        task=Stated(task, origin_text) if task else facts.task,
        library="custom-vision",
    )


def _add_pixel_facts(values: Mapping[str, str], origin: str, facts: SourceFacts) -> SourceFacts:
    """Return the facts with the normalisation that range and order of the pixels state.

    A range or an order that Fovea does not know is a problem.
    """
    problems = [
        f"{key} in the metadata is {values[key]!r}; Fovea knows {' and '.join(known)}"
        if key in values
        else f"the metadata does not state {key}"
        for key, known in ((_PIXEL_RANGE, tuple(_SCALES)), (_PIXEL_FORMAT, _PIXEL_FORMATS))
        if values.get(key) not in known
    ]
    if problems:
        return replace(facts, problems=(*facts.problems, *problems))
    normalization = Normalization(
        _SCALES[values[_PIXEL_RANGE]], (0.0,) * 3, (1.0,) * 3, bgr=values[_PIXEL_FORMAT] == "Bgr8"
    )
    return replace(facts, normalization=Stated(normalization, origin))


def _parse_literal(text: str | None) -> Any:
    """Return the value of a Python literal, or None if it is none."""
    try:
        return ast.literal_eval(text or "None")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _to_size(value: Any) -> tuple[int, int] | None:
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(type(one) is int and one > 0 for one in value)
    ):
        return value[0], value[1]
    return (value, value) if type(value) is int and value > 0 else None


def _find_graph_size(model: ModelProto) -> tuple[int, int] | None:
    """Return height and width of the input (n, 3, H, W); None if they are not fixed."""
    weights = {one.name for one in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in weights]
    sides = [side.dim_value for side in inputs[0].type.tensor_type.shape.dim] if inputs else []
    return (sides[2], sides[3]) if len(sides) == 4 and sides[1] == 3 and min(sides[2:]) > 0 else None
