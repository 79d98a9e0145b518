"""The routes `explain`, `layers`, `maps` and `weights` on a real server."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from PIL import Image

from fovea.bench.processes import measure_own_cpu_seconds
from fovea.export.importer.inspect import ImportRequest
from fovea.export.importer.pipeline import import_model
from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
from fovea.service.artifact.geometry import Geometry, Interpolation, PixelPath
from fovea.service.inference.preprocess import decode_image
from tests import tokens
from tests.graphs import SMALL_GEOMETRY as SMALL_GEOMETRY
from tests.graphs import add_to_repository, build_model, build_unopenable, read_contract
from tests.pictures import draw_picture, encode_image, make_jpeg
from tests.raw import Wire
from tests.servers import Server, is_running, wait_until
from tests.vgg import LABELS, build_vgg

PHOTO = make_jpeg(200, 120)
SMALL = "/v1/models/small"
VGG = "/v1/models/vgg"
LONG = "/v1/models/large/explain?method=occlusion&samples=8000"
"""A request for an explanation that no processor finishes before its time limit."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small`, which has class activation maps, and `vgg` and `tokens`, which came as ONNX files."""
    folder = tmp_path_factory.mktemp("explained")
    zoo = add_to_repository(build_model(), folder / "zoo")
    for name, graph, words in (
        ("vgg", build_vgg(), LABELS),
        ("tokens", tokens.build_token_network(), tokens.LABELS),
    ):
        file, labels = folder / f"{name}.onnx", folder / f"{name}.txt"
        onnx.save(graph, file)
        labels.write_text("\n".join(words))
        import_model(ImportRequest(file, labels, name, zoo, PreprocessingOptions(preset=IMAGENET)))
    large = Geometry.cropped(160, 160, 160, Interpolation.BILINEAR, PixelPath.FAST)
    add_to_repository(build_model(geometry=large), zoo, "large")
    (zoo / "default").write_text("small")
    return zoo


@pytest.fixture(scope="module")
def explain_server(zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_BODY_BYTES="1000000") as server:
        yield server


def post_explain(server: Server, content: bytes = PHOTO, path: str = "/v1/explain", **query: Any) -> Any:
    reply = server.client.post(path, content=content, params=query)
    assert reply.status_code == 200, reply.text
    return reply.json()


def status_and_code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def read_array(reply: httpx.Response) -> npt.NDArray[np.float32]:
    assert reply.status_code == 200, reply.text
    assert reply.headers["Content-Type"] == "application/x-npy"
    values = np.load(BytesIO(reply.content))
    assert values.dtype == np.float32
    return np.asarray(values)


def fetch_layers(server: Server, model: str = SMALL) -> list[dict[str, Any]]:
    return list(server.client.get(f"{model}/layers").json()["layers"])


def explainer_pids(server: Server) -> set[int]:
    """Return the explaining processes: children of the service that are not runners."""
    return server.child_pids("explain.process")


# --- heat maps -----------------------------------------------------------------------------------


def test_explanation_agrees_with_classify(explain_server: Server) -> None:
    expected = explain_server.client.post("/v1/classify?top_k=3", content=PHOTO).json()
    reply = post_explain(explain_server, top_k=3)
    assert reply["model"] == expected["model"]
    assert reply["image"] == expected["image"]
    assert [prediction["label"] for prediction in reply["predictions"]] == [
        prediction["label"] for prediction in expected["predictions"]
    ]
    best = expected["predictions"][0]
    assert (reply["label"], reply["index"]) == (best["label"], best["index"])
    assert reply["probability"] == pytest.approx(best["probability"], abs=1e-5)
    assert (reply["method"], reply["samples"], reply["note"]) == ("cam", 0, None)


def test_heatmap_has_the_shape_of_the_photo(explain_server: Server) -> None:
    heatmap = post_explain(explain_server)["heatmap"]
    values = np.array(heatmap["values"])
    assert values.shape == (heatmap["height"], heatmap["width"]) == (58, 96)
    assert values.min() == 0
    assert values.max() == 1
    assert not values[:, :18].any()  # outside the crop
    assert not values[:, -18:].any()


def test_every_label_can_be_explained(explain_server: Server) -> None:
    maps = {label: post_explain(explain_server, label=label) for label in ("ant", "bee", "cow", "dog")}
    assert {label: reply["label"] for label, reply in maps.items()} == {label: label for label in maps}
    assert len({json.dumps(reply["heatmap"]) for reply in maps.values()}) == 4


def test_reply_shows_the_exact_model_input(explain_server: Server, zoo: Path) -> None:
    contract = read_contract(onnx.load(zoo / "small" / "1" / "model.onnx"))
    model_input = post_explain(explain_server)["what_the_model_saw"]
    with Image.open(BytesIO(base64.b64decode(model_input["png"]))) as image:
        pixels = np.asarray(image)
    assert (pixels == decode_image(PHOTO, contract.input, max_pixels=10**6).pixels).all()
    assert (model_input["width"], model_input["height"]) == (16, 16)
    assert model_input["box"] == pytest.approx([40, 0, 160, 120], abs=5)
    assert [step["step"] for step in model_input["steps"]] == ["decode", "resize", "crop"]


def test_reply_lists_the_preprocessing_steps(explain_server: Server) -> None:
    picture = draw_picture(120, 200).convert("CMYK")
    exif = Image.Exif()
    exif[0x0112] = 6
    reply = post_explain(explain_server, encode_image(picture, "JPEG", exif=exif))
    steps = {step["step"]: step["text"] for step in reply["what_the_model_saw"]["steps"]}
    assert steps == {
        "decode": "JPEG of 120 x 200 pixels",
        "orient": "rotated upright, by EXIF orientation 6",
        "convert": "from CMYK to RGB",
        "resize": "from 200 x 120 to 26 x 16, bilinear",
        "crop": "the middle 16 x 16, 5 from the left and 0 from the top",
    }
    assert reply["image"] == {"format": "JPEG", "width": 200, "height": 120}
    assert reply["heatmap"]["width"] > reply["heatmap"]["height"]


def test_png_has_the_size_of_the_photo(explain_server: Server) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for content, size in (
        (PHOTO, (200, 120)),
        (encode_image(draw_picture(70, 33), "JPEG", exif=exif), (33, 70)),
    ):
        reply = explain_server.client.post("/v1/explain?format=png", content=content)
        assert reply.headers["Content-Type"] == "image/png"
        with Image.open(BytesIO(reply.content)) as image:
            assert image.size == size
            assert image.mode == "RGB"


def test_network_without_cam_is_explained_by_occlusion(explain_server: Server) -> None:
    reply, same_seed, other_seed = (
        post_explain(explain_server, path=f"{VGG}/explain", samples=64, seed=seed) for seed in (1, 1, 2)
    )
    assert (reply["method"], reply["samples"]) == ("occlusion", 64)
    assert reply["note"].startswith("the network does not end in an average")
    assert reply["heatmap"] == same_seed["heatmap"]
    assert reply["heatmap"] != other_seed["heatmap"]


@pytest.mark.long
def test_occlusion_stops_at_the_time_limit(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_EXPLAIN_SECONDS="0.3") as server:
        reply = post_explain(server, path=f"{VGG}/explain")
    assert reply["samples"] >= 16
    assert reply["samples"] % 16 == 0


def test_progress_is_sent_as_json_lines(explain_server: Server) -> None:
    reply = explain_server.client.post(f"{VGG}/explain?progress=true&samples=64&seed=5", content=PHOTO)
    assert reply.headers["Content-Type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert [line.get("progress") for line in lines] == [0.0, 0.25, 0.5, 0.75, None]
    assert lines[0]["heatmap"] is None
    assert lines[0]["what_the_model_saw"]["width"] == 24
    assert len(lines[0]["predictions"]) == 4
    assert np.array(lines[1]["heatmap"]["values"]).max() == 1
    assert lines[-1]["result"] == post_explain(explain_server, path=f"{VGG}/explain", samples=64, seed=5)


def test_second_label_needs_no_occlusion_of_its_own(explain_server: Server) -> None:
    progresses = []
    for label in LABELS[:2]:
        reply = explain_server.client.post(
            f"{VGG}/explain",
            content=PHOTO,
            params={"progress": "true", "samples": 64, "seed": 6, "label": label},
        )
        lines = [json.loads(line) for line in reply.text.splitlines()]
        progresses.append([line.get("progress") for line in lines])
        assert lines[-1]["result"]["label"] == label
        assert lines[-1]["result"]["samples"] == 64
    assert progresses == [[0.0, 0.25, 0.5, 0.75, None], [0.0, None]]


def test_explanations_are_counted(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        post_explain(server)
        post_explain(server, path=f"{VGG}/explain", samples=16)
        assert server.read_metric("fovea_explanations_total", model="small", method="cam") == 1
        assert server.read_metric("fovea_explanations_total", model="vgg", method="occlusion") == 1
        assert server.read_metric("fovea_requests_total", route="/v1/explain", status="200") == 1


# --- layers --------------------------------------------------------------------------------------


def test_layers_of_imported_network_are_described(explain_server: Server) -> None:
    reply = explain_server.client.get(f"{VGG}/versions/1/layers").json()
    assert (reply["labels"], reply["task"], reply["cam"], reply["reason"]) == (
        list(LABELS), "multiclass", False, None,
    )  # fmt: skip
    layers = reply["layers"]
    block = ["Conv", "Relu", "Conv", "Relu", "MaxPool"]
    kinds = ["Input", *block, *block, "Flatten", "Gemm", "Relu", "Gemm", "Softmax"]
    assert [layer["kind"] for layer in layers] == kinds
    for previous, layer in pairwise(layers):
        assert layer["sources"] == [previous["tensor"]]
    conv = layers[1]
    assert (conv["kernel"], conv["stride"], conv["padding"]) == ([3, 3], [1, 1], [1, 1, 1, 1])
    assert (conv["shape"], conv["parameters"], conv["weights"]) == ([8, 24, 24], 224, ["weight", "bias"])
    assert conv["field"] == {"rows": [1, -1, 1], "columns": [1, -1, 1]}
    assert layers[6]["field"]["rows"] == [2, -4, 5]
    assert layers[10]["field"]["rows"] == [4, -6, 9]
    assert layers[11]["field"] is None
    assert reply["parameters"] == sum(layer["parameters"] for layer in layers)


def test_token_maps_leave_out_the_class_token(explain_server: Server) -> None:
    path = "/v1/models/tokens"
    layers = {layer["tensor"]: layer for layer in fetch_layers(explain_server, path)}
    assert layers["maps"]["shape"] == layers["all"]["shape"] == [8, 4, 4]
    assert [layers[name]["left_out"] for name in ("maps", "sum", "all", "average")] == [0, 0, 1, 0]
    assert [name for name, layer in layers.items() if not layer["direct"]] == ["average"]
    assert layers["norm"]["field"] == {"rows": [4, 0, 3], "columns": [4, 0, 3]}
    sum_maps, all_maps = (
        read_array(explain_server.client.post(f"{path}/maps", content=PHOTO, params={"tensor": tensor}))
        for tensor in ("sum", "all")
    )
    assert sum_maps.shape == (8, 4, 4)
    assert (sum_maps == all_maps).all()


def test_maps_can_be_requested_in_parts(explain_server: Server) -> None:
    relu = fetch_layers(explain_server)[2]
    assert relu["kind"] == "Relu"
    reply = explain_server.client.post(f"{SMALL}/maps", content=PHOTO, params={"tensor": relu["tensor"]})
    all_maps = read_array(reply)
    assert all_maps.shape == tuple(relu["shape"])
    assert reply.headers["X-Channels"] == str(len(all_maps))
    assert float(reply.headers["X-Lowest"]) == all_maps.min()
    assert float(reply.headers["X-Highest"]) == all_maps.max()
    query = {"tensor": relu["tensor"], "first": 3, "count": 2}
    part = explain_server.client.post(f"{SMALL}/versions/1/maps", content=PHOTO, params=query)
    assert (read_array(part) == all_maps[3:5]).all()
    assert part.headers["X-Highest"] == reply.headers["X-Highest"]  # of the whole
    query = {"tensor": relu["tensor"], "indices": "6,0,3"}
    selection = explain_server.client.post(f"{SMALL}/maps", content=PHOTO, params=query)
    assert (read_array(selection) == all_maps[[6, 0, 3]]).all()
    query = {"tensor": relu["tensor"], "strength": "true"}
    strengths = explain_server.client.post(f"{SMALL}/maps", content=PHOTO, params=query)
    assert read_array(strengths) == pytest.approx(np.abs(all_maps).mean(axis=(1, 2)), rel=1e-6)
    assert strengths.headers["X-Channels"] == str(len(all_maps))


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"indices": "1,8"}, "indices has 8; it must be less than 8"),
        ({"indices": "1", "count": "2"}, "leave out first and count"),
        ({"indices": "1,,2"}, "indices"),
        ({"indices": "-1"}, "indices"),
    ],
)
def test_indices_that_name_no_map_are_refused(
    explain_server: Server, query: dict[str, str], message: str
) -> None:
    tensor = fetch_layers(explain_server)[2]["tensor"]
    reply = explain_server.client.post(f"{SMALL}/maps", content=PHOTO, params={"tensor": tensor, **query})
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def test_prepared_image_is_used_without_preprocessing(explain_server: Server) -> None:
    model_input = base64.b64decode(post_explain(explain_server)["what_the_model_saw"]["png"])
    conv = fetch_layers(explain_server)[1]["tensor"]
    query = {"tensor": conv}
    expected = read_array(explain_server.client.post(f"{SMALL}/maps", content=PHOTO, params=query))
    prepared = explain_server.client.post(
        f"{SMALL}/maps", content=model_input, params={**query, "prepared": True}
    )
    assert (read_array(prepared) == expected).all()
    unprepared = explain_server.client.post(
        f"{SMALL}/maps", content=PHOTO, params={**query, "prepared": True}
    )
    assert status_and_code(unprepared) == (400, "bad_request")
    assert "16 x 16" in unprepared.text


def test_last_layer_equals_the_probabilities(explain_server: Server) -> None:
    reply = post_explain(explain_server, path=f"{VGG}/explain", top_k=0, samples=2)
    last = fetch_layers(explain_server, VGG)[-1]["tensor"]
    values = read_array(explain_server.client.post(f"{VGG}/maps", content=PHOTO, params={"tensor": last}))
    by_index = {prediction["index"]: prediction["probability"] for prediction in reply["predictions"]}
    assert values == pytest.approx([by_index[index] for index in range(4)], abs=1e-5)


def test_linear_layer_output_follows_from_its_weights(explain_server: Server) -> None:
    layers = fetch_layers(explain_server, VGG)
    gemm = layers[-2]
    layer_input, layer_output = (
        read_array(explain_server.client.post(f"{VGG}/maps", content=PHOTO, params={"tensor": tensor}))
        for tensor in (gemm["sources"][0], gemm["tensor"])
    )
    weights = {
        part: read_array(
            explain_server.client.get(
                f"{VGG}/weights", params={"tensor": gemm["tensor"], "part": part, "first": 2, "count": 1}
            )
        )
        for part in ("weight", "bias")
    }
    assert weights["weight"].shape == (1, 32)
    assert (weights["weight"] @ layer_input + weights["bias"])[0] == pytest.approx(layer_output[2], abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("is_allowed", [False, True])
def test_whole_weights_require_the_setting(zoo: Path, is_allowed: bool) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WEIGHTS=str(is_allowed).lower()) as server:
        conv, gemm = (
            next(layer for layer in fetch_layers(server, VGG) if layer["kind"] == kind)
            for kind in ("Conv", "Gemm")
        )
        for layer in (conv, gemm):
            for query in ({}, {"count": 0}, {"count": 2}, {"first": 1, "count": 0}):
                parameters = {"tensor": layer["tensor"], **query}
                reply = server.client.get(f"{VGG}/weights", params=parameters)
                if is_allowed:
                    assert len(read_array(reply)) >= 2
                else:
                    assert status_and_code(reply) == (403, "forbidden")
                    assert "FOVEA_WEIGHTS" in reply.text
            for part in ({"count": "1"}, {"part": "bias"}, {"first": "1", "count": "1"}):
                parameters = {"tensor": layer["tensor"], **part}
                reply = server.client.get(f"{VGG}/weights", params=parameters)
                assert read_array(reply).size
            last = {"tensor": layer["tensor"], "first": int(reply.headers["X-Channels"]) - 1}
            assert len(read_array(server.client.get(f"{VGG}/weights", params=last))) == 1


def test_progress_with_png_is_refused(explain_server: Server) -> None:
    reply = explain_server.client.post("/v1/explain?format=png&progress=true", content=PHOTO)
    assert status_and_code(reply) == (400, "bad_request")


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"label": "cot"}, "there is no label 'cot'; the nearest is 'cow'"),
        ({"method": "magic"}, "method"),
        ({"format": "gif"}, "format"),
        ({"samples": -1}, "samples"),
        ({"samples": 10**9}, "samples"),
        ({"seed": "x"}, "seed"),
        ({"lable": "cow"}, "lable"),
    ],
)
def test_bad_query_is_refused(explain_server: Server, query: dict[str, Any], message: str) -> None:
    reply = explain_server.client.post("/v1/explain", content=PHOTO, params=query)
    assert status_and_code(reply) == (400, "bad_request")
    assert message in reply.json()["error"]["message"]


def test_network_without_cam_refuses_method_cam(explain_server: Server) -> None:
    reply = explain_server.client.post(f"{VGG}/explain?method=cam", content=PHOTO)
    assert status_and_code(reply) == (400, "bad_request")
    assert "method=occlusion" in reply.text


@pytest.mark.parametrize("query", ["", "?format=png", "?progress=true"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", (400, "bad_request")),
        (b"no image", (415, "unsupported_format")),
        (PHOTO[:-200], (422, "bad_image")),
        (b"\xff" * 1_000_001, (413, "body_too_large")),
    ],
)
def test_bad_body_is_refused_as_by_classify(
    explain_server: Server, content: bytes, expected: tuple[int, str], query: str
) -> None:
    assert status_and_code(explain_server.client.post(f"/v1/explain{query}", content=content)) == expected
    if not query:
        assert status_and_code(explain_server.client.post("/v1/classify", content=content)) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/models/none/layers", (404, "model_not_found")),
        (f"{SMALL}/versions/9/layers", (404, "model_not_found")),
        (f"{SMALL}/weights?tensor=none", (404, "not_found")),
        (f"{SMALL}/weights?tensor=relu", (404, "not_found")),
        (f"{SMALL}/weights", (400, "bad_request")),
        (f"{SMALL}/weights?tensor=conv&first=8", (400, "bad_request")),
        (f"{SMALL}/weights?tensor=conv&count=-1", (400, "bad_request")),
        (f"{SMALL}/weights?tensor=conv&part=bias", (404, "not_found")),
    ],
)
def test_missing_model_or_bad_query_is_refused(
    explain_server: Server, path: str, expected: tuple[int, str]
) -> None:
    assert status_and_code(explain_server.client.get(path)) == expected


@pytest.mark.long
def test_image_above_the_decode_memory_is_refused(zoo: Path) -> None:
    """This holds for the heat map drawn over the photo too, which is decoded at full size."""
    photo = draw_picture(1500, 1500)
    with Server(FOVEA_MODELS=str(zoo), FOVEA_DECODE_BYTES="5000000") as server:
        for path in ("/v1/explain", f"{SMALL}/maps?tensor=conv"):
            png_reply = server.client.post(path, content=encode_image(photo, "PNG"))
            assert status_and_code(png_reply) == (413, "too_many_pixels")
            jpeg_reply = server.client.post(path, content=encode_image(photo, "JPEG"))
            assert jpeg_reply.status_code == 200
        painted_reply = server.client.post("/v1/explain?format=png", content=encode_image(photo, "JPEG"))
        assert status_and_code(painted_reply) == (413, "too_many_pixels")


def test_two_images_are_refused(explain_server: Server) -> None:
    files = [("a", PHOTO), ("b", PHOTO)]
    assert status_and_code(explain_server.client.post("/v1/explain", files=files)) == (400, "bad_request")
    assert explain_server.client.post("/v1/explain", files=files[:1]).status_code == 200


@pytest.mark.long
def test_explain_can_be_switched_off(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_EXPLAIN="false") as server:
        assert status_and_code(server.client.post("/v1/explain", content=PHOTO)) == (403, "forbidden")
        assert status_and_code(server.client.get(f"{SMALL}/layers")) == (403, "forbidden")
        assert server.client.post("/v1/classify", content=PHOTO).status_code == 200


@pytest.mark.long
def test_unopenable_graph_is_explained_by_occlusion(tmp_path: Path) -> None:
    add_to_repository(build_unopenable(), tmp_path / "zoo")
    with Server(FOVEA_MODELS=str(tmp_path / "zoo")) as server:
        assert server.client.post("/v1/classify", content=PHOTO).status_code == 200
        reply = post_explain(server, samples=16)
        assert reply["method"] == "occlusion"
        assert reply["note"]
        layers_reply = server.client.get(f"{SMALL}/layers").json()
        assert "cannot load the model" in layers_reply["reason"]
        maps_reply = server.client.post(f"{SMALL}/maps?tensor=conv", content=PHOTO)
        assert status_and_code(maps_reply) == (404, "not_found")
        assert "the layers of this model cannot be read" in maps_reply.text


# --- the process ---------------------------------------------------------------------------------


@pytest.mark.long
def test_explain_process_runs_only_while_needed(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_EXPLAIN_IDLE="0.2") as server:
        server.client.post("/v1/classify", content=PHOTO)
        assert not explainer_pids(server)
        post_explain(server)
        wait_until(lambda: not explainer_pids(server))
        post_explain(server)  # and it is started again


def test_crash_of_explain_process_fails_one_request(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        post_explain(server)
        (pid,) = explainer_pids(server)
        cpu_before = measure_own_cpu_seconds(pid)
        replies: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: replies.append(httpx.post(f"{server.url}{LONG}", content=PHOTO, timeout=60))
        )
        thread.start()
        wait_until(lambda: measure_own_cpu_seconds(pid) > cpu_before + 0.05)  # it works on the request
        os.kill(pid, signal.SIGKILL)
        thread.join()
        assert status_and_code(replies[0]) == (503, "not_ready")
        assert replies[0].headers["retry-after"] == "1"
        assert post_explain(server)["method"] == "cam"
        assert explainer_pids(server) != {pid}


@pytest.mark.long
def test_disconnect_stops_the_explanation(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        post_explain(server)
        (pid,) = explainer_pids(server)
        head = f"POST {LONG} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(PHOTO)}\r\n\r\n"
        with Wire(server.url) as wire:
            wire.send(head.encode(), PHOTO)
            wait_until(lambda: server.read_metric("fovea_requests_in_flight") == 2)
        assert post_explain(server)["method"] == "cam"  # long before 8,000 images are processed
        assert explainer_pids(server) == {pid}  # the same process, with its models
        server.wait_for_metric(1, "fovea_errors_total", reason="client_left")


@pytest.mark.long
def test_late_explanation_does_not_affect_the_next(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        post_explain(server)
        (pid,) = explainer_pids(server)
        for _ in range(3):
            reply = server.client.post(LONG, content=PHOTO, headers={"X-Deadline-Ms": "100"})
            assert status_and_code(reply) == (504, "deadline_exceeded")
            assert post_explain(server, label="cow")["label"] == "cow"
        assert explainer_pids(server) == {pid}


def test_late_progress_ends_with_an_error_line(explain_server: Server) -> None:
    post_explain(explain_server, path="/v1/models/large/explain?method=occlusion", samples=16)
    reply = explain_server.client.post(
        f"{LONG}&progress=true", content=PHOTO, headers={"X-Deadline-Ms": "2000"}
    )
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert reply.status_code == 200
    assert lines[0]["progress"] == 0
    assert lines[-1]["error"]["code"] == "deadline_exceeded"


@pytest.mark.slow
def test_stuck_explain_process_is_replaced(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        post_explain(server)
        (pid,) = explainer_pids(server)
        os.kill(pid, signal.SIGSTOP)
        late_reply = server.client.post("/v1/explain", content=PHOTO, headers={"X-Deadline-Ms": "200"})
        assert status_and_code(late_reply) == (504, "deadline_exceeded")
        server.client.timeout = 30  # another process answers some seconds later
        assert post_explain(server)["method"] == "cam"
        assert explainer_pids(server) != {pid}


@pytest.mark.long
def test_layer_request_to_stuck_process_gets_504(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        fetch_layers(server)
        (pid,) = explainer_pids(server)
        os.kill(pid, signal.SIGSTOP)
        for path in ("layers", "weights?tensor=conv"):
            late_reply = server.client.get(f"{SMALL}/{path}", headers={"X-Deadline-Ms": "200"})
            assert status_and_code(late_reply) == (504, "deadline_exceeded")
            bad_reply = server.client.get(f"{SMALL}/{path}", headers={"X-Deadline-Ms": "soon"})
            assert status_and_code(bad_reply) == (400, "bad_request")


@pytest.mark.long
def test_crash_of_idle_explain_process_fails_no_request(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        post_explain(server)
        (pid,) = explainer_pids(server)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid))
        assert post_explain(server)["method"] == "cam"


@pytest.mark.long
def test_explain_process_replaces_its_cached_models(zoo: Path, tmp_path: Path) -> None:
    """The process keeps two models; the third replaces the first, which is later sent again."""
    root = tmp_path / "zoo"
    for name in ("a", "b", "c"):
        add_to_repository(build_model(), root, name)
    (root / "default").write_text("a")
    with Server(FOVEA_MODELS=str(root)) as server:
        for name in "abcabcaacb":
            path = f"/v1/models/{name}"
            assert post_explain(server, path=f"{path}/explain")["model"]["name"] == name
            assert len(fetch_layers(server, path)) == 6


def test_very_long_image_is_explained_but_not_painted(explain_server: Server) -> None:
    strip = encode_image(Image.new("RGB", (70_000, 1)), "PNG")
    assert status_and_code(explain_server.client.post("/v1/explain?format=png", content=strip)) == (
        400,
        "bad_request",
    )
    assert post_explain(explain_server, strip)["method"] == "cam"


@pytest.mark.long
def test_too_many_explanations_get_503(zoo: Path) -> None:
    head = f"POST {LONG} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(PHOTO)}\r\n\r\n"
    with Server(FOVEA_MODELS=str(zoo)) as server, ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.url)) for _ in range(8)]
        for wire in wires:
            wire.send(head.encode(), PHOTO)
        wait_until(lambda: server.read_metric("fovea_requests_in_flight") == 9)
        replies: list[httpx.Response] = []

        def is_refused() -> bool:  # unless the bodies of the others have not been read yet
            headers = {"X-Deadline-Ms": "1000"}
            replies.append(server.client.post("/v1/explain", content=PHOTO, headers=headers))
            return replies[-1].status_code != 504

        wait_until(is_refused)
        assert status_and_code(replies[-1]) == (503, "overloaded")
        assert int(replies[-1].headers["Retry-After"]) >= 1
        assert fetch_layers(server)  # layers can be read meanwhile


def test_large_png_is_sent_completely(explain_server: Server) -> None:
    noise = Image.effect_noise((1500, 1000), 60).convert("RGB")
    reply = explain_server.client.post(
        "/v1/explain?format=png", content=encode_image(noise, "JPEG", quality=50)
    )
    assert len(reply.content) > 2 << 20
    with Image.open(BytesIO(reply.content)) as image:
        image.load()
        assert image.size == noise.size


@pytest.mark.long
def test_explain_process_ends_with_the_service(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        post_explain(server)
        (pid,) = explainer_pids(server)
        os.kill(server.process.pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid))
