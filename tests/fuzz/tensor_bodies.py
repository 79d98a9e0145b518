"""Bodies of infer requests with binary data behind their JSON (Open Inference Protocol)."""

from __future__ import annotations

import random
from typing import Any, Final

import orjson

from fovea.service.api.oip.infer import InferAdapter
from fovea.service.api.tensors import pack_elements
from fovea.service.errors import RequestError
from tests.fuzz.json_bodies import make_loop
from tests.fuzz.json_changes import change_json
from tests.fuzz.target import Target, require
from tests.service.api.infer_bodies import check_infer_request, make_infer_request, make_model

_MODEL: Final = make_model()
_ADAPTER: Final = InferAdapter()
_LOOP: Final = make_loop()


def check_tensors(data: bytes) -> bool:
    """Parse a body; the first line of the input is the size of the JSON in the header."""
    header, _, body = data.partition(b"\n")
    request = make_infer_request(_MODEL, header or None, body)
    try:
        parsed = _LOOP.run_until_complete(_ADAPTER.parse_request(request))
    except RequestError as error:
        require(len(str(error).encode()) < 1000, "the error quotes the body")
        return False
    check_infer_request(_MODEL, parsed, len(body))
    return True


def _make_body(tensors: list[dict[str, Any]], content: bytes, **more: Any) -> bytes:
    text = orjson.dumps({"inputs": tensors, **more})
    return b"%d\n" % len(text) + text + content


def _make_tensor(name: str, shape: list[int], datatype: str, size: int | None = None) -> dict[str, Any]:
    parameters = {} if size is None else {"parameters": {"binary_data_size": size}}
    return {"name": name, "shape": shape, "datatype": datatype, **parameters}


def _make_seeds() -> list[bytes]:
    images = pack_elements([b"\xff\xd8\xff\xe0", b"GIF89a"])
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True, "classification": 2}}]
    return [
        _make_body([_make_tensor("pixels", [2, 2, 2, 3], "UINT8", 24)], bytes(24), outputs=outputs),
        _make_body([_make_tensor("input", [1, 3, 2, 2], "FP32", 48)], bytes(48)),
        _make_body([_make_tensor("image", [2], "BYTES", len(images))], images),
        _make_body([_make_tensor("image", [2, 1], "BYTES")], images),
        _make_body([_make_tensor("image", [1], "BYTES", 4)], b"\xff\xd8\xff\xe0"),
    ]


_change = change_json(
    ("name", "shape", "datatype", "data", "parameters", "binary_data_size", "inputs", "outputs", "pixels",
     "input", "image", "UINT8", "FP32", "FP16", "BYTES", "binary_data_output", "classification")
)  # fmt: skip


def _mutate(data: bytes, choice: random.Random) -> bytes:
    """Change the JSON, the binary data, or the size in the header."""
    header, _, body = data.partition(b"\n")
    size = int(header) if header.isdigit() and len(header) < 5 else len(body)
    text, content = body[:size], body[size:]
    action = choice.random()
    if action < 0.6:
        text = _change(text, choice)
    elif action < 0.8:
        content = choice.choice((content[:-1], content + b"\0", content * 2, pack_elements([content])))
    else:
        return b"%d\n" % (size + choice.choice((-1, 1, -size))) + body
    return b"%d\n" % len(text) + text + content


TARGET = Target(check_tensors, _make_seeds, _mutate, max_size=2000)
