"""The container image and the Compose file, built and started for real: `make image-test`."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT
from tests.deploy.test_alerts import ALERTS
from tests.image.conftest import Container, Docker
from tests.servers import wait_until

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
SHIP = (ROOT / "samples" / "ship.jpg").read_bytes()
MEMORY = "1g"
SIZE_GOAL = 200e6
STOP_GOAL = 2.0


UNWANTED = (
    r"/torch/", r"/onnx/", r"/bin/(gcc|cc|g\+\+|make|clang)$", r"/\.cache/pip", r"/packages/pip/",
    r"/packages/.*/tests?/", r"/app/(model|export|tests)/", r"/weights\.safetensors$",
)  # fmt: skip
"""Paths: frameworks, compilers, caches, and what only makes models."""


def read_run_line() -> list[str]:
    """The README's `docker run`, without the port and what removes the container."""
    (line,) = re.findall(r"^\$ docker run (.+) fovea$", README, re.MULTILINE)
    words = line.split()
    index = words.index("-p")
    assert words[index + 1] == "8000:8000"
    return [word for word in (*words[:index], *words[index + 2 :]) if word != "--rm"]


@pytest.fixture
def container(docker: Docker, image: str, request: pytest.FixtureRequest) -> Iterator[Container]:
    """The image as the README runs it, on a free port and in 1 GiB; parameters are settings."""
    settings = [word for setting in getattr(request, "param", ()) for word in ("--env", setting)]
    name = docker(
        "run",
        "--detach",
        *read_run_line(),
        "--publish",
        "127.0.0.1::8000",
        "--memory",
        MEMORY,
        *settings,
        image,
    )
    try:
        started = Container(docker, name)
        with started.client:
            yield started
    finally:
        docker("rm", "--force", name)


def test_it_is_small_and_holds_no_more_than_it_needs(docker: Docker, image: str) -> None:
    listing = docker(
        "run", "--rm", "--user", "0", "--entrypoint", "find", image, "/", "-xdev", "-not", "-path", "/proc/*"
    )
    assert "/packages/onnxruntime/__init__.py\n" in listing
    for unwanted in UNWANTED:
        assert not re.search(unwanted, listing, re.MULTILINE), unwanted
    base, own = (int(docker.inspect(name, "{{.Size}}")) for name in ("python:3.12-slim", image))
    assert own - base < SIZE_GOAL


def test_it_serves_as_an_unprivileged_user_and_writes_nothing(docker: Docker, container: Container) -> None:
    best = container.client.post("/v1/classify", content=SHIP).json()["predictions"][0]
    assert best["label"] == "ship"
    files = [("image", ("ship.jpg", SHIP))] * 20
    assert len(container.client.post("/v1/classify", files=files).json()["results"]) == 20
    assert docker("exec", container.name, "id", "-u") == "10001"
    assert docker("exec", container.name, "touch", "/app/x", check=False).endswith("Read-only file system\n")
    how = " ".join(
        f"{{{{.HostConfig.{one}}}}}" for one in ("ReadonlyRootfs", "CapDrop", "SecurityOpt", "Init")
    )
    assert docker.inspect(container.name, how) == "true [ALL] [no-new-privileges] true"
    assert container.client.get("/health/ready").status_code == 200
    limit = re.search(
        r"^fovea_container_memory_limit_bytes (\S+)$", container.client.get("/metrics").text, re.M
    )
    assert limit is not None
    assert float(limit[1]) == 1 << 30


def test_it_takes_arguments_and_its_health_check_follows_them(docker: Docker, image: str) -> None:
    name = docker(
        "run",
        "--detach",
        *read_run_line(),
        "--publish",
        "127.0.0.1::9000",
        image,
        "--port",
        "9000",
        "--workers",
        "2",
    )
    try:
        wait_until(lambda: docker.inspect(name, "{{.State.Health.Status}}") == "healthy")
        address = docker("port", name, "9000").splitlines()[0]
        assert httpx.post(f"http://{address}/v1/classify", content=SHIP).status_code == 200
        assert "fovea_workers 2.0" in httpx.get(f"http://{address}/metrics").text
    finally:
        docker("rm", "--force", name)


def test_it_publishes_as_a_job(docker: Docker, image: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    model = "/app/zoo/cifar10/3/model.onnx"
    volume = f"{tmp_path}:/models"
    said = docker(
        "run", "--rm", *read_run_line(), "--volume", volume, image, "publish", model, "--models", "/models"
    )
    assert said == "published /models/cifar10/1/model.onnx"
    assert (tmp_path / "cifar10" / "1" / "model.onnx").exists()


def test_without_an_init_a_signal_while_it_loads_ends_it_at_once(docker: Docker, image: str) -> None:
    """As in Kubernetes: the service is process 1, for which the kernel drops signals without a handler."""
    words = [word for word in read_run_line() if word != "--init"]
    name = docker("run", "--detach", *words, "--cpus", "0.2", image)  # it loads for seconds
    try:
        wait_until(lambda: _handles_sigterm(docker("exec", name, "cat", "/proc/1/status", check=False)))
        started = time.monotonic()
        docker("kill", "--signal", "TERM", name)
        assert int(docker("wait", name)) in (0, 143)
        assert time.monotonic() - started < STOP_GOAL
    finally:
        docker("rm", "--force", name)


def _handles_sigterm(status: str) -> bool:
    """Return whether a process has a handler for a signal, by proc_pid_status(5)."""
    signal_match = re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    return signal_match is not None and bool(int(signal_match[1], 16) >> (signal.SIGTERM - 1) & 1)


TRACED = ["FOVEA_TRACES=true", "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:9"]
"""Nobody is there to take them."""


@pytest.mark.parametrize("container", [TRACED], indirect=True)
def test_its_log_is_json_and_it_can_trace(docker: Docker, container: Container) -> None:
    assert container.client.post("/v1/classify", content=SHIP).status_code == 200
    wait_until(lambda: '"event":"request"' in docker("logs", container.name, check=False))
    written = docker("logs", container.name, check=False).splitlines()
    told = [json.loads(line) for line in written if line.startswith("{")]
    (request,) = (line for line in told if line["event"] == "request")
    assert (request["status"], len(request["trace_id"])) == (200, 32)
    assert len(written) - len(told) == 3  # the greeting


@pytest.mark.parametrize("container", [["FOVEA_DRAIN_GRACE=0"]], indirect=True)
def test_idle_it_ends_at_once(docker: Docker, container: Container) -> None:
    started = time.monotonic()
    docker("kill", "--signal", "TERM", container.name)
    assert container.exit_code in (0, 143)
    seconds = time.monotonic() - started
    print(f"stopped in {seconds:.1f} s")
    assert seconds <= STOP_GOAL


@pytest.mark.parametrize("container", [["FOVEA_DRAIN_GRACE=1"]], indirect=True)
def test_a_signal_loses_no_request_in_flight(docker: Docker, container: Container) -> None:
    """Eight callers that reuse their connections, and are answered until they are told to go."""
    statuses: list[int] = []
    lost: list[Exception] = []

    def ask() -> None:
        with httpx.Client(base_url=container.url, timeout=60) as client:
            told_to_go = False
            while not told_to_go:
                try:
                    reply = client.post("/v1/classify", content=SHIP)
                except httpx.HTTPError as error:
                    lost.append(error)
                    return
                statuses.append(reply.status_code)
                told_to_go = reply.headers.get("connection") == "close"

    callers = [threading.Thread(target=ask) for _ in range(8)]
    for caller in callers:
        caller.start()
    wait_until(lambda: len(statuses) > 50)
    docker("kill", "--signal", "TERM", container.name)
    for caller in callers:
        caller.join(60)
    assert container.exit_code in (0, 143)
    assert not lost
    assert set(statuses) == {200}


# --- Compose -------------------------------------------------------------------------------------


OVERRIDE = """
services:
  fovea:
    ports: !override ["127.0.0.1::8000"]
  prometheus:
    ports: !override ["127.0.0.1::9090"]
"""

OWN_BASES = """
services:
  fovea:
    pull_policy: never
    build: {network: host, additional_contexts: {"python:3.12-slim": "docker-image://local/python-with-ca"}}
  prometheus:
    pull_policy: never
"""


@pytest.fixture
def compose(docker: Docker, tmp_path: Path) -> Iterator[list[str]]:
    """`docker compose` for the project's own file, on free ports, with bases of this machine where needed."""
    files = [ROOT / "docker-compose.yml", tmp_path / "ports.yml", tmp_path / "bases.yml"]
    files[1].write_text(OVERRIDE)
    files[2].write_text(OWN_BASES if docker.has_own_bases else "services: {}")
    words = ["compose", "--project-name", "fovea-test", *(f"--file={file}" for file in files)]
    try:
        yield words
    finally:
        docker(*words, "down", "--volumes", "--timeout", "5")


def test_compose_brings_up_a_service_that_prometheus_watches(docker: Docker, compose: list[str]) -> None:
    """All but Grafana, whose image is large and whose part is checked without it."""
    assert re.search(r"^\$ docker compose up\b", README, re.MULTILINE)
    started = time.monotonic()
    docker(*compose, "up", "--build", "--detach", "--wait", "fovea", "prometheus")
    print(f"compose up in {time.monotonic() - started:.0f} s")
    service, prometheus = (
        f"http://{docker(*compose, 'port', name, port)}"
        for name, port in (("fovea", "8000"), ("prometheus", "9090"))
    )
    assert httpx.post(f"{service}/v1/classify", content=SHIP).json()["predictions"][0]["label"] == "ship"

    def value(query: str) -> float | None:
        found = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}).json()["data"]["result"]
        return float(found[0]["value"][1]) if found else None

    wait_until(lambda: value('sum(fovea_images_total{job="fovea"})') == 1)
    assert value('up{job="fovea"}') == 1
    rules = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    assert {
        rule["name"] for group in rules for rule in group["rules"] if rule["type"] == "alerting"
    } == ALERTS.keys()
