"""Shared fixtures: the folder of test data, a small model, and a real server."""

from __future__ import annotations

import os
import signal
import ssl
import tarfile
from collections.abc import Generator, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import certifi
import httpx
import hypothesis
import pytest

from tests.commands import Command, make_command
from tests.graphs import add_to_repository, build_model
from tests.servers import Server
from tests.tools import SYSTEM_REASON, require_tool

ROOT = Path(__file__).parents[1]


def pytest_configure() -> None:
    """Let Ctrl-C end the processes of tests, because shells start background jobs with SIGINT ignored.

    No example of a property has a time limit, nor have all together: a shared machine may take any time.
    """
    hypothesis.settings.register_profile(
        "fovea", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("fovea")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that are repeated with several workers as `long`, so that only `make proof` runs them."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if str(parameters.get("workers", "1")) != "1":
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session", autouse=True)
def _shared_certificates() -> Iterator[None]:
    """Let the clients of all tests share one TLS context of the usual certificates.

    Loading them takes 40 ms of processor time for each client and each `httpx.get`, also without TLS.
    """
    create_default_context = ssl.create_default_context
    create_usual_context = cache(lambda: create_default_context(cafile=certifi.where()))

    def create_context(*arguments: Any, **options: Any) -> ssl.SSLContext:
        if not arguments and options == {"cafile": certifi.where()}:
            return create_usual_context()
        return create_default_context(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", create_context)
        yield


@pytest.fixture(scope="session", autouse=True)
def _patient_requests() -> Iterator[None]:
    """Let `httpx.get` and the like wait a minute for an answer, not five seconds: a machine may be busy."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("delete", "get", "head", "options", "post", "put", "request"):
            patch.setattr(httpx, name, partial(getattr(httpx, name), timeout=60))
        yield


@pytest.fixture(autouse=True)
def _tools(request: pytest.FixtureRequest) -> None:
    """Skip a test that is marked `needs` if one of its programs is missing."""
    for mark in request.node.iter_markers("needs"):
        for tool in mark.args:
            require_tool(tool)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail skipped tests where `CI` is set: all programs are installed there, so a skip hides a mistake."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if os.environ.get("CI") and not reason.startswith(SYSTEM_REASON):
            report.outcome = "failed"
            report.longrepr = f"skipped where CI is set: {reason}"
        else:  # one line for each reason instead of each test
            report.longrepr = (__file__, 1, report.longrepr[2])
    return report


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Return the folder of test data; skip the test if there is none."""
    folder = ROOT / os.environ.get("TEST_DATA", "data")
    if not (folder / "cifar10-jpeg.tar.gz").exists():
        pytest.skip(f"no test data at {folder}; TEST_DATA names another place")
    return folder


@pytest.fixture(scope="session")
def cifar_test(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the CIFAR-10 test images, `<label>/*.jpg`."""
    folder = tmp_path_factory.mktemp("cifar10")
    with tarfile.open(test_data / "cifar10-jpeg.tar.gz") as archive:
        members = [member for member in archive if member.name.startswith("cifar10/test/")]
        archive.extractall(folder, members, filter="data")
    return folder / "cifar10" / "test"


@pytest.fixture(scope="session")
def photographs(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the paths of forty photographs of about 500 x 375 pixels."""
    folder = tmp_path_factory.mktemp("photographs")
    with tarfile.open(test_data / "photos.tar") as archive:
        archive.extractall(folder, filter="data")
    return sorted(folder.rglob("*.JPEG"))


@pytest.fixture(scope="session")
def small_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository with one small model, called `small`."""
    return add_to_repository(build_model(), tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def server(small_zoo: Path) -> Iterator[Server]:
    """Yield a real server of the small model, shared by all tests of a process."""
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_BODY_BYTES="1000000") as instance:
        yield instance


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs `fovea` in this process and returns its exit code."""
    return make_command(monkeypatch)
