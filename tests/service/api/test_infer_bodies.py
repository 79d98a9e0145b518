"""Bodies of infer requests with any content are either parsed or refused."""

from __future__ import annotations

import asyncio
import importlib
import struct
import threading
import tracemalloc
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fovea.service.api.oip.infer import InferAdapter
from fovea.service.api.tensors import BinaryData, InferInput, ModelInputs, pack_elements
from fovea.service.errors import BadRequest, RequestError
from fovea.service.runners.batch_messages import ImageRequest, Item
from fovea.service.runners.shared_memory import SharedRef
from tests.service.api.infer_bodies import (
    SETTINGS,
    check_infer_request,
    make_infer_request,
    make_model,
    parse_infer_body,
)

MODEL = make_model()
SIZES = {tensor.name: tensor.size for tensor in MODEL.tensors}

NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.sampled_from([0, 1, 2, 3, 2**40, -1])
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside))
PARAMETERS = st.dictionaries(
    st.sampled_from(
        ["binary_data_size", "binary_data", "binary_data_output", "classification", "timeout", "x"]
    ),
    SCALARS | st.integers(0, 300),
)
TENSOR = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["pixels", "input", "image"]) | st.text(),
        "shape": st.lists(NUMBERS | st.integers(1, 3), max_size=5) | VALUES,
        "datatype": st.sampled_from(["UINT8", "FP32", "BYTES", "FP16"]) | st.text(),
    },
    optional={
        "parameters": PARAMETERS | VALUES,
        "data": st.lists(NUMBERS, min_size=12, max_size=12) | VALUES,
    },
)
REQUEST = st.fixed_dictionaries(
    {"inputs": st.lists(TENSOR, min_size=1, max_size=2) | VALUES},
    optional={
        "id": SCALARS,
        "parameters": PARAMETERS | VALUES,
        "outputs": st.lists(
            st.fixed_dictionaries(
                {"name": st.sampled_from(["probabilities", "logits"]) | st.text()},
                optional={"parameters": PARAMETERS | VALUES},
            )
        ),
    },
)


def image_contents(images: list[Item]) -> list[bytes]:
    raw_contents = [image.content if isinstance(image, ImageRequest) else image for image in images]
    return [bytes(content) for content in raw_contents if not isinstance(content, SharedRef)]


def read_or_refuse(header: bytes | None, body: bytes) -> None:
    try:
        check_infer_request(MODEL, parse_infer_body(MODEL, header, body), len(body))
    except RequestError as error:
        assert len(str(error).encode()) < 1000


@pytest.mark.long
@given(REQUEST, st.binary(max_size=300), st.none() | st.integers(-2, 400) | st.binary(max_size=30))
def test_requests_of_any_values_are_read_or_refused(
    request: dict[str, Any], binary_data: bytes, header: int | bytes | None
) -> None:
    try:
        json_bytes = orjson.dumps(request)
    except orjson.JSONEncodeError:  # half a surrogate pair, which orjson does not read either
        return
    header_bytes = header if isinstance(header, bytes) else str(len(json_bytes)).encode()
    read_or_refuse(header_bytes, json_bytes + binary_data)
    if isinstance(header, int):
        read_or_refuse(str(header).encode(), json_bytes + binary_data)
    read_or_refuse(None, json_bytes)


@given(st.binary(max_size=500), st.none() | st.integers(0, 500))
def test_any_bytes_are_read_or_refused(body: bytes, header: int | None) -> None:
    read_or_refuse(None if header is None else str(header).encode(), body)


@given(st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=8))
def test_packed_images_are_unpacked_unchanged(images: list[bytes]) -> None:
    request = {"inputs": [{"name": "image", "shape": [len(images)], "datatype": "BYTES"}]}
    json_bytes = orjson.dumps(request)
    unpacked_images = parse_infer_body(
        MODEL, str(len(json_bytes)).encode(), json_bytes + pack_elements(images)
    ).images
    assert image_contents(unpacked_images) == images


@given(st.data())
def test_elements_of_wrong_length_are_refused(data: st.DataObject) -> None:
    """There are several elements, because a single image may come without a length."""
    images = data.draw(st.lists(st.binary(max_size=50), min_size=2, max_size=8))
    content = bytearray(pack_elements(images))
    index = data.draw(st.integers(0, len(images) - 1))
    start = sum(4 + len(image) for image in images[:index])
    length = data.draw(st.integers(0, 2**32 - 1).filter(lambda value: value != len(images[index])))
    struct.pack_into("<I", content, start, length)
    tensor = InferInput(name="image", shape=[len(images)], datatype="BYTES")
    view = memoryview(bytes(content))
    try:
        rows = ModelInputs(MODEL.tensors).split_rows(
            [tensor], BinaryData(view, lambda begin, end: view[begin:end]), SETTINGS
        )
    except BadRequest:
        return
    assert sum(4 + len(row.content) for row in rows) == len(content)  # another length happens to fit


@given(st.sampled_from(["pixels", "input"]), st.integers(1, 8), st.booleans())
def test_rows_equal_the_sent_bytes(name: str, count: int, is_json: bool) -> None:
    tensor = next(candidate for candidate in MODEL.tensors if candidate.name == name)
    values = np.arange(count * 12).astype(tensor.dtype)
    infer_input: dict[str, Any] = {"name": name, "shape": [count, *tensor.shape], "datatype": "UINT8"}
    infer_input["datatype"] = {"pixels": "UINT8", "input": "FP32"}[name]
    if is_json:
        infer_input["data"] = values.reshape(count, *tensor.shape).tolist()
    json_bytes = orjson.dumps({"inputs": [infer_input]})
    binary_data = b"" if is_json else values.tobytes()
    rows = parse_infer_body(MODEL, str(len(json_bytes)).encode(), json_bytes + binary_data).images
    assert b"".join(image_contents(rows)) == values.tobytes()


@pytest.mark.parametrize("shape", [[2**40, 3, 2, 2], [2**63, 3, 2, 2], [1, 3, 2**40, 2], [-(2**40), 3, 2, 2]])
@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
def test_huge_shape_allocates_little_memory(shape: list[int], datatype: str) -> None:
    shape = shape[:1] if datatype == "BYTES" and shape[0] != 1 else shape
    json_bytes = orjson.dumps({"inputs": [{"name": "input", "shape": shape, "datatype": datatype}]})
    read_or_refuse(str(len(json_bytes)).encode(), json_bytes + bytes(48))
    tracemalloc.start()
    with pytest.raises(BadRequest):
        parse_infer_body(MODEL, str(len(json_bytes)).encode(), json_bytes + bytes(48))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_requests_wait_together_for_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that comes while another one imports NumPy would block the event loop until it is there."""
    is_imported, import_module = threading.Event(), importlib.import_module

    def import_late(name: str) -> Any:
        is_imported.wait()
        return import_module(name)

    monkeypatch.setattr(importlib, "import_module", import_late)
    body = orjson.dumps(
        {"inputs": [{"name": "pixels", "shape": [1, 2, 2, 3], "datatype": "UINT8", "data": [0] * 12}]}
    )

    async def parse_bodies() -> None:
        adapter = InferAdapter()
        tasks = [
            asyncio.ensure_future(adapter.parse_request(make_infer_request(MODEL, None, body)))
            for _ in range(2)
        ]
        try:
            done, _ = await asyncio.wait(tasks, timeout=0.2)
            assert not done
        finally:
            is_imported.set()
        for request in await asyncio.gather(*tasks):
            assert len(request.images) == 1

    asyncio.run(parse_bodies())
