"""The routes `explain`, `layers`, `maps` and `weights` on a real server."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
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

from fovea.export.importer.inspect import ImportRequest
from fovea.export.importer.pipeline import import_model
from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
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
"""An explanation that takes longer than a process has time to stop."""


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
    large = replace(SMALL_GEOMETRY, height=160, width=160, resize_to=160)
    add_to_repository(build_model(geometry=large), zoo, "large")
    (zoo / "default").write_text("small")
    return zoo


@pytest.fixture(scope="module")
def running(zoo: Path) -> Iterator[Server]:
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


def test_the_answer_says_what_classify_says(running: Server) -> None:
    wanted = running.client.post("/v1/classify?top_k=3", content=PHOTO).json()
    reply = post_explain(running, top_k=3)
    assert reply["model"] == wanted["model"]
    assert reply["image"] == wanted["image"]
    assert [one["label"] for one in reply["predictions"]] == [one["label"] for one in wanted["predictions"]]
    best = wanted["predictions"][0]
    assert (reply["label"], reply["index"]) == (best["label"], best["index"])
    assert reply["probability"] == pytest.approx(best["probability"], abs=1e-5)
    assert (reply["method"], reply["samples"], reply["note"]) == ("cam", 0, None)


def test_the_map_has_the_photos_shape(running: Server) -> None:
    heatmap = post_explain(running)["heatmap"]
    values = np.array(heatmap["values"])
    assert values.shape == (heatmap["height"], heatmap["width"]) == (58, 96)
    assert values.min() == 0
    assert values.max() == 1
    assert not values[:, :18].any()  # what the crop has left out
    assert not values[:, -18:].any()


def test_every_label_can_be_asked_for(running: Server) -> None:
    maps = {label: post_explain(running, label=label) for label in ("ant", "bee", "cow", "dog")}
    assert {label: reply["label"] for label, reply in maps.items()} == {label: label for label in maps}
    assert len({json.dumps(reply["heatmap"]) for reply in maps.values()}) == 4


def test_what_the_model_saw_is_its_very_input(running: Server, zoo: Path) -> None:
    contract = read_contract(onnx.load(zoo / "small" / "1" / "model.onnx"))
    seen = post_explain(running)["what_the_model_saw"]
    with Image.open(BytesIO(base64.b64decode(seen["png"]))) as image:
        pixels = np.asarray(image)
    assert (pixels == decode_image(PHOTO, contract.input, max_pixels=10**6).pixels).all()
    assert (seen["width"], seen["height"]) == (16, 16)
    assert seen["box"] == pytest.approx([40, 0, 160, 120], abs=5)
    assert [step["step"] for step in seen["steps"]] == ["decode", "resize", "crop"]


def test_the_receipt_tells_of_every_step(running: Server) -> None:
    turned = draw_picture(120, 200).convert("CMYK")
    exif = Image.Exif()
    exif[0x0112] = 6
    reply = post_explain(running, encode_image(turned, "JPEG", exif=exif))
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


def test_a_picture_has_the_photos_own_size(running: Server) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for content, size in (
        (PHOTO, (200, 120)),
        (encode_image(draw_picture(70, 33), "JPEG", exif=exif), (33, 70)),
    ):
        reply = running.client.post("/v1/explain?format=png", content=content)
        assert reply.headers["Content-Type"] == "image/png"
        with Image.open(BytesIO(reply.content)) as image:
            assert image.size == size
            assert image.mode == "RGB"


def test_a_network_without_maps_is_explained_by_occlusion(running: Server) -> None:
    one, same, other = (
        post_explain(running, path=f"{VGG}/explain", samples=64, seed=seed) for seed in (1, 1, 2)
    )
    assert (one["method"], one["samples"]) == ("occlusion", 64)
    assert one["note"].startswith("the network does not end in an average")
    assert one["heatmap"] == same["heatmap"]
    assert one["heatmap"] != other["heatmap"]


@pytest.mark.long
def test_an_occlusion_ends_by_the_clock(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_EXPLAIN_SECONDS="0.3") as server:
        reply = post_explain(server, path=f"{VGG}/explain")
    assert reply["samples"] >= 16
    assert reply["samples"] % 16 == 0


def test_progress_is_told_line_by_line(running: Server) -> None:
    reply = running.client.post(f"{VGG}/explain?progress=true&samples=64&seed=1", content=PHOTO)
    assert reply.headers["Content-Type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert [line.get("progress") for line in lines] == [0.0, 0.25, 0.5, 0.75, None]
    assert lines[0]["heatmap"] is None
    assert lines[0]["what_the_model_saw"]["width"] == 24
    assert len(lines[0]["predictions"]) == 4
    assert np.array(lines[1]["heatmap"]["values"]).max() == 1
    assert lines[-1]["result"] == post_explain(running, path=f"{VGG}/explain", samples=64, seed=1)


def test_explanations_are_counted(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        post_explain(server)
        post_explain(server, path=f"{VGG}/explain", samples=16)
        assert server.read_metric("fovea_explanations_total", model="small", method="cam") == 1
        assert server.read_metric("fovea_explanations_total", model="vgg", method="occlusion") == 1
        assert server.read_metric("fovea_requests_total", route="/v1/explain", status="200") == 1


# --- layers --------------------------------------------------------------------------------------


def test_layers_of_a_foreign_network(running: Server) -> None:
    reply = running.client.get(f"{VGG}/versions/1/layers").json()
    assert (reply["labels"], reply["task"], reply["cam"], reply["reason"]) == (
        list(LABELS), "multiclass", False, None,
    )  # fmt: skip
    found = reply["layers"]
    block = ["Conv", "Relu", "Conv", "Relu", "MaxPool"]
    kinds = ["Input", *block, *block, "Flatten", "Gemm", "Relu", "Gemm", "Softmax"]
    assert [layer["kind"] for layer in found] == kinds
    for before, layer in pairwise(found):
        assert layer["sources"] == [before["tensor"]]
    first = found[1]
    assert (first["kernel"], first["stride"], first["padding"]) == ([3, 3], [1, 1], [1, 1, 1, 1])
    assert (first["shape"], first["parameters"], first["weights"]) == ([8, 24, 24], 224, ["weight", "bias"])
    assert first["field"] == {"rows": [1, -1, 1], "columns": [1, -1, 1]}
    assert found[6]["field"]["rows"] == [2, -4, 5]
    assert found[10]["field"]["rows"] == [4, -6, 9]
    assert found[11]["field"] is None
    assert reply["parameters"] == sum(layer["parameters"] for layer in found)


def test_tokens_are_maps_without_those_that_are_no_place(running: Server) -> None:
    path = "/v1/models/tokens"
    found = {layer["tensor"]: layer for layer in fetch_layers(running, path)}
    assert found["maps"]["shape"] == found["all"]["shape"] == [8, 4, 4]
    assert [found[name]["left_out"] for name in ("maps", "sum", "all", "average")] == [0, 0, 1, 0]
    assert [name for name, layer in found.items() if not layer["direct"]] == ["average"]
    assert found["norm"]["field"] == {"rows": [4, 0, 3], "columns": [4, 0, 3]}
    one, same = (
        read_array(running.client.post(f"{path}/maps", content=PHOTO, params={"tensor": tensor}))
        for tensor in ("sum", "all")
    )
    assert one.shape == (8, 4, 4)
    assert (one == same).all()


def test_maps_come_as_they_are_asked_for(running: Server) -> None:
    relu = fetch_layers(running)[2]
    assert relu["kind"] == "Relu"
    reply = running.client.post(f"{SMALL}/maps", content=PHOTO, params={"tensor": relu["tensor"]})
    whole = read_array(reply)
    assert whole.shape == tuple(relu["shape"])
    assert reply.headers["X-Channels"] == str(len(whole))
    assert float(reply.headers["X-Lowest"]) == whole.min()
    assert float(reply.headers["X-Highest"]) == whole.max()
    query = {"tensor": relu["tensor"], "first": 3, "count": 2}
    part = running.client.post(f"{SMALL}/versions/1/maps", content=PHOTO, params=query)
    assert (read_array(part) == whole[3:5]).all()
    assert part.headers["X-Highest"] == reply.headers["X-Highest"]  # of the whole


def test_a_prepared_image_is_the_input_itself(running: Server) -> None:
    png = base64.b64decode(post_explain(running)["what_the_model_saw"]["png"])
    conv = fetch_layers(running)[1]["tensor"]
    query = {"tensor": conv}
    whole = read_array(running.client.post(f"{SMALL}/maps", content=PHOTO, params=query))
    prepared = running.client.post(f"{SMALL}/maps", content=png, params={**query, "prepared": True})
    assert (read_array(prepared) == whole).all()
    other = running.client.post(f"{SMALL}/maps", content=PHOTO, params={**query, "prepared": True})
    assert status_and_code(other) == (400, "bad_request")
    assert "16 x 16" in other.text


def test_the_last_layer_is_the_answer(running: Server) -> None:
    best = post_explain(running, path=f"{VGG}/explain", top_k=0, samples=2)
    last = fetch_layers(running, VGG)[-1]["tensor"]
    values = read_array(running.client.post(f"{VGG}/maps", content=PHOTO, params={"tensor": last}))
    by_index = {one["index"]: one["probability"] for one in best["predictions"]}
    assert values == pytest.approx([by_index[index] for index in range(4)], abs=1e-5)


def test_a_linear_layer_adds_up(running: Server) -> None:
    found = fetch_layers(running, VGG)
    gemm = found[-2]
    given, made = (
        read_array(running.client.post(f"{VGG}/maps", content=PHOTO, params={"tensor": tensor}))
        for tensor in (gemm["sources"][0], gemm["tensor"])
    )
    weights = {
        part: read_array(
            running.client.get(
                f"{VGG}/weights", params={"tensor": gemm["tensor"], "part": part, "first": 2, "count": 1}
            )
        )
        for part in ("weight", "bias")
    }
    assert weights["weight"].shape == (1, 32)
    assert (weights["weight"] @ given + weights["bias"])[0] == pytest.approx(made[2], abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("is_given", [False, True])
def test_whole_weights_are_given_out_by_a_setting_alone(zoo: Path, is_given: bool) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WEIGHTS=str(is_given).lower()) as server:
        conv, gemm = (
            next(one for one in fetch_layers(server, VGG) if one["kind"] == kind) for kind in ("Conv", "Gemm")
        )
        for layer in (conv, gemm):
            for query in ({}, {"count": 0}, {"count": 2}, {"first": 1, "count": 0}):
                asked = {"tensor": layer["tensor"], **query}
                reply = server.client.get(f"{VGG}/weights", params=asked)
                if is_given:
                    assert len(read_array(reply)) >= 2
                else:
                    assert status_and_code(reply) == (403, "forbidden")
                    assert "FOVEA_WEIGHTS" in reply.text
            for part in ({"count": "1"}, {"part": "bias"}, {"first": "1", "count": "1"}):
                asked = {"tensor": layer["tensor"], **part}
                reply = server.client.get(f"{VGG}/weights", params=asked)
                assert read_array(reply).size
            last = {"tensor": layer["tensor"], "first": int(reply.headers["X-Channels"]) - 1}
            assert len(read_array(server.client.get(f"{VGG}/weights", params=last))) == 1


def test_progress_in_a_picture_is_refused_and_not_passed_over(running: Server) -> None:
    reply = running.client.post("/v1/explain?format=png&progress=true", content=PHOTO)
    assert status_and_code(reply) == (400, "bad_request")


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "said"),
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
def test_a_bad_question_is_said_to_be_one(running: Server, query: dict[str, Any], said: str) -> None:
    reply = running.client.post("/v1/explain", content=PHOTO, params=query)
    assert status_and_code(reply) == (400, "bad_request")
    assert said in reply.json()["error"]["message"]


def test_a_network_without_maps_refuses_the_method(running: Server) -> None:
    reply = running.client.post(f"{VGG}/explain?method=cam", content=PHOTO)
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
def test_whatever_classify_refuses_is_refused(
    running: Server, content: bytes, expected: tuple[int, str], query: str
) -> None:
    assert status_and_code(running.client.post(f"/v1/explain{query}", content=content)) == expected
    if not query:
        assert status_and_code(running.client.post("/v1/classify", content=content)) == expected


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
def test_what_is_not_there(running: Server, path: str, expected: tuple[int, str]) -> None:
    assert status_and_code(running.client.get(path)) == expected


@pytest.mark.long
def test_what_takes_too_much_memory_to_decode_is_refused(zoo: Path) -> None:
    """This holds for the painted photo too, which is decoded at full size."""
    photo = draw_picture(1500, 1500)
    with Server(FOVEA_MODELS=str(zoo), FOVEA_DECODE_BYTES="5000000") as server:
        for path in ("/v1/explain", f"{SMALL}/maps?tensor=conv"):
            large = server.client.post(path, content=encode_image(photo, "PNG"))
            assert status_and_code(large) == (413, "too_many_pixels")
            drafted = server.client.post(path, content=encode_image(photo, "JPEG"))
            assert drafted.status_code == 200
        painted = server.client.post("/v1/explain?format=png", content=encode_image(photo, "JPEG"))
        assert status_and_code(painted) == (413, "too_many_pixels")


def test_two_images_are_one_too_many(running: Server) -> None:
    files = [("a", PHOTO), ("b", PHOTO)]
    assert status_and_code(running.client.post("/v1/explain", files=files)) == (400, "bad_request")
    assert running.client.post("/v1/explain", files=files[:1]).status_code == 200


@pytest.mark.long
def test_it_can_be_switched_off(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_EXPLAIN="false") as server:
        assert status_and_code(server.client.post("/v1/explain", content=PHOTO)) == (403, "forbidden")
        assert status_and_code(server.client.get(f"{SMALL}/layers")) == (403, "forbidden")
        assert server.client.post("/v1/classify", content=PHOTO).status_code == 200


@pytest.mark.long
def test_a_graph_that_cannot_be_opened_is_explained_all_the_same(tmp_path: Path) -> None:
    add_to_repository(build_unopenable(), tmp_path / "zoo")
    with Server(FOVEA_MODELS=str(tmp_path / "zoo")) as server:
        assert server.client.post("/v1/classify", content=PHOTO).status_code == 200
        reply = post_explain(server, samples=16)
        assert reply["method"] == "occlusion"
        assert reply["note"]
        looked = server.client.get(f"{SMALL}/layers").json()
        assert "cannot load the model" in looked["reason"]
        maps = server.client.post(f"{SMALL}/maps?tensor=conv", content=PHOTO)
        assert status_and_code(maps) == (404, "not_found")
        assert "the layers of this model cannot be read" in maps.text


# --- the process ---------------------------------------------------------------------------------


@pytest.mark.long
def test_it_is_started_when_it_is_needed_and_let_go_when_it_is_not(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_EXPLAIN_IDLE="0.2") as server:
        server.client.post("/v1/classify", content=PHOTO)
        assert not explainer_pids(server)
        post_explain(server)
        wait_until(lambda: not explainer_pids(server))
        post_explain(server)  # and it comes again


def test_its_death_costs_one_explanation(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        post_explain(server)
        (pid,) = explainer_pids(server)
        outcome: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: outcome.append(
                httpx.post(f"{server.url}{VGG}/explain?samples=8000", content=PHOTO, timeout=60)
            )
        )
        asking.start()
        wait_until(lambda: server.read_metric("fovea_requests_in_flight") == 2)  # that, and this question
        os.kill(pid, signal.SIGKILL)
        asking.join()
        assert status_and_code(outcome[0]) == (500, "internal")
        assert post_explain(server)["method"] == "cam"
        assert explainer_pids(server) != {pid}


@pytest.mark.long
def test_who_leaves_is_not_waited_for(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        post_explain(server)
        (pid,) = explainer_pids(server)
        head = f"POST {LONG} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(PHOTO)}\r\n\r\n"
        with Wire(server.url) as wire:
            wire.send(head.encode(), PHOTO)
            wait_until(lambda: server.read_metric("fovea_requests_in_flight") == 2)
        assert post_explain(server)["method"] == "cam"  # long before 8,000 images
        assert explainer_pids(server) == {pid}  # and the same process, with its models
        server.wait_for_metric(1, "fovea_errors_total", reason="client_left")


@pytest.mark.long
def test_what_is_late_is_said_to_be_and_the_next_answer_is_its_own(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        post_explain(server)
        (pid,) = explainer_pids(server)
        for _ in range(3):
            reply = server.client.post(LONG, content=PHOTO, headers={"X-Deadline-Ms": "100"})
            assert status_and_code(reply) == (504, "deadline_exceeded")
            assert post_explain(server, label="cow")["label"] == "cow"
        assert explainer_pids(server) == {pid}


def test_what_is_late_in_the_middle_of_its_lines_ends_with_the_error(running: Server) -> None:
    post_explain(running, path=f"{VGG}/explain", samples=16)
    reply = running.client.post(
        f"{VGG}/explain?progress=true&samples=8000", content=PHOTO, headers={"X-Deadline-Ms": "700"}
    )
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert reply.status_code == 200
    assert lines[0]["progress"] == 0
    assert lines[-1]["error"]["code"] == "deadline_exceeded"


@pytest.mark.slow
def test_one_that_is_stuck_is_replaced(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        post_explain(server)
        (pid,) = explainer_pids(server)
        os.kill(pid, signal.SIGSTOP)
        late = server.client.post("/v1/explain", content=PHOTO, headers={"X-Deadline-Ms": "200"})
        assert status_and_code(late) == (504, "deadline_exceeded")
        server.client.timeout = 30  # some seconds later, by another one
        assert post_explain(server)["method"] == "cam"
        assert explainer_pids(server) != {pid}


@pytest.mark.long
def test_who_looks_into_a_model_is_not_kept_waiting(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        fetch_layers(server)
        (pid,) = explainer_pids(server)
        os.kill(pid, signal.SIGSTOP)
        for path in ("layers", "weights?tensor=conv"):
            late = server.client.get(f"{SMALL}/{path}", headers={"X-Deadline-Ms": "200"})
            assert status_and_code(late) == (504, "deadline_exceeded")
            wrong = server.client.get(f"{SMALL}/{path}", headers={"X-Deadline-Ms": "soon"})
            assert status_and_code(wrong) == (400, "bad_request")


@pytest.mark.long
def test_one_that_died_while_nobody_asked_costs_nothing(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        post_explain(server)
        (pid,) = explainer_pids(server)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid))
        assert post_explain(server)["method"] == "cam"


@pytest.mark.long
def test_models_come_and_go_in_an_explaining_process(zoo: Path, tmp_path: Path) -> None:
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


def test_what_is_too_long_is_not_painted(running: Server) -> None:
    strip = encode_image(Image.new("RGB", (70_000, 1)), "PNG")
    assert status_and_code(running.client.post("/v1/explain?format=png", content=strip)) == (
        400,
        "bad_request",
    )
    assert post_explain(running, strip)["method"] == "cam"


@pytest.mark.long
def test_more_than_a_few_do_not_wait(zoo: Path) -> None:
    head = f"POST {VGG}/explain?samples=8000 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(PHOTO)}\r\n\r\n"
    with Server(FOVEA_MODELS=str(zoo)) as server, ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.url)) for _ in range(8)]
        for wire in wires:
            wire.send(head.encode(), PHOTO)
        wait_until(lambda: server.read_metric("fovea_requests_in_flight") == 9)
        reply = server.client.post("/v1/explain", content=PHOTO)
        assert status_and_code(reply) == (503, "overloaded")
        assert int(reply.headers["Retry-After"]) >= 1
        assert fetch_layers(server)  # and models can be looked into meanwhile


def test_a_large_picture_comes_whole(running: Server) -> None:
    noise = Image.effect_noise((1500, 1000), 60).convert("RGB")
    reply = running.client.post("/v1/explain?format=png", content=encode_image(noise, "JPEG", quality=50))
    assert len(reply.content) > 2 << 20
    with Image.open(BytesIO(reply.content)) as image:
        image.load()
        assert image.size == noise.size


@pytest.mark.long
def test_it_ends_with_the_service(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        post_explain(server)
        (pid,) = explainer_pids(server)
        os.kill(server.process.pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid))
