"""Boxes: several regions of one image, each answered like an image with the region's pixels."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fovea
from fovea.commands.box_options import read_boxes
from fovea.errors import BadBox, BadRequest, StartError
from fovea.service.inference.preprocess import decode_upright
from tests.commands import Command
from tests.graphs import add_to_repository, build_model, build_nan_for_black
from tests.pictures import draw_picture, encode_image, make_jpeg
from tests.servers import ROOT, Server

ZOO = ROOT / "zoo"

BOXES = [[0, 0, 64, 48], [3, 5, 40, 41], [10, 10, 11, 12], [0, 47, 64, 48], [3, 5, 40, 41]]
"""The whole image of `make_jpeg`, a part, two pixels, a row, and a repeated part."""


@pytest.fixture(scope="module")
def zoo_server() -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(ZOO), FOVEA_RUNNERS="1") as server:
        yield server


@pytest.fixture(scope="module")
def zoo_model() -> fovea.Model:
    return fovea.load(ZOO)


@pytest.fixture(scope="module")
def fovea_client(zoo_server: Server) -> Iterator[fovea.Client]:
    with fovea.Client(zoo_server.url) as client:
        yield client


@pytest.fixture(scope="module")
def narrow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server that takes six images in a request; the queue of the model `narrow` takes four."""
    root = tmp_path_factory.mktemp("narrow")
    for name in ("small", "narrow"):
        add_to_repository(build_model(), root, name)
    (root / "narrow" / "config.toml").write_text("queue_images = 4\n")
    settings = {"FOVEA_DEFAULT_MODEL": "small", "FOVEA_REQUEST_IMAGES": "6", "FOVEA_QUEUE_IMAGES": "8"}
    with Server(FOVEA_MODELS=str(root), FOVEA_RUNNERS="1", **settings) as server:
        yield server


def cut_box(image: bytes, box: list[int]) -> bytes:
    """Return a region of the upright image as a PNG."""
    left, top, right, bottom = box
    upright = decode_upright(image, max_pixels=50_000_000)
    return encode_image(upright.crop((left, top, right, bottom)), "PNG")


def in_query(boxes: list[list[int]]) -> dict[str, Any]:
    return {"boxes": json.dumps(boxes)}


def as_b64(image: bytes) -> str:
    return base64.b64encode(image).decode()


def test_each_box_is_answered_like_its_pixels_as_a_png(zoo_server: Server) -> None:
    image, client = make_jpeg(exif=make_exif(6)), zoo_server.client
    boxes = [[0, 0, 48, 64], [3, 5, 40, 41], [0, 63, 48, 64]]
    options: dict[str, Any] = {"top_k": 0, "coverage": 0.95, "embedding": "true"}
    reply = client.post("/v1/classify", params={**in_query(boxes), **options}, content=image).json()
    assert list(reply) == ["model", "boxes", "image"]
    assert reply["image"] == {"format": "JPEG", "width": 48, "height": 64}
    for box, answer in zip(boxes, reply["boxes"], strict=True):
        expected = client.post("/v1/classify", params=options, content=cut_box(image, box)).json()
        del expected["model"], expected["image"]
        assert answer == {"box": box, **expected}


def make_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_every_way_to_ask_gets_the_same_answers(
    zoo_server: Server,
    zoo_model: fovea.Model,
    fovea_client: fovea.Client,
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image, client, url = make_jpeg(), zoo_server.client, zoo_server.url
    path = tmp_path / "photo.jpg"
    path.write_bytes(image)
    expected = zoo_model.classify(image, boxes=BOXES, embedding=True, coverage=0.9)
    assert [list(one.box or ()) for one in expected] == BOXES
    query: dict[str, Any] = {"embedding": "true", "coverage": 0.9}
    image_fields = {"b64": as_b64(image), "boxes": BOXES}
    replies = [
        client.post("/v1/classify", params=in_query(BOXES) | query, content=image),
        client.post("/v1/classify", params=query, files={"a": image}, data=in_query(BOXES)),
        client.post("/v1/classify", params=query, json={"images": [image_fields]}),
        client.post(
            "/v1/classify", params=in_query(BOXES) | query, json={"images": [{"b64": as_b64(image)}]}
        ),
        client.post("/invocations", params=in_query(BOXES) | query, content=image),
        client.post("/v1/models/cifar10/classify", params=in_query(BOXES) | query, content=image),
    ]
    flags = [f"--box={','.join(map(str, box))}" for box in BOXES[:2]]
    words = [path, "--models", ZOO, "--json", "--embedding", "--coverage=0.9", *flags]
    assert command("classify", *words, "--boxes", json.dumps(BOXES[2:])) == 0
    for values in [*(reply.json() for reply in replies), json.loads(capsys.readouterr().out)]:
        assert fovea.Result.list_from_reply(values, 5) == expected

    async def ask_asynchronously() -> Any:
        async with fovea.AsyncClient(url) as asynchronous:
            return await asynchronous.classify([image], boxes=[BOXES], embedding=True, coverage=0.9)

    assert fovea_client.classify(image, boxes=BOXES, embedding=True, coverage=0.9) == expected
    assert asyncio.run(ask_asynchronously()) == [expected]


def test_images_of_one_request_have_boxes_or_none(zoo_server: Server) -> None:
    image = make_jpeg()
    images = [
        {"b64": as_b64(image), "boxes": BOXES[:2]},
        {"b64": as_b64(image)},
        {"b64": as_b64(image), "boxes": []},
        {"b64": as_b64(image), "boxes": [BOXES[0], [0, 0, 65, 48]]},
        {"b64": as_b64(b"nothing"), "boxes": BOXES},
    ]
    reply = zoo_server.client.post("/v1/classify", json={"images": images})
    boxed, whole, without, outside, broken = reply.json()["results"]
    assert [one["box"] for one in boxed["boxes"]] == BOXES[:2]
    assert boxed["boxes"][0]["predictions"] == whole["predictions"]
    assert "boxes" not in whole
    assert without == {"boxes": [], "image": whole["image"]}
    assert outside["error"]["code"] == "bad_box"
    assert broken["error"]["code"] == "unsupported_format"


def test_boxes_of_the_body_take_precedence(zoo_server: Server) -> None:
    image = make_jpeg()
    body = {"images": [{"b64": as_b64(image), "boxes": BOXES[:1]}]}
    reply = zoo_server.client.post("/v1/classify", params=in_query(BOXES), json=body)
    assert [one["box"] for one in reply.json()["boxes"]] == BOXES[:1]
    form = zoo_server.client.post(
        "/v1/classify", params=in_query(BOXES), files={"a": image}, data=in_query(BOXES[:2])
    )
    assert [one["box"] for one in form.json()["boxes"]] == BOXES[:2]


def test_urls_that_differ_in_their_boxes_get_their_own_answers(zoo_server: Server) -> None:
    image = make_jpeg()
    for _ in range(2):
        for box in BOXES:
            reply = zoo_server.client.post("/v1/classify", params=in_query([box]), content=image).json()
            assert [one["box"] for one in reply["boxes"]] == [box]
        assert "boxes" not in zoo_server.client.post("/v1/classify", content=image).json()


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([0, 0, 65, 48], "is not inside the image"),
        ([0, 0, 64, 49], "is not inside the image"),
        ([-1, 0, 64, 48], "is not inside the image"),
        ([0, -1, 64, 48], "is not inside the image"),
        ([64, 0, 65, 48], "is not inside the image"),
        ([0, 0, 2**31 - 1, 48], "is not inside the image"),
        ([5, 5, 5, 6], "is empty"),
        ([5, 5, 6, 5], "is empty"),
        ([6, 5, 5, 6], "is empty"),
    ],
)
def test_box_that_is_empty_or_outside_names_itself_and_the_size(
    zoo_server: Server, zoo_model: fovea.Model, fovea_client: fovea.Client, box: list[int], reason: str
) -> None:
    image = make_jpeg()
    reply = zoo_server.client.post("/v1/classify", params=in_query([BOXES[0], box]), content=image)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (422, "bad_box")
    assert error["message"].startswith(f"box 1, {box}, {reason}")
    assert error["message"].endswith("(the image is 64 x 48 px)")
    for model in (fovea_client, zoo_model):
        with pytest.raises(BadBox, match=r"images\[1\]: box 0, "):
            model.classify([image, image], boxes=[BOXES, [box]])
        good, bad = model.classify([image, image], boxes=[BOXES, [box]], on_error="return")
        assert isinstance(good, list) and len(good) == len(BOXES)
        assert isinstance(bad, BadBox)


NO_BOXES: list[Any] = [
    *("text", 7, {"a": 1}, {}, True, [0, 0, 1, 1], [[0, 0, 1]], [[0, 0, 1, 1, 1]], [[0, 0, 1, 1.0]]),
    *(
        [[0, 0, 1, "1"]],
        [[0, 0, 1, True]],
        [[0, 0, 1, None]],
        [None],
        [[0, 0, 1, 2**31]],
        [[0, 0, 1, 10**30]],
    ),
    [[0, 0, 1, 1]] * 65,
]


@pytest.mark.parametrize("value", NO_BOXES)
def test_value_that_is_no_list_of_boxes_is_refused_everywhere(
    zoo_server: Server, zoo_model: fovea.Model, fovea_client: fovea.Client, value: Any
) -> None:
    client, image, text = zoo_server.client, make_jpeg(), json.dumps(value)
    body = {"images": [{"b64": as_b64(image), "boxes": value}]}
    replies = [
        client.post("/v1/classify", params={"boxes": text}, content=image),
        client.post("/v1/classify", files={"a": image}, data={"boxes": text}),
        client.post("/v1/classify", content=json.dumps(body), headers={"Content-Type": "application/json"}),
    ]
    for reply in replies:
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")
        assert "boxes: " in reply.json()["error"]["message"]
    for model in (fovea_client, zoo_model):
        with pytest.raises(BadRequest, match="boxes: "):
            model.classify(image, boxes=value)
        with pytest.raises(BadRequest, match="boxes"):
            model.classify([image], boxes=[value])


@pytest.mark.parametrize("name", ["box", "Box", "boxs"])
@pytest.mark.parametrize("count", [1, 64])
def test_misspelled_boxes_are_refused_with_a_hint(zoo_server: Server, name: str, count: int) -> None:
    """Otherwise the whole image would be classified, without a word. 64 boxes are a long field of a form."""
    client, image, boxes = zoo_server.client, make_jpeg(), [[0, 0, 10, 10]] * count
    replies = [
        client.post("/v1/classify", params={name: json.dumps(boxes)}, content=image),
        client.post("/v1/classify", files={"a": image}, data={name: json.dumps(boxes)}),
        client.post("/v1/classify", json={"images": [{"b64": as_b64(image), name: boxes}]}),
    ]
    for reply in replies:
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")
        assert name in reply.json()["error"]["message"]
    for reply in replies[:2]:
        assert "did you mean boxes?" in reply.json()["error"]["message"]
    other = client.post("/v1/classify", files={"a": image}, data={"notes": json.dumps(boxes)})
    assert other.status_code == 200


@pytest.mark.parametrize("depth", [2, 900, 985, 1000, 1020])
def test_deep_lists_are_refused(zoo_server: Server, depth: int) -> None:
    """The parser accepts lists that are nested more deeply than Python can write them."""
    text, image = "[" * depth + "]" * depth, make_jpeg()
    for reply in (
        zoo_server.client.post("/v1/classify", params={"boxes": text}, content=image),
        zoo_server.client.post("/v1/classify", files={"a": image}, data={"boxes": text}),
    ):
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")
        assert "boxes are each four integers" in reply.json()["error"]["message"]


@pytest.mark.parametrize("text", ["", "[[0,0,1,1]", "[" * 3000, "NaN", "0,0,1,1"])
def test_text_that_is_not_json_is_refused(zoo_server: Server, text: str) -> None:
    reply = zoo_server.client.post("/v1/classify", params={"boxes": text}, content=make_jpeg())
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")


def test_boxes_for_several_images_need_json(zoo_server: Server) -> None:
    image, files = make_jpeg(), [("a", make_jpeg()), ("b", make_jpeg())]
    several = {"images": [{"b64": as_b64(image)}] * 2}
    for reply in (
        zoo_server.client.post("/v1/classify", params=in_query(BOXES), files=files),
        zoo_server.client.post("/v1/classify", files=files, data=in_query(BOXES)),
        zoo_server.client.post("/v1/classify", params=in_query(BOXES), json=several),
    ):
        assert reply.status_code == 400
        assert "for several images, send JSON" in reply.json()["error"]["message"]


def test_long_boxes_in_a_form_are_read_or_refused_and_never_ignored(zoo_server: Server) -> None:
    image, boxes = make_jpeg(), [[0, 0, 64, 48]] * 64
    for text, status in ((json.dumps(boxes, indent=4), 200), (json.dumps(boxes) + " " * 8192, 400)):
        reply = zoo_server.client.post("/v1/classify", files={"a": image}, data={"boxes": text})
        assert reply.status_code == status
    assert (
        len(zoo_server.client.post("/v1/classify", params=in_query(boxes), content=image).json()["boxes"])
        == 64
    )


def test_boxes_count_as_images(narrow_server: Server) -> None:
    image, labels = make_jpeg(), {"model": "small", "version": "1"}
    server, client = narrow_server, narrow_server.client
    assert client.post("/v1/classify", params=in_query(BOXES), content=image).status_code == 200
    server.wait_for_metric(5, "fovea_images_total", **labels)
    assert server.read_metric("fovea_images_in_flight") == 0
    too_many = client.post("/v1/classify", params=in_query(BOXES + BOXES[:2]), content=image)
    assert too_many.status_code == 400
    assert "7 boxes" in too_many.json()["error"]["message"]
    images = [{"b64": as_b64(image), "boxes": BOXES}, {"b64": as_b64(image)}]
    assert client.post("/v1/classify", json={"images": images}).status_code == 200
    images.append({"b64": as_b64(image), "boxes": []})
    assert client.post("/v1/classify", json={"images": images}).status_code == 400
    assert server.read_metric("fovea_images_in_flight") == 0


def test_boxes_need_as_many_places_in_the_queue(narrow_server: Server) -> None:
    client, path = narrow_server.client, "/v1/models/narrow/classify"
    replies = [client.post(path, params=in_query(BOXES[:count]), content=make_jpeg()) for count in (4, 5)]
    assert [reply.status_code for reply in replies] == [200, 503]
    assert client.post(path, content=make_jpeg()).status_code == 200


def test_large_image_in_shared_memory_is_decoded_at_full_size(zoo_server: Server) -> None:
    """Otherwise, the model decodes a JPEG of this size at a fraction of its size."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8))
    image = encode_image(picture, "JPEG", quality=95)
    assert len(image) > 1 << 19
    box = [100, 200, 420, 520]
    reply = zoo_server.client.post(
        "/v1/classify", params=in_query([box]) | {"top_k": 0}, content=image
    ).json()
    expected = zoo_server.client.post("/v1/classify", params={"top_k": 0}, content=cut_box(image, box)).json()
    assert reply["boxes"][0]["predictions"] == expected["predictions"]


def test_warnings_are_those_of_the_image_and_of_each_box(zoo_server: Server, zoo_model: fovea.Model) -> None:
    gif = BytesIO()
    frames = [draw_picture(64, 48, seed) for seed in range(2)]
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    counts = {
        code: count_warnings(zoo_server, code) for code in ("one_of_several_pictures", "strongly_enlarged")
    }
    reply = zoo_server.client.post(
        "/v1/classify", params=in_query([[0, 0, 64, 48], [0, 0, 2, 2], [0, 0, 3, 3]]), content=gif.getvalue()
    ).json()
    assert [one["code"] for one in reply["warnings"]] == ["one_of_several_pictures"]
    assert [[one["code"] for one in box.get("warnings", [])] for box in reply["boxes"]] == [
        [],
        ["strongly_enlarged"],
        ["strongly_enlarged"],
    ]
    assert count_warnings(zoo_server, "one_of_several_pictures") == counts["one_of_several_pictures"] + 1
    assert count_warnings(zoo_server, "strongly_enlarged") == counts["strongly_enlarged"] + 2
    results = zoo_model.classify(gif.getvalue(), boxes=[[0, 0, 2, 2]])
    assert [one.code for one in results[0].warnings] == ["one_of_several_pictures", "strongly_enlarged"]


def count_warnings(server: Server, code: str) -> float:
    return server.read_metric("fovea_image_warnings_total", reason=code)


def test_box_without_a_finite_answer_is_named(tmp_path: Path) -> None:
    add_to_repository(build_nan_for_black(), tmp_path)
    picture = draw_picture(64, 48)
    picture.paste((0, 0, 0), (0, 0, 20, 20))
    image = encode_image(picture, "PNG")
    with pytest.raises(fovea.errors.Internal, match="box 2: the model's answer"):
        fovea.load(tmp_path).classify(image, boxes=[[20, 20, 40, 40]] * 2 + [[0, 0, 20, 20]])


def test_models_with_several_tasks_and_no_batches_answer_boxes(tmp_path: Path) -> None:
    """A graph that takes one image at a time gets the boxes one after the other."""
    model = build_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    add_to_repository(model, tmp_path)
    image = make_jpeg()
    local = fovea.load(tmp_path)
    for box, result in zip(BOXES, local.classify(image, boxes=BOXES, top_k=0), strict=True):
        assert result.predictions == local.classify(cut_box(image, box), top_k=0).predictions
        assert result.box == tuple(box)


def test_arrays_of_a_detector_are_boxes(zoo_model: fovea.Model) -> None:
    model, image = zoo_model, np.asarray(draw_picture(64, 48))
    results = model.classify(image, boxes=np.array(BOXES))
    assert results == model.classify(image, boxes=BOXES)
    assert results[0].image.width == 64
    with pytest.raises(BadRequest, match="each four integers"):
        model.classify(image, boxes=np.array(BOXES, np.float32))
    with pytest.raises(BadRequest, match="the boxes of 1 images, but 2 images"):
        model.classify([image, image], boxes=[BOXES])
    assert model.classify(image, boxes=[]) == []
    assert model.classify([], boxes=[]) == []


def test_result_of_a_box_tells_its_box(zoo_model: fovea.Model) -> None:
    (result,) = zoo_model.classify(make_jpeg(), boxes=[BOXES[1]])
    assert result.to_dict()["box"] == BOXES[1]
    assert "(3, 5, 40, 41)" in repr(result)
    assert "box (3, 5, 40, 41)" in result._repr_html_()
    assert fovea.Result.from_reply(result.to_dict(), 5) == result


def test_command_shows_the_boxes_of_one_file(
    command: Command, small_zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(make_jpeg())
    words = ["--models", small_zoo, "--box", "3,5,40,41", "--boxes", "[[0, 0, 64, 48]]", "--top-k", "1"]
    assert command("classify", path, *words) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("  box ")] == [
        "  box 3,5,40,41",
        "  box 0,0,64,48",
    ]
    assert command("classify", tmp_path, "--models", small_zoo, "--box", "0,0,1,1") == 2
    assert "--box and --boxes are for one image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("boxes", "text", "message"),
    [
        (["0,0,1"], None, "each four integers"),
        (["a,b,c,d"], None, "it takes four integers"),
        ([], "0,0,1,1", "it must be JSON"),
        (["0,0,1,1"] * 65, None, "more than 64 boxes"),
        (["0,0,1,1"] * 33, json.dumps([[0, 0, 1, 1]] * 33), "more than 64 boxes"),
    ],
)
def test_options_that_are_no_boxes_are_refused(boxes: list[str], text: str | None, message: str) -> None:
    with pytest.raises(StartError, match=message):
        read_boxes(boxes, text)
