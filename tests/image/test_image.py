"""The container image and the Compose file, built and started by Docker: `make image-test`."""

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
"""Paths of frameworks, compilers, caches and code that only makes models."""


def read_run_line() -> list[str]:
    """Return the arguments of the README's `docker run`, without the port and `--rm`."""
    (line,) = re.findall(r"^\$ docker run (.+) fovea$", README, re.MULTILINE)
    words = line.split()
    index = words.index("-p")
    assert words[index + 1] == "8000:8000"
    return [word for word in (*words[:index], *words[index + 2 :]) if word != "--rm"]


@pytest.fixture
def container(docker: Docker, image: str, request: pytest.FixtureRequest) -> Iterator[Container]:
    """Yield a container as the README runs it, on a free port and in 1 GiB; parameters are settings."""
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
        instance = Container(docker, name)
        with instance.client:
            yield instance
    finally:
        docker("rm", "--force", name)


def test_image_is_small_and_has_no_unwanted_files(docker: Docker, image: str) -> None:
    listing = docker(
        "run", "--rm", "--user", "0", "--entrypoint", "find", image, "/", "-xdev", "-not", "-path", "/proc/*"
    )
    assert "/packages/onnxruntime/__init__.py\n" in listing
    for pattern in UNWANTED:
        assert not re.search(pattern, listing, re.MULTILINE), pattern
    base_bytes, image_bytes = (int(docker.inspect(name, "{{.Size}}")) for name in ("python:3.12-slim", image))
    assert image_bytes - base_bytes < SIZE_GOAL


def test_image_names_its_licence(docker: Docker, image: str) -> None:
    label = '{{index .Config.Labels "org.opencontainers.image.licenses"}}'
    assert docker.inspect(image, label) == "MIT"


def test_container_serves_unprivileged_and_read_only(docker: Docker, container: Container) -> None:
    best = container.client.post("/v1/classify", content=SHIP).json()["predictions"][0]
    assert best["label"] == "ship"
    files = [("image", ("ship.jpg", SHIP))] * 20
    assert len(container.client.post("/v1/classify", files=files).json()["results"]) == 20
    assert docker("exec", container.name, "id", "-u") == "10001"
    assert docker("exec", container.name, "touch", "/app/x", check=False).endswith("Read-only file system\n")
    template = " ".join(
        f"{{{{.HostConfig.{field}}}}}" for field in ("ReadonlyRootfs", "CapDrop", "SecurityOpt", "Init")
    )
    assert docker.inspect(container.name, template) == "true [ALL] [no-new-privileges] true"
    assert container.client.get("/health/ready").status_code == 200
    limit = re.search(
        r"^fovea_container_memory_limit_bytes (\S+)$", container.client.get("/metrics").text, re.M
    )
    assert limit is not None
    assert float(limit[1]) == 1 << 30


def test_container_runs_with_the_default_seccomp_profile(docker: Docker, container: Container) -> None:
    """Every process is filtered, has no capability, and can get none; proc_pid_status(5) has the fields."""
    assert container.client.post("/v1/classify", content=SHIP).status_code == 200
    assert "name=seccomp,profile=builtin" in docker("info", "--format", "{{.SecurityOptions}}")
    assert docker.inspect(container.name, "{{.HostConfig.SecurityOpt}}") == "[no-new-privileges]"
    command = "cat /proc/[0-9]*/status"
    statuses = docker("exec", container.name, "sh", "-c", command, check=False)
    values = {
        name: set(re.findall(rf"^{name}:\s*(\S+)", statuses, re.MULTILINE))
        for name in ("Seccomp", "NoNewPrivs", "CapEff", "CapPrm", "CapBnd", "Uid")
    }
    none = {"0" * 16}
    assert values == {
        "Seccomp": {"2"}, "NoNewPrivs": {"1"}, "CapEff": none, "CapPrm": none, "CapBnd": none,
        "Uid": {"10001"},
    }  # fmt: skip
    assert statuses.count("\nPid:") >= 4  # init, the service, a runner, and this command


def test_container_health_check_follows_arguments(docker: Docker, image: str) -> None:
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


def test_container_publishes_a_model(docker: Docker, image: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    model = "/app/zoo/cifar10/4/model.onnx"
    volume = f"{tmp_path}:/models"
    output = docker(
        "run", "--rm", *read_run_line(), "--volume", volume, image, "publish", model, "--models", "/models"
    )
    assert output == "published /models/cifar10/1/model.onnx"
    assert (tmp_path / "cifar10" / "1" / "model.onnx").exists()


def test_signal_during_loading_ends_container_without_init(docker: Docker, image: str) -> None:
    """The service is process 1, as in Kubernetes; the kernel drops its signals that have no handler."""
    words = [word for word in read_run_line() if word != "--init"]
    name = docker("run", "--detach", *words, "--cpus", "0.2", image)  # loading takes seconds
    try:
        wait_until(lambda: _handles_sigterm(docker("exec", name, "cat", "/proc/1/status", check=False)))
        start_time = time.monotonic()
        docker("kill", "--signal", "TERM", name)
        assert int(docker("wait", name)) in (0, 143)
        assert time.monotonic() - start_time < STOP_GOAL
    finally:
        docker("rm", "--force", name)


def _handles_sigterm(status: str) -> bool:
    """Return whether a process has a handler for a signal, by proc_pid_status(5)."""
    signal_match = re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    return signal_match is not None and bool(int(signal_match[1], 16) >> (signal.SIGTERM - 1) & 1)


TRACE_SETTINGS = ["FOVEA_TRACES=true", "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:9"]
"""Settings that send traces to an address at which nothing listens."""


@pytest.mark.parametrize("container", [TRACE_SETTINGS], indirect=True)
def test_container_log_is_json_with_trace_ids(docker: Docker, container: Container) -> None:
    assert container.client.post("/v1/classify", content=SHIP).status_code == 200
    wait_until(lambda: '"event":"request"' in docker("logs", container.name, check=False))
    lines = docker("logs", container.name, check=False).splitlines()
    records = [json.loads(entry) for entry in lines if entry.startswith("{")]
    (request,) = (entry for entry in records if entry["event"] == "request")
    assert (request["status"], len(request["trace_id"])) == (200, 32)
    assert len(lines) - len(records) == 3  # the greeting


@pytest.mark.parametrize("container", [["FOVEA_DRAIN_GRACE=0"]], indirect=True)
def test_idle_container_stops_at_once(docker: Docker, container: Container) -> None:
    start_time = time.monotonic()
    docker("kill", "--signal", "TERM", container.name)
    assert container.exit_code in (0, 143)
    seconds = time.monotonic() - start_time
    print(f"stopped in {seconds:.1f} s")
    assert seconds <= STOP_GOAL


@pytest.mark.parametrize("container", [["FOVEA_DRAIN_GRACE=1"]], indirect=True)
def test_signal_loses_no_request_in_flight(docker: Docker, container: Container) -> None:
    """Eight callers reuse their connections until an answer has `Connection: close`."""
    statuses: list[int] = []
    errors: list[Exception] = []

    def send_requests() -> None:
        with httpx.Client(base_url=container.url, timeout=60) as client:
            is_closing = False
            while not is_closing:
                try:
                    reply = client.post("/v1/classify", content=SHIP)
                except httpx.HTTPError as error:
                    errors.append(error)
                    return
                statuses.append(reply.status_code)
                is_closing = reply.headers.get("connection") == "close"

    callers = [threading.Thread(target=send_requests) for _ in range(8)]
    for caller in callers:
        caller.start()
    wait_until(lambda: len(statuses) > 50)
    docker("kill", "--signal", "TERM", container.name)
    for caller in callers:
        caller.join(60)
    assert container.exit_code in (0, 143)
    assert not errors
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
    """Yield the `docker compose` arguments for the project's file, with free ports and usable base images."""
    files = [ROOT / "docker-compose.yml", tmp_path / "ports.yml", tmp_path / "bases.yml"]
    files[1].write_text(OVERRIDE)
    files[2].write_text(OWN_BASES if docker.has_own_bases else "services: {}")
    words = ["compose", "--project-name", "fovea-test", *(f"--file={file}" for file in files)]
    try:
        yield words
    finally:
        docker(*words, "down", "--volumes", "--timeout", "5")


def test_compose_starts_a_service_watched_by_prometheus(docker: Docker, compose: list[str]) -> None:
    """Grafana is left out: its image is large, and its files are checked without it."""
    assert re.search(r"^\$ docker compose up\b", README, re.MULTILINE)
    start_time = time.monotonic()
    docker(*compose, "up", "--build", "--detach", "--wait", "fovea", "prometheus")
    print(f"compose up in {time.monotonic() - start_time:.0f} s")
    service, prometheus = (
        f"http://{docker(*compose, 'port', name, port)}"
        for name, port in (("fovea", "8000"), ("prometheus", "9090"))
    )
    assert httpx.post(f"{service}/v1/classify", content=SHIP).json()["predictions"][0]["label"] == "ship"

    def read_value(query: str) -> float | None:
        samples = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}).json()["data"]["result"]
        return float(samples[0]["value"][1]) if samples else None

    wait_until(lambda: read_value('sum(fovea_images_total{job="fovea"})') == 1)
    assert read_value('up{job="fovea"}') == 1
    rules = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    assert {
        rule["name"] for group in rules for rule in group["rules"] if rule["type"] == "alerting"
    } == ALERTS.keys()
