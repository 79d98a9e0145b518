"""Contracts: the JSON in the metadata of a model is valid as a whole, or refused."""

from __future__ import annotations

import json
from typing import Final

from fovea.service.artifact.contract import METADATA_KEY, Contract
from fovea.service.errors import ContractError
from tests.fuzz.json_changes import change_json
from tests.fuzz.target import Target, require
from tests.graphs import build_model, read_contract

_CONTRACT: Final = read_contract(build_model())


def check_contract(data: bytes) -> bool:
    """Read a contract; what was read is written and read again unchanged."""
    try:
        contract = Contract.from_metadata({METADATA_KEY: data.decode("utf-8", "replace")})
    except ContractError as error:
        str(error).encode()
        return False
    require(Contract.from_json(contract.to_json()) == contract, "the contract changes when it is written")
    return True


def _make_seeds() -> list[bytes]:
    document = json.loads(_CONTRACT.to_json())
    small = {**document, "golden": {**document["golden"], "images": document["golden"]["images"][:1]}}
    return [json.dumps(small, separators=(",", ":")).encode()]


def _list_words() -> list[str]:
    document = json.loads(_CONTRACT.to_json())
    words = {"binary", "multilabel", "multiclass", "bilinear", "bicubic", "exact", "fast", "unknown"}
    containers = [document]
    while containers:
        one = containers.pop()
        words |= one.keys()
        values = [value if isinstance(value, list) else [value] for value in one.values()]
        containers += [
            value for values_of_one in values for value in values_of_one if isinstance(value, dict)
        ]
    return sorted(words)


TARGET = Target(
    check_contract,
    _make_seeds,
    change_json(_list_words()),
    words=(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"\\ud800", b"[[[[", b"null"),
    max_size=16_000,
)
