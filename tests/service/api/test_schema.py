"""Replies conform to the OpenAPI document in every protocol, and none has status 500."""

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
"""Acceptance of every valid body is not checked, because the document cannot describe an image."""

PATH_VALUES = {"name": ["small", "absent"], "version": ["1", "2"]}


@pytest.fixture(scope="module")
def managed_server(small_zoo: Path) -> Iterator[Server]:
    """A server that loads and unloads models on request."""
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_MANAGEMENT="true") as server:
        yield server


def run_schemathesis(server: Server, folder: Path, *options: str) -> str:
    """Run Schemathesis with names of which half exist, because a random name would never exist."""
    document = server.client.get("/openapi.json").json()
    for parameter in _list_parameters(document):
        if parameter["in"] == "path":
            parameter["schema"]["enum"] = PATH_VALUES[parameter["name"]]
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


@pytest.mark.long
def test_replies_conform_to_the_openapi_document(small_zoo: Path, tmp_path: Path) -> None:
    room_for_one_image_too_many = {"FOVEA_BODY_BYTES": "16000000"}  # else the answer is 413
    with Server(FOVEA_MODELS=str(small_zoo), **room_for_one_image_too_many) as server:
        output = run_schemathesis(server, tmp_path, "--max-examples", "4", "--generation-deterministic")
        count = sum(len(path) for path in server.client.get("/openapi.json").json()["paths"].values())
        assert f"Tested: {count}" in output
        assert server.read_metric("fovea_errors_total", reason="internal") == 0


@pytest.mark.long
def test_repository_replies_conform_to_the_openapi_document(managed_server: Server, tmp_path: Path) -> None:
    run_schemathesis(
        managed_server,
        tmp_path,
        "--max-examples",
        "10",
        "--generation-deterministic",
        "--include-path-regex",
        "^/v2/repo",
    )
    assert managed_server.read_metric("fovea_errors_total", reason="internal") == 0


@pytest.mark.long
def test_many_random_requests_get_documented_replies(managed_server: Server, tmp_path: Path) -> None:
    run_schemathesis(managed_server, tmp_path, "--max-examples", "10", "--generation-database", "none")
    assert managed_server.read_metric("fovea_errors_total", reason="internal") == 0
