"""TFLite files and exports of Teachable Machine, converted by tf2onnx."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import shutil
import zipfile
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.preprocessing import KERAS_MOBILENET, PreprocessingOptions
from fovea.export.importer.sources.tflite_child import (
    Quantization,
    take_float_input,
    take_output_before_rounding,
)
from fovea.export.importer.sources.tflite_metadata import read_tflite_metadata
from fovea.export.importer.sources.tflite_source import read_numbered_labels
from fovea.service.artifact.geometry import Geometry, PixelPath
from fovea.service.artifact.geometry_text import format_steps, parse_steps
from fovea.service.inference.resize import apply_geometry
from tests.export.classifiers import run_onnx
from tests.export.importer.sources.imports import import_source, read_refusal
from tests.export.importer.sources.layouts import LABELS
from tests.tools import SYSTEM_REASON

FILES = Path(__file__).parent / "tflite_files"
HAS_CONVERTER = all(importlib.util.find_spec(one) for one in ("tf2onnx", "tensorflow"))

needs_converter = pytest.mark.skipif(
    not HAS_CONVERTER,
    reason=f"{SYSTEM_REASON}has no tf2onnx and TensorFlow: pip install 'fovea-serve[tflite]'",
)


def write_labels_file(tmp_path: Path) -> Path:
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    return tmp_path / "labels.txt"


@pytest.mark.long
@needs_converter
@pytest.mark.parametrize(("name", "limit"), [("float", 1e-4), ("int8", 0.1), ("uint8", 0.1)])
def test_file_is_converted_and_compared_with_its_interpreter(tmp_path: Path, name: str, limit: float) -> None:
    preprocessing = (
        PreprocessingOptions(geometry=parse_steps("resize stretch 16 bilinear"))
        if name == "uint8"
        else PreprocessingOptions(preset=KERAS_MOBILENET)
    )
    report, engine = import_source(
        tmp_path,
        f"tflite:{FILES / name}.tflite",
        labels=write_labels_file(tmp_path),
        preprocessing=preprocessing,
    )
    assert (report.model, engine.contract.labels) == (name, LABELS)
    assert report.sha256 == hashlib.sha256((FILES / f"{name}.tflite").read_bytes()).hexdigest()
    assert report.comparison is not None
    assert report.comparison.probability_tolerance == limit
    assert report.comparison.same_labels == report.comparison.images == 32
    assert dict(report.facts)["compared"].startswith("with the file in LiteRT on 32 generated images")


@pytest.mark.long
@needs_converter
@pytest.mark.parametrize("is_archive", [False, True])
def test_export_of_teachable_machine_needs_no_options(tmp_path: Path, is_archive: bool) -> None:
    folder = write_teachable_export(tmp_path / "pets")
    source = folder
    if is_archive:
        source = Path(shutil.make_archive(str(tmp_path / "pets"), "zip", folder))
    report, engine = import_source(tmp_path, source)
    assert (report.model, engine.contract.labels) == ("pets", LABELS)
    assert (
        format_steps(engine.contract.input.steps)
        == "crop aspect 224 x 224 unrounded, resize stretch 224 x 224 lanczos"
    )
    assert report.comparison is not None
    assert report.comparison.pixel_difference < 1e-2
    assert report.comparison.probability_difference < 1e-4
    assert "with ImageOps.fit and the file in LiteRT on 32" in dict(report.facts)["compared"]


@pytest.mark.long
@needs_converter
def test_quantised_export_of_teachable_machine_takes_pixels(tmp_path: Path) -> None:
    """Its "Quantized" model takes uint8, and its example program leaves the pixels as they are."""
    folder = write_teachable_export(tmp_path / "pets", "teachable-uint8")
    (folder / "model_unquant.tflite").rename(folder / "model.tflite")
    report, engine = import_source(tmp_path, folder)
    assert engine.contract.labels == LABELS
    facts = dict(report.facts)
    assert facts["arithmetic"] == "int8"
    assert facts["normalise"].startswith("uint8, RGB, unchanged")
    assert report.comparison is not None
    assert report.comparison.pixel_difference < 1e-2
    assert report.comparison.probability_difference < 0.1
    assert report.comparison.same_labels >= 31


@pytest.mark.long
@needs_converter
def test_folder_with_one_file_is_converted(tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    folder.mkdir()
    shutil.copy(FILES / "float.tflite", folder / "anything.tflite")
    (folder / "README.md").write_text("pets")
    report, _ = import_source(
        tmp_path,
        folder,
        labels=write_labels_file(tmp_path),
        preprocessing=PreprocessingOptions(preset=KERAS_MOBILENET),
    )
    assert (report.model, report.file) == ("pets", "anything.tflite")


def test_folder_with_several_files_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    folder.mkdir()
    for name in ("one.tflite", "two.tflite"):
        shutil.copy(FILES / "float.tflite", folder / name)
    message = read_refusal(tmp_path, folder)
    assert message.endswith("pets has several TFLite files: import one of one.tflite, two.tflite itself")


@pytest.mark.long
@needs_converter
def test_geometry_of_tensorflow_is_that_of_the_steps(tmp_path: Path) -> None:
    """`central_crop` and `image.resize`, which rounds to levels here; Fovea's weights have 11 bits."""
    import tensorflow as tf

    random = np.random.default_rng(0)
    for height, width, fraction in ((240, 321, 0.875), (97, 64, 0.5), (333, 500, 1 / 3)):
        coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), np.uint8))
        image = coarse.resize((width, height), Image.Resampling.BICUBIC)
        cropped = tf.image.central_crop(np.asarray(image), fraction)
        expected = tf.image.resize(cropped, (48, 56)).numpy()
        steps = parse_steps(f"crop fraction {fraction!r}, resize stretch 48 x 56 bilinear no-antialias")
        geometry = Geometry(48, 56, steps, PixelPath.EXACT)
        pixels = apply_geometry(image, geometry, image.size, (0, 0, *image.size), None)
        assert np.abs(pixels - expected).max() < 0.75


@pytest.mark.long
@needs_converter
def test_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pets.tflite").write_bytes((FILES / "float.tflite").read_bytes()[:900])
    message = read_refusal(tmp_path, tmp_path / "pets.tflite")
    assert "pets.tflite" in message
    assert "\n" not in message


@pytest.mark.skipif(HAS_CONVERTER, reason=f"{SYSTEM_REASON}has tf2onnx and TensorFlow")
def test_missing_converter_is_named(tmp_path: Path) -> None:
    message = read_refusal(tmp_path, FILES / "float.tflite")
    assert message.endswith("pip install 'fovea-serve[tflite]'")


# --- Teachable Machine ---------------------------------------------------------------------------


def write_teachable_export(folder: Path, name: str = "teachable") -> Path:
    folder.mkdir()
    shutil.copy(FILES / f"{name}.tflite", folder / "model_unquant.tflite")
    (folder / "labels.txt").write_text("".join(f"{index} {label}\n" for index, label in enumerate(LABELS)))
    return folder


@pytest.mark.parametrize("is_archive", [False, True])
def test_keras_model_of_teachable_machine_is_refused(tmp_path: Path, is_archive: bool) -> None:
    folder = tmp_path / "pets"
    folder.mkdir()
    (folder / "keras_model.h5").write_bytes(b"\x89HDF")
    (folder / "labels.txt").write_text("0 cat\n1 dog\n")
    source = Path(shutil.make_archive(str(folder), "zip", folder)) if is_archive else folder
    message = read_refusal(tmp_path, source)
    assert "choose Export Model, TensorFlow Lite, Floating point" in message


def test_other_archive_with_tflite_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        archive.writestr("other.tflite", b"x")
        archive.writestr("labels.txt", "0 cat\n1 dog\n")
    assert "import the .tflite file itself" in read_refusal(tmp_path, tmp_path / "pets.zip")


def test_numbered_labels(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("0 Class 1\n1 2 dogs \n\n", encoding="utf-8-sig")
    assert read_numbered_labels(file) == ("Class 1", "2 dogs")
    file.write_text("0 cat\n2 dog\n")
    with pytest.raises(ImportRefused, match=r"line 2 of labels.txt is '2 dog'; .* writes '1 LABEL'"):
        read_numbered_labels(file)


# --- metadata ------------------------------------------------------------------------------------


def build_table(builder: flatbuffers.Builder, fields: dict[int, Any], count: int) -> int:
    """Write a table of offsets, and of bytes given as ("byte", value)."""
    builder.StartObject(count)
    for field, value in fields.items():
        if isinstance(value, tuple):
            (builder.PrependUint8Slot if value[0] == "byte" else builder.PrependUint32Slot)(
                field, value[1], 0
            )
        else:
            builder.PrependUOffsetTRelativeSlot(field, value, 0)
    return int(builder.EndObject())


def build_list(builder: flatbuffers.Builder, offsets: list[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for one in reversed(offsets):
        builder.PrependUOffsetTRelative(one)
    return int(builder.EndVector())


def build_floats(builder: flatbuffers.Builder, values: list[float]) -> int:
    builder.StartVector(4, len(values), 4)
    for one in reversed(values):
        builder.PrependFloat32(one)
    return int(builder.EndVector())


def build_metadata(mean: list[float], std: list[float], files: list[str]) -> bytes:
    """Return `ModelMetadata` of one input with a normalisation, and one output with files of labels."""
    builder = flatbuffers.Builder()
    options = build_table(builder, {0: build_floats(builder, mean), 1: build_floats(builder, std)}, 2)
    unit = build_table(builder, {0: ("byte", 1), 1: options}, 2)
    tensor = build_table(builder, {4: build_list(builder, [unit])}, 7)
    names = [builder.CreateString(one) for one in files]
    associated = [build_table(builder, {0: one, 2: ("byte", 2)}, 4) for one in names]
    output = build_table(builder, {6: build_list(builder, associated)}, 7)
    inputs, outputs = build_list(builder, [tensor]), build_list(builder, [output])
    subgraph = build_table(builder, {2: inputs, 3: outputs}, 8)
    builder.Finish(build_table(builder, {3: build_list(builder, [subgraph])}, 8))
    return bytes(builder.Output())


def build_file(metadata: bytes, labels: dict[str, str]) -> bytes:
    """Return a TFLite file with metadata and without a network."""
    builder = flatbuffers.Builder()
    buffer = build_table(builder, {0: builder.CreateByteVector(metadata)}, 3)
    empty = build_table(builder, {}, 3)
    entry = build_table(builder, {0: builder.CreateString("TFLITE_METADATA"), 1: ("number", 1)}, 2)
    buffers, entries = build_list(builder, [empty, buffer]), build_list(builder, [entry])
    builder.Finish(build_table(builder, {4: buffers, 6: entries}, 8), b"TFL3")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, text in labels.items():
            file.writestr(name, text)
    return bytes(builder.Output()) + archive.getvalue()


def test_labels_and_normalization_are_read(tmp_path: Path) -> None:
    metadata = build_metadata([127.5], [127.5], ["names.txt"])
    (tmp_path / "pets.tflite").write_bytes(build_file(metadata, {"names.txt": "cat\ndog\n"}))
    facts = read_tflite_metadata(tmp_path / "pets.tflite")
    assert (facts.labels, facts.labels_file, facts.problems) == ("cat\ndog\n", "names.txt", ())
    assert facts.normalization is not None
    assert np.allclose(facts.normalization(np.array([[[[0, 255, 51]]]], np.uint8)), [[[[-1, 1, -0.6]]]])


@pytest.mark.parametrize(
    ("std", "files", "problem"),
    [
        ([0.0], ["names.txt"], "states no mean and std"),
        ([1.0, 1.0], ["names.txt"], "states no mean and std"),
        ([127.5], [], "names no files of labels"),
        ([127.5], ["names.txt", "names-de.txt"], "names 2 files of labels"),
        ([127.5], ["missing.txt"], "names 'missing.txt', which cannot be read"),
    ],
)
def test_metadata_that_cannot_be_used_is_a_problem(
    tmp_path: Path, std: list[float], files: list[str], problem: str
) -> None:
    metadata = build_metadata([127.5], std, files)
    (tmp_path / "pets.tflite").write_bytes(build_file(metadata, {"names.txt": "cat\ndog\n"}))
    facts = read_tflite_metadata(tmp_path / "pets.tflite")
    assert problem in " ".join(facts.problems)


@pytest.mark.parametrize(
    ("mean", "names", "is_damaged"),
    [
        ([127.5] * 3, ["names.txt"], False),
        ([127.5] * 4, ["names.txt"], True),  # of three channels at most
        ([127.5], [f"{number}.txt" for number in range(10_000)], False),
        ([127.5], [f"{number}.txt" for number in range(10_001)], True),
    ],
    ids=["three means", "four means", "10,000 files", "10,001 files"],
)
def test_lists_of_metadata_are_limited(
    tmp_path: Path, mean: list[float], names: list[str], is_damaged: bool
) -> None:
    """A list of a billion items, of which each points to the same place, would fit into a small file."""
    metadata = build_metadata(mean, [127.5] * len(mean), names)
    (tmp_path / "pets.tflite").write_bytes(build_file(metadata, {"names.txt": "cat\ndog\n"}))
    facts = read_tflite_metadata(tmp_path / "pets.tflite")
    assert ("the metadata of the file is damaged" in facts.problems) == is_damaged
    assert (facts.normalization is None) == is_damaged


def test_labels_of_metadata_are_limited(tmp_path: Path) -> None:
    metadata = build_metadata([127.5], [127.5], ["names.txt"])
    archive = (
        build_file(metadata, {"names.txt": "x" * (4 << 20)}),
        build_file(metadata, {"names.txt": "x" * ((4 << 20) + 1)}),
    )
    (tmp_path / "pets.tflite").write_bytes(archive[0])
    assert read_tflite_metadata(tmp_path / "pets.tflite").labels == "x" * (4 << 20)
    (tmp_path / "pets.tflite").write_bytes(archive[1])
    facts = read_tflite_metadata(tmp_path / "pets.tflite")
    assert facts.labels is None
    assert "which cannot be read" in facts.problems[0]


def test_damaged_metadata_is_a_problem(tmp_path: Path) -> None:
    """Bytes that are cut off or changed lead to no other exception."""
    content = build_file(build_metadata([127.5], [127.5], ["names.txt"]), {"names.txt": "cat\ndog\n"})
    random = np.random.default_rng(0)
    damages = 0
    for _ in range(500):
        damaged = bytearray(content[: random.integers(8, len(content)) if random.random() < 0.5 else None])
        for place in random.integers(0, len(damaged), 3):
            damaged[place] = random.integers(0, 256)
        (tmp_path / "pets.tflite").write_bytes(damaged)
        damages += bool(read_tflite_metadata(tmp_path / "pets.tflite").problems)
    assert damages > 100


def test_file_without_metadata(tmp_path: Path) -> None:
    assert read_tflite_metadata(FILES / "float.tflite").labels is None


# --- whole numbers at both ends ------------------------------------------------------------------


def test_int8_graph_takes_and_gives_values() -> None:
    scale, zero_point = 1 / 127.5, -1
    constants = [
        numpy_helper.from_array(np.array(scale, np.float32), "scale"),
        numpy_helper.from_array(np.array(zero_point, np.int8), "zero_point"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["image", "scale", "zero_point"], ["values"]),
        helper.make_node("Softmax", ["values"], ["softmax"]),
        helper.make_node("QuantizeLinear", ["softmax", "scale", "zero_point"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["rounded", "scale", "zero_point"], ["again"]),
        helper.make_node("QuantizeLinear", ["again", "scale", "zero_point"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "int8",
        [helper.make_tensor_value_info("image", TensorProto.INT8, [1, 3])],
        [helper.make_tensor_value_info("scores", TensorProto.INT8, [1, 3])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    take_output_before_rounding(model, "scores")
    take_float_input(model, Quantization(scale, zero_point))
    onnx.checker.check_model(model)
    values = np.array([[-1.0, 0.0, 0.5]], np.float32)
    numbers = Quantization(scale, zero_point).quantize(values)
    expected = np.exp((numbers.astype(np.float32) - zero_point) * scale)
    assert np.abs(run_onnx(model, values) - expected / expected.sum()).max() < 1e-6
    assert [one.name for one in model.graph.output] == ["softmax"]
