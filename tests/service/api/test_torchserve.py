"""TorchServe's protocol, with the commands of its README and the keys that its clients read."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fovea.service.artifact.contract import Task
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.servers import Server
from tests.tools import require_tool

PICTURE = make_jpeg()
LABELS = [f"label {number}" for number in range(8)]


def native_probabilities(
    server: Server, picture: bytes = PICTURE, path: str = "/v1/classify"
) -> dict[str, float]:
    reply = server.client.post(path, content=picture).json()
    return {prediction["label"]: prediction["probability"] for prediction in reply["predictions"]}


def run_curl(*arguments: str) -> Any:
    result = subprocess.run([require_tool("curl"), "--silent", *arguments], capture_output=True, check=True)
    return json.loads(result.stdout)


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "kitten_small.jpg"
    path.write_bytes(PICTURE)
    return str(path)


def test_readme_commands_get_native_probabilities(server: Server, photo: str) -> None:
    expected = native_probabilities(server)
    assert list(run_curl(f"{server.url}/predictions/small", "-T", photo).items()) == list(expected.items())
    assert run_curl("-X", "POST", f"{server.url}/predictions/small", "-T", photo) == expected
    assert run_curl(f"{server.url}/predictions/small/1", "-T", photo) == expected
    assert run_curl(f"{server.url}/predictions/small", "-F", f"data=@{photo}") == expected
    assert run_curl("--data-binary", f"@{photo}", f"{server.url}/predictions/small") == expected
    assert run_curl(f"{server.url}/ping") == {"status": "Healthy"}
    assert "/predictions/{name}" in run_curl("-X", "OPTIONS", f"{server.url}/")["paths"]


def test_version_1_0_is_version_1(server: Server, photo: str) -> None:
    """TorchServe calls the first version 1.0, and clients request it by this name."""
    expected = native_probabilities(server)
    assert run_curl(f"{server.url}/predictions/small/1.0", "-T", photo) == expected
    assert server.client.get("/models/small/1.0").json() == server.client.get("/models/small/1").json()
    for other in ("1.1", "1.0.0", "2.0", ".0", "1."):
        assert server.client.post(f"/predictions/small/{other}", content=PICTURE).status_code == 404


@pytest.mark.long
def test_version_1_0_is_loaded_on_request(tmp_path: Path) -> None:
    for number in range(2):
        add_to_repository(build_model(seed=number), tmp_path, f"m{number}")
    with Server(FOVEA_MODELS=str(tmp_path), FOVEA_DEFAULT_MODEL="m0", FOVEA_MODELS_LOADED="1") as server:
        assert server.client.post("/predictions/m1/1.0", content=PICTURE).status_code == 200


def test_several_files_get_one_map_each(server: Server) -> None:
    pictures = [make_jpeg(seed=number) for number in range(3)]
    reply = server.client.post("/predictions/small", files=[("data", picture) for picture in pictures])
    assert reply.json() == [native_probabilities(server, picture) for picture in pictures]


@pytest.mark.long
def test_reply_has_five_labels(tmp_path: Path) -> None:
    with Server(FOVEA_MODELS=str(add_to_repository(build_model(labels=LABELS), tmp_path, "many"))) as server:
        probabilities = server.client.put("/predictions/many", content=PICTURE).json()
        assert list(probabilities.items()) == list(native_probabilities(server).items())
        assert len(probabilities) == 5


@pytest.mark.long
def test_multilabel_model_returns_native_probabilities(tmp_path: Path) -> None:
    with Server(
        FOVEA_MODELS=str(add_to_repository(build_model(Task.MULTILABEL), tmp_path, "tags"))
    ) as server:
        assert server.client.put("/predictions/tags", content=PICTURE).json() == native_probabilities(server)


def test_explanation_equals_the_native_heatmap(server: Server, photo: str) -> None:
    """The map is the same as that of the native route."""
    native_reply = server.client.post("/v1/explain?method=cam", content=PICTURE).json()
    expected = [native_reply["heatmap"]["values"]]
    labels = {"protocol": "torchserve", "route": "/explanations/{name}", "status": "200"}
    count_before = server.read_metric("fovea_requests_total", **labels)
    assert run_curl(f"{server.url}/explanations/small", "-T", photo) == expected
    assert run_curl(f"{server.url}/explanations/small/1", "-F", f"data=@{photo}") == expected
    assert server.read_metric("fovea_requests_total", **labels) == count_before + 1


@pytest.mark.long
def test_explanations_can_be_switched_off(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_EXPLAIN="false") as server:
        reply = server.client.put("/explanations/small", content=PICTURE)
        assert (reply.status_code, reply.json()["type"]) == (403, "ForbiddenException")
        assert "FOVEA_EXPLAIN" in reply.json()["message"]


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "kind", "reason"),
    [
        ("POST", "/predictions/small", b"", 400, "BadRequestException", "bad_request"),
        ("POST", "/predictions/small", b"nonsense", 415, "BadRequestException", "unsupported_format"),
        ("POST", "/predictions/small", PICTURE[:200], 422, "BadRequestException", "bad_image"),
        ("POST", "/predictions/large", PICTURE, 404, "ModelNotFoundException", "model_not_found"),
        ("POST", "/predictions/small/7", PICTURE, 404, "ModelNotFoundException", "model_not_found"),
        ("GET", "/predictions/small", b"", 405, "MethodNotAllowedException", "method_not_allowed"),
        ("POST", "/predictions/small", bytes(1_000_001), 413, "BadRequestException", "body_too_large"),
        ("POST", "/models?url=https://example.org/evil.mar", b"", 403, "ForbiddenException", "forbidden"),
        ("DELETE", "/models/small/1", b"", 405, "MethodNotAllowedException", "method_not_allowed"),
        ("PUT", "/models/small?min_worker=3", b"", 405, "MethodNotAllowedException", "method_not_allowed"),
        ("POST", "/explanations/small", b"nonsense", 415, "BadRequestException", "unsupported_format"),
        ("POST", "/explanations/large", PICTURE, 404, "ModelNotFoundException", "model_not_found"),
        ("GET", "/explanations/small", b"", 405, "MethodNotAllowedException", "method_not_allowed"),
        ("GET", "/models/large", b"", 404, "ModelNotFoundException", "model_not_found"),
        ("GET", "/models/large/all", b"", 404, "ModelNotFoundException", "model_not_found"),
        ("GET", "/models?limit=0", b"", 400, "BadRequestException", "bad_request"),
        ("GET", "/models?limit=some", b"", 400, "BadRequestException", "bad_request"),
        ("GET", "/models?next_page_token=-1", b"", 400, "BadRequestException", "bad_request"),
    ],
)
def test_errors_have_torchserve_shape(
    server: Server, method: str, path: str, content: bytes, status: int, kind: str, reason: str
) -> None:
    reply = server.client.request(method, path, content=content)
    error = reply.json()
    assert (reply.status_code, error["code"], error["type"], error["reason"]) == (
        status,
        status,
        kind,
        reason,
    )
    assert error["message"]
    assert error["request_id"] == reply.headers["x-request-id"]


def test_form_without_a_file_is_refused(server: Server) -> None:
    reply = server.client.post("/predictions/small", files={"data": (None, "text")})
    assert (reply.status_code, reply.json()["reason"]) == (400, "bad_request")


def test_error_names_the_bad_file(server: Server) -> None:
    files = [("data", PICTURE), ("data", b"nonsense")]
    reply = server.client.post("/predictions/small", files=files)
    assert (reply.status_code, reply.json()["reason"]) == (415, "unsupported_format")
    assert reply.json()["message"].startswith("image 1: ")


# --- the models ----------------------------------------------------------------------------------


@pytest.mark.long
def test_models_are_listed_in_pages(tmp_path: Path) -> None:
    for number in range(3):
        add_to_repository(build_model(seed=number), tmp_path, f"m{number}")
    with Server(FOVEA_MODELS=str(tmp_path), FOVEA_DEFAULT_MODEL="m0", FOVEA_MODELS_LOADED="2") as server:
        first_page = server.client.get("/models?limit=2").json()
        assert first_page["models"][0] == {"modelName": "m0", "modelUrl": "m0/1/model.onnx"}
        second_page = server.client.get(
            "/models", params={"next_page_token": first_page["nextPageToken"]}
        ).json()
        names = [model["modelName"] for model in first_page["models"] + second_page["models"]]
        assert names == ["m0", "m1", "m2"]
        assert "nextPageToken" not in second_page
        unloaded_model = server.client.get("/models/m2").json()[0]
        assert (unloaded_model["modelVersion"], unloaded_model["workers"], unloaded_model["batchSize"]) == (
            "1",
            [],
            None,
        )


@pytest.mark.long
def test_model_description_lists_its_versions(tmp_path: Path) -> None:
    add_to_repository(build_model(), tmp_path)
    shutil.copytree(tmp_path / "small" / "1", tmp_path / "small" / "2")
    (tmp_path / "small" / "config.toml").write_text('versions = ["1", "2"]')
    with Server(FOVEA_MODELS=str(tmp_path), FOVEA_RUNNERS="2", FOVEA_QUEUE_IMAGES="100") as server:
        latest = server.client.get("/models/small").json()
        assert [version["modelVersion"] for version in latest] == ["2"]
        assert [worker["status"] for worker in latest[0]["workers"]] == ["READY", "READY"]
        assert latest[0]["jobQueueStatus"] == {"remainingCapacity": 100, "pendingRequests": 0}
        assert latest[0]["modelUrl"] == "small/2/model.onnx"
        models = server.client.get("/models").json()["models"]
        assert models == [{"modelName": "small", "modelUrl": "small/2/model.onnx"}]
        versions = server.client.get("/models/small/all").json()
        assert [version["modelVersion"] for version in versions] == ["1", "2"]
        assert server.client.get("/models/small/1").json() == [versions[0]]
        assert server.client.get("/models/small/3").status_code == 404


@pytest.mark.long
def test_single_file_is_listed_as_a_model(tmp_path: Path) -> None:
    path = add_to_repository(build_model(), tmp_path) / "small" / "1" / "model.onnx"
    with Server(FOVEA_MODELS=str(path)) as server:
        models = [{"modelName": "small", "modelUrl": "model.onnx"}]
        assert server.client.get("/models").json() == {"models": models}
        assert server.client.get("/models/small").json()[0]["modelVersion"] == "1"
