"""Large images scale with the runners, as far as the memory for decoding goes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.pictures import draw_picture, encode_image
from tests.servers import Server

RUNNERS = 8
JPEG_12_MP = encode_image(draw_picture(4000, 3000), "JPEG")
PNG_12_MP = encode_image(draw_picture(4000, 3000), "PNG", compress_level=1)
DECODE_BYTES = 3 << 29
"""The default: memory for three such PNG."""


@contextmanager
def block_runners(server: Server) -> Iterator[None]:
    """Stop the runners, so that they hold what was sent to them and decode nothing."""
    runners = server.runner_pids
    assert len(runners) == RUNNERS
    for pid in runners:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in runners:
            os.kill(pid, signal.SIGCONT)


def post_photograph(url: str, content: bytes) -> int:
    return httpx.post(f"{url}/v1/classify", content=content, timeout=120).status_code


@pytest.mark.long
def test_eight_runners_decode_eight_photographs_at_once(small_zoo: Path) -> None:
    with (
        Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS=str(RUNNERS)) as server,
        ThreadPoolExecutor(RUNNERS) as pool,
    ):
        with block_runners(server):
            replies = [pool.submit(post_photograph, server.url, JPEG_12_MP) for _ in range(RUNNERS)]
            server.wait_for_metric(RUNNERS, "fovea_images_in_flight")
            assert server.read_metric("fovea_queue_images") == 0
        assert {reply.result() for reply in replies} == {200}


@pytest.mark.long
def test_images_wait_for_decode_memory_and_not_in_a_runner(small_zoo: Path) -> None:
    """A runner that waited would count as hung; the images wait in the service, and a gauge shows them."""
    limits = {"FOVEA_DECODE_BYTES": str(DECODE_BYTES), "FOVEA_RUNNERS": str(RUNNERS)}
    with Server(FOVEA_MODELS=str(small_zoo), **limits) as server, ThreadPoolExecutor(RUNNERS) as pool:
        with block_runners(server):
            replies = [pool.submit(post_photograph, server.url, PNG_12_MP) for _ in range(RUNNERS)]
            server.wait_for_metric(RUNNERS, "fovea_images_in_flight")
            reserved_bytes = server.read_metric("fovea_decode_reserved_bytes")
            waiting_images = server.read_metric("fovea_queue_images")
        assert 0 < reserved_bytes <= DECODE_BYTES
        assert waiting_images == RUNNERS - 3
        assert {reply.result() for reply in replies} == {200}
        assert server.read_metric("fovea_runner_deaths_total") == 0
