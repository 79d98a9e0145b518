"""Recognition of files that users give to the import by mistake, by their first bytes and their structure."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

_HEAD_BYTES: Final = 512
"""Number of bytes that are read to recognise a file."""

_TO_ONNX: Final = "export the model to ONNX first"

_STARTS: Final = (
    (b"\x89HDF", "an HDF5 file, as Keras writes them", f"load it in Keras, and {_TO_ONNX}: model.export"),
    (b"GGUF", "a GGUF file, with weights for llama.cpp", _TO_ONNX),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "run `git lfs pull`"),
    (b"\x1f\x8b", "a gzip archive", "unpack it, and import the ONNX file inside"),
    (b"BZh", "a bzip2 archive", "unpack it, and import the ONNX file inside"),
    (b"\xfd7zXZ", "an xz archive", "unpack it, and import the ONNX file inside"),
    (b"7z\xbc\xaf'\x1c", "a 7-Zip archive", "unpack it, and import the ONNX file inside"),
    (b"\x93NUMPY", "a NumPy array, not a model", _TO_ONNX),
)
"""First bytes, the format, and what to do."""

_IDENTIFIERS: Final = {
    b"TFL3": (
        "a TensorFlow Lite model",
        "convert it with `fovea import FILE` (pip install 'fovea-serve[tflite]')",
    ),
    b"ORTM": ("ONNX Runtime's own format (.ort)", "import the .onnx file it was made from"),
}
"""Identifiers of FlatBuffers, which stand after the first four bytes."""

_PICKLE_ADVICE: Final = (
    "it is never loaded, because loading a pickle can run any program; load it in PyTorch yourself, and "
    "export the model with torch.onnx.export"
)

_ONNX_GRAPH_FIELD: Final = 7
"""Field number of the graph in ONNX's `ModelProto`."""

_CORE_ML_TYPES: Final = range(200, 3001)
"""Field numbers of the kinds of models in Core ML's `Model.proto`; ONNX has none as high."""

_SAVED_MODEL_FIELDS: Final = frozenset({1, 2})
"""Fields of TensorFlow's `SavedModel`: its version and its graphs."""

_GRAPH_FIELDS: Final = frozenset({1, 2, 3, 4})
"""Fields of TensorFlow's `GraphDef`: nodes, library and versions."""

_FIRST_NODE: Final = b"\x0a"
"""First byte of a `GraphDef`: the key of its first node. ONNX begins with a version, key 8."""


def describe_other_format(path: Path) -> str | None:
    """Return the format of a file that is not ONNX and what to do with it; None if it may be ONNX.

    Only the beginning of the file is read, and of an archive the list of its files. Raises `OSError`.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        description = _describe_start(head) or _describe_text(head) or _describe_archive(file, head)
        if description is None:
            file.seek(0)
            description = _describe_protobuf(file)
    if description is None:
        return None
    kind, advice = description
    return f"{path} is {kind}, not ONNX; {advice}"


def describe_folder(path: Path) -> str | None:
    """Return the format of a folder with a model that is not ONNX and what to do with it, else None."""
    if (path / "Manifest.json").is_file() and (path / "Data").is_dir():
        kind, advice = _CORE_ML
    elif (path / "saved_model.pb").is_file():
        kind, advice = _SAVED_MODEL
    else:
        return None
    return f"{path} is {kind}, not ONNX; {advice}"


_CORE_ML: Final = ("a Core ML model", "export the model that it was made from to ONNX")
_SAVED_MODEL: Final = (
    "a SavedModel of TensorFlow",
    f"{_TO_ONNX}: python -m tf2onnx.convert --saved-model FOLDER",
)


def _describe_start(head: bytes) -> tuple[str, str] | None:
    for start, kind, advice in _STARTS:
        if head.startswith(start):
            return kind, advice
    if head[4:8] in _IDENTIFIERS:
        return _IDENTIFIERS[head[4:8]]
    if len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return "a Python pickle, as older PyTorch writes them", _PICKLE_ADVICE
    # safetensors: the length of a JSON text in eight bytes, then the text
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100 << 20:
        return "a safetensors file, which has weights without their network", (
            "import its folder if config.json of transformers or timm is there; else export the model to "
            "ONNX with the program that made it"
        )
    return None


def _describe_text(head: bytes) -> tuple[str, str] | None:
    text = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page", "download the file itself, not the page that shows it"
    if text.startswith(b"<?xml") and b"<net" in text:
        return "an OpenVINO model (IR)", "import the ONNX file it was made from"
    if text.startswith((b"{", b"[")) and text.isascii():
        return "JSON text", "give the ONNX file first, and a file of labels with --labels"
    return None


def _describe_archive(file: BinaryIO, head: bytes) -> tuple[str, str] | None:
    if not head.startswith(b"PK\x03\x04"):
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a ZIP archive that is cut short", "copy or download it again"
    models = sorted(name for name in names if name.lower().endswith(".tflite"))
    if models:
        listed = ", ".join(models[:3]) + (", …" if len(models) > 3 else "")
        return (
            f"a ZIP archive with TensorFlow Lite inside ({listed})",
            "unpack it, and import the .tflite file",
        )
    if any(name.endswith(".onnx") for name in names):  # an archive in place of a file of a folder
        return "a ZIP archive", "unpack it, and import the ONNX file inside"
    return "a ZIP archive without an ONNX file inside", _TO_ONNX


# --- protobuf ------------------------------------------------------------------------------------


def _describe_protobuf(file: BinaryIO) -> tuple[str, str] | None:
    """Return the format of a protobuf message other than ONNX, by the numbers of its fields."""
    is_graph = file.read(1) == _FIRST_NODE
    file.seek(0)
    fields = set()
    for field in _read_field_numbers(file):
        if field == _ONNX_GRAPH_FIELD:
            return None
        fields.add(field)
    if any(field in _CORE_ML_TYPES for field in fields):
        return _CORE_ML
    if is_graph and fields and fields <= _GRAPH_FIELDS:
        return "a frozen graph of TensorFlow", f"{_TO_ONNX}: python -m tf2onnx.convert --graphdef FILE"
    return _SAVED_MODEL if not is_graph and fields == _SAVED_MODEL_FIELDS else None


def _read_field_numbers(file: BinaryIO) -> Iterator[int]:
    """Yield the numbers of the fields of a message without reading long values; end with 0 at a fault."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    while (key := _read_varint(file)) is not None:
        field, wire_type = key >> 3, key & 7
        if wire_type == 0:
            length = 0 if _read_varint(file) is not None else None
        elif wire_type == 2:
            length = _read_varint(file)
        else:
            length = {1: 8, 5: 4}.get(wire_type)
        if length is None or not field or file.tell() + length > size:
            yield 0
            return
        file.seek(length, io.SEEK_CUR)
        yield field


def _read_varint(file: BinaryIO) -> int | None:
    value = 0
    for shift in range(0, 64, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None
