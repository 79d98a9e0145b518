"""Health, metrics, runtime and documentation on a real server."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fovea.service import __version__
from fovea.service.settings import Settings
from tests.graphs import build_model, read_contract
from tests.pictures import make_jpeg
from tests.servers import Server, sum_samples
from tests.service.runners.test_memory_plan import fit_settings


def test_health_routes_answer_get_and_head(server: Server) -> None:
    assert server.client.get("/health/live").json() == {"status": "live"}
    assert server.client.get("/health/ready").json() == {"status": "ready"}
    for path in ("/health/live", "/health/ready"):  # uptime checkers send HEAD
        assert (server.client.head(path).status_code, server.client.head(path).content) == (200, b"")


def test_greeting_shows_the_url_and_a_curl_example(server: Server) -> None:
    assert f"Fovea {__version__} serves small version 1 on cpu at {server.url}" in server.greeting
    assert re.search(rf"curl -T \S+ {server.url}/v1/classify", server.greeting)


def test_runtime_describes_the_running_service(server: Server) -> None:
    runtime = server.client.get("/runtime").json()
    assert runtime["models"][0]["provider"] == "cpu"
    assert runtime["models"][0]["golden"]["images"] == 8
    assert runtime["threads"]["runners"] >= 1
    assert runtime["limits"]["body_bytes"] == 1_000_000


def test_runtime_shows_every_memory_dependent_limit(server: Server, small_zoo: Path, tmp_path: Path) -> None:
    """`docs/operations.md` sends people there when a container is small."""
    default_settings = Settings(models=small_zoo)
    small_settings = fit_settings(tmp_path, 300 << 20, models=small_zoo)
    changed_limits = {
        name
        for name in Settings.model_fields
        if getattr(default_settings, name) != getattr(small_settings, name)
    }
    assert {"bodies_bytes", "decode_bytes", "explain_idle"} <= changed_limits
    runtime = server.client.get("/runtime").json()
    assert changed_limits <= runtime["limits"].keys() | runtime["threads"].keys()


def test_contract_route_returns_contract_of_the_file(server: Server) -> None:
    expected = read_contract(build_model()).to_json()
    for path in ("/v1/models/small/contract", "/v1/models/small/versions/1/contract"):
        assert server.client.get(path, params={"golden": "true"}).text == expected
    assert server.client.get("/v1/models/none/contract").status_code == 404


def test_contract_route_leaves_out_golden_images_unless_asked(server: Server) -> None:
    document = json.loads(read_contract(build_model()).to_json())
    assert document["golden"]["images"]
    document["golden"]["images"] = []
    for path in ("/v1/models/small/contract", "/v1/models/small/versions/1/contract"):
        for params in ({}, {"golden": "false"}):
            text = server.client.get(path, params=params).text
            assert text == json.dumps(document, separators=(",", ":"))


def test_request_is_counted_once_and_timed_in_every_stage(server: Server) -> None:
    stages = ("read", "decode", "queue", "inference", "encode")

    def read_counts() -> list[float]:
        route, text = "/v1/models/{name}/classify", server.client.get("/metrics").text
        return [
            sum_samples(text, "fovea_requests_total", route=route, model="small", status="200"),
            sum_samples(text, "fovea_images_total", model="small", version="1"),
            sum_samples(text, "fovea_request_seconds_count", route=route),
            *(sum_samples(text, "fovea_stage_seconds_count", stage=stage) for stage in stages),
        ]

    before = read_counts()
    assert server.client.post("/v1/models/small/classify", content=make_jpeg()).status_code == 200
    assert [after - earlier for after, earlier in zip(read_counts(), before, strict=True)] == [1] * 8
    assert server.read_metric("fovea_model_info", model="small", provider="cpu", task="multiclass") == 1
    assert server.read_metric("fovea_model_load_seconds", model="small") > 0
    assert server.read_metric("fovea_requests_in_flight") == 1  # the scrape itself
    assert server.read_metric("fovea_images_in_flight") == 0
    assert server.read_metric("fovea_queue_images") == 0


def test_metric_labels_are_bounded(server: Server) -> None:
    server.client.get("/first/unknown/path")
    series = len(server.client.get("/metrics").text.splitlines())
    for path in ("/a", "/v1/models/x/classify", "/v1/models/y/classify", "/b/c"):
        server.client.get(path)
        server.client.post(path, content=b"x")
    text = server.client.get("/metrics").text
    assert 'model="x"' not in text
    assert "/a" not in re.findall(r'route="([^"]*)"', text)
    for number in range(20):
        server.client.post(f"/v1/models/{number}/classify", content=b"x")
    assert len(server.client.get("/metrics").text.splitlines()) < series + 150


@pytest.mark.needs("promtool")
def test_promtool_accepts_the_metrics(server: Server) -> None:
    server.client.post("/v1/classify", content=make_jpeg())
    server.client.post("/v1/classify", content=b"")
    text = server.client.get("/metrics").text
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_openmetrics_format_is_sent_on_request(server: Server) -> None:
    headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
    reply = server.client.get("/metrics", headers=headers)
    assert reply.headers["Content-Type"].startswith("application/openmetrics-text")
    assert reply.text.endswith("# EOF\n")


# --- documentation -------------------------------------------------------------------------------


def test_documentation_loads_only_local_files(server: Server) -> None:
    page = server.client.get("/docs")
    assert page.status_code == 200
    linked_paths = re.findall(r'<(?:link|script|img)[^>]* (?:href|src)="([^"]+)"', page.text)
    assert len(linked_paths) == 6
    for path in linked_paths:
        route = "/page" if path.endswith("fovea.svg") else "/docs/swagger"
        assert path.startswith(f".{route}/")
        before = server.read_metric("fovea_requests_total", route=route, status="200")
        assert server.client.get(path).status_code == 200
        assert server.read_metric("fovea_requests_total", route=route, status="200") == before + 1


def test_documentation_examples_succeed(server: Server) -> None:
    document: dict[str, Any] = server.client.get("/openapi.json").json()
    tags = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            if "example" not in body:
                continue
            url = path.format(**_parameter_examples(operation))
            reply = server.client.request(method, url, json=body["example"])
            assert reply.status_code == 200, (url, reply.text)
            if "top_k" in body["example"]:
                assert len(reply.json()["predictions"]) == body["example"]["top_k"]
            tags.append(operation["tags"][0])
    assert Counter(tags) == {"classify": 6, "oip": 2, "tensorflow": 4, "huggingface": 3, "clouds": 1}


def _parameter_examples(operation: dict[str, Any], place: str = "path") -> dict[str, str]:
    """Return the examples of required parameters, and of those that Swagger UI fills in."""
    parameters = (parameter for parameter in operation.get("parameters", ()) if parameter["in"] == place)
    values = {
        parameter["name"]: parameter.get("example", parameter["schema"].get("example"))
        for parameter in parameters
    }
    return {name: str(example) for name, example in values.items() if example is not None}


def test_documented_get_requests_succeed(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        if "get" in operations:
            query = _parameter_examples(operations["get"], "query")
            reply = server.client.get(path.format(**_parameter_examples(operations["get"])), params=query)
            assert reply.status_code == 200, path


def test_documentation_has_fovea_errors_not_fastapi_errors(server: Server) -> None:
    for _ in range(2):  # the document is created once and cached
        text = server.client.get("/openapi.json").text
        assert "ValidationError" not in text
        assert "ErrorReply" in text


def test_schema_references_in_documentation_resolve(server: Server) -> None:
    text = server.client.get("/openapi.json").text
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    references = set(re.findall(r'"\$ref":"([^"]+)"', text))
    assert {f"#/components/schemas/{name}" for name in ("ClassifyRequest", "ErrorReply")} <= references
    assert references <= {f"#/components/schemas/{name}" for name in schemas}


def test_operation_ids_are_unique(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids))
