"""Embeddings: the vector that the last layer reads, against plain ONNX Runtime."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import fovea
from fovea.service.artifact.contract import Contract
from fovea.service.artifact.embedding import Embedding, find_embedding
from fovea.service.errors import NoEmbedding
from fovea.service.inference.preprocess import decode_image
from tests.graphs import (
    LayerRow,
    add_to_repository,
    build_model,
    build_unopenable,
    build_without_embedding_tensor,
    contract_with_layers,
    read_contract,
)
from tests.pictures import make_jpeg
from tests.servers import ROOT, Server

ZOO = ROOT / "zoo"

TENSORS = {"3": "mean", "4": "mean_DequantizeLinear_Output"}


@pytest.fixture(scope="module")
def zoo_server() -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(ZOO)) as server:
        yield server


def compute_embedding(version: str, image: bytes) -> Any:
    """Return the embedding by a session of its own, from a graph that the onnx package has changed."""
    model = onnx.load(ZOO / "cifar10" / version / "model.onnx")
    model.graph.output.append(onnx.ValueInfoProto(name=TENSORS[version]))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    contract = Contract.from_metadata(session.get_modelmeta().custom_metadata_map)
    pixels = decode_image(image, contract.input, max_pixels=1_000_000).pixels
    return session.run([TENSORS[version]], {contract.input_name: pixels[None]})[0][0]


def decode(text: str) -> Any:
    return np.frombuffer(base64.b64decode(text, validate=True), "<f4")


@pytest.mark.parametrize("version", ["3", "4"])
def test_embedding_equals_that_of_plain_onnx_runtime(version: str) -> None:
    images = [make_jpeg(seed=seed) for seed in range(5)]
    model = fovea.load(ZOO / "cifar10" / version)
    plain_results = model.classify(images)
    for image, result, plain in zip(
        images, model.classify(images, embedding=True), plain_results, strict=True
    ):
        assert result.embedding == pytest.approx(compute_embedding(version, image), abs=1e-6)
        assert len(result.embedding or ()) == 256
        assert result.probability == pytest.approx(plain.probability, abs=1e-6)
        assert plain.embedding is None
        assert "embedding" not in plain.to_dict()
        assert decode(result.to_dict()["embedding"]).tolist() == list(result.embedding or ())


def test_every_form_of_a_request_gets_the_embedding(zoo_server: Server) -> None:
    client, image = zoo_server.client, make_jpeg()
    expected = compute_embedding("4", image)
    text = base64.b64encode(image).decode()
    replies = [
        client.post("/v1/classify?embedding=true", content=image),
        client.post("/v1/classify", files={"file": image}, data={"embedding": "true"}),
        client.post("/v1/classify", json={"images": [{"b64": text}], "embedding": True}),
    ]
    for reply in replies:
        assert decode(reply.json()["embedding"]) == pytest.approx(expected, abs=1e-6)
    body = {"images": [{"b64": text}, {"b64": "AAAA"}, {"b64": text}], "embedding": True}
    first, failed, last = client.post("/v1/classify", json=body).json()["results"]
    assert first["embedding"] == last["embedding"]
    assert "error" in failed
    assert "embedding" not in client.post("/v1/classify", content=image).json()
    off = client.post("/v1/classify?embedding=true", json={"images": [{"b64": text}], "embedding": False})
    assert "embedding" not in off.json()
    assert client.post("/v1/classify?embedding=maybe", content=image).status_code == 400
    assert client.get("/v1/models").json()["models"][0]["embedding"] == {"dimension": 256}
    with fovea.Client(str(client.base_url)) as fovea_client:
        assert fovea_client.classify(image, embedding=True).embedding == pytest.approx(expected, abs=1e-6)
        assert fovea_client.classify(image).embedding is None


def test_model_without_an_embedding_says_so(tmp_path: Path) -> None:
    model = build_unopenable()
    add_to_repository(model, tmp_path)
    assert find_embedding(read_contract(model)) is None
    with pytest.raises(NoEmbedding):
        fovea.load(tmp_path).classify(make_jpeg(), embedding=True)
    with Server(FOVEA_MODELS=str(tmp_path)) as server:
        (entry,) = server.client.get("/v1/models").json()["models"]
        assert entry["embedding"] is None
        reply = server.client.post("/v1/classify?embedding=true", content=make_jpeg())
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "no_embedding")


def test_asynchronous_client_and_command_get_the_embedding(zoo_server: Server, tmp_path: Path) -> None:
    image = make_jpeg()
    expected = compute_embedding("4", image)

    async def ask() -> list[fovea.Result]:
        async with fovea.AsyncClient(zoo_server.url) as client:
            return await client.classify([image, image], embedding=True)

    for result in asyncio.run(ask()):
        assert result.embedding == pytest.approx(expected, abs=1e-6)
    (tmp_path / "a.jpg").write_bytes(image)
    (tmp_path / "b.jpg").write_bytes(b"no image")
    command = [sys.executable, "-m", "fovea", "classify", "--json", "--embedding"]
    files = [str(tmp_path / name) for name in ("a.jpg", "b.jpg")]
    reply = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    good, bad = json.loads(reply.stdout)["results"]
    assert decode(good["embedding"]) == pytest.approx(expected, abs=1e-6)
    assert bad["error"]["code"] == "unsupported_format"


@pytest.mark.long
def test_each_of_several_models_gives_its_own_embedding(tmp_path: Path) -> None:
    """Models and requests with and without an embedding share the runners."""
    add_to_repository(build_model(seed=1), tmp_path, "first")
    add_to_repository(build_model(seed=2), tmp_path, "second")
    add_to_repository(build_unopenable(), tmp_path, "third")
    image = make_jpeg()
    expected = {
        name: fovea.load(tmp_path / name).classify(image, embedding=True) for name in ("first", "second")
    }
    assert expected["first"].embedding != expected["second"].embedding
    with (
        Server(FOVEA_MODELS=str(tmp_path), FOVEA_DEFAULT_MODEL="first") as server,
        ThreadPoolExecutor(8) as pool,
        fovea.Client(server.url) as client,
    ):

        def ask(index: int) -> None:
            name = ("first", "second")[index % 2]
            with_embedding = index % 3 > 0
            result = client.classify(image, model=name, embedding=with_embedding)
            assert result.predictions == expected[name].predictions
            assert result.embedding == (expected[name].embedding if with_embedding else None)

        list(pool.map(ask, range(48)))
        with pytest.raises(NoEmbedding):
            client.classify(image, model="third", embedding=True)
        assert client.classify(image, model="third").embedding is None


@pytest.mark.long
def test_embedding_that_cannot_be_computed_fails_its_image_only(tmp_path: Path) -> None:
    add_to_repository(build_without_embedding_tensor(), tmp_path)
    image = make_jpeg()
    with Server(FOVEA_MODELS=str(tmp_path), FOVEA_RUNNERS="1") as server, ThreadPoolExecutor(8) as pool:

        def ask(index: int) -> tuple[bool, int]:
            query = "?embedding=true" if index % 2 else ""
            return bool(query), server.client.post(f"/v1/classify{query}", content=image).status_code

        assert set(pool.map(ask, range(32))) == {(False, 200), (True, 500)}
        error = server.client.post("/v1/classify?embedding=true", content=image).json()["error"]
        assert error["message"].startswith("the model's embedding cannot be computed")
        assert server.read_metric("fovea_runner_deaths_total") == 0


CONV: LayerRow = ("Conv", "pixels k", "conv", (8, 4, 4), {})
POOL: LayerRow = ("ReduceMean", "conv axes", "pooled", (8,), {})
HEAD: LayerRow = ("Gemm", "pooled w", "logits", (4,), {})


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([CONV, POOL, ("Gemm", "pooled w", "logits", (4,), {})], Embedding("pooled", 8)),
        (
            [
                CONV,
                ("GlobalAveragePool", "conv", "pooled", (8, 1, 1), {}),
                ("Conv", "pooled w", "maps", (4, 1, 1), {}),
                ("Flatten", "maps", "logits", (4,), {}),
            ],
            Embedding("pooled", 8),
        ),
        (
            [
                CONV,
                POOL,
                ("DequantizeLinear", "wq s z", "w", (8, 4), {}),
                ("MatMul", "pooled w", "product", (4,), {}),
                ("Add", "product bias", "logits", (4,), {}),
            ],
            Embedding("pooled", 8),
        ),
        ([CONV, ("Conv", "conv w", "maps", (4, 4, 4), {}), ("Flatten", "maps", "logits", (4,), {})], None),
        ([("Flatten", "pixels", "flat", (768,), {}), ("Gemm", "flat w", "logits", (4,), {})], None),
        ([CONV, POOL, ("MatMul", "pooled pooled2", "logits", (4,), {})], Embedding("pooled", 8)),
        (
            [
                CONV,
                POOL,
                ("Gemm", "pooled a", "left", (4,), {}),
                ("Gemm", "pooled b", "right", (4,), {}),
                ("Add", "left right", "logits", (4,), {}),
            ],
            None,
        ),
        (
            [
                CONV,
                ("ReduceMean", "conv axes", "pooled", (None,), {}),
                ("Gemm", "pooled w", "logits", (4,), {}),
            ],
            None,
        ),
        (
            [CONV, POOL, ("Gemm", "pooled w", "hidden", (4,), {}), ("Relu", "hidden", "logits", (4,), {})],
            None,
        ),
    ],
)
def test_embedding_is_found_in_the_layer_table(rows: list[LayerRow], expected: Embedding | None) -> None:
    assert find_embedding(contract_with_layers(*rows)) == expected
