"""Docker for the tests: the user's own, or one from `CONTAINER_TOOLS`, which needs no registry."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT
from tests.servers import wait_until

BASE_IMAGE = "python:3.12-slim"
BASE_CONTEXT = f"{BASE_IMAGE}=docker-image://local/python-with-ca"
"""The base image with this machine's certificates, for machines without a registry."""


@dataclass(frozen=True)
class Docker:
    """The `docker` command, with build arguments for base images that are not from a registry."""

    environment: dict[str, str]
    has_own_bases: bool

    def __call__(self, *arguments: str | Path, check: bool = True, seconds: float = 600) -> str:
        """Run `docker`; return what it prints. Raises `AssertionError` when it fails."""
        result = subprocess.run(
            ["docker", *map(str, arguments)],
            cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        assert not check or result.returncode == 0, f"docker {arguments}: {result.stdout}{result.stderr}"
        return result.stdout + result.stderr if not check else result.stdout.strip()

    def build(self, *arguments: str) -> str:
        """Run `docker build`; return its output."""
        bases = ["--network=host", "--build-context", BASE_CONTEXT] if self.has_own_bases else []
        return self("build", *bases, *arguments)

    def inspect(self, name: str, template: str) -> str:
        """Return a property of an image or a container."""
        return self("inspect", "--format", template, name)


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    """Yield Docker; if there is none, end the whole run as failed."""
    if _is_docker_available(dict(os.environ)):
        yield Docker(dict(os.environ), has_own_bases=False)
        return
    tools = os.environ.get("CONTAINER_TOOLS")
    if not tools or os.geteuid() != 0:
        pytest.exit("no Docker answers, and CONTAINER_TOOLS names none: the images are NOT tested", 1)
    yield from _docker_from_tools(ROOT / tools)


def _is_docker_available(environment: dict[str, str]) -> bool:
    try:
        result = subprocess.run(["docker", "info"], env=environment, capture_output=True, check=False)
    except OSError:
        return False
    return result.returncode == 0


def _docker_from_tools(tools: Path) -> Iterator[Docker]:
    environment = {**os.environ, "ENGINE": "docker"}

    def run_tool(name: str, *arguments: str) -> str:
        started_at = time.monotonic()
        result = subprocess.run(
            [tools / name, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{name}: {result.stdout}{result.stderr}"
        print(f"{name}: {time.monotonic() - started_at:.0f} s")
        return result.stdout

    try:
        run_tool("install-docker.sh")
        exports = re.findall(r"(\w+)=(\S+)", run_tool("start-docker.sh"))
    except AssertionError as error:
        pytest.exit(f"no Docker can be started, the images are NOT tested: {error}", 1)
    environment.update({name: os.path.expandvars(value) for name, value in exports})
    try:
        run_tool("make-base-image.sh")
        run_tool("make-ca-base.sh")
        run_tool("make-prometheus-image.sh", _read_prometheus_version())
        yield Docker(environment, has_own_bases=True)
    finally:
        run_tool("stop-docker.sh")


def _read_prometheus_version() -> str:
    version_match = re.search(r"prom/prometheus:(\S+)", (ROOT / "docker-compose.yml").read_text())
    assert version_match is not None
    return version_match[1]


@pytest.fixture(scope="session")
def image(docker: Docker) -> str:
    """Build the image by the command of the README; return its name."""
    line = re.search(r"^\$ docker (build .+) \.$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert line is not None
    started_at = time.monotonic()
    docker.build(*line[1].split()[1:], ".")
    seconds = time.monotonic() - started_at
    base, total = (int(docker.inspect(name, "{{.Size}}")) for name in (BASE_IMAGE, "fovea"))
    print(
        f"built in {seconds:.0f} s: {(total - base) / 1e6:.0f} MB on top of {BASE_IMAGE}, {base / 1e6:.0f} MB"
    )
    return "fovea"


class Container:
    """A healthy container of the service."""

    def __init__(self, docker: Docker, name: str) -> None:
        self.docker = docker
        self.name = name
        wait_until(lambda: docker.inspect(name, "{{.State.Health.Status}}") != "starting")
        assert docker.inspect(name, "{{.State.Health.Status}}") == "healthy", docker(
            "logs", name, check=False
        )
        self.url = f"http://127.0.0.1:{docker('port', name, '8000').splitlines()[0].rsplit(':', 1)[1]}"
        self.client = httpx.Client(base_url=self.url, timeout=60)

    @property
    def exit_code(self) -> int:
        """Return the exit status of the service, after its end."""
        return int(self.docker("wait", self.name))
