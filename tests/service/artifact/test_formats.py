"""Versions of the contract: old files stay readable, and no field changes without a new version.

`python -m tests.service.artifact.test_formats` writes the files of a new version.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from enum import StrEnum
from pathlib import Path
from typing import Any

import onnx
import pytest

from fovea.service.artifact import contract as contract_module
from fovea.service.artifact.contract import FORMAT_VERSION, Contract
from fovea.service.errors import ContractError
from fovea.service.inference.engine import Engine
from tests.graphs import build_model, read_contract

FORMATS = Path(__file__).parent / "formats"
"""For each version a model file, as Fovea wrote it at that time, and the list of its fields."""

VERSIONS = range(1, FORMAT_VERSION + 1)


def describe_type(kind: Any) -> str:
    """Describe a type as in JSON, without the names of our classes, because these may change."""
    if dataclasses.is_dataclass(kind):
        fields = typing.get_type_hints(kind).items()
        return "{" + ", ".join(f"{name}: {describe_type(field)}" for name, field in fields) + "}"
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return " | ".join(map(repr, map(str, kind)))
    if inner := typing.get_args(kind):
        kinds = ", ".join(describe_type(part) for part in inner if part is not Ellipsis)
        return f"{getattr(typing.get_origin(kind), '__name__', kind)}[{kinds}]"
    return repr(kind) if isinstance(kind, str) else str(kind.__name__)  # text is the value of a literal


def describe_fields() -> str:
    """Return the fields of the contract with their types, one per line."""
    fields = typing.get_type_hints(Contract).items()
    return "".join(f"{name}: {describe_type(field)}\n" for name, field in fields)


@pytest.mark.parametrize("version", VERSIONS)
def test_file_of_every_format_version_is_served(version: int) -> None:
    path = FORMATS / f"{version}.onnx"
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata[contract_module.METADATA_KEY])["format"] == version
    engine = Engine.load(path, provider="cpu", threads=1)
    assert engine.contract.format == FORMAT_VERSION
    assert engine.check_golden_set().images == 8


def test_changed_field_requires_new_format_version() -> None:
    """After a change of fields: raise `FORMAT_VERSION`, add a step to `_UPGRADES`, and run this module."""
    assert describe_fields() == (FORMATS / f"{FORMAT_VERSION}.txt").read_text()


def test_every_old_format_version_has_an_upgrade_step() -> None:
    assert sorted(contract_module._UPGRADES) == list(VERSIONS)[:-1]


def test_old_document_is_upgraded_and_newer_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this test, version 2 has given `temperature` another name, and 3 has its square root."""
    document = json.loads(read_contract(build_model()).to_json())
    document["softness"] = document.pop("temperature") ** 2
    upgrades = {
        1: lambda old: {**old, "squared": old["softness"]},
        2: lambda old: {
            **{name: value for name, value in old.items() if name not in ("softness", "squared")},
            "temperature": old["squared"] ** 0.5,
        },
    }
    monkeypatch.setattr(contract_module, "_UPGRADES", upgrades)
    monkeypatch.setattr(contract_module, "FORMAT_VERSION", 3)
    contract = Contract.from_json(json.dumps({**document, "format": 1}))
    assert (contract.format, contract.temperature) == (3, 1.0)
    with pytest.raises(
        ContractError, match=r"format is 4; this version of Fovea reads 1 to 3\. Update Fovea"
    ):
        Contract.from_json(json.dumps({**document, "format": 4}))
    with pytest.raises(ContractError, match="format is 0; "):
        Contract.from_json(json.dumps({**document, "format": 0}))


def _write_files() -> None:
    (FORMATS / f"{FORMAT_VERSION}.txt").write_text(describe_fields())
    path = FORMATS / f"{FORMAT_VERSION}.onnx"
    if path.exists():
        raise SystemExit(f"{path} is there already; files of old versions are never written again")
    onnx.save(build_model(), path)


if __name__ == "__main__":
    _write_files()
