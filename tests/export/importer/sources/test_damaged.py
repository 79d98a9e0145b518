"""Damaged and hostile sources: one sentence instead of a traceback, and no memory before a check."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto, TensorProto

from fovea.export.importer.foreign_model import MAX_BYTES, ImportRefused
from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
from fovea.export.importer.sources.facts import SourceFacts
from fovea.export.importer.sources.hub import HubReference
from fovea.export.importer.sources.metadata import add_metadata_facts
from tests.export.importer.sources.imports import read_refusal
from tests.export.importer.sources.layouts import (
    PROCESSOR,
    build_hub_graph,
    make_config,
    write_files,
    write_hub_folder,
)
from tests.export.importer.test_large_weights import build_wide_network

CENTRAL_ENTRY = b"PK\x01\x02"


def write_archive(path: Path) -> bytes:
    """Write a ZIP archive with a compressed ONNX file; return its bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.onnx", build_hub_graph().SerializeToString())
    return path.read_bytes()


def test_damaged_deflate_stream_is_named(tmp_path: Path) -> None:
    content = bytearray(write_archive(tmp_path / "model.zip"))
    start = content.index(b"model.onnx") + len("model.onnx")
    content[start : start + 40] = b"\xff" * 40
    (tmp_path / "model.zip").write_bytes(content)
    message = read_refusal(tmp_path, tmp_path / "model.zip")
    assert "model.zip is damaged or encrypted at model.onnx: Error -3" in message


def test_archive_of_a_newer_version_is_named(tmp_path: Path) -> None:
    content = bytearray(write_archive(tmp_path / "model.zip"))
    content[content.index(CENTRAL_ENTRY) + 6] = 99  # the version that is needed, 9.9
    (tmp_path / "model.zip").write_bytes(content)
    message = read_refusal(tmp_path, tmp_path / "model.zip")
    assert "model.zip is a damaged ZIP archive (zip file version 9.9)" in message


@pytest.mark.parametrize(
    "text",
    ["hf:a/b--c", "hf:a/..", "hf:a/-b", "hf:a-/b", "hf:./b", "hf:a/b.git", f"hf:a/{'b' * 97}", "hf:a/b..c"],
)
def test_names_that_the_hub_forbids_are_refused(text: str) -> None:
    with pytest.raises(ImportRefused, match="is not hf:OWNER/MODEL"):
        HubReference.parse(text)


@pytest.mark.parametrize("name", ["a/b", "timm/resnet18.a1_in1k", "onnx-community/mobilenet_v2_1.0_224-ONNX"])
def test_names_that_the_hub_allows_are_accepted(name: str) -> None:
    assert HubReference.parse(f"hf:{name}").repository == name
    validate = pytest.importorskip("huggingface_hub.utils").validate_repo_id
    validate(name)


def shorten(graph: ModelProto, name: str) -> None:
    """Cut the last four bytes of a weight."""
    tensor = next(one for one in graph.graph.initializer if one.name == name)
    tensor.raw_data = tensor.raw_data[:-4]


def set_input(graph: ModelProto, *, count: int = 0, kind: int = TensorProto.FLOAT) -> None:
    """Set the batch size and the type of the input."""
    tensor_type = graph.graph.input[0].type.tensor_type
    tensor_type.shape.dim[0].dim_value = count
    tensor_type.elem_type = kind


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda graph: shorten(graph, "square"), "net.onnx is damaged: the values of 'square' do not fit"),
        (lambda graph: shorten(graph, "last"), "net.onnx is damaged: the values of 'last' do not fit"),
        (lambda graph: set_input(graph, count=1 << 40), "batches of 1099511627776 images; at most 1024"),
        (lambda graph: set_input(graph, kind=99), "has type number 99; supported types are"),
    ],
)
def test_damaged_graphs_are_named(tmp_path: Path, damage: Callable[[ModelProto], None], reason: str) -> None:
    graph = build_wide_network(200)
    damage(graph)
    write_files(tmp_path, {"net.onnx": graph, "labels.txt": "a\nb\nc\nd\ne"})
    options: dict[str, Any] = {"preprocessing": PreprocessingOptions(preset=IMAGENET)}
    message = read_refusal(tmp_path, tmp_path / "net.onnx", labels=tmp_path / "labels.txt", **options)
    assert reason in message


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"config.json": {**make_config(), "architectures": 5, "id2label": None}}, "has no id2label"),
        (
            {"config.json": make_config(("a\ud800", "b", "c", "d", "e"))},
            "is 'a\\ud800', which is empty or not",
        ),
        (
            {"preprocessor_config.json": {**PROCESSOR, "image_mean": [10**400, 0, 0]}},
            "image_mean is 1000000000",
        ),
        (
            {"preprocessor_config.json": {**PROCESSOR, "image_std": [0.5, float("inf"), 0.5]}},
            "image_std is inf, which is not a number, or is too large",
        ),
    ],
)
def test_values_of_other_types_are_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    folder = write_hub_folder(tmp_path / "net", **changes)
    assert problem in read_refusal(tmp_path, folder)


@pytest.mark.parametrize("start", [b"GGUF\x03\x00\x00\x00", b"<!doctype html>"])
def test_file_of_another_format_is_not_read_as_a_whole(tmp_path: Path, start: bytes) -> None:
    size = 256 << 20
    with (tmp_path / "model.onnx").open("wb") as file:
        file.write(start)
        file.truncate(size)
    assert measure_peak(tmp_path / "model.onnx") < size / 8
    assert "not ONNX" in read_refusal(tmp_path, tmp_path / "model.onnx")


def test_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model.onnx").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert measure_peak(tmp_path / "model.onnx") < MAX_BYTES / 8


def measure_peak(file: Path) -> int:
    """Return the peak of memory in which the metadata of a file are read, in bytes."""
    facts = SourceFacts(None)
    tracemalloc.start()
    try:
        assert add_metadata_facts(file, "model", facts, file.parent) is facts
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_device_is_no_model(tmp_path: Path) -> None:
    assert "/dev/zero is neither a file nor a folder" in read_refusal(tmp_path, "/dev/zero")
