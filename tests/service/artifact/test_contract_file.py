"""The contract of a model file is read without ONNX Runtime, and any other file is refused."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
from onnx import helper

from fovea.service.artifact.contract_file import read_contract
from fovea.service.artifact.onnx_edit import ExternalWeight, list_external_weights, read_metadata
from fovea.service.errors import ContractError, ModelError
from tests.graphs import build_model
from tests.graphs import read_contract as parse_contract
from tests.servers import ROOT


def test_contract_equals_that_of_onnx(tmp_path: Path) -> None:
    model = build_model()
    onnx.save(model, tmp_path / "model.onnx")
    assert read_contract(tmp_path / "model.onnx") == parse_contract(model)
    for path in (ROOT / "zoo").glob("*/*/model.onnx"):
        assert read_contract(path) == parse_contract(onnx.load(path))


def test_metadata_equal_those_of_onnx(tmp_path: Path) -> None:
    model = build_model()
    helper.set_model_props(model, {"": "no key", "empty": "", "häufig": "ünusual " * 1000})
    model.metadata_props.add(key="empty", value="the last entry of a key counts")
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with path.open("rb") as file:
        assert read_metadata(file) == {entry.key: entry.value for entry in model.metadata_props}


def test_every_cut_file_is_refused(tmp_path: Path) -> None:
    content = build_model().SerializeToString()
    path = tmp_path / "model.onnx"
    for size in (*range(40), *range(40, len(content), 997), *range(len(content) - 40, len(content))):
        path.write_bytes(content[:size])
        with pytest.raises(ModelError):
            read_contract(path)
    path.write_bytes(content[:200])  # in the graph, which is skipped
    with pytest.raises(ModelError, match="the ONNX model is cut short"):
        read_contract(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (bytes(100), "the file is not an ONNX model"),
        (b"no model at all", "the file is not an ONNX model"),
        (b"\x7f" * 100, "the file is not an ONNX model"),
        (b"\xff" * 100, "the ONNX model is cut short"),
        (b"\x08\x08" * 200_000, "the file is not an ONNX model"),
        (b"\x72\x04\x0a\x02\xff\xfe", "a text of the ONNX model is not UTF-8"),
        (b"\x72\x04\x0a\x7f\xff\xfe", "the ONNX model is cut short"),
    ],
)
def test_other_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_contract(tmp_path / "model.onnx")


def test_model_without_contract_is_refused(tmp_path: Path) -> None:
    model = build_model()
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ContractError, match="the model has no contract; `fovea export` writes one"):
        read_contract(tmp_path / "model.onnx")


def test_other_kinds_of_files_are_refused(tmp_path: Path) -> None:
    """A pipe without a writer would block whoever opens it."""
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("pipe", "pipe is not a file"),
        (".", " is not a file"),
        ("nothing", "the file cannot be read: No such file or directory"),
    ):
        with pytest.raises(ModelError, match=message):
            read_contract(tmp_path / name)


def _encode(number: int, content: bytes) -> bytes:
    return bytes((number << 3 | 2, len(content))) + content


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (_encode(8, b"\xff"), "a text of the ONNX model is not UTF-8"),
        (_encode(13, _encode(1, b"offset") + _encode(2, b"\xff")), "a text of the ONNX model is not UTF-8"),
        (_encode(13, _encode(1, b"offset") + _encode(2, b"x")), "has the offset 'x'"),
        (_encode(13, _encode(1, b"offset") + _encode(2, b"-1")), "has the offset '-1'"),
        (_encode(13, _encode(1, b"offset") + _encode(2, b"9" * 99)), "has the offset '99999999999999999999'"),
    ],
)
def test_damaged_external_weight_is_refused(weight: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        list_external_weights(_encode(7, _encode(5, weight)))


def test_external_weight_without_numbers_or_keys_is_read() -> None:
    """A packed field may be empty, and an entry may lack its key."""
    weight = _encode(8, b"a") + _encode(2, b"") + _encode(1, b"\x02\x03") + _encode(13, b"")
    assert list_external_weights(_encode(7, _encode(5, weight))) == [ExternalWeight("a", 0, (2, 3), 0)]
