"""JSON bodies of all protocols: values become images, not too many of them, or an error."""

from __future__ import annotations

import asyncio
import atexit
import random
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import orjson

from fovea.service.api import huggingface, tensorflow, torchserve
from fovea.service.api.adapter import InferenceRequest, ProtocolAdapter
from fovea.service.api.bodies import RawBody
from fovea.service.api.mlflow import InvocationsAdapter
from fovea.service.api.native.routes import ClassifyAdapter
from fovea.service.api.oip.infer import InferAdapter
from fovea.service.api.request_schemas import ClassifyOptions
from fovea.service.errors import RequestError
from fovea.service.http.request_record import RequestRecord
from tests.fuzz.json_changes import change_json
from tests.fuzz.target import Target, require
from tests.service.api.infer_bodies import SETTINGS, check_infer_request, make_model

_ADAPTERS: Final[dict[bytes, ProtocolAdapter]] = {
    b"huggingface": huggingface._ClassifyAdapter(),
    b"mlflow": InvocationsAdapter(),
    b"native": ClassifyAdapter(),
    b"oip": InferAdapter(),
    b"tensorflow-classify": tensorflow._ClassifyAdapter(),
    b"tensorflow-predict": tensorflow.PredictAdapter(),
    b"torchserve": torchserve._PredictAdapter(),
}
"""Parsers by the word in the first line of an input."""

_MODEL: Final = make_model()

_HEADERS: Final = {b"content-type": b"application/json"}


class _InlineExecutor(ThreadPoolExecutor):
    """An executor without threads: inputs are parsed one after the other."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **named))
        except RequestError as error:
            future.set_exception(error)
        return future


def make_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that runs threads' work inline."""
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)
    loop.set_default_executor(_InlineExecutor())
    return loop


_LOOP: Final = make_loop()


def check_body(data: bytes) -> bool:
    """Parse a body; the first line of the input is the protocol."""
    name, _, body = data.partition(b"\n")
    if (adapter := _ADAPTERS.get(name)) is None:
        return False
    options = ClassifyOptions() if isinstance(adapter, ClassifyAdapter) else None
    request = InferenceRequest(
        RawBody(body, len(body)), _HEADERS, options, _MODEL, SETTINGS, RequestRecord("POST", _HEADERS)
    )
    try:
        parsed = _LOOP.run_until_complete(adapter.parse_request(request))
    except RequestError as error:
        require(len(str(error).encode()) < 4000, "the error quotes the body")
        return False
    check_infer_request(_MODEL, parsed, len(body))
    require(parsed.time_limit is None or parsed.time_limit > 0, f"the time limit is {parsed.time_limit}")
    require(parsed.reply_format.labels_per_image >= 0, "fewer labels than none")
    return True


_IMAGE: Final = "/9j/4AAQSkZJRg=="
_PIXELS: Final = [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 255]]]

_EXAMPLES: Final[tuple[tuple[str, Any], ...]] = (
    ("huggingface", {"inputs": _IMAGE, "parameters": {"top_k": 3, "function_to_apply": "sigmoid"}}),
    ("huggingface", {"inputs": [_IMAGE, f"data:image/jpeg;base64,{_IMAGE}"]}),
    ("mlflow", {"dataframe_split": {"columns": ["image"], "data": [[_IMAGE]]}, "params": {"top_k": 2}}),
    ("mlflow", {"dataframe_records": [{"image": _IMAGE}]}),
    ("mlflow", {"instances": [_IMAGE]}),
    ("mlflow", {"inputs": {"image": [_IMAGE]}}),
    ("native", {"images": [{"b64": _IMAGE}], "top_k": 3, "threshold": 0.5}),
    ("native", {"images": [{"b64": _IMAGE, "boxes": [[0, 0, 5, 5]]}], "coverage": 0.9}),
    ("oip", {"id": "1", "inputs": [{"name": "pixels", "shape": [1, 2, 2, 3], "datatype": "UINT8",
        "data": [0] * 12}]}),
    ("oip", {"inputs": [{"name": "input", "shape": [1, 3, 2, 2], "datatype": "FP32", "data": [0.5] * 12}],
             "outputs": [{"name": "probabilities", "parameters": {"classification": 2,
             "binary_data": True}}]}),
    ("oip", {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [_IMAGE],
                         "parameters": {"content_type": "base64"}}], "parameters": {"timeout": 1000}}),
    ("tensorflow-classify", {"context": {}, "examples": [{"image": {"b64": _IMAGE}}],
        "signature_name": "serving_default"}),
    ("tensorflow-predict", {"instances": [{"b64": _IMAGE}, {"image_bytes": {"b64": _IMAGE}}],
                            "parameters": {"labels": True, "top_k": 2}}),
    ("tensorflow-predict", {"instances": [_PIXELS], "signature_name": "serving_default"}),
    ("tensorflow-predict", {"inputs": {"pixels": [_PIXELS, _PIXELS]}}),
    ("torchserve", {"instances": [{"data": _IMAGE}, {"b64": _IMAGE}]}),
    ("torchserve", {"data": _IMAGE}),
)  # fmt: skip


def _make_seeds() -> list[bytes]:
    return [name.encode() + b"\n" + orjson.dumps(value) for name, value in _EXAMPLES]


def _list_words() -> list[str]:
    """Return the names and texts of the examples."""
    words = {"outputs", "datatype", "FP16", "BYTES", "BOOL", "softmax", "logits", "binary_data_size"}
    values: list[Any] = [value for _, value in _EXAMPLES]
    while values:
        one = values.pop()
        if isinstance(one, str):
            words.add(one)
        elif isinstance(one, dict):
            words |= one.keys()
            values += one.values()
        elif isinstance(one, list):
            values += one
    return sorted(words)


_change = change_json(_list_words())


def _mutate(data: bytes, choice: random.Random) -> bytes:
    """Change the JSON, and sometimes send it to another protocol."""
    name, _, body = data.partition(b"\n")
    if choice.random() < 0.1 or name not in _ADAPTERS:
        return choice.choice(sorted(_ADAPTERS)) + b"\n" + body
    return name + b"\n" + _change(body, choice)


TARGET = Target(check_body, _make_seeds, _mutate, max_size=3000)
