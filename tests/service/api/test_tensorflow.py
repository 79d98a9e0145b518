"""TensorFlow Serving's protocol, with clients like those in its documentation, which use `requests`."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from fovea.service.artifact.contract import Task
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.servers import Server

PICTURES = [make_jpeg(seed=number) for number in range(3)]
IMAGES = [{"b64": base64.b64encode(picture).decode()} for picture in PICTURES]
IMAGE = IMAGES[0]
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8).tolist()
"""Pixels in the form that the small model takes."""

PREDICT = "/v1/models/small:predict"
CLASSIFY = "/v1/models/small:classify"


def native_probabilities(server: Server, picture: bytes, name: str = "small") -> dict[str, float]:
    """Return the probability of every label, highest first."""
    reply = server.client.post(f"/v1/models/{name}/classify?top_k=0", content=picture).json()
    return {prediction["label"]: prediction["probability"] for prediction in reply["predictions"]}


def probability_rows(server: Server, *pictures: bytes) -> list[list[float]]:
    """Return the probability of every label, in the model's order."""
    labels = server.client.get("/v1/models/small/contract").json()["labels"]
    return [[native_probabilities(server, picture)[label] for label in labels] for picture in pictures]


def post_json(server: Server, body: Any, path: str = PREDICT) -> requests.Response:
    """Send the body as in TensorFlow's documentation: a string, and no content type."""
    return requests.post(server.url + path, data=json.dumps(body), timeout=30)


@pytest.mark.parametrize("path", [PREDICT, "/v1/models/small/versions/1:predict"])
@pytest.mark.parametrize(
    "instances",
    [
        IMAGES,
        [{"image_bytes": image} for image in IMAGES],
        [{"data": image["b64"]} for image in IMAGES],
    ],
)
def test_row_format_returns_predictions(server: Server, path: str, instances: list[Any]) -> None:
    reply = post_json(server, {"signature_name": "serving_default", "instances": instances}, path)
    assert reply.status_code == 200, reply.text
    assert reply.json() == {"predictions": probability_rows(server, *PICTURES)}


@pytest.mark.parametrize("inputs", [IMAGES, {"image_bytes": IMAGES}])
def test_column_format_returns_outputs(server: Server, inputs: Any) -> None:
    assert post_json(server, {"inputs": inputs}).json() == {"outputs": probability_rows(server, *PICTURES)}


@pytest.mark.parametrize("inputs", [IMAGE, {"image": IMAGE}])
def test_single_image_in_column_format_is_read(server: Server, inputs: Any) -> None:
    assert post_json(server, {"inputs": inputs}).json() == {"outputs": probability_rows(server, PICTURES[0])}


@pytest.mark.parametrize(
    "body",
    [
        {"instances": [PIXELS, PIXELS]},
        {"instances": [{"pixels": PIXELS}, {"pixels": PIXELS}]},
        {"signature_name": "pixels", "instances": [PIXELS, PIXELS]},
        {"inputs": [PIXELS, PIXELS]},
        {"inputs": {"pixels": [PIXELS, PIXELS]}},
    ],
)
def test_numbers_are_read_as_pixels(server: Server, body: Any) -> None:
    """A PNG of the model's own size becomes the same pixels."""
    file = BytesIO()
    Image.fromarray(np.array(PIXELS, np.uint8)).save(file, "PNG")
    expected = probability_rows(server, file.getvalue(), file.getvalue())
    assert next(iter(post_json(server, body).json().values())) == expected


def test_classify_returns_labels_and_probabilities(server: Server) -> None:
    reply = post_json(server, {"examples": [{"image": image} for image in IMAGES]}, CLASSIFY)
    expected = [[[*pair] for pair in native_probabilities(server, picture).items()] for picture in PICTURES]
    assert reply.json() == {"result": expected}
    context_reply = post_json(server, {"context": {"image": IMAGE}, "examples": [{}, {}]}, CLASSIFY)
    assert context_reply.json() == {"result": [expected[0], expected[0]]}


@pytest.fixture(scope="module")
def tasks_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("tasks")
    add_to_repository(build_model(Task.BINARY, ("no", "yes")), root, "binary")
    add_to_repository(build_model(Task.MULTILABEL), root, "tags")
    with Server(FOVEA_MODELS=str(root), FOVEA_DEFAULT_MODEL="tags") as server:
        yield server


@pytest.mark.parametrize("name", ["binary", "tags"])
def test_binary_and_multilabel_models_are_classified(tasks_server: Server, name: str) -> None:
    reply = post_json(tasks_server, {"examples": [{"image": IMAGE}]}, f"/v1/models/{name}:classify").json()
    assert dict(reply["result"][0]) == native_probabilities(tasks_server, PICTURES[0], name)


@pytest.mark.long
def test_status_lists_the_versions(tmp_path: Path) -> None:
    add_to_repository(build_model(), tmp_path)
    shutil.copytree(tmp_path / "small" / "1", tmp_path / "small" / "2")
    (tmp_path / "small" / "config.toml").write_text('versions = ["1", "2"]')
    with Server(FOVEA_MODELS=str(tmp_path), FOVEA_MODELS_LOADED="1") as server:
        statuses = requests.get(f"{server.url}/v1/models/small", timeout=30).json()["model_version_status"]
        assert [(status["version"], status["state"]) for status in statuses] == [
            ("1", "AVAILABLE"),
            ("2", "AVAILABLE"),
        ]
        assert [status["status"]["error_code"] for status in statuses] == ["OK", "OK"]
        assert [bool(status["status"]["error_message"]) for status in statuses] == [True, False]
        model_reply = requests.get(f"{server.url}/v1/models/small", timeout=30).json()
        assert (model_reply["name"], model_reply["ready"]) == ("small", True)  # read by KServe's clients
        version_reply = requests.get(f"{server.url}/v1/models/small/versions/1", timeout=30).json()
        assert version_reply["model_version_status"] == statuses[:1]
        assert requests.get(f"{server.url}/v1/models/small/versions/3", timeout=30).status_code == 404


def test_metadata_describes_the_signatures(server: Server) -> None:
    for path in ("/v1/models/small/metadata", "/v1/models/small/versions/1/metadata"):
        reply = requests.get(server.url + path, timeout=30).json()
        assert reply["model_spec"] == {"name": "small", "signature_name": "", "version": "1"}
        signature = reply["metadata"]["signature_def"]["signature_def"]["serving_default"]
        assert signature["inputs"]["image_bytes"]["dtype"] == "DT_STRING"
        pixels = reply["metadata"]["signature_def"]["signature_def"]["pixels"]["inputs"]["pixels"]
        assert pixels["dtype"] == "DT_UINT8"
        assert [dimension["size"] for dimension in pixels["tensor_shape"]["dim"]] == ["-1", "16", "16", "3"]
        sizes = [
            dimension["size"] for dimension in signature["outputs"]["probabilities"]["tensor_shape"]["dim"]
        ]
        assert sizes == ["-1", "4"]


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "either"),
        ([], "the body"),
        ({"instances": IMAGES, "inputs": IMAGES}, "either"),
        ({"instances": []}, "instances"),
        ({"instances": IMAGE}, "instances"),
        (
            {"instances": [[[1]]]},
            "instances.0 has shape [1, 1]; the model takes 'pixels' of shape [16, 16, 3]",
        ),
        ({"instances": [[]]}, "instances.0 has shape [0]"),
        ({"instances": [{"pixels": [[[1]]]}]}, "'pixels'"),
        ({"instances": [{"pixels": IMAGES}]}, "'pixels'"),
        ({"instances": [PIXELS, IMAGE]}, "'pixels'"),
        ({"instances": [[[[300] * 3] * 16] * 16]}, "UINT8"),
        ({"instances": [[[[-1] * 3] * 16] * 16]}, "UINT8"),
        ({"instances": [[[[0.5] * 3] * 16] * 16]}, "UINT8"),
        ({"instances": [[[[None] * 3] * 16] * 16]}, "UINT8"),
        ({"instances": [{}]}, "instances.0 has 0 inputs"),
        ({"instances": [{"a": IMAGE, "b": IMAGE}]}, "instances.0 has 2 inputs"),
        ({"instances": [3]}, "instances.0 is not an image"),
        ({"instances": ["text"]}, "instances.0 is not an image"),
        ({"instances": [IMAGE, {"b64": 3}]}, "instances.1 is not an image"),
        ({"instances": [{**IMAGE, "key": 1}]}, "instances.0 is not an image"),
        ({"instances": [{"b64": "@"}]}, "instances.0.b64 is not base64"),
        ({"instances": [{"image": {"image": IMAGE}}]}, "instances.0.image is not an image"),
        ({"instances": [IMAGE] * 65}, "at most 64"),
        ({"inputs": [IMAGE] * 65}, "at most 64"),
        ({"instances": IMAGES, "signature_name": "other"}, "no signature 'other'"),
        ({"instances": IMAGES, "signature_name": 3}, "signature_name"),
        ({"instances": IMAGES, "more": 3}, "more"),
        ({"instances": IMAGES, "x" * 100_000: 3}, "xxx"),
        ({"inputs": []}, "no images"),
        ({"inputs": {}}, "inputs has 0 inputs"),
        ({"inputs": 3}, "inputs is not an image"),
        ({"inputs": {"image": []}}, "no images"),
        ({"inputs": PIXELS}, "inputs.0 has shape [16, 3]"),
        ({"inputs": None}, "either"),
    ],
)
def test_malformed_request_gets_tensorflow_error(server: Server, body: Any, message: str) -> None:
    reply = post_json(server, body)
    assert reply.status_code == 400, reply.text
    assert message in reply.json()["error"]
    assert reply.json()["code"] == "bad_request"
    assert reply.json()["request_id"] == reply.headers["x-request-id"]
    assert len(reply.content) < 2000


@pytest.mark.parametrize(
    "body", [b"", b"{", b"NaN", b'{"instances": [NaN]}', b"\xff\xfe", b'{"inputs": ' + 10_000 * b"["]
)
def test_invalid_json_is_refused(server: Server, body: bytes) -> None:
    reply = requests.post(server.url + PREDICT, data=body, timeout=30)
    assert (reply.status_code, reply.json()["code"]) == (400, "bad_request")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"examples": [{}], "context": {"a": IMAGE, "b": 1}},
        {"examples": []},
        {"examples": [3]},
        {"examples": [{"image": 3}]},
    ],
)
def test_malformed_examples_are_refused(server: Server, body: Any) -> None:
    reply = post_json(server, body, CLASSIFY)
    assert (reply.status_code, reply.json()["code"]) == (400, "bad_request")


@pytest.mark.parametrize(
    "path", ["/v1/models/large:predict", "/v1/models/large", "/v1/models/small/versions/9/metadata"]
)
def test_unknown_model_gets_404(server: Server, path: str) -> None:
    reply = (
        post_json(server, {"instances": IMAGES}, path)
        if path.endswith("predict")
        else requests.get(server.url + path, timeout=30)
    )
    assert (reply.status_code, reply.json()["code"]) == (404, "model_not_found")
    assert "there is no model" in reply.json()["error"] or "has no version" in reply.json()["error"]


def test_bad_image_gets_its_own_status(server: Server) -> None:
    nonsense = {"b64": base64.b64encode(b"nonsense").decode()}
    reply = post_json(server, {"instances": [IMAGE, nonsense]})
    assert (reply.status_code, reply.json()["code"]) == (415, "unsupported_format")
    assert reply.json()["error"].startswith("image 1: ")
