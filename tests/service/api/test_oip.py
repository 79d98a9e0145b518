"""Open Inference Protocol, with Triton's own client and with plain requests."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from fovea.service.artifact.contract import Task
from fovea.service.inference.preprocess import decode_image
from tests.export.classifiers import build_classifier
from tests.export.imports import import_graph
from tests.graphs import SMALL_GEOMETRY, add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.raw import Wire
from tests.servers import Server
from tests.service.api.test_tensors import KINDS

Array = npt.NDArray[Any]

IMAGES = [make_jpeg(64 + seed, 48, seed) for seed in range(100)]
PER_REQUEST = 50
BINARY = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trained model of each task, and `thing`, which was imported."""
    folder = tmp_path_factory.mktemp("oip")
    import_graph(build_classifier(), folder)
    root = folder / "zoo"
    add_to_repository(build_model(), root)
    add_to_repository(build_model(Task.BINARY, ["no", "yes"]), root, "yesno")
    add_to_repository(build_model(Task.MULTILABEL, ["ant", "bee", "cow"]), root, "many")
    return root


@pytest.fixture(scope="module")
def oip_server(zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_DEFAULT_MODEL="small", FOVEA_JSON_BYTES="2000000") as server:
        yield server


@pytest.fixture
def client(oip_server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(oip_server.url.removeprefix("http://"), network_timeout=60) as instance:
        yield instance


@pytest.fixture(scope="module")
def native_probabilities(oip_server: Server) -> Mapping[str, Array]:
    """The native results for the images, by model."""
    return {
        name: np.array([classify_natively(oip_server, name, image) for image in IMAGES])
        for name in ("small", "thing")
    }


def classify_natively(server: Server, name: str, image: bytes) -> list[float]:
    reply = server.client.post(f"/v1/models/{name}/classify?top_k=0", content=image)
    probability_by_index = {
        prediction["index"]: prediction["probability"] for prediction in reply.json()["predictions"]
    }
    return [probability_by_index[index] for index in range(len(probability_by_index))]


def decode_pixels(image: bytes) -> Array:
    return decode_image(image, SMALL_GEOMETRY, max_pixels=1_000_000).pixels


def requested_outputs(*names: str, **options: Any) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name, **options) for name in names]


def make_input(name: str, values: Array, datatype: str, *, binary: bool = True) -> triton.InferInput:
    infer_input = triton.InferInput(name, list(values.shape), datatype)
    infer_input.set_data_from_numpy(values, binary_data=binary)
    return infer_input


def make_image_input(images: list[bytes]) -> triton.InferInput:
    return make_input("image", np.array(images, dtype=object), "BYTES")


def read_probabilities(result: Any) -> Array:
    values: Array = result.as_numpy("probabilities")
    return values


# --- Triton's client -----------------------------------------------------------------------------


def test_metadata_describes_server_and_models(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("thing") and client.is_model_ready("thing", "1")
    assert not client.is_model_ready("thing", "2") and not client.is_model_ready("nothing")
    server_metadata = client.get_server_metadata()
    assert server_metadata["name"] == "fovea"
    assert set(server_metadata["extensions"]) == {
        "binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics",
    }  # fmt: skip
    model_metadata = client.get_model_metadata("thing", "1")
    assert (model_metadata["name"], model_metadata["versions"], model_metadata["platform"]) == (
        "thing",
        ["1"],
        "onnxruntime_onnx",
    )
    assert model_metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 16, 16]}]
    assert model_metadata["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 5]}]
    assert model_metadata["alternatives"] == {
        "inputs": [
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, 16, 16, 3]},
            {"name": "encoded_image", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [-1, 5]},
            {"name": "scores", "datatype": "FP32", "shape": [-1, 5]},
        ],
    }
    small_metadata = client.get_model_metadata("small")
    assert [tensor["name"] for tensor in small_metadata["inputs"]] == ["pixels"]
    assert [tensor["name"] for tensor in small_metadata["alternatives"]["inputs"]] == ["image"]
    assert client.get_model_metadata("yesno")["alternatives"]["outputs"][0]["shape"] == [-1, 1]
    assert {entry["name"] for entry in client.get_model_repository_index()} == {
        "small",
        "thing",
        "yesno",
        "many",
    }


@pytest.mark.parametrize(
    ("model", "layout", "version"), [("thing", "FORMAT_NCHW", ""), ("small", "FORMAT_NHWC", "1")]
)
def test_client_can_follow_metadata_and_config(
    client: triton.InferenceServerClient,
    oip_server: Server,
    native_probabilities: Mapping[str, Array],
    model: str,
    layout: str,
    version: str,
) -> None:
    """Triton's `image_client.py` and its descendants read the metadata and the configuration."""
    metadata, config = client.get_model_metadata(model, version), client.get_model_config(model, version)
    (input_metadata,), (output_metadata,) = metadata["inputs"], metadata["outputs"]
    (input_config,), (output_config,) = config["input"], config["output"]
    assert (config["name"], config["backend"], config["max_batch_size"]) == (model, "onnxruntime", 64)
    assert (input_config["name"], output_config["name"]) == (input_metadata["name"], output_metadata["name"])
    assert (input_config["dims"], output_config["dims"]) == (
        input_metadata["shape"][1:],
        output_metadata["shape"][1:],
    )
    assert input_config["data_type"] == f"TYPE_{input_metadata['datatype']}"
    assert (input_config["format"], output_config["data_type"]) == (layout, "TYPE_FP32")
    pixels = np.stack([decode_imported_pixels(oip_server, image, model) for image in IMAGES[:64]])
    values = KINDS["float32 nchw"].compute_by_hand(pixels) if model == "thing" else pixels
    outputs = [triton.InferRequestedOutput(output_metadata["name"], class_count=1)]
    inputs = [make_input(input_metadata["name"], values, input_metadata["datatype"])]
    lines = client.infer(model, inputs, outputs=outputs).as_numpy(output_metadata["name"])
    best = [int(line.decode().split(":")[1]) for (line,) in lines]
    assert best == native_probabilities[model][:64].argmax(axis=1).tolist()
    with pytest.raises(InferenceServerException, match="no model 'nothing'"):
        client.get_model_config("nothing")


@pytest.mark.parametrize("model", ["small", "thing"])
def test_encoded_images_get_native_probabilities(
    client: triton.InferenceServerClient, native_probabilities: Mapping[str, Array], model: str
) -> None:
    batches = [
        read_probabilities(client.infer(model, [make_image_input(IMAGES[start : start + PER_REQUEST])]))
        for start in range(0, len(IMAGES), PER_REQUEST)
    ]
    assert np.concatenate(batches) == pytest.approx(native_probabilities[model], abs=1e-6)
    assert np.array_equal(np.concatenate(batches).argmax(axis=1), native_probabilities[model].argmax(axis=1))


def test_pixels_get_native_probabilities(
    client: triton.InferenceServerClient, native_probabilities: Mapping[str, Array]
) -> None:
    for binary in (True, False):
        for start in range(0, len(IMAGES), PER_REQUEST):
            pixels = np.stack([decode_pixels(image) for image in IMAGES[start : start + PER_REQUEST]])
            values = read_probabilities(
                client.infer("small", [make_input("pixels", pixels, "UINT8", binary=binary)])
            )
            assert values == pytest.approx(
                native_probabilities["small"][start : start + PER_REQUEST], abs=1e-6
            )


@pytest.mark.parametrize("binary", [True, False])
def test_original_input_of_imported_model_is_accepted(
    client: triton.InferenceServerClient,
    native_probabilities: Mapping[str, Array],
    oip_server: Server,
    binary: bool,
) -> None:
    """There are 100 rows of 3 KB, once in the memory that runners share, and once in JSON."""
    geometry = fetch_contract(oip_server, "thing")["input"]
    size = (geometry["height"], geometry["width"])
    assert size == (16, 16)
    for start in range(0, len(IMAGES), PER_REQUEST):
        pixels = np.stack(
            [decode_imported_pixels(oip_server, image) for image in IMAGES[start : start + PER_REQUEST]]
        )
        values = KINDS["float32 nchw"].compute_by_hand(pixels)
        probabilities = read_probabilities(
            client.infer("thing", [make_input("image", values, "FP32", binary=binary)])
        )
        assert probabilities == pytest.approx(
            native_probabilities["thing"][start : start + PER_REQUEST], abs=1e-6
        )


def fetch_contract(server: Server, name: str) -> dict[str, Any]:
    document: dict[str, Any] = server.client.get(f"/v1/models/{name}/contract").json()
    return document


def decode_imported_pixels(server: Server, image: bytes, name: str = "thing") -> Array:
    from fovea.service.artifact.contract import Geometry
    from fovea.service.artifact.strict_json import from_plain

    geometry = from_plain(Geometry, fetch_contract(server, name)["input"], "input")
    return decode_image(image, geometry, max_pixels=1_000_000).pixels


def test_outputs_can_be_json_or_binary(
    client: triton.InferenceServerClient, native_probabilities: Mapping[str, Array]
) -> None:
    both_outputs = requested_outputs("probabilities", "logits")
    binary_result = client.infer(
        "small", [make_image_input(IMAGES[:3])], request_id="42", outputs=both_outputs
    )
    assert binary_result.get_response()["id"] == "42"
    assert (binary_result.get_response()["model_name"], binary_result.get_response()["model_version"]) == (
        "small",
        "1",
    )
    mixed_outputs = [
        triton.InferRequestedOutput(name, binary_data=name == "logits")
        for name in ("logits", "probabilities")
    ]
    mixed_result = client.infer("small", [make_image_input(IMAGES[:3])], outputs=mixed_outputs)
    for result in (binary_result, mixed_result):
        assert read_probabilities(result) == pytest.approx(native_probabilities["small"][:3], abs=1e-6)
        powers = np.exp(result.as_numpy("logits"))
        assert powers / powers.sum(axis=1, keepdims=True) == pytest.approx(
            read_probabilities(result), abs=1e-6
        )
    assert [output["name"] for output in mixed_result.get_response()["outputs"]] == [
        "logits",
        "probabilities",
    ]
    (default_output,) = client.infer("small", [make_image_input(IMAGES[:3])]).get_response()["outputs"]
    assert default_output["name"] == "probabilities"


@pytest.mark.parametrize("binary", [True, False])
def test_classification_returns_the_best_labels(
    client: triton.InferenceServerClient,
    oip_server: Server,
    native_probabilities: Mapping[str, Array],
    binary: bool,
) -> None:
    outputs = [triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=3)]
    result = read_probabilities(client.infer("small", [make_image_input(IMAGES[:5])], outputs=outputs))
    assert result.shape == (5, 3)
    labels = fetch_contract(oip_server, "small")["labels"]
    for row, reference in zip(result, native_probabilities["small"], strict=False):
        texts = [value.decode() if isinstance(value, bytes) else value for value in row]
        best = np.argsort(-reference, kind="stable")[:3]
        assert [int(text.split(":")[1]) for text in texts] == best.tolist()
        assert [text.split(":")[2] for text in texts] == [labels[index] for index in best]
        assert [float(text.split(":")[0]) for text in texts] == pytest.approx(reference[best], abs=1e-6)


@pytest.mark.parametrize(("model", "labels", "logits"), [("yesno", 2, 1), ("many", 3, 3)])
def test_binary_and_multilabel_outputs_are_consistent(
    client: triton.InferenceServerClient, model: str, labels: int, logits: int
) -> None:
    outputs = requested_outputs("probabilities", "logits", class_count=9)
    result = client.infer(model, [make_image_input(IMAGES[:2])], outputs=outputs)
    assert read_probabilities(result).shape == (2, labels)
    assert result.as_numpy("logits").shape == (2, logits)
    plain_result = client.infer(
        model, [make_image_input(IMAGES[:2])], outputs=requested_outputs("probabilities", "logits")
    )
    sigmoid = 1 / (1 + np.exp(-plain_result.as_numpy("logits")))
    assert read_probabilities(plain_result)[:, -logits:] == pytest.approx(sigmoid, abs=1e-6)
    assert result.as_numpy("logits")[0][0].decode().count(":") == (1 if model == "yesno" else 2)


def test_imported_output_keeps_its_original_name(client: triton.InferenceServerClient) -> None:
    """Clients of Triton request the output by its original name."""
    inputs = [make_input("encoded_image", np.array(IMAGES[:3], dtype=object), "BYTES")]
    result = client.infer("thing", inputs, outputs=requested_outputs("scores", "logits"))
    assert np.array_equal(result.as_numpy("scores"), result.as_numpy("logits"))
    lines = client.infer("thing", inputs, outputs=requested_outputs("scores", class_count=1))
    best = result.as_numpy("scores").argmax(axis=1)
    assert [int(line.decode().split(":")[1]) for (line,) in lines.as_numpy("scores")] == best.tolist()


def test_concurrent_requests_get_native_probabilities(
    client: triton.InferenceServerClient, native_probabilities: Mapping[str, Array]
) -> None:
    with triton.InferenceServerClient(
        client._client_stub.host + f":{client._client_stub.port}", concurrency=4
    ) as parallel_client:
        pending_requests = [
            parallel_client.async_infer("small", [make_image_input([image])]) for image in IMAGES[:20]
        ]
        probabilities = np.concatenate(
            [read_probabilities(request.get_result()) for request in pending_requests]
        )
    assert probabilities == pytest.approx(native_probabilities["small"][:20], abs=1e-6)


def test_asyncio_client_gets_native_probabilities(
    oip_server: Server, native_probabilities: Mapping[str, Array]
) -> None:
    async def infer_images() -> tuple[Any, Array]:
        async with triton_aio.InferenceServerClient(oip_server.url.removeprefix("http://")) as client:
            metadata = await client.get_model_metadata("small")
            assert await client.is_server_ready()
            pending_results = (client.infer("small", [make_image_input([image])]) for image in IMAGES[:10])
            return metadata, np.concatenate(
                [read_probabilities(result) for result in await asyncio.gather(*pending_results)]
            )

    metadata, probabilities = asyncio.run(infer_images())
    assert metadata["name"] == "small"
    assert probabilities == pytest.approx(native_probabilities["small"][:10], abs=1e-6)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_get_native_probabilities(
    client: triton.InferenceServerClient, native_probabilities: Mapping[str, Array], algorithm: str
) -> None:
    """A compressed body passes through ASGI, so that a large one is not received into shared memory."""
    for count in (1, PER_REQUEST):
        result = client.infer(
            "small",
            [make_image_input(IMAGES[:count])],
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        assert read_probabilities(result) == pytest.approx(native_probabilities["small"][:count], abs=1e-6)


def test_unsupported_extensions_are_refused(client: triton.InferenceServerClient) -> None:
    """Triton's client can only show errors of this form."""
    for call in (client.get_trace_settings, client.get_log_settings, client.get_cuda_shared_memory_status):
        with pytest.raises(InferenceServerException, match=r"\[404\] there is nothing at /v2/"):
            call()
    pixels = triton.InferInput("pixels", [1, 16, 16, 3], "UINT8")
    pixels.set_shared_memory("region", 768)
    with pytest.raises(InferenceServerException, match="shared_memory_region is not supported"):
        client.infer("small", [pixels])


@pytest.mark.long
def test_statistics_count_real_inferences(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as server:
        with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
            (before,) = client.get_inference_statistics("small")["model_stats"]
            assert (before["inference_count"], before["last_inference"]) == (0, 0)
            client.infer("small", [make_image_input(IMAGES[:9])])
            client.infer("small", [make_image_input(IMAGES[:1])])
            with pytest.raises(InferenceServerException):
                client.infer("small", [make_image_input([IMAGES[0], b"nonsense"])])
            (after,) = client.get_inference_statistics("small", "1")["model_stats"]
            all_stats = client.get_inference_statistics()["model_stats"]
        assert server.read_metric("fovea_images_total", model="small") == after["inference_count"] == 11
        batch_count = server.read_metric("fovea_batch_images_count")
    stats = after["inference_stats"]
    assert (stats["success"]["count"], stats["fail"]["count"]) == (2, 1)
    assert 0 <= time.time() - after["last_inference"] / 1000 < 60
    assert after["execution_count"] == batch_count
    assert sum(batch["batch_size"] * batch["compute_infer"]["count"] for batch in after["batch_stats"]) == 11
    assert stats["success"]["ns"] > stats["compute_infer"]["ns"] / 11 > 0
    assert {model["name"] for model in all_stats} == {"small", "thing", "yesno", "many"}


@pytest.mark.long
def test_loading_and_unloading_require_management(zoo: Path, client: triton.InferenceServerClient) -> None:
    for change in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException, match="FOVEA_MANAGEMENT"):
            change("small")
    with (
        Server(FOVEA_MODELS=str(zoo), FOVEA_MANAGEMENT="true") as server,
        triton.InferenceServerClient(
            server.url.removeprefix("http://"), network_timeout=60
        ) as managing_client,
    ):
        managing_client.unload_model("small")
        assert not managing_client.is_model_ready("small")
        states = {model["name"]: model["state"] for model in managing_client.get_model_repository_index()}
        assert states["small"] == "UNAVAILABLE"
        managing_client.load_model("small")
        assert managing_client.is_model_ready("small")
        with pytest.raises(InferenceServerException, match="has no model 'nothing'"):
            managing_client.load_model("nothing")


# --- plain requests ------------------------------------------------------------------------------


def post_infer(
    server: Server, request: Any, binary_data: bytes | None = None, **headers: str
) -> httpx.Response:
    """Send a request of JSON, and binary data after the JSON."""
    content = request if isinstance(request, bytes) else json.dumps(request).encode()
    if binary_data is not None:
        headers = {BINARY: str(len(content)), "Content-Type": "application/octet-stream", **headers}
    model = headers.pop("model", "thing")
    return server.client.post(
        f"/v2/models/{model}/infer", content=content + (binary_data or b""), headers=headers
    )


def infer_body(name: str, shape: list[int], datatype: str, **rest: Any) -> dict[str, Any]:
    return {"inputs": [{"name": name, "shape": shape, "datatype": datatype, **rest}]}


def prefix_lengths(images: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


ROW = np.linspace(-1, 1, 3 * 16 * 16, dtype=np.float32)
ROW_VALUES = ROW.tolist()
B64 = base64.b64encode(IMAGES[0]).decode()


def test_flat_and_nested_json_get_equal_replies(oip_server: Server) -> None:
    nested = ROW.reshape(1, 3, 16, 16).tolist()
    replies = [
        post_infer(oip_server, infer_body("image", [1, 3, 16, 16], "FP32", data=data))
        for data in (ROW_VALUES, nested)
    ]
    binary = post_infer(
        oip_server,
        infer_body("image", [1, 3, 16, 16], "FP32", parameters={"binary_data_size": 3072}),
        ROW.tobytes(),
    )
    assert {reply.status_code for reply in (*replies, binary)} == {200}
    assert replies[0].json() == replies[1].json() == binary.json()
    assert replies[0].json()["outputs"][0]["shape"] == [1, 5]


@pytest.mark.parametrize(
    "request_and_binary_data",
    [
        pytest.param(
            lambda: (infer_body("image", [2], "BYTES"), prefix_lengths(IMAGES[:2])), id="without a size"
        ),
        pytest.param(
            lambda: (infer_body("pixels", [2, 1], "BYTES"), prefix_lengths(IMAGES[:2])),
            id="two axes, model's name",
        ),
        pytest.param(lambda: sized_request(sum(map(len, IMAGES[:2])) + 8), id="lengths are counted"),
        pytest.param(lambda: sized_request(sum(map(len, IMAGES[:2]))), id="lengths are not counted"),
        pytest.param(
            lambda: (infer_body("image", [2], "BYTES", data=encode_two_images()), None), id="base64"
        ),
        pytest.param(
            lambda: (
                infer_body("image", [2, 1], "BYTES", data=[[image] for image in encode_two_images()]),
                None,
            ),
            id="nested",
        ),
    ],
)
def test_encoded_images_are_read_in_every_form(
    oip_server: Server,
    native_probabilities: Mapping[str, Array],
    request_and_binary_data: Callable[[], tuple[dict[str, Any], bytes | None]],
) -> None:
    reply = post_infer(oip_server, *request_and_binary_data(), model="small")
    assert reply.status_code == 200, reply.text
    (output,) = reply.json()["outputs"]
    assert output["data"] == pytest.approx(native_probabilities["small"][:2].ravel(), abs=1e-6)


def sized_request(size: int) -> tuple[dict[str, Any], bytes]:
    return infer_body("image", [2], "BYTES", parameters={"binary_data_size": size}), prefix_lengths(
        IMAGES[:2]
    )


def encode_two_images() -> list[str]:
    return [base64.b64encode(image).decode() for image in IMAGES[:2]]


@pytest.mark.parametrize("size", [None, len(IMAGES[0])])
def test_single_image_needs_no_length_prefix(
    oip_server: Server, native_probabilities: Mapping[str, Array], size: int | None
) -> None:
    parameters = {} if size is None else {"binary_data_size": size}
    reply = post_infer(
        oip_server, infer_body("image", [1], "BYTES", parameters=parameters), IMAGES[0], model="small"
    )
    assert reply.json()["outputs"][0]["data"] == pytest.approx(native_probabilities["small"][0], abs=1e-6)


def test_parameters_may_be_null(oip_server: Server) -> None:
    """Some clients send null for parameters that were not set."""
    body = infer_body("image", [1], "BYTES", data=[B64], parameters=None)
    body |= {"id": None, "parameters": None, "outputs": [{"name": "logits", "parameters": None}]}
    assert post_infer(oip_server, body).status_code == 200


HUGE = 1 << 40
FP32_ROW = infer_body("image", [1, 3, 16, 16], "FP32", parameters={"binary_data_size": 3072})

ROW_SHAPE, PIXELS_SHAPE = [1, 3, 16, 16], [1, 16, 16, 3]
ROW_BYTES, ONE_IMAGE = ROW.tobytes(), prefix_lengths(IMAGES[:1])

BAD_REQUESTS: dict[str, tuple[Any, bytes | None, str]] = {
    "no JSON": (b"{", None, "not JSON"),
    "no object": ([], None, "the body"),
    "no inputs": ({"inputs": []}, None, "inputs"),
    "two inputs": ({"inputs": [*FP32_ROW["inputs"], *FP32_ROW["inputs"]]}, bytes(6144), "2 inputs"),
    "unknown input": (
        infer_body("x", [1, 3, 16, 16], "FP32", data=ROW_VALUES),
        None,
        "no input 'x' of datatype 'FP32'",
    ),
    "wrong datatype": (
        infer_body("image", [1, 3, 16, 16], "FP64", data=ROW_VALUES),
        None,
        "no input 'image' of datatype 'FP64'",
    ),
    "unknown datatype": (infer_body("image", [1], 9 * "BYTES" + 100 * "!", data=[B64]), None, "…"),
    "wrong shape": (
        infer_body("image", [1, 16, 16, 3], "FP32", data=ROW_VALUES),
        None,
        "must be [N, 3, 16, 16]",
    ),
    "no images": (infer_body("image", [0, 3, 16, 16], "FP32", data=[]), None, "must be [N, 3, 16, 16]"),
    "no pixels": (infer_body("pixels", [1, 16, 0, 3], "UINT8", data=[]), None, "must be [N, 16, 16, 3]"),
    "no axes": (infer_body("pixels", [], "UINT8", data=[]), None, "inputs.0.shape"),
    "shape of fractions": (
        infer_body("image", [1.0, 3, 16, 16], "FP32", data=ROW_VALUES),  # type: ignore[list-item]
        None,
        "inputs.0.shape.0",
    ),
    "shape of truths": (
        infer_body("image", [True, 3, 16, 16], "FP32", data=ROW_VALUES),
        None,
        "inputs.0.shape.0",
    ),
    "shape of 2^63": (infer_body("image", [1 << 63, 3, 16, 16], "FP32"), ROW_BYTES, f"{1 << 63} images"),
    "shape of 2^64": (infer_body("image", [1 << 64, 3, 16, 16], "FP32"), ROW_BYTES, "inputs.0.shape.0"),
    "BYTES of two axes": (infer_body("image", [1, 2], "BYTES", data=[[B64, B64]]), None, "must be [N]"),
    "an image of nothing": (infer_body("image", [1], "BYTES", data=[""]), None, "the image is empty"),
    "nothing at all": (infer_body("image", [1], "BYTES"), b"", "the image is empty"),
    "elements of nothing": (
        infer_body("image", [2], "BYTES"),
        prefix_lengths([b"", b""]),
        "image 0: the image is empty",
    ),
    "negative shape": (
        infer_body("image", [-1, 3, 16, 16], "FP32", data=ROW_VALUES),
        None,
        "must be [N, 3, 16, 16]",
    ),
    "shape of text": (
        infer_body("image", ["1", 3, 16, 16], "FP32", data=ROW_VALUES),  # type: ignore[list-item]
        None,
        "inputs.0.shape.0",
    ),
    "huge shape": (infer_body("image", [HUGE, 3, 16, 16], "FP32", data=ROW_VALUES), None, f"{HUGE} images"),
    "huge binary shape": (infer_body("image", [HUGE, 3, 16, 16], "FP32"), ROW_BYTES, f"{HUGE} images"),
    "huge BYTES": (infer_body("image", [HUGE], "BYTES"), ONE_IMAGE, f"{HUGE} images"),
    "shape of sixty": (infer_body("image", [1] * 60, "BYTES", data=[B64]), None, "…"),
    "shape of a million": (infer_body("image", [1] * 100_000, "BYTES", data=[B64]), None, "at most 64"),
    "too few values": (infer_body("image", ROW_SHAPE, "FP32", data=ROW_VALUES[1:]), None, "768 values"),
    "too many values": (infer_body("image", ROW_SHAPE, "FP32", data=[*ROW_VALUES, 0]), None, "768 values"),
    "ragged": (
        infer_body("image", ROW_SHAPE, "FP32", data=[[ROW_VALUES[:100], ROW_VALUES[100:]]]),
        None,
        "768 values",
    ),
    "another nesting": (
        infer_body("image", ROW_SHAPE, "FP32", data=ROW.reshape(1, 16, 16, 3).tolist()),
        None,
        "768 values",
    ),
    "a text among numbers": (
        infer_body("image", ROW_SHAPE, "FP32", data=["1.0", *ROW_VALUES[1:]]),
        None,
        "of type str",
    ),
    "a null": (
        infer_body("image", ROW_SHAPE, "FP32", data=[None, *ROW_VALUES[1:]]),
        None,
        "of type NoneType",
    ),
    "a truth": (infer_body("image", ROW_SHAPE, "FP32", data=[True, *ROW_VALUES[1:]]), None, "of type bool"),
    "a list among numbers": (
        infer_body("image", ROW_SHAPE, "FP32", data=[0, [], *ROW_VALUES[2:]]),
        None,
        "of type list",
    ),
    "fractions of bytes": (
        infer_body("pixels", PIXELS_SHAPE, "UINT8", data=[0.5] * 768),
        None,
        "of type float",
    ),
    "256": (infer_body("pixels", PIXELS_SHAPE, "UINT8", data=[256] * 768), None, "out of the range of UINT8"),
    "-1": (infer_body("pixels", PIXELS_SHAPE, "UINT8", data=[-1] * 768), None, "out of the range of UINT8"),
    "no base64": (infer_body("image", [1], "BYTES", data=["@"]), None, "image.0 is not base64"),
    "numbers as BYTES": (infer_body("image", [1], "BYTES", data=[7]), None, "of type int"),
    "data and binary": (
        infer_body("image", ROW_SHAPE, "FP32", data=ROW_VALUES, parameters={"binary_data_size": 3072}),
        ROW_BYTES,
        "data",
    ),
    "no data": (infer_body("image", ROW_SHAPE, "FP32"), None, "0 bytes follow the JSON"),
    "too few bytes": (FP32_ROW, ROW_BYTES[:-1], "3071 bytes follow the JSON"),
    "too many bytes": (FP32_ROW, ROW_BYTES + b"x", "3073 bytes follow the JSON"),
    "a size that lies": (
        infer_body("image", ROW_SHAPE, "FP32", parameters={"binary_data_size": HUGE}),
        ROW_BYTES,
        str(HUGE),
    ),
    "a size of text": (
        infer_body("image", ROW_SHAPE, "FP32", parameters={"binary_data_size": "3072"}),
        ROW_BYTES,
        "must be a number",
    ),
    "a negative size": (
        infer_body("image", [1], "BYTES", parameters={"binary_data_size": -4}),
        ONE_IMAGE,
        "-4; it must be a number",
    ),
    "shared memory": (
        infer_body("image", ROW_SHAPE, "FP32", parameters={"shared_memory_region": "x"}),
        ROW_BYTES,
        "shared_memory_region is not supported",
    ),
    "shared memory for an output": (
        {**FP32_ROW, "outputs": [{"name": "logits", "parameters": {"shared_memory_region": "x"}}]},
        ROW_BYTES,
        "shared_memory_region is not supported",
    ),
    "binary of text": (
        {**FP32_ROW, "outputs": [{"name": "logits", "parameters": {"binary_data": "yes"}}]},
        ROW_BYTES,
        "true or false",
    ),
    "all binary of a number": (
        {**FP32_ROW, "parameters": {"binary_data_output": 1}},
        ROW_BYTES,
        "true or false",
    ),
    "a size that fits no elements": (
        infer_body("image", [2], "BYTES", parameters={"binary_data_size": 5}),
        prefix_lengths(IMAGES[:2]),
        "do not fit",
    ),
    "an element past the end": (
        infer_body("image", [2], "BYTES"),
        ONE_IMAGE + b"\xff\xff\xff\xffabc",
        "do not fit",
    ),
    "bytes behind the elements": (
        infer_body("image", [1], "BYTES", parameters={"binary_data_size": len(ONE_IMAGE)}),
        ONE_IMAGE + b"ab",
        "do not fit",
    ),
    "half a length": (infer_body("image", [2], "BYTES"), ONE_IMAGE + b"ab", "do not fit"),
    "too few elements": (infer_body("image", [2], "BYTES"), ONE_IMAGE, "do not fit"),
    "too many elements": (infer_body("image", [2], "BYTES"), prefix_lengths(IMAGES[:3]), "do not fit"),
    "NaN": (FP32_ROW, np.full(768, np.nan, np.float32).tobytes(), "not finite"),
    "infinite": (FP32_ROW, np.full(768, np.inf, np.float32).tobytes(), "not finite"),
    "too large for FP32": (infer_body("image", ROW_SHAPE, "FP32", data=[1e300] * 768), None, "not finite"),
    "unknown output": ({**FP32_ROW, "outputs": [{"name": "x"}]}, ROW_BYTES, "no output 'x'"),
    "an output twice": ({**FP32_ROW, "outputs": [{"name": "logits"}] * 2}, ROW_BYTES, "twice"),
    "classes of text": (
        {**FP32_ROW, "outputs": [{"name": "logits", "parameters": {"classification": "5"}}]},
        ROW_BYTES,
        "'5'",
    ),
    "negative classes": (
        {**FP32_ROW, "outputs": [{"name": "logits", "parameters": {"classification": -1}}]},
        ROW_BYTES,
        "-1",
    ),
    "a timeout of text": (
        {**FP32_ROW, "parameters": {"timeout": "1"}},
        ROW_BYTES,
        "'1'; it must be a number",
    ),
    "a number for an id": ({**FP32_ROW, "id": 42}, ROW_BYTES, "id"),
    "nested 10,000 deep": (b'{"inputs": ' + 10_000 * b"[" + 10_000 * b"]" + b"}", None, "not JSON"),
    "a timeout 1000 deep": (
        b'{"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [""]}], '
        b'"parameters": {"timeout": ' + 1000 * b"[" + 1000 * b"]" + b"}}",
        None,
        "timeout is [[…]]",
    ),
    "classes of objects": (
        {**FP32_ROW, "outputs": [{"name": "logits", "parameters": {"classification": [{"a": 1}]}}]},
        ROW_BYTES,
        "is [{…}]",
    ),
    "data 900 deep": (
        b'{"inputs": [{"name": "image", "shape": [1, 3, 16, 16], "datatype": "FP32", "data": '
        + 900 * b"["
        + 900 * b"]"
        + b"}]}",
        None,
        "768 values",
    ),
}


@pytest.mark.parametrize("case", list(BAD_REQUESTS))
def test_bad_request_gets_oip_error(oip_server: Server, case: str) -> None:
    request, binary_data, message = BAD_REQUESTS[case]
    reply = post_infer(oip_server, request, binary_data, **{"X-Request-ID": "mine"})
    assert reply.status_code == 400, reply.text
    assert message in reply.json()["error"]
    assert len(reply.json()["error"]) < 500
    assert (reply.json()["code"], reply.json()["request_id"]) == ("bad_request", "mine")


@pytest.mark.parametrize("header", ["9999999", "-1", "+1", "1e3", "1_0", "", "9" * 5000, "٣", "\udcff\udcfe"])
def test_wrong_json_length_header_is_refused(oip_server: Server, header: str) -> None:
    content = json.dumps(FP32_ROW).encode() + ROW.tobytes()
    request_head = f"POST /v2/models/thing/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    with Wire(oip_server.url) as wire:
        wire.send(
            request_head.encode(), f"{BINARY}: {header}\r\n\r\n".encode(errors="surrogateescape"), content
        )
        response = wire.read_response()
    assert (response.status, response.json["code"]) == (400, "bad_request")
    assert BINARY in response.json["error"]


def test_chunked_body_is_read(oip_server: Server) -> None:
    """The body comes in chunks, so that the request passes through ASGI."""
    content = json.dumps(FP32_ROW).encode()

    def post_chunks(json_size: int) -> httpx.Response:
        chunks = iter([content[:10], content[10:] + ROW.tobytes()[:100], ROW.tobytes()[100:]])
        return oip_server.client.post(
            "/v2/models/thing/infer", content=chunks, headers={BINARY: str(json_size)}
        )

    assert post_chunks(len(content)).json() == post_infer(oip_server, FP32_ROW, ROW.tobytes()).json()
    bad_reply = post_chunks(len(content) + 3073)
    assert (bad_reply.status_code, bad_reply.json()["code"]) == (400, "bad_request")
    assert BINARY in bad_reply.json()["error"]


def test_header_value_may_have_spaces_around_it(oip_server: Server) -> None:
    """HTTP allows spaces; the parser does not strip those after the value."""
    content = json.dumps(FP32_ROW).encode()
    length = f"Content-Length: {len(content) + ROW.nbytes}\r\n{BINARY}: \t{len(content)} \r\n\r\n"
    with Wire(oip_server.url) as wire:
        wire.send(b"POST /v2/models/thing/infer HTTP/1.1\r\nHost: x\r\n", length.encode())
        wire.send(content, ROW.tobytes())
        assert wire.read_response().status == 200


def test_error_names_the_bad_image(oip_server: Server) -> None:
    reply = post_infer(
        oip_server, infer_body("image", [2], "BYTES"), prefix_lengths([IMAGES[0], b"nonsense"])
    )
    assert (reply.status_code, reply.json()["code"]) == (415, "unsupported_format")
    assert reply.json()["error"].startswith("image 1: ")


def test_json_has_its_own_size_limit(oip_server: Server) -> None:
    large_body = infer_body("image", [1], "BYTES", data=["A" * 2_000_000])
    assert post_infer(oip_server, large_body).status_code == 413
    assert post_infer(oip_server, large_body, b"x").status_code == 413
    assert "FOVEA_JSON_BYTES" in post_infer(oip_server, large_body, b"x").json()["error"]
    with Wire(oip_server.url) as wire:  # refused before any of the body is read
        wire.send(b"POST /v2/models/small/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n")
        assert wire.read_response().status == 413
    pixels = np.zeros((64, 16, 16, 3), np.uint8)
    row_body = infer_body("image", [40], "BYTES")
    assert (
        post_infer(oip_server, row_body, prefix_lengths([IMAGES[0] + bytes(60_000)] * 40)).status_code == 200
    )
    assert (
        post_infer(oip_server, infer_body("pixels", [64, 16, 16, 3], "UINT8"), pixels.tobytes()).status_code
        == 200
    )


@pytest.mark.long
def test_rows_count_as_images_in_the_limits(zoo: Path) -> None:
    pixels = np.zeros((6, 16, 16, 3), np.uint8)
    body = infer_body("pixels", list(pixels.shape), "UINT8")
    with Server(FOVEA_MODELS=str(zoo), FOVEA_QUEUE_IMAGES="4", FOVEA_REQUEST_IMAGES="4") as server:
        reply = post_infer(server, body, pixels.tobytes())
        assert (reply.status_code, "FOVEA_REQUEST_IMAGES" in reply.json()["error"]) == (400, True)
        reply = post_infer(server, infer_body("pixels", [4, 16, 16, 3], "UINT8"), pixels[:4].tobytes())
        assert reply.status_code == 200
        assert server.read_metric("fovea_images_total") == 4
        assert server.read_metric("fovea_images_in_flight") == 0
        assert server.read_metric("fovea_image_pixels_count") == 0
        assert server.read_metric("fovea_image_brightness_count") == 4
    with Server(FOVEA_MODELS=str(zoo), FOVEA_QUEUE_IMAGES="8", FOVEA_REQUEST_IMAGES="8") as server:
        reply = post_infer(server, body, pixels.tobytes())
        assert (reply.status_code, reply.json()["code"]) == (503, "overloaded")
        assert int(reply.headers["retry-after"]) >= 1


def test_expired_deadline_or_timeout_gets_504(oip_server: Server) -> None:
    for reply in (
        post_infer(oip_server, FP32_ROW, ROW.tobytes(), **{"X-Deadline-Ms": "0.001"}),
        post_infer(oip_server, {**FP32_ROW, "parameters": {"timeout": 1}}, ROW.tobytes()),
    ):
        assert (reply.status_code, reply.json()["code"]) == (504, "deadline_exceeded")
    long_timeout_body = {**FP32_ROW, "parameters": {"timeout": 60_000_000, "priority": 1}}
    assert post_infer(oip_server, long_timeout_body, ROW.tobytes()).status_code == 200


@pytest.mark.long
def test_unloaded_model_is_loaded_on_request(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_MODELS_LOADED="1", FOVEA_DEFAULT_MODEL="small") as server:
        index = {model["name"]: model["state"] for model in server.client.post("/v2/repository/index").json()}
        assert index == {
            "small": "READY",
            "thing": "UNAVAILABLE",
            "yesno": "UNAVAILABLE",
            "many": "UNAVAILABLE",
        }
        ready_models = server.client.post("/v2/repository/index", json={"ready": True}).json()
        assert [model["name"] for model in ready_models] == ["small"]
        assert server.client.get("/v2/models/thing/ready").json() == {"name": "thing", "ready": True}
        binary_data = np.tile(ROW, 40).tobytes()
        reply = post_infer(server, infer_body("image", [40, 3, 16, 16], "FP32"), binary_data)
        assert reply.status_code == 200, reply.text
        assert (
            post_infer(server, infer_body("image", [40, 3, 16, 16], "FP32"), binary_data).json()
            == reply.json()
        )


def test_server_routes_and_errors_follow_the_protocol(oip_server: Server) -> None:
    assert oip_server.client.get("/v2").json() == oip_server.client.get("/v2/").json()
    assert oip_server.client.get("/v2/health/live").json() == {"live": True}
    assert oip_server.client.get("/v2/health/ready").json() == {"ready": True}
    for path, status, code in (
        ("/v2/models/nothing", 404, "model_not_found"),
        ("/v2/models/small/versions/7/stats", 404, "model_not_found"),
        ("/v2/models/small/infer", 405, "method_not_allowed"),
    ):
        reply = oip_server.client.get(path)
        assert (reply.status_code, reply.json()["code"]) == (status, code)
        assert isinstance(reply.json()["error"], str)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": []}, "did you mean outputs?"),
        ({"parameters": {"binary_data_ouput": True}}, "did you mean binary_data_output?"),
        ({"parameters": {"time_out": 1000}}, "did you mean timeout?"),
        ({"outputs": [{"name": "probabilities", "parameters": {"clasification": 2}}]}, "classification?"),
        ({"outputs": [{"name": "probabilities", "parameter": {"classification": 2}}]}, "parameters?"),
    ],
)
def test_misspelt_key_gets_a_suggestion(server: Server, change: dict[str, Any], message: str) -> None:
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [B64]}
    reply = server.client.post("/v2/models/small/infer", json={"inputs": [tensor], **change})
    assert (reply.status_code, reply.json()["code"]) == (400, "bad_request")
    assert message in reply.json()["error"]


def test_unknown_keys_of_other_servers_are_ignored(server: Server) -> None:
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [B64], "model_platform": "x"}
    extra_keys = {"model_name": "small", "parameters": {"priority": 1, "sequence_id": 3}}
    assert (
        server.client.post("/v2/models/small/infer", json={"inputs": [tensor], **extra_keys}).status_code
        == 200
    )
