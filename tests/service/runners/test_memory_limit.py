"""A service whose memory is limited by a real control group, as a container's is."""

from __future__ import annotations

import gzip
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from fovea.bench.groups import ControlGroup, create_limited_group
from tests.graphs import add_to_repository, build_model
from tests.pictures import draw_picture, encode_image, make_jpeg
from tests.servers import Server, wait_until
from tests.tools import SYSTEM_REASON
from tests.zoo import classify_pictures, get_served_version, publish_variant

pytestmark = pytest.mark.long

MB = 1 << 20
CALLERS = 6


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return add_to_repository(build_model(), tmp_path / "zoo")


@contextmanager
def start_limited_server(zoo: Path, megabytes: int, **settings: str) -> Iterator[tuple[Server, ControlGroup]]:
    """Start a service in a group of `megabytes`; skip the test where no group can be made."""
    with create_limited_group(megabytes * MB) as group:
        if group is None:
            pytest.skip(f"{SYSTEM_REASON}lets no group with a memory limit be made")
        popen = {"args": group.wrap_command([sys.executable, "-m", "fovea.service"])}
        with Server(popen, FOVEA_MODELS=str(zoo), **settings) as server:
            yield server, group


@pytest.fixture(scope="module")
def bodies() -> list[bytes]:
    """Return large pictures in several formats, and a small picture."""
    photograph = draw_picture(1500, 1200).resize((6000, 4000))
    flat = draw_picture(64, 64).resize((7000, 7000))
    return [
        encode_image(photograph, "JPEG", quality=80),
        encode_image(photograph.resize((3000, 2000)), "PNG", compress_level=1),
        encode_image(flat, "WEBP", quality=10, method=0),
        make_jpeg(),
    ]


@pytest.mark.parametrize("megabytes", [300, 400, 512])
def test_mixed_requests_do_not_exceed_the_memory_limit(
    zoo: Path, bodies: list[bytes], megabytes: int
) -> None:
    with start_limited_server(zoo, megabytes) as (server, group):
        statuses: Counter[int] = Counter()

        def send_requests(number: int) -> None:
            with httpx.Client(base_url=server.url, timeout=120) as client:
                for body in (bodies * 2)[number % len(bodies) :][: len(bodies)]:
                    statuses[client.post("/v1/classify", content=body).status_code] += 1
                statuses[client.post("/v1/explain", content=bodies[-1]).status_code] += 1

        with ThreadPoolExecutor(CALLERS) as pool:
            list(pool.map(send_requests, range(CALLERS)))
        assert set(statuses) <= {200, 413, 503}, statuses
        assert statuses[200] >= CALLERS  # at least the small images
        assert group.kill_count == 0
        assert server.read_metric("fovea_runner_deaths_total") == 0


def test_new_version_loads_despite_constant_explain_requests(zoo: Path) -> None:
    """The explaining process has the only memory that a trial could use, and ends for the trial."""
    settings = {"FOVEA_WATCH": "0.1", "FOVEA_RUNNERS": "1"}
    with start_limited_server(zoo, 300, **settings) as (server, group):
        statuses: Counter[int] = Counter()
        is_over = threading.Event()

        def request_explanations() -> None:
            with httpx.Client(base_url=server.url, timeout=120) as client:
                while not is_over.is_set():
                    statuses[client.post("/v1/explain", content=make_jpeg()).status_code] += 1

        explain_thread = threading.Thread(target=request_explanations)
        explain_thread.start()
        try:
            wait_until(lambda: statuses[200])
            for seed in (1, 2):
                version = publish_variant(zoo, seed=seed)
                wait_until(partial(_is_served, server, version))
                wait_until(partial(_has_more_than, statuses, statuses[200]))
        finally:
            is_over.set()
            explain_thread.join()
        assert set(statuses) <= {200, 503}, statuses
        assert classify_pictures(server)["model"]["version"] == "3"
        assert group.kill_count == 0


def _is_served(server: Server, version: str) -> bool:
    return get_served_version(server) == version


def _has_more_than(statuses: Counter[int], count: int) -> bool:
    return statuses[200] > count


def test_memory_of_inflated_bodies_is_returned(small_zoo: Path) -> None:
    """glibc kept 100 to 300 MB with its default thresholds, and 46 MB before its heap was trimmed."""
    compressed_body = gzip.compress(os.urandom(7 * MB), 1)
    with Server(FOVEA_MODELS=str(small_zoo)) as server:
        bytes_before = _read_anonymous_bytes(server.process.pid)

        def send_body(_number: int) -> int:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                headers = {"Content-Encoding": "gzip"}
                return client.post("/v1/classify", content=compressed_body, headers=headers).status_code

        with ThreadPoolExecutor(CALLERS) as pool:
            assert set(pool.map(send_body, range(48))) <= {415, 503}
        assert server.client.post("/v1/classify", content=make_jpeg()).status_code == 200
        wait_until(lambda: _read_anonymous_bytes(server.process.pid) - bytes_before < 8 * MB)


def _read_anonymous_bytes(pid: int) -> int:
    """Return the resident bytes of anonymous memory (proc_pid_status(5))."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
