"""The service over gRPC with Triton's own clients."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.export.classifiers import build_classifier
from tests.export.imports import import_graph
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.servers import Server
from tests.service.grpc.channels import grpc_address
from tests.service.grpc.triton_process import run_triton

IMAGES = [make_jpeg(64 + seed, 48, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model `small`, and `thing`, which was imported."""
    folder = tmp_path_factory.mktemp("grpc")
    import_graph(build_classifier(), folder)
    add_to_repository(build_model(), folder / "zoo")
    return folder / "zoo"


@pytest.fixture(scope="module")
def grpc_server(zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_DEFAULT_MODEL="small", FOVEA_GRPC_PORT="0") as server:
        yield server


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    files = [folder / f"{number}.jpg" for number in range(len(IMAGES))]
    for file, image in zip(files, IMAGES, strict=True):
        file.write_bytes(image)
    return files


@pytest.fixture(scope="module")
def answers(grpc_server: Server, image_files: list[Path]) -> Any:
    """The answers of both clients."""
    return run_triton("sync", "aio", address=grpc_address(grpc_server), images=image_files)


@pytest.fixture(scope="module")
def native_predictions(grpc_server: Server) -> list[list[dict[str, Any]]]:
    """The native predictions for the images, the most probable first."""
    return [
        grpc_server.client.post("/v1/models/small/classify?top_k=0", content=image).json()["predictions"]
        for image in IMAGES
    ]


def test_questions_about_the_server_and_models_have_the_answers_of_http(
    grpc_server: Server, answers: Any
) -> None:
    sync, http = answers["sync"], grpc_server.client
    assert sync["live"] and sync["ready"]
    assert sync["model_ready"] == [True, True, False, False]
    server = http.get("/v2").json()
    assert sync["server"] == {
        **server, "extensions": [one for one in server["extensions"] if one != "binary_tensor_data"],
    }  # fmt: skip
    metadata = http.get("/v2/models/small/versions/1").json()
    del metadata["alternatives"]
    assert sync["metadata"] == as_strings(metadata)
    assert sync["config"]["config"] == as_strings(http.get("/v2/models/small/config").json(), "dims")
    assert [one["name"] for one in sync["index"]["models"]] == ["small", "thing"]
    assert {one["state"] for one in sync["index"]["models"]} == {"READY"}


def as_strings(value: Any, *names: str) -> Any:
    """Return a value with the numbers of its shapes as text, as Protocol Buffers write them in JSON."""
    if isinstance(value, dict):
        return {
            key: list(map(str, one)) if key in ("shape", *names) else as_strings(one, *names)
            for key, one in value.items()
        }
    return [as_strings(one, *names) for one in value] if isinstance(value, list) else value


def test_encoded_images_get_the_probabilities_of_the_native_protocol(
    answers: Any, native_predictions: list[list[dict[str, Any]]]
) -> None:
    by_index = [sorted(one, key=lambda prediction: prediction["index"]) for one in native_predictions]
    expected = [[prediction["probability"] for prediction in one] for one in by_index]
    assert np.allclose(answers["sync"]["probabilities"]["probabilities"], expected, atol=1e-6)
    assert answers["sync"]["id"] == "42"


def test_classification_extension_and_several_outputs(
    answers: Any, native_predictions: list[list[dict[str, Any]]]
) -> None:
    outputs = answers["sync"]["labels"]
    assert set(outputs) == {"probabilities", "logits"} and len(outputs["logits"]) == 3
    for row, predictions in zip(outputs["probabilities"], native_predictions, strict=True):
        assert [re.sub("^[^:]*:", "", text) for text in row] == [
            f"{one['index']}:{one['label']}" for one in predictions[:2]
        ]
    best = [[one[0]["label"]] for one in native_predictions]
    for labels in answers["aio"]:
        assert [[text.split(":")[2] for text in row] for row in labels] == best


def test_tensors_get_the_answers_of_http(grpc_server: Server, answers: Any) -> None:
    requests: list[tuple[str, str, str, Any, list[int], str]] = [
        ("thing", "image", "FP32", np.linspace(0, 1, 2 * 768, dtype=np.float32), [2, 3, 16, 16], "logits"),
        ("small", "pixels", "UINT8", np.linspace(0, 255, 2 * 768).astype(np.uint8), [2, 16, 16, 3], ""),
    ]
    for (model, name, datatype, values, shape, output), key in zip(
        requests, ("float", "pixels"), strict=True
    ):
        tensor = {"name": name, "datatype": datatype, "shape": shape, "data": values.tolist()}
        body = {"inputs": [tensor], "outputs": [{"name": output}] if output else None}
        reply = grpc_server.client.post(f"/v2/models/{model}/infer", json=body).json()["outputs"][0]
        assert np.allclose(np.ravel(answers["sync"][key][reply["name"]]), reply["data"], atol=1e-6)


def test_statistics_count_requests_of_both_protocols(answers: Any) -> None:
    (statistics,) = answers["sync"]["statistics"]["model_stats"]
    assert statistics["name"] == "small" and int(statistics["inference_stats"]["success"]["count"]) >= 4
    assert int(statistics["inference_stats"]["compute_infer"]["ns"]) > 0
    names = {one["name"] for one in answers["sync"]["all_statistics"]["model_stats"]}
    assert names == {"small", "thing"}


def test_errors_have_status_codes_and_the_messages_of_http(grpc_server: Server, answers: Any) -> None:
    def post(model: str, image: bytes = IMAGES[0], **rest: Any) -> str:
        content = len(image).to_bytes(4, "little") + image
        head = f'{{"inputs": [{{"name": "image", "shape": [1], "datatype": "BYTES"}}]{rest.get("more", "")}}}'
        headers = {"Inference-Header-Content-Length": str(len(head))}
        reply = grpc_server.client.post(
            f"/v2/models/{model}/infer", content=head.encode() + content, headers=headers
        )
        message: str = reply.json()["error"]
        return message

    errors = answers["sync"]["errors"]
    assert errors["unknown model"] == ["StatusCode.NOT_FOUND", post("nothing")]
    assert errors["bad image"] == ["StatusCode.INVALID_ARGUMENT", post("small", b"no image")]
    unknown_output = post("small", more=', "outputs": [{"name": "x"}]')
    assert errors["unknown output"] == ["StatusCode.INVALID_ARGUMENT", unknown_output]
    assert errors["load"][0] == "StatusCode.PERMISSION_DENIED" and "FOVEA_MANAGEMENT" in errors["load"][1]
    # gRPC would unpack a compressed message before it looks at the limit.
    assert errors["compressed"][0] == "StatusCode.UNIMPLEMENTED"
    assert errors["shared memory"][0] == "StatusCode.UNIMPLEMENTED"


def test_requests_are_counted_and_logged_as_grpc(grpc_server: Server, answers: Any) -> None:
    route = "/inference.GRPCInferenceService/ModelInfer"
    labels = {"protocol": "grpc", "route": route, "model": "small"}
    assert grpc_server.read_metric("fovea_requests_total", status="200", **labels) >= 24
    assert grpc_server.read_metric("fovea_requests_total", status="415", **labels) == 1
    assert grpc_server.read_metric("fovea_requests_total", status="400", **labels) == 1
    unmatched = {"protocol": "grpc", "route": "unmatched", "status": "405"}
    assert grpc_server.read_metric("fovea_requests_total", **unmatched) == 1


@pytest.mark.long
def test_models_are_unloaded_and_loaded(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_GRPC_PORT="0", FOVEA_MANAGEMENT="true") as server:
        before, unloaded, loaded, error = run_triton("manage", address=grpc_address(server))["manage"]
    assert (before, unloaded, loaded) == (True, False, True)
    assert error[0] == "StatusCode.NOT_FOUND" and "has no model 'nothing'" in error[1]
