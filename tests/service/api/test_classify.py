"""`/v1/classify` on a real server: replies to good and to bad requests."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
from PIL import Image

from fovea.service.artifact.contract import Coverage, Task
from fovea.service.inference.preprocess import decode_image
from tests.graphs import (
    COVERAGE,
    SMALL_GEOMETRY,
    add_to_repository,
    build_model,
    read_contract,
    with_contract,
)
from tests.pictures import draw_picture, encode_image, make_jpeg, make_png_header
from tests.raw import Wire
from tests.servers import Server, run_service

BLACK = Image.new("RGB", (16, 16))


def post_image(server: Server, content: bytes, **options: Any) -> httpx.Response:
    return server.client.post("/v1/classify", content=content, **options)


def encode_base64(content: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(content).decode()}


def predicted_labels(reply: dict[str, Any]) -> list[str]:
    return [prediction["label"] for prediction in reply["predictions"]]


# --- good requests -------------------------------------------------------------------------------


def test_probabilities_equal_those_of_plain_onnx_runtime(server: Server, small_zoo: Path) -> None:
    image = encode_image(draw_picture(50, 40), "PNG")
    session = onnxruntime.InferenceSession(small_zoo / "small" / "1" / "model.onnx")
    pixels = decode_image(image, SMALL_GEOMETRY, max_pixels=10_000).pixels
    expected = session.run(["probabilities"], {"pixels": pixels[None]})[0][0]
    reply = post_image(server, image, params={"top_k": 0}).json()
    assert reply["model"] == {"name": "small", "version": "1"}
    assert reply["image"] == {"format": "PNG", "width": 50, "height": 40}
    probabilities = {prediction["index"]: prediction["probability"] for prediction in reply["predictions"]}
    assert [probabilities[index] for index in range(4)] == pytest.approx(expected, abs=1e-6)
    assert predicted_labels(reply) == [("ant", "bee", "cow", "dog")[index] for index in np.argsort(-expected)]


def test_all_ways_to_send_an_image_get_the_same_reply(server: Server) -> None:
    image = make_jpeg()
    client = server.client
    expected = post_image(server, image).json()
    form = "application/x-www-form-urlencoded"  # as sent by `curl --data-binary`
    for reply in (
        client.put("/v1/classify", content=image),
        client.put("/v1/classify", content=image, headers={"Content-Type": ""}),
        post_image(server, image, headers={"Content-Type": form}),
        post_image(server, image, headers={"Content-Type": "image/png"}),
        client.post("/v1/classify", files={"anything": ("a.txt", image, "text/plain")}),
        client.post("/v1/classify", json={"images": [encode_base64(image)]}),
        client.post("/v1/models/small/classify", content=image),
        client.put("/v1/models/small/versions/1/classify", content=image),
    ):
        assert reply.status_code == 200
        assert reply.json() == expected


def test_all_forms_of_file_names_are_accepted(server: Server) -> None:
    image = make_jpeg()
    expected = post_image(server, image).json()
    for name in (b'filename="a.jpg"', b"filename=a.jpg", b"filename*=UTF-8''caf%C3%A9.jpg", b'filename=""'):
        part = b"--x\r\nContent-Disposition: form-data; name=f; " + name + b"\r\n\r\n" + image + b"\r\n"
        empty_file = b'--x\r\nContent-Disposition: form-data; name=g; filename=""\r\n\r\n\r\n'
        field = b"--x\r\nContent-Disposition: form-data; name=note\r\n\r\nhello\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        reply = post_image(server, empty_file + part + field + b"--x--\r\n", headers=headers)
        assert reply.json() == expected


def test_several_images_keep_their_order_and_own_errors(server: Server) -> None:
    images = [
        make_jpeg(seed=1),
        b"not an image",
        make_jpeg(seed=2),
        make_jpeg()[:300],
        make_jpeg(seed=3),
        make_png_header(50_000, 50_000),
    ]
    single_replies = [post_image(server, image).json() for image in images]
    errors_before = server.read_metric("fovea_errors_total", reason="bad_image")
    for reply in (
        server.client.post("/v1/classify", files=[("f", ("x", image)) for image in images]),
        server.client.post("/v1/classify", json={"images": [encode_base64(image) for image in images]}),
    ):
        assert reply.status_code == 200
        results = reply.json()["results"]
        for single_reply, result in zip(single_replies, results, strict=True):
            assert result.get("predictions") == single_reply.get("predictions")
        assert [result.get("error", {}).get("code") for result in results] == [
            None, "unsupported_format", None, "bad_image", None, "too_many_pixels",
        ]  # fmt: skip
    assert server.read_metric("fovea_errors_total", reason="bad_image") == errors_before + 2


def test_top_k_and_threshold_limit_the_predictions(server: Server) -> None:
    image = make_jpeg()
    all_predictions = post_image(server, image, params={"top_k": 0}).json()["predictions"]
    probabilities = [prediction["probability"] for prediction in all_predictions]
    assert probabilities == sorted(probabilities, reverse=True)
    assert len(all_predictions) == 4
    assert post_image(server, image, params={"top_k": 2}).json()["predictions"] == all_predictions[:2]
    assert post_image(server, image, params={"top_k": 10**6}).json()["predictions"] == all_predictions
    likely_predictions = post_image(server, image, params={"threshold": probabilities[1]}).json()[
        "predictions"
    ]
    assert likely_predictions == all_predictions[:2]
    assert post_image(server, image, params={"threshold": 1}).json()["predictions"] == []
    body = {"images": [encode_base64(image)], "top_k": 1, "threshold": 0}
    reply = server.client.post("/v1/classify", params={"top_k": 3, "threshold": 1}, json=body)
    assert reply.json()["predictions"] == all_predictions[:1]


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_extreme_shapes_are_classified(server: Server, size: tuple[int, int]) -> None:
    reply = post_image(server, encode_image(draw_picture(*size), "PNG"))
    assert reply.status_code == 200
    assert (reply.json()["image"]["width"], reply.json()["image"]["height"]) == size


@pytest.fixture(scope="module")
def tasks_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("tasks")
    add_to_repository(build_model(Task.BINARY, ("cat", "dog")), root, "pets")
    add_to_repository(build_model(Task.MULTILABEL, ("sun", "sea", "sand")), root, "beach")
    add_to_repository(build_model(Task.MULTICLASS), root, "animals", "3")
    add_to_repository(build_model(Task.MULTICLASS), root, "animals", "12")
    with Server(FOVEA_MODELS=str(root)) as server:
        yield server


def test_binary_and_multilabel_replies_mark_selected_labels(tasks_server: Server) -> None:
    pets = tasks_server.client.post("/v1/models/pets/classify", content=make_jpeg()).json()["predictions"]
    assert {prediction["label"] for prediction in pets} == {"cat", "dog"}
    assert sum(prediction["probability"] for prediction in pets) == pytest.approx(1)
    beach = tasks_server.client.post("/v1/models/beach/classify", content=make_jpeg()).json()["predictions"]
    assert [prediction["selected"] for prediction in beach] == [
        prediction["probability"] >= 0.5 for prediction in beach
    ]
    assert [prediction["selected"] for prediction in pets] == [
        prediction["probability"] >= 0.5 for prediction in pets
    ]
    animals = tasks_server.client.post("/v1/models/animals/classify", content=make_jpeg()).json()[
        "predictions"
    ]
    assert "selected" not in animals[0]


@pytest.mark.long
def test_selection_uses_thresholds_of_the_model(tmp_path: Path) -> None:
    """The image and the weights are the same; only the contracts differ."""
    pets, beach = (
        build_model(Task.BINARY, ("cat", "dog")),
        build_model(Task.MULTILABEL, ("sun", "sea", "sand")),
    )
    models = {"dogs": (pets, (0.0,)), "cats": (pets, (1.0,)), "beach": (beach, (0.0, 1.0, 0.5))}
    for name, (graph, thresholds) in models.items():
        add_to_repository(
            with_contract(graph, replace(read_contract(graph), thresholds=thresholds)), tmp_path, name
        )
    with Server(FOVEA_MODELS=str(tmp_path)) as server:
        for seed in range(8):
            replies = {
                name: server.client.post(f"/v1/models/{name}/classify", content=make_jpeg(seed=seed)).json()
                for name in models
            }
            for name, label in (("dogs", "dog"), ("cats", "cat")):
                assert [
                    prediction["label"]
                    for prediction in replies[name]["predictions"]
                    if prediction["selected"]
                ] == [label]
            for prediction in replies["beach"]["predictions"]:
                assert prediction["selected"] is (
                    prediction["probability"] >= models["beach"][1][prediction["index"]]
                )


# --- label sets ----------------------------------------------------------------------------------


def expected_set(predictions: list[dict[str, Any]], level: float) -> dict[str, Any]:
    """Return the label set by its definition, from all probabilities of an answer."""
    quantile = next(entry.quantile for entry in COVERAGE if entry.level == level)
    set_labels = [
        prediction["label"] for prediction in predictions if 1 - prediction["probability"] <= quantile
    ]
    return {
        "level": level,
        "labels": set_labels,
        "abstain": not 1 <= len(set_labels) <= len(predictions) // 2,
    }


@pytest.mark.parametrize("level", [entry.level for entry in COVERAGE])
def test_coverage_returns_label_set_of_stored_quantile(server: Server, level: float) -> None:
    for seed in range(12):
        image = make_jpeg(seed=seed)
        all_predictions = post_image(server, image, params={"top_k": 0}).json()["predictions"]
        reply = post_image(server, image, params={"top_k": 1, "threshold": 1, "coverage": level}).json()
        assert reply["coverage"] == expected_set(all_predictions, level)
        assert "coverage" not in post_image(server, image).json()


def test_empty_and_large_label_sets_abstain(server: Server) -> None:
    """The images were chosen so that each kind of set occurs: empty, of one label, and too large."""
    label_sets = [
        post_image(server, make_jpeg(seed=seed), params={"coverage": level}).json()["coverage"]
        for seed in range(40)
        for level in (0.5, 0.95)
    ]
    abstain_by_size = {len(label_set["labels"]): label_set["abstain"] for label_set in label_sets}
    assert abstain_by_size[0] is True
    assert abstain_by_size[1] is False
    assert abstain_by_size[max(abstain_by_size)] is (max(abstain_by_size) > 2)
    assert max(abstain_by_size) > 2


@pytest.mark.long
@pytest.mark.parametrize(("count", "widest"), [(14, 5), (9, 4), (10, 5), (2, 1)])
def test_set_above_five_or_half_of_all_labels_abstains(tmp_path: Path, count: int, widest: int) -> None:
    """The logits of a black image are the biases, so that no probability is near 0 or 1."""
    graph, black = (
        build_model(labels=[f"label {index}" for index in range(count)]),
        encode_image(BLACK, "PNG"),
    )
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    pixels = decode_image(black, SMALL_GEOMETRY, max_pixels=10_000).pixels
    probabilities = sorted(session.run(["probabilities"], {"pixels": pixels[None]})[0][0].tolist())[::-1]
    coverages = [Coverage((size + 1) / 100, 1 - probabilities[size - 1] + 1e-6) for size in range(1, count)]
    add_to_repository(
        with_contract(graph, replace(read_contract(graph), coverage=tuple(coverages))), tmp_path
    )
    with Server(FOVEA_MODELS=str(tmp_path)) as server:
        for size, coverage in enumerate(coverages, 1):
            label_set = post_image(server, black, params={"coverage": coverage.level}).json()["coverage"]
            assert (len(label_set["labels"]), label_set["abstain"]) == (size, size > widest)


def test_coverage_levels_are_compared_as_numbers(server: Server) -> None:
    for text in ("0.95", "0.950", "95e-2", "0.9500000000001"):
        reply = server.client.post(f"/v1/classify?coverage={text}", content=make_jpeg())
        assert reply.json()["coverage"]["level"] == 0.95
    for text, bound in (("0", "more than 0.0"), ("1", "less than 1.0")):
        range_reply = server.client.post(f"/v1/classify?coverage={text}", content=make_jpeg())
        assert range_reply.json()["error"]["message"] == f"coverage: it must be {bound}"
    level_reply = server.client.post("/v1/classify?coverage=0.9500001", content=make_jpeg())
    assert level_reply.json()["error"]["message"] == "coverage 0.9500001 is not one of 0.5, 0.9, 0.95"


@pytest.mark.parametrize("is_chunked", [False, True])
def test_coverage_in_body_overrides_the_query(server: Server, is_chunked: bool) -> None:
    content = json.dumps({"images": [encode_base64(make_jpeg())], "coverage": 0.9}).encode()
    expected = post_image(server, make_jpeg(), params={"coverage": 0.9}).json()
    body: Any = iter([content]) if is_chunked else content
    headers = {"Content-Type": "application/json"}
    assert post_image(server, body, params={"coverage": 0.91}, headers=headers).json() == expected


def test_unknown_coverage_is_refused_before_a_raw_body(server: Server) -> None:
    with Wire(server.url) as wire:
        wire.send(
            b"PUT /v1/classify?coverage=0.91 HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\nstalled"
        )
        assert wire.read_response().status == 400


def test_each_image_has_its_own_label_set(server: Server) -> None:
    images = [make_jpeg(seed=1), b"not an image", make_jpeg(seed=2)]
    single_sets = [
        post_image(server, image, params={"coverage": 0.9}).json().get("coverage") for image in images
    ]
    form_reply = server.client.post(
        "/v1/classify", params={"coverage": 0.9}, files=[("f", ("x", image)) for image in images]
    )
    json_body = {"images": [encode_base64(image) for image in images], "coverage": 0.9}
    json_reply = server.client.post("/v1/classify", params={"coverage": 0.5}, json=json_body)
    for reply in (form_reply, json_reply):
        assert [result.get("coverage") for result in reply.json()["results"]] == single_sets
    chunked_reply = post_image(server, iter([images[0]]), params={"coverage": 0.9})  # type: ignore[arg-type]  # past the fast path
    assert chunked_reply.json()["coverage"] == single_sets[0]


@pytest.mark.parametrize("body_kind", ["raw", "json", "chunked"])
def test_unknown_coverage_error_lists_the_levels(server: Server, body_kind: str) -> None:
    image = make_jpeg()
    if body_kind == "json":
        reply = server.client.post("/v1/classify", json={"images": [encode_base64(image)], "coverage": 0.91})
    else:
        content: Any = image if body_kind == "raw" else iter([image])
        reply = post_image(server, content, params={"coverage": 0.91})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")
    assert reply.json()["error"]["message"] == "coverage 0.91 is not one of 0.5, 0.9, 0.95"


@pytest.mark.long
def test_model_without_label_sets_names_the_reason(tasks_server: Server, tmp_path: Path) -> None:
    reply = tasks_server.client.post("/v1/models/beach/classify?coverage=0.9", content=make_jpeg())
    assert reply.status_code == 400
    assert "each label is `selected` or not" in reply.json()["error"]["message"]
    graph = build_model()
    add_to_repository(with_contract(graph, replace(read_contract(graph), coverage=())), tmp_path)
    with Server(FOVEA_MODELS=str(tmp_path)) as server:
        reply = server.client.post("/v1/classify?coverage=0.9", content=make_jpeg())
    assert reply.status_code == 400
    assert "no label sets were measured for this model" in reply.json()["error"]["message"]


# --- model selection -----------------------------------------------------------------------------


@pytest.mark.long
def test_default_file_selects_the_default_model(tmp_path: Path) -> None:
    add_to_repository(build_model(), tmp_path, "first")
    add_to_repository(build_model(Task.BINARY, ("cat", "dog")), tmp_path, "second")
    (tmp_path / "default").write_text("second\n")
    with Server(FOVEA_MODELS=str(tmp_path)) as server:
        assert post_image(server, make_jpeg()).json()["model"]["name"] == "second"
    with Server(FOVEA_MODELS=str(tmp_path), FOVEA_DEFAULT_MODEL="first") as server:
        assert post_image(server, make_jpeg()).json()["model"]["name"] == "first"
    (tmp_path / "default").write_text("third\n")
    result = run_service(FOVEA_MODELS=str(tmp_path), FOVEA_STRICT="true")
    assert result.returncode == 2
    assert f"{tmp_path}/default is 'third'; there are first, second" in result.stderr


def test_newest_version_is_served_and_no_default_is_guessed(tasks_server: Server) -> None:
    assert f"{tasks_server.url}/v1/models/animals/classify" in tasks_server.greeting
    models = {model["name"]: model for model in tasks_server.client.get("/v1/models").json()["models"]}
    assert models["animals"] == {
        "name": "animals", "version": "12", "task": "multiclass", "labels": 4, "default": False,
        "embedding": {"dimension": 8},
    }  # fmt: skip
    reply = tasks_server.client.post("/v1/classify", content=make_jpeg())
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert "animals, beach, pets" in reply.json()["error"]["message"]
    assert tasks_server.client.post("/v1/models/animals/versions/3/classify", content=b"").status_code == 404


def test_json_without_content_type_gets_a_hint(server: Server) -> None:
    reply = server.client.post("/v1/classify", content=b'{"images": []}')
    assert (reply.status_code, "Content-Type: application/json" in reply.text) == (415, True)
    assert "Content-Type" not in server.client.post("/v1/classify", content=b"hello").text


# --- bad requests --------------------------------------------------------------------------------

FILE_PART = b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n'
BAD_REQUESTS: dict[str, tuple[str, str, dict[str, Any], int, str]] = {
    "empty body": ("POST", "/v1/classify", {"content": b""}, 400, "bad_request"),
    "text": ("POST", "/v1/classify", {"content": b"hello"}, 415, "unsupported_format"),
    "zip named .jpg": (
        "POST",
        "/v1/classify",
        {"files": {"file": ("cat.jpg", b"PK\x03\x04" + bytes(50))}},
        415,
        "unsupported_format",
    ),
    "jpeg xl": (
        "PUT",
        "/v1/classify",
        {"content": b"\xff\x0a" + bytes(50)},
        415,
        "unsupported_format",
    ),
    "truncated JPEG": ("POST", "/v1/classify", {"content": make_jpeg()[:-400]}, 422, "bad_image"),
    "truncated PNG": (
        "POST",
        "/v1/classify",
        {"content": encode_image(draw_picture(60, 60), "PNG")[:-400]},
        422,
        "bad_image",
    ),
    "bomb": ("POST", "/v1/classify", {"content": make_png_header(50_000, 50_000)}, 413, "too_many_pixels"),
    "body over the limit": ("POST", "/v1/classify", {"content": bytes(1_000_001)}, 413, "body_too_large"),
    "chunked body over the limit": (
        "POST",
        "/v1/classify",
        {"content": (bytes(100_000) for _ in range(20))},
        413,
        "body_too_large",
    ),
    "bad base64": ("POST", "/v1/classify", {"json": {"images": [{"b64": "%%%"}]}}, 400, "bad_request"),
    "bad JSON": (
        "POST",
        "/v1/classify",
        {"content": b"{", "headers": {"Content-Type": "application/json"}},
        400,
        "bad_request",
    ),
    "deep JSON": (
        "POST",
        "/v1/classify",
        {"content": b"[" * 10_000, "headers": {"Content-Type": "application/json"}},
        400,
        "bad_request",
    ),
    "JSON of another shape": ("POST", "/v1/classify", {"json": {"image": "x"}}, 400, "bad_request"),
    "no images": ("POST", "/v1/classify", {"json": {"images": []}}, 400, "bad_request"),
    "empty image in JSON": ("POST", "/v1/classify", {"json": {"images": [{"b64": ""}]}}, 400, "bad_request"),
    "too many images": (
        "POST",
        "/v1/classify",
        {"json": {"images": [{"b64": ""}] * 65}},
        400,
        "bad_request",
    ),
    "no file field": (
        "POST",
        "/v1/classify",
        {
            "content": b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n',
            "headers": {"Content-Type": "multipart/form-data; boundary=x"},
        },
        400,
        "bad_request",
    ),
    "no boundary": (
        "POST",
        "/v1/classify",
        {"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}},
        400,
        "bad_request",
    ),
    "rubbish multipart": (
        "POST",
        "/v1/classify",
        {"content": b"rubbish", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        400,
        "bad_request",
    ),
    "multipart that stops in its second file": (
        "POST",
        "/v1/classify",
        {
            "content": 2 * (FILE_PART + make_jpeg() + b"\r\n"),
            "headers": {"Content-Type": "multipart/form-data; boundary=x"},
        },
        400,
        "bad_request",
    ),
    "a boundary that is too long": (
        "POST",
        "/v1/classify",
        {"content": b"--x", "headers": {"Content-Type": f"multipart/form-data; boundary={'x' * 1000}"}},
        400,
        "bad_request",
    ),
    "top_k of another type": (
        "POST",
        "/v1/classify",
        {"json": {"images": [{"b64": "AA=="}], "top_k": "3"}},
        400,
        "bad_request",
    ),
    "unknown parameter": ("POST", "/v1/classify?topk=3", {"content": make_jpeg()}, 400, "bad_request"),
    "wrong method on a file": ("POST", "/docs/swagger/start.js", {}, 405, "method_not_allowed"),
    "unknown model": ("POST", "/v1/models/none/classify", {"content": make_jpeg()}, 404, "model_not_found"),
    "unknown version": (
        "POST",
        "/v1/models/small/versions/2/classify",
        {"content": make_jpeg()},
        404,
        "model_not_found",
    ),
    "top_k below 0": ("POST", "/v1/classify?top_k=-1", {"content": make_jpeg()}, 400, "bad_request"),
    "top_k in words": ("POST", "/v1/classify?top_k=many", {"content": make_jpeg()}, 400, "bad_request"),
    "threshold above 1": ("POST", "/v1/classify?threshold=1.1", {"content": make_jpeg()}, 400, "bad_request"),
    "coverage 1": ("POST", "/v1/classify?coverage=1", {"content": make_jpeg()}, 400, "bad_request"),
    "coverage nan": ("POST", "/v1/classify?coverage=nan", {"content": make_jpeg()}, 400, "bad_request"),
    "coverage word": ("POST", "/v1/classify?coverage=high", {"content": make_jpeg()}, 400, "bad_request"),
    "threshold nan": ("POST", "/v1/classify?threshold=nan", {"content": make_jpeg()}, 400, "bad_request"),
    "unknown path": ("GET", "/v3/nothing", {}, 404, "not_found"),
    "wrong method": ("DELETE", "/v1/classify", {}, 405, "method_not_allowed"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request_gets_an_error_and_is_counted(server: Server, case: str) -> None:
    method, path, options, status, code = BAD_REQUESTS[case]
    errors_before = (
        server.read_metric("fovea_errors_total", reason=code),
        server.read_metric("fovea_errors_total"),
    )
    replies_before = server.read_metric("fovea_requests_total", status=str(status))
    reply = server.client.request(method, path, **options)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error["code"] == code
    assert error["message"]
    assert error["request_id"] == reply.headers["X-Request-ID"]
    errors_after = (
        server.read_metric("fovea_errors_total", reason=code),
        server.read_metric("fovea_errors_total"),
    )
    assert errors_after == (errors_before[0] + 1, errors_before[1] + 1)
    assert server.read_metric("fovea_requests_total", status=str(status)) == replies_before + 1
    assert post_image(server, make_jpeg()).status_code == 200


def test_messages_name_the_limit_and_its_setting(server: Server) -> None:
    def read_message(content: bytes) -> str:
        return str(post_image(server, content).json()["error"]["message"])

    assert read_message(make_png_header(50_000, 50_000)) == "image is 50000 x 50000 px; at most 50 MP"
    assert read_message(bytes(1_000_001)) == "the body has more than 1000000 bytes (FOVEA_BODY_BYTES)"


def test_wrong_method_reply_lists_allowed_methods(server: Server) -> None:
    assert server.client.delete("/v1/classify").headers["Allow"] == "POST, PUT"
    assert server.client.post("/metrics").headers["Allow"] == "GET, HEAD"
    assert server.client.post("/docs/swagger/start.js").headers["Allow"] == "GET, HEAD"


def test_expect_continue_is_refused_for_a_large_body(server: Server) -> None:
    with Wire(server.url) as wire:
        wire.send(
            b"PUT /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert wire.read_response().status == 413


def test_disconnected_client_is_counted(server: Server) -> None:
    count_before = server.read_metric("fovea_errors_total", reason="client_left")
    with Wire(server.url) as wire:
        wire.send(b"PUT /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\nhalf")
    counts = (server.read_metric("fovea_errors_total", reason="client_left") for _ in range(1000))
    assert next(count for count in counts if count != count_before) == count_before + 1


def test_valid_request_id_is_kept_and_invalid_one_replaced(server: Server) -> None:
    reply = server.client.get("/health/live", headers={"X-Request-ID": "abc-123"})
    assert reply.headers["X-Request-ID"] == "abc-123"
    for invalid_id in ("a b", "x" * 129, ""):
        new_id = server.client.get("/health/live", headers={"X-Request-ID": invalid_id}).headers[
            "X-Request-ID"
        ]
        assert new_id != invalid_id
        assert len(new_id) == 32


def test_large_declared_body_is_refused_before_it_is_sent(server: Server) -> None:
    with Wire(server.url) as wire:
        wire.send(b"PUT /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\nstalled")
        assert wire.read_response().status == 413


@pytest.mark.long
def test_damaged_bodies_do_not_fill_the_log(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo)) as server:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        for content in (b"rubbish", b"--x\r\n: \r\n", b"--x"):
            assert post_image(server, content, headers=headers).status_code == 400
        post_image(server, encode_image(draw_picture(40, 40), "TIFF")[:-100])
    first_event, *events = [json.loads(line)["event"] for line in server.log.splitlines()]
    assert first_event.startswith("model small version 1")
    assert events == ["request"] * 4


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.long
def test_slow_body_gets_408(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_BODY_TIMEOUT="0.2") as server:
        with Wire(server.url) as wire:
            wire.send(b"PUT /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n\xff")
            assert wire.read_response().status == 408
        assert server.read_metric("fovea_errors_total", reason="body_timeout") == 1


def test_images_beyond_the_queue_get_503(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_QUEUE_IMAGES="2", FOVEA_REQUEST_IMAGES="2") as server:
        assert post_image(server, make_jpeg()).status_code == 200
        body = {"images": [encode_base64(make_jpeg(2000, 2000))] * 2}
        with ThreadPoolExecutor(8) as clients:
            replies = list(clients.map(lambda _: server.client.post("/v1/classify", json=body), range(24)))
        assert {reply.status_code for reply in replies} == {200, 503}
        for reply in replies:
            if reply.status_code == 503:
                assert reply.json()["error"]["code"] == "overloaded"
                assert int(reply.headers["Retry-After"]) >= 1
        assert server.read_metric("fovea_images_in_flight") == 0
        assert post_image(server, make_jpeg()).status_code == 200
