"""Files and folders that are not ONNX: named for what they are, with the way to ONNX."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fovea.export.importer.file_format import describe_other_format
from fovea.export.importer.foreign_model import ImportRefused, read_model
from tests.export.classifiers import build_classifier
from tests.export.importer.sources.imports import read_refusal
from tests.export.importer.test_refused import assert_refused


def write_zip(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return content.getvalue()


def write_safetensors() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


def save_with_torch(*, is_zip: bool) -> bytes:
    content = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, content, _use_new_zipfile_serialization=is_zip)
    return content.getvalue()


def encode_field(number: int, value: bytes | int) -> bytes:
    """Return a field of a protobuf message."""

    def encode_varint(value: int) -> bytes:
        parts = []
        while value > 0x7F:
            parts.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*parts, value])

    if isinstance(value, int):
        return encode_varint(number << 3) + encode_varint(value)
    return encode_varint(number << 3 | 2) + encode_varint(len(value)) + value


CORE_ML = encode_field(1, 5) + encode_field(2, bytes(300)) + encode_field(403, b"network")
SAVED_MODEL = encode_field(1, 1) + encode_field(2, bytes(1000))
FROZEN_GRAPH = encode_field(1, b"node") * 3 + encode_field(4, b"versions")

FORMATS: dict[str, tuple[Callable[[], bytes], str]] = {
    "safetensors": (write_safetensors, "a safetensors file, .* without their network.* import its folder"),
    "TFLite": (lambda: b"\x1c\0\0\0TFL3" + bytes(100), "a TensorFlow Lite model, .*`fovea import FILE`"),
    "ort": (
        lambda: b"\x18\0\0\0ORTM" + bytes(100),
        r"own format \(.ort\), .*the .onnx file it was made from",
    ),
    "pickle": (lambda: pickle.dumps({"weight": [1.0]}), "a Python pickle.* is never loaded"),
    "old torch": (lambda: save_with_torch(is_zip=False), "a Python pickle.*torch.onnx.export"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file, as Keras"),
    "ZIP with ONNX": (lambda: write_zip("model.onnx"), "a ZIP archive, .*import the ONNX file inside"),
    "Teachable Machine": (
        lambda: write_zip("model_unquant.tflite"),
        "with TensorFlow Lite inside .*import the .tflite file",
    ),
    "other ZIP": (lambda: write_zip("photo.jpg"), "a ZIP archive without an ONNX file"),
    "cut ZIP": (lambda: write_zip("model.onnx")[:60], "a ZIP archive that is cut short"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(100), "a gzip archive.*unpack it"),
    "Core ML": (lambda: CORE_ML, "a Core ML model"),
    "SavedModel": (lambda: SAVED_MODEL, "a SavedModel of TensorFlow.*--saved-model"),
    "frozen graph": (lambda: FROZEN_GRAPH, "a frozen graph of TensorFlow.*--graphdef"),
    "LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS.*git lfs pull"),
    "page": (lambda: b"\n<!DOCTYPE html><html>", "a web page.*download the file itself"),
    "OpenVINO": (lambda: b'<?xml version="1.0"?>\n<net name="a" version="11">', "an OpenVINO model"),
    "JSON": (lambda: b'{"model_type": "vit"}', "JSON text.*--labels"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_files_of_other_formats_are_named(tmp_path: Path, name: str) -> None:
    build, message = FORMATS[name]
    assert_refused(tmp_path, rf"foreign\.onnx is .*{message}", build())


ARCHIVES_AND_PICKLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "pickle": (lambda: pickle.dumps({"weight": [1.0]}), "is a pickle, which Fovea never loads"),
    "old torch": (lambda: save_with_torch(is_zip=False), "is a pickle, which Fovea never loads"),
    "torch": (lambda: save_with_torch(is_zip=True), "is a pickle, which Fovea never loads"),
    "ZIP with ONNX": (lambda: write_zip("model.onnx"), "is not an ONNX file, or it is cut short"),
    "cut ZIP": (lambda: write_zip("model.onnx")[:60], "is a damaged ZIP archive"),
}
"""Files that the import recognises before it reads them as ONNX."""


@pytest.mark.parametrize(
    "name", sorted((FORMATS | ARCHIVES_AND_PICKLES).keys() - {"TFLite"})
)  # which is converted
def test_sources_of_other_formats_are_named(tmp_path: Path, name: str) -> None:
    build, message = (FORMATS | ARCHIVES_AND_PICKLES)[name]
    (tmp_path / "foreign.bin.onnx").write_bytes(build())
    refusal = read_refusal(tmp_path, tmp_path / "foreign.bin.onnx")
    assert re.search(rf"foreign\.bin\.onnx .*{message}", refusal)
    assert "fovea-import-" not in refusal  # the folder for temporary files


@pytest.mark.parametrize("length", [0, 1, 2, 5, 10, 20, 40, 200, None])
def test_onnx_files_are_not_taken_for_another_format(tmp_path: Path, length: int | None) -> None:
    """Files that are cut short are not, either."""
    graph = build_classifier()
    graph.producer_name = "pytorch"
    file = tmp_path / "model.onnx"
    file.write_bytes(graph.SerializeToString()[:length])
    assert describe_other_format(file) is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Manifest.json", "Data/com.apple.CoreML/model.mlmodel"], "is a Core ML model, not ONNX"),
        (["saved_model.pb", "variables/variables.index"], "is a SavedModel of TensorFlow, not ONNX"),
    ],
)
def test_folders_of_other_formats_are_named(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"content")
    with pytest.raises(ImportRefused, match=message):
        read_model(tmp_path)
    assert message in read_refusal(tmp_path, tmp_path)
