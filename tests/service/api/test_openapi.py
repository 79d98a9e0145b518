"""The OpenAPI document describes every group, call and parameter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Server


@pytest.fixture(scope="module")
def document(small_zoo: Path) -> dict[str, Any]:
    """The document of a service with all protocols and with management."""
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_MANAGEMENT="true") as server:
        document: dict[str, Any] = server.client.get("/openapi.json").json()
        return document


def list_operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the operations with their methods and paths."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield f"{method.upper()} {path}", operation


def test_every_group_is_described_and_images_come_first(document: dict[str, Any]) -> None:
    names = [tag["name"] for tag in document["tags"]]
    assert {tag for _, operation in list_operations(document) for tag in operation["tags"]} == set(names)
    assert all(tag["description"].endswith(".") for tag in document["tags"])
    assert names[:4] == ["classify", "images", "explain", "models"]


def test_every_call_has_a_summary_in_words(document: dict[str, Any]) -> None:
    """FastAPI makes a summary like "Contract Of Model" of the name of a function."""
    for call, operation in list_operations(document):
        words = operation["summary"].split()
        assert len(words) > 2 or words == ["Classify", "images"], call
        assert len(operation["summary"]) < 100, call
        assert not operation["summary"].endswith("."), call
        assert not operation["summary"].istitle(), call


def test_every_parameter_is_described(document: dict[str, Any]) -> None:
    for call, operation in list_operations(document):
        for parameter in operation.get("parameters", ()):
            assert parameter.get("description", "").endswith("."), (call, parameter["name"])


def test_file_comes_before_json(document: dict[str, Any]) -> None:
    """Swagger UI shows the first form of a body: a file chooser, not a page of base64."""
    counts = {True: 0, False: 0}
    for call, operation in list_operations(document):
        kinds = list(operation.get("requestBody", {}).get("content", ()))
        if "application/octet-stream" in kinds:
            is_oip = operation["tags"] == ["oip"]  # its bytes are tensors behind JSON
            assert (kinds[0] == "application/octet-stream") is not is_oip, call
            counts[is_oip] += 1
    assert all(counts.values())
