"""Images that are sent once and asked about many times."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from fovea.service.access.caller import Caller
from fovea.service.api.uploads import MAX_IDLE_SECONDS, MAX_IMAGES, Uploads
from fovea.service.errors import UploadNotFound
from fovea.service.resources.body_memory import BodyMemory
from tests.pictures import make_jpeg
from tests.servers import FLOAT_MODEL, ROOT, Server

IMAGE = (ROOT / "samples" / "ship.jpg").read_bytes()
SMALL_IMAGE = make_jpeg()


@pytest.fixture(scope="module")
def upload_server() -> Iterator[Server]:
    """A server with the default model, and with little memory for bodies."""
    settings = {"FOVEA_BODIES_BYTES": "800000", "FOVEA_BODY_BYTES": "400000"}
    with Server(
        FOVEA_MODELS=str(FLOAT_MODEL.parents[2]), FOVEA_DEFAULT_MODEL="cifar10", **settings
    ) as server:
        yield server
    assert "Traceback" not in server.log


def send_image(server: Server, image: bytes) -> str:
    reply = server.client.post("/v1/images", content=image)
    assert reply.status_code == 200, reply.text
    assert (reply.json()["bytes"], reply.json()["seconds"]) == (len(image), MAX_IDLE_SECONDS)
    return str(reply.json()["url"])


def ask(server: Server, path: str, url: str, **query: str) -> httpx.Response:
    return server.client.post(path, json={"images": [{"url": url}]}, params=query)


def test_every_question_about_an_upload_has_the_answer_to_the_image(upload_server: Server) -> None:
    server = upload_server
    url = send_image(server, IMAGE)
    assert send_image(server, IMAGE) == url
    for path in ("/v1/classify", "/v1/explain", "/v1/models/cifar10/classify", "/v1/models/cifar10/explain"):
        expected = server.client.post(path, content=IMAGE, params={"top_k": 10}).json()
        assert ask(server, path, url, top_k="10").json() == expected
    layers = server.client.get("/v1/models/cifar10/layers").json()["layers"]
    for layer in layers[::4]:
        path, query = "/v1/models/cifar10/maps", {"tensor": layer["tensor"]}
        expected_values = np.load(io.BytesIO(server.client.post(path, content=IMAGE, params=query).content))
        values = np.load(io.BytesIO(ask(server, path, url, **query).content))
        assert np.array_equal(values, expected_values)


def test_maps_follow_the_image(upload_server: Server) -> None:
    """The process keeps the pixels of the last image."""
    images = [IMAGE, (ROOT / "samples" / "truck.png").read_bytes()]
    urls = [send_image(upload_server, image) for image in images]
    path = "/v1/models/cifar10/maps"
    layers = upload_server.client.get("/v1/models/cifar10/layers").json()["layers"]
    query = {"tensor": layers[3]["tensor"]}
    replies = [ask(upload_server, path, url, **query).content for url in (*urls, *urls)]
    assert replies[:2] == replies[2:]
    assert replies[0] != replies[1]


def test_unknown_upload_is_404_in_every_call(upload_server: Server) -> None:
    url = "upload:0123456789abcdef0123456789abcdef"
    for path in ("/v1/classify", "/v1/explain", "/v1/models/cifar10/maps"):
        reply = ask(upload_server, path, url, **({"tensor": "logits"} if "maps" in path else {}))
        assert reply.status_code == 404, reply.text
        assert reply.json()["error"]["code"] == "upload_not_found"


def test_upload_is_refused_when_it_is_empty_too_large_or_has_options(upload_server: Server) -> None:
    client = upload_server.client
    assert client.post("/v1/images").status_code == 400
    assert client.post("/v1/images?top_k=1", content=IMAGE).status_code == 400
    assert client.post("/v1/images", content=bytes(100_001)).status_code == 413
    assert client.post("/v1/images", content=bytes(100_000)).status_code == 200


def test_least_recently_used_upload_makes_room(upload_server: Server) -> None:
    first_url, second_url = (send_image(upload_server, bytes([number]) * 40_000) for number in (1, 2))
    assert ask(upload_server, "/v1/classify", first_url).status_code == 415  # it is there, and no image
    send_image(upload_server, bytes([3]) * 40_000)
    assert ask(upload_server, "/v1/classify", first_url).status_code == 415
    assert ask(upload_server, "/v1/classify", second_url).status_code == 404


def test_uploads_end_after_ten_idle_minutes_and_give_their_memory_back() -> None:
    async def run() -> None:
        memory, now = BodyMemory(8000), 0.0
        uploads = Uploads(memory, lambda: now)
        caller = Caller("", "192.0.2.1")
        url = await uploads.add_image(b"image", caller)
        assert url is not None
        assert memory.body_bytes == 5
        now = MAX_IDLE_SECONDS - 1
        assert uploads.find_image(url, caller) == b"image"
        now = 2 * MAX_IDLE_SECONDS - 2
        assert uploads.find_image(url, caller) == b"image"
        now = 3 * MAX_IDLE_SECONDS
        with pytest.raises(UploadNotFound):
            uploads.find_image(url, caller)
        assert memory.body_bytes == 0
        uploads.close()

    asyncio.run(run())


def test_number_of_uploads_is_limited() -> None:
    async def run() -> None:
        memory = BodyMemory(8_000_000)
        uploads = Uploads(memory)
        caller = Caller("", "192.0.2.1")
        urls = [await uploads.add_image(b"%d" % number, caller) for number in range(MAX_IMAGES + 1)]
        with pytest.raises(UploadNotFound):
            uploads.find_image(str(urls[0]), caller)
        assert uploads.find_image(str(urls[1]), caller) == b"1"
        uploads.close()
        assert memory.body_bytes == 0

    asyncio.run(run())


def test_upload_belongs_to_its_caller() -> None:
    async def run() -> None:
        uploads = Uploads(BodyMemory(8000))
        url = await uploads.add_image(b"image", Caller("web", "192.0.2.1"))
        assert url is not None
        assert uploads.find_image(url, Caller("web", "192.0.2.2")) == b"image"
        for caller in (Caller("other", "192.0.2.1"), Caller("", "192.0.2.1")):
            with pytest.raises(UploadNotFound):
                uploads.find_image(url, caller)
        uploads.close()

    asyncio.run(run())


def test_upload_takes_no_memory_that_bodies_have() -> None:
    async def run() -> None:
        memory = BodyMemory(8000)
        uploads = Uploads(memory)
        assert memory.reserve(7500)
        assert await uploads.add_image(bytes(600), Caller("", "")) is None
        assert memory.body_bytes == 7500
        uploads.close()

    asyncio.run(run())


@pytest.mark.long
def test_upload_is_sent_again_until_every_worker_has_it(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2") as server:
        expected = server.client.post("/v1/classify", content=SMALL_IMAGE).json()["predictions"]
        url = ""
        for _ in range(20):
            with httpx.Client(base_url=server.url, timeout=60) as client:  # a connection to any worker
                reply = client.post("/v1/classify", json={"images": [{"url": url or "upload:none"}]})
                if reply.status_code == 404:
                    again = client.post("/v1/images", content=SMALL_IMAGE).json()["url"]
                    assert url in ("", again)
                    url = again
                    reply = client.post("/v1/classify", json={"images": [{"url": url}]})
            assert reply.json()["predictions"] == expected
