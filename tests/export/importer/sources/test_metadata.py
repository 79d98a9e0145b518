"""Exports of Ultralytics and Azure Custom Vision, whose ONNX files describe themselves."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fovea.export.importer.preprocessing import PreprocessingOptions
from fovea.service.artifact.contract import Task
from fovea.service.artifact.geometry import CropStep, Fit, Interpolation, ResizeStep
from tests.export.classifiers import build_classifier, run_onnx
from tests.export.importer.sources.imports import import_source, read_refusal
from tests.export.importer.sources.layouts import LABELS, write_files
from tests.export.importer.test_output_choice import build_zip_map

ULTRALYTICS = {
    "description": "Ultralytics YOLO11n-cls model trained on imagenet",
    "author": "Ultralytics",
    "license": "AGPL-3.0 License (https://ultralytics.com/license)",
    "version": "8.3.40",
    "task": "classify",
    "batch": "1",
    "imgsz": "[16, 16]",
    "names": repr(dict(enumerate(LABELS))),
}
CUSTOM_VISION = {
    "CustomVision.Metadata.Version": "1.2",
    "CustomVision.Postprocess.Method": "ClassificationMultiClass",
    "Image.BitmapPixelFormat": "Bgr8",
    "Image.NominalPixelRange": "NominalRange_0_255",
}


def build_described(metadata: dict[str, str], **options: Any) -> onnx.ModelProto:
    """Return a graph with metadata."""
    graph = build_classifier(**{"end": "softmax", "batch": 1, **options})
    onnx.helper.set_model_props(graph, metadata)
    return graph


def test_ultralytics_export_needs_no_options(tmp_path: Path) -> None:
    folder = write_files(tmp_path, {"yolo11n-cls.onnx": build_described(ULTRALYTICS)})
    report, engine = import_source(tmp_path, folder / "yolo11n-cls.onnx")
    contract = engine.contract
    assert (report.model, contract.labels, contract.task) == ("yolo11n-cls", LABELS, Task.MULTICLASS)
    assert contract.input.steps == (
        ResizeStep(Fit.COVER, 16, 16, Interpolation.BILINEAR),
        CropStep(16, 16),
    )
    facts = dict(report.facts)
    assert facts["licence"] == "agpl-3.0"
    assert facts["labels"].endswith("(names in the metadata)")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    values = (pixels.transpose(0, 3, 1, 2) / 255).astype(np.float32)
    assert np.abs(engine.run(pixels) - run_onnx(build_described(ULTRALYTICS), values)).max() < 1e-5
    card = (tmp_path / "zoo" / "yolo11n-cls" / "1" / "README.md").read_text()
    assert card.startswith("---\nlicense: agpl-3.0\n")
    assert "must offer their source code" in card


def test_oblong_ultralytics_export_stretches_images(tmp_path: Path) -> None:
    graph = build_described({**ULTRALYTICS, "imgsz": "[16, 32]"})
    graph.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 32
    folder = write_files(tmp_path, {"wide-cls.onnx": graph})
    _, engine = import_source(tmp_path, folder / "wide-cls.onnx")
    assert engine.contract.input.steps == (ResizeStep(Fit.STRETCH, 16, 32, Interpolation.BILINEAR),)


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb"])
def test_other_tasks_of_ultralytics_are_refused(tmp_path: Path, task: str) -> None:
    write_files(tmp_path, {"yolo11n.onnx": build_described({**ULTRALYTICS, "task": task})})
    message = read_refusal(tmp_path, tmp_path / "yolo11n.onnx")
    assert f"(task '{task}' in its metadata); Fovea serves classifiers" in message


def test_broken_names_of_ultralytics_are_asked_for(tmp_path: Path) -> None:
    graph = build_described({**ULTRALYTICS, "names": "{0: 'a', 2: __import__('os').getcwd()}"})
    write_files(tmp_path, {"yolo-cls.onnx": graph})
    message = read_refusal(tmp_path, tmp_path / "yolo-cls.onnx")
    assert "`fovea import` needs --labels" in message
    assert "names in the metadata do not map the numbers from 0 on to labels" in message


def write_custom_vision_export(folder: Path, graph: onnx.ModelProto | None = None) -> Path:
    """Write an export as Azure Custom Vision does."""
    return write_files(
        folder,
        {
            "model.onnx": graph or build_described(CUSTOM_VISION),
            "labels.txt": "\n".join(LABELS),
            "cvexport.manifest": {"DomainType": "Classification", "Flavor": "ONNX12"},
            "python/onnxruntime_predict.py": "print('not needed')",
        },
    )


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_custom_vision_export_needs_no_options(tmp_path: Path, form: str) -> None:
    source = write_custom_vision_export(tmp_path / "pets")
    if form == "zip":
        source = tmp_path / "pets.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for file in (tmp_path / "pets").rglob("*.*"):
                archive.write(file, Path("export") / file.relative_to(tmp_path / "pets"))
    report, engine = import_source(tmp_path, source)
    assert (report.model, engine.contract.labels) == ("pets", LABELS)
    assert engine.contract.input.steps == (ResizeStep(Fit.STRETCH, 16, 16, Interpolation.BICUBIC),)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    values = pixels[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32)
    assert np.abs(engine.run(pixels) - run_onnx(build_described({}), values)).max() < 1e-5


def test_normalised_range_of_custom_vision_is_read(tmp_path: Path) -> None:
    metadata = {"Image.NominalPixelRange": "Normalized_0_1", "Image.BitmapPixelFormat": "Rgb8"}
    folder = write_custom_vision_export(tmp_path / "pets", build_described({**CUSTOM_VISION, **metadata}))
    report, _ = import_source(tmp_path, folder)
    assert dict(report.facts)["normalise"].startswith("RGB, (pixels / 255 - (0, 0, 0)) / (1, 1, 1)")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("Image.NominalPixelRange", "Normalized_1_1", "is 'Normalized_1_1'; Fovea knows NominalRange_0_255"),
        ("Image.NominalPixelRange", "NominalRange_16_235", "is 'NominalRange_16_235'; Fovea knows"),
        ("Image.NominalPixelRange", None, "the metadata does not state Image.NominalPixelRange"),
        ("Image.BitmapPixelFormat", "Gray8", "in the metadata is 'Gray8'; Fovea knows Rgb8 and Bgr8"),
        ("Image.BitmapPixelFormat", None, "the metadata does not state Image.BitmapPixelFormat"),
    ],
)
def test_pixels_that_the_metadata_leaves_open_are_asked_for(
    tmp_path: Path, key: str, value: str | None, problem: str
) -> None:
    metadata = {**CUSTOM_VISION, key: value}
    graph = build_described({name: one for name, one in metadata.items() if one is not None})
    message = read_refusal(tmp_path, write_custom_vision_export(tmp_path / "pets", graph))
    assert "the file does not say how to normalise pixels" in message
    assert problem in message


def test_metadata_of_other_tools_states_only_the_pixels(tmp_path: Path) -> None:
    metadata = {"Image.NominalPixelRange": "Normalized_0_1", "Image.BitmapPixelFormat": "Bgr8"}
    folder = write_files(
        tmp_path / "pets", {"model.onnx": build_described(metadata), "labels.txt": "\n".join(LABELS)}
    )
    assert "the file does not say how to resize images" in read_refusal(tmp_path, folder)
    geometry = PreprocessingOptions(stretch=True, interpolation=Interpolation.BILINEAR)
    report, _ = import_source(tmp_path, folder, preprocessing=geometry)
    assert dict(report.facts)["normalise"].endswith("(metadata of the file)")
    assert "custom" not in (tmp_path / "zoo" / "pets" / "1" / "README.md").read_text().casefold()


@pytest.mark.parametrize("is_numbered", [False, True])
def test_labels_of_the_graph_come_before_a_file_in_another_order(tmp_path: Path, is_numbered: bool) -> None:
    """Numbers of outputs are no labels."""
    graph = build_zip_map([0, 1, 2, 3, 4] if is_numbered else list(LABELS))
    onnx.helper.set_model_props(graph, CUSTOM_VISION)
    folder = write_custom_vision_export(tmp_path / "pets", graph)
    (folder / "labels.txt").write_text("\n".join(LABELS[::-1]))
    report, engine = import_source(tmp_path, folder)
    assert engine.contract.labels == (LABELS[::-1] if is_numbered else LABELS)
    origin = "(labels.txt)" if is_numbered else "; the graph's own"
    assert dict(report.facts)["labels"].endswith(origin)


def test_detector_of_custom_vision_is_refused(tmp_path: Path) -> None:
    folder = write_custom_vision_export(
        tmp_path / "pets", build_described({**CUSTOM_VISION, "CustomVision.Postprocess.Method": "Yolo"})
    )
    assert "is an object detector (Yolo in its metadata)" in read_refusal(tmp_path, folder)


def test_damaged_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pets.zip").write_bytes(b"PK\x03\x04" + b"\0" * 50)
    assert "is a damaged ZIP archive" in read_refusal(tmp_path, tmp_path / "pets.zip")


def test_archive_with_several_onnx_files_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        archive.writestr("a.onnx", b"x")
        archive.writestr("b.onnx", b"x")
    message = read_refusal(tmp_path, tmp_path / "pets.zip")
    assert message.startswith(f"{tmp_path / 'pets.zip'} has 2 ONNX files: a.onnx (0.0 MB), b.onnx")


def test_archive_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        archive.writestr("../../evil.onnx", b"x")
        archive.writestr("model.onnx", build_described(ULTRALYTICS).SerializeToString())
        archive.writestr("/labels.txt", "\n".join(LABELS))
    import_source(tmp_path, tmp_path / "pets.zip", "model.onnx")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["pets.zip", "zoo"]
