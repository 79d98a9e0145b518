"""Embeddings: the vector that the last layer reads, against plain ONNX Runtime."""

from __future__ import annotations

import base64
from collections.abc import Iterator
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
from tests.graphs import LayerRow, add_to_repository, build_unopenable, contract_with_layers, read_contract
from tests.pictures import make_jpeg
from tests.servers import Server

ZOO = Path(__file__).parents[3] / "zoo"

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
