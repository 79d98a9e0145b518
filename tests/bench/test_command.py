"""`fovea bench URL` against a real service, and against what is none."""

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
def test_with_a_rate_it_counts_what_the_service_counts(server: Server) -> None:
    before = server.read_metric("fovea_images_total")
    ended = run_bench(server.url, "--rate", "50", "--seconds", "1", "--json")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["url"] == f"{server.url}/v1/classify"
    assert found["statuses"] == {"200": found["sent"]}
    assert (
        server.read_metric("fovea_images_total") - before == found["sent"] + 1
    )  # one to see whether it answers
    latency = list(found["latency"].values())
    assert list(found["latency"]) == ["p50", "p90", "p95", "p99", "p99.9", "p100"]
    assert latency == sorted(latency)


def test_for_people_it_draws_how_long_answers_took(server: Server, tmp_path: Path) -> None:
    (tmp_path / "own.jpg").write_bytes(make_jpeg())
    ended = run_bench(
        f"{server.url}/v1/models/small/classify", tmp_path / "own.jpg", "--callers", "2", "--seconds", "0.5"
    )
    assert ended.returncode == 0, ended.stderr
    assert "2 callers, each with one request at a time, 0.5 s" in ended.stdout
    assert "p99 " in ended.stdout
    assert "█" in ended.stdout


@pytest.mark.long
def test_what_is_not_answered_with_200_is_told_and_is_exit_code_1(small_zoo: Path) -> None:
    settings = {"FOVEA_QUEUE_IMAGES": "1", "FOVEA_REQUEST_IMAGES": "1"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as narrow:
        ended = run_bench(narrow.url, "--callers", "16", "--seconds", "1")
    assert ended.returncode == 1
    assert " x 503" in ended.stdout


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("https://127.0.0.1", "https://127.0.0.1 is not an address that can be loaded"),
        ("ftp://127.0.0.1/x", "is not an address that can be loaded"),
        ("http://", "is not an address that can be loaded"),
        ("127.0.0.1:{closed}", "no service answers at http://127.0.0.1:{closed}/v1/classify: "),
        ("{server}/v1/models/x/classify", "/v1/models/x/classify answers an image with 404: "),
        ("{server}/docs", "/docs answers an image with 405: "),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(server: Server, url: str, sentence: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        names = {"closed": str(closed.getsockname()[1]), "server": server.url}
        ended = run_bench(url.format(**names))
    assert ended.returncode == 2
    assert ended.stderr.startswith("fovea: ")
    assert sentence.format(**names) in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
