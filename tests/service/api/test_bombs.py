"""Small bodies that would become large are refused quickly and with little memory."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import Server
from tests.service.api.test_protocols import error_code

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=x"}

LIMIT = 4 << 20
"""Default limit for JSON that orjson parses, in bytes."""


def fill_items(start: bytes, item: bytes, end: bytes, size: int = LIMIT - 2000) -> bytes:
    """Return as many items as fit into `size` bytes."""
    return start + item * ((size - len(start) - len(end)) // len(item)) + item.rstrip(b",") + end


def make_fields(size: int = LIMIT - 2000) -> bytes:
    names = b",".join(b'"%07x":1' % number for number in range(size // 12))
    return b"{%b}" % names


TENSOR = b'{"name":"image","datatype":"BYTES","shape":[1],"data":[""]}'

EXAMPLE = b'{"b64":""}'

INFER, PREDICT, CLASSIFY = "/v2/models/small/infer", "/v1/models/small:predict", "/v1/models/small:classify"

BOMBS: dict[str, tuple[str, str, bytes, dict[str, str]]] = {
    "inputs of numbers": ("oip", INFER, fill_items(b'{"inputs":[', b"1,", b"]}"), {}),
    "inputs of nothing": ("oip", INFER, fill_items(b'{"inputs":[', b"{},", b"]}"), {}),
    "good inputs": ("oip", INFER, fill_items(b'{"inputs":[', TENSOR + b",", b"]}"), {}),
    "outputs": ("oip", INFER, fill_items(b'{"inputs":[%b],"outputs":[' % TENSOR, b"1,", b"]}"), {}),
    "good outputs": (
        "oip",
        INFER,
        fill_items(b'{"inputs":[%b],"outputs":[' % TENSOR, b'{"name":""},', b"]}"),
        {},
    ),
    "a shape": (
        "oip",
        INFER,
        fill_items(b'{"inputs":[{"name":"","datatype":"","shape":[', b'"",', b"]}]}"),
        {},
    ),
    "shapes of many inputs": (
        "oip",
        INFER,
        fill_items(b'{"inputs":[', b'{"shape":[%b]},' % b",".join(64 * [b'""']), b"]}"),
        {},
    ),
    "instances": ("tensorflow", PREDICT, fill_items(b'{"instances":[', b"1,", b"]}"), {}),
    "columns": ("tensorflow", PREDICT, fill_items(b'{"inputs":[', b"1,", b"]}"), {}),
    "examples": ("tensorflow", CLASSIFY, fill_items(b'{"examples":[', b"1,", b"]}"), {}),
    "a context for many": (
        "tensorflow",
        CLASSIFY,
        b'{"context":%b,"examples":[%b]}' % (make_fields(), b",".join(64 * [EXAMPLE])),
        {},
    ),
    "fields of rows": ("tensorflow", PREDICT, make_fields(), {}),
    "fields of examples": ("tensorflow", CLASSIFY, make_fields(), {}),
    "base64 of numbers": ("huggingface", "/predict", fill_items(b'{"inputs":[', b"1,", b"]}"), JSON),
    "fields of inputs": ("huggingface", "/predict", make_fields(), JSON),
    "fields of parameters": (
        "huggingface",
        "/predict",
        b'{"inputs":"","parameters":%b}' % make_fields(),
        JSON,
    ),
    "images of numbers": (
        "native",
        "/v1/classify",
        fill_items(b'{"images":[', b"1,", b"]}", 60_000_000),
        JSON,
    ),
    "lists in no field": ("native", "/v1/classify", fill_items(b'{"a":[', b"[],", b"]}", 60_000_000), JSON),
    "fields beside images": ("native", "/v1/classify", make_fields(60_000_000), JSON),
    "zeros": ("oip", INFER, gzip.compress(bytes(1 << 30)), {"Content-Encoding": "gzip"}),
    "parts": (
        "torchserve",
        "/predictions/small",
        fill_items(b"", b"--x\r\n\r\n\r\n", b"--x--\r\n", 60_000_000),
        FORM,
    ),
}
"""The protocol, the path, the body and its headers."""


@pytest.fixture(scope="module")
def default_server(small_zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(small_zoo)) as server:
        yield server


@pytest.mark.parametrize("bomb", BOMBS)
def test_bomb_is_refused_with_little_memory(default_server: Server, bomb: str) -> None:
    """A request takes at most 200 MB beside its body; without the limits it took ten times as much."""
    protocol, path, body, headers = BOMBS[bomb]
    status = Path(f"/proc/{default_server.process.pid}/status")
    clear_refs = status.with_name("clear_refs")
    if not os.access(clear_refs, os.W_OK):
        pytest.skip("this system does not tell a process's peak memory")
    clear_refs.write_text("5")  # the peak is from here on (proc(5))
    size_before = memory_size(status, "VmRSS")
    reply = default_server.client.post(path, content=body, headers=headers)
    assert error_code(reply, protocol) in ("bad_request", "body_too_large")
    assert len(reply.content) < 2000
    assert memory_size(status, "VmHWM") - size_before - len(body) < 200_000_000


def test_form_with_too_many_parts_is_refused(default_server: Server) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n'
    for count, message in ((8192, "has no file"), (8193, "more than 8192 parts")):
        content = part * count + b"--x--\r\n"
        reply = default_server.client.post("/predictions/small", content=content, headers=FORM)
        assert (reply.status_code, error_code(reply, "torchserve")) == (400, "bad_request")
        assert message in reply.json()["message"]


def memory_size(status: Path, name: str) -> int:
    """Return an entry of `/proc/{pid}/status` in bytes."""
    return 1024 * next(
        int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)
    )
