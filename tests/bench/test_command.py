"""`fovea bench URL` against a real service and against unusable addresses."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pictures import make_jpeg
from tests.servers import ROOT, Server


def run_bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fovea", "bench", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.long
def test_bench_with_a_rate_counts_as_the_service(server: Server) -> None:
    before = server.read_metric("fovea_images_total")
    process = run_bench(server.url, "--rate", "50", "--seconds", "1", "--json")
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert report["url"] == f"{server.url}/v1/classify"
    assert report["statuses"] == {"200": report["sent"]}
    # one more request tests the connection
    assert server.read_metric("fovea_images_total") - before == report["sent"] + 1
    latency = list(report["latency"].values())
    assert list(report["latency"]) == ["p50", "p90", "p95", "p99", "p99.9", "p100"]
    assert latency == sorted(latency)


def test_bench_draws_latencies_as_text(server: Server, tmp_path: Path) -> None:
    (tmp_path / "own.jpg").write_bytes(make_jpeg())
    process = run_bench(
        f"{server.url}/v1/models/small/classify", tmp_path / "own.jpg", "--callers", "2", "--seconds", "0.5"
    )
    assert process.returncode == 0, process.stderr
    assert "2 callers, each with one request at a time, 0.5 s" in process.stdout
    assert "p99 " in process.stdout
    assert "█" in process.stdout


@pytest.mark.long
def test_refused_requests_give_exit_code_1(small_zoo: Path) -> None:
    settings = {"FOVEA_QUEUE_IMAGES": "1", "FOVEA_REQUEST_IMAGES": "1"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as small_queue_server:
        process = run_bench(small_queue_server.url, "--callers", "16", "--seconds", "1")
    assert process.returncode == 1
    assert " x 503" in process.stdout


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://127.0.0.1", "https://127.0.0.1 is not an address that can be loaded"),
        ("ftp://127.0.0.1/x", "is not an address that can be loaded"),
        ("http://", "is not an address that can be loaded"),
        ("127.0.0.1:{closed}", "no service answers at http://127.0.0.1:{closed}/v1/classify: "),
        ("{server}/v1/models/x/classify", "/v1/models/x/classify answers an image with 404: "),
        ("{server}/docs", "/docs answers an image with 405: "),
    ],
)
def test_unusable_url_gives_one_sentence(server: Server, url: str, message: str) -> None:
    with socket.socket() as closed_socket:
        closed_socket.bind(("127.0.0.1", 0))
        names = {"closed": str(closed_socket.getsockname()[1]), "server": server.url}
        process = run_bench(url.format(**names))
    assert process.returncode == 2
    assert process.stderr.startswith("fovea: ")
    assert message.format(**names) in process.stderr
    assert len(process.stderr.splitlines()) == 1
