"""The OpenAPI document is complete: no other status, no other type, and no 500 in any protocol."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Server

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)
"""Acceptance of all that fits the document is not checked: it cannot describe an image."""

PRESENT = {"name": ["small", "absent"], "version": ["1", "2"]}


@pytest.fixture(scope="module")
def managed(small_zoo: Path) -> Iterator[Server]:
    """A server that loads and unloads models on request."""
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_MANAGEMENT="true") as running:
        yield running


def run_schemathesis(server: Server, folder: Path, *options: str) -> str:
    """Schemathesis, with names of which half exist; a random name would never exist."""
    document = server.client.get("/openapi.json").json()
    for parameter in _list_parameters(document):
        if parameter["in"] == "path":
            parameter["schema"]["enum"] = PRESENT[parameter["name"]]
    (folder / "openapi.json").write_text(json.dumps(document))
    checks = ("--url", server.url, "--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing")
    output_options = ("--warnings", "off", "--no-color")
    result = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", *checks, *output_options, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _list_parameters(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        for operation in path.values():
            yield from operation.get("parameters", ())


@pytest.mark.slow
def test_nothing_comes_that_is_not_documented(server: Server, tmp_path: Path) -> None:
    said = run_schemathesis(server, tmp_path, "--max-examples", "15", "--generation-deterministic")
    count = sum(len(path) for path in server.client.get("/openapi.json").json()["paths"].values())
    assert f"Tested: {count}" in said
    assert server.read_metric("fovea_errors_total", reason="internal") == 0


@pytest.mark.long
def test_nor_when_models_come_and_go(managed: Server, tmp_path: Path) -> None:
    run_schemathesis(
        managed,
        tmp_path,
        "--max-examples",
        "15",
        "--generation-deterministic",
        "--include-path-regex",
        "^/v2/repo",
    )
    assert managed.read_metric("fovea_errors_total", reason="internal") == 0


@pytest.mark.slow
def test_nor_among_many(managed: Server, tmp_path: Path) -> None:
    run_schemathesis(managed, tmp_path, "--max-examples", "150", "--generation-database", "none")
    assert managed.read_metric("fovea_errors_total", reason="internal") == 0
