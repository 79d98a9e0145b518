"""No request runs for over 2 ms of processor time on the event loop."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import pytest
from PIL import Image

from fovea.service.artifact.contract import Coverage
from tests.graphs import add_to_repository, build_model, read_contract, with_contract
from tests.pictures import encode_image, make_jpeg
from tests.servers import ROOT, Server, wait_until

pytestmark = pytest.mark.slow  # the measurement of coverage blocks the loop itself

BLOCKED_MESSAGE: Final = "the event loop was blocked for"
ROUNDS: Final = 3
FIRST_REQUEST_MS: Final = 12.0
"""Milliseconds for which the first request of its kind may block the loop."""

NOISE = np.random.default_rng(0).integers(0, 256, (1800, 1900, 3), dtype=np.uint8)
LARGE = encode_image(Image.fromarray(NOISE), "PNG", compress_level=0)
"""A PNG of 10 MB."""

SendRequest = Callable[[httpx.Client], httpx.Response]


def _form_files(*images: bytes) -> dict[str, Any]:
    return {"files": [("file", ("a", image)) for image in images]}


def _json_body(content: bytes) -> dict[str, Any]:
    return {"content": content, "headers": {"Content-Type": "application/json"}}


def _encode_base64(image: bytes) -> str:
    return base64.b64encode(image).decode()


def _make_classify(query: str = "", **body: Any) -> SendRequest:
    return lambda client: client.post(f"/v1/classify{query}", **body)


def _make_get(path: str, **headers: str) -> SendRequest:
    return lambda client: client.get(path, headers=headers)


WORST_REQUESTS: Final[dict[str, SendRequest]] = {
    "10 MB": _make_classify(content=LARGE),
    "30 MB of rubbish": _make_classify(content=b"\xff\xd8\xff" + b"x" * 30_000_000),
    "33 MB, chunked": lambda client: client.post("/v1/classify", content=iter([b"x" * 1_000_000] * 33)),
    "16 MB multipart": _make_classify(**_form_files(LARGE, LARGE[:6_000_000])),
    "16 MB JSON": _make_classify(
        json={"images": [{"b64": _encode_base64(image)} for image in (LARGE, LARGE[:2_000_000])]}
    ),
    "16 MB of bad JSON": _make_classify(**_json_body(b'{"images": [' + b"[" * 16_000_000)),
    "64 images": _make_classify(**_form_files(*[make_jpeg()] * 64)),
    "64 images, all 1000 labels": _make_classify("?top_k=0", **_form_files(*[make_jpeg()] * 64)),
    "64 images, sets of 1000 labels": _make_classify(
        "?top_k=1&coverage=0.9", **_form_files(*[make_jpeg()] * 64)
    ),
    "64 bad images": _make_classify(**_form_files(*[b"rubbish"] * 64)),
    "one image, all 1000 labels": _make_classify("?top_k=0", content=make_jpeg()),
    "a bad parameter": _make_classify("?top_k=-1", content=make_jpeg()),
    "metrics": _make_get("/metrics"),
    "OpenMetrics": _make_get("/metrics", accept="application/openmetrics-text"),
    "OpenAPI": _make_get("/openapi.json"),
    "the contract": _make_get("/v1/models/small/contract"),
    "models": _make_get("/v1/models"),
    "runtime": _make_get("/runtime"),
    "the page": _make_get("/docs"),
    "the page's script": _make_get("/docs/swagger/swagger-ui-bundle.js"),
    "nothing": _make_get("/nothing"),
}  # fmt: skip


@pytest.fixture(scope="module")
def server_and_log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """Yield a server that logs blocking callbacks, and its log. Its model has sets of 1000 labels."""
    graph = build_model(labels=[f"label {index}" for index in range(1000)])
    graph = with_contract(graph, replace(read_contract(graph), coverage=(Coverage(0.9, 1.0),)))
    zoo = add_to_repository(graph, tmp_path_factory.mktemp("zoo"))
    log = tmp_path_factory.mktemp("log") / "log"
    with (
        log.open("w") as stderr,
        Server({"stderr": stderr}, FOVEA_MODELS=str(zoo), FOVEA_LOG_LEVEL="debug") as server,
    ):
        yield server, log


@pytest.mark.parametrize("name", WORST_REQUESTS)
def test_request_does_not_block_event_loop(server_and_log: tuple[Server, Path], name: str) -> None:
    """Other load may slow down one round, and first use of new memory the first round."""
    server, log = server_and_log
    blocks = []
    for _ in range(1 + ROUNDS):
        before = len(log.read_text())
        WORST_REQUESTS[name](server.client)
        server.client.get("/health/live")
        wait_until(partial(_is_logged, log, before))
        blocks.append(re.findall(rf"{BLOCKED_MESSAGE} (\S+) ms (.*)", log.read_text()[before:]))
    assert not all(blocks[1:]), blocks
    if not name.startswith("the page"):  # the first file imports the module that reads files
        assert all(float(ms) < FIRST_REQUEST_MS for ms, _ in blocks[0]), blocks


def _is_logged(log: Path, start: int) -> bool:
    """Return whether the log has the line of `/health/live`, and so of the requests before it."""
    return '"/health/live"' in log.read_text()[start:]


def test_blocking_callback_is_named_in_log() -> None:
    program = (
        "import asyncio, logging, time\n"
        "from fovea.service.observability import slow_callbacks\n"
        "logging.basicConfig(format='%(message)s')\n"
        "def spin(seconds):\n"
        "    end = time.thread_time() + seconds\n"
        "    while time.thread_time() < end: pass\n"
        "async def busy(): spin(0.004)\n"
        "async def idle(): await asyncio.sleep(0.01); time.sleep(0.01)\n"
        "async def main():\n"
        "    await asyncio.create_task(busy())\n"
        "    await asyncio.create_task(idle())\n"
        "    asyncio.get_running_loop().call_later(0.001, spin, 0.003)\n"
        "    await asyncio.sleep(0.01)\n"
        "asyncio.run(main())\n"  # warm
        "slow_callbacks.log_slow_callbacks()\n"
        "asyncio.run(main())\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line for line in process.stderr.splitlines() if "busy" in line or "spin" in line]
    assert re.match(rf"{BLOCKED_MESSAGE} \d\.\d ms by <Task .*coro=<busy\(\)", lines[0])
    assert re.match(rf"{BLOCKED_MESSAGE} \d\.\d ms by <function spin", lines[1])
    assert "idle" not in process.stderr
