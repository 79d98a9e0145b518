"""Publishing adds a complete model file or nothing, and leftovers never block the next call."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import pytest

from fovea.service.artifact.model_file import fingerprint_of
from fovea.service.errors import ModelError
from fovea.service.rollout.publish import _add_version, publish_model
from tests.graphs import build_model
from tests.servers import ROOT

STUCK_PUBLISHER = """
import pathlib, shutil, sys, time
import fovea.service.rollout.publish

copy = shutil.copyfile

def copy_and_wait(source, target):
    copy(source, target)
    print("copied", flush=True)
    time.sleep(600)

shutil.copyfile = copy_and_wait
fovea.service.rollout.publish.publish_model(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""
"""A publisher that stops after it has copied the file."""


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    path = tmp_path / "made.onnx"
    onnx.save(build_model(), path)
    return path


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start_stuck_publisher(model_path: Path, zoo: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK_PUBLISHER, str(model_path), str(zoo)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "copied\n"
    return process


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_leftovers_of_killed_publisher_are_removed(
    model_path: Path, tmp_path: Path, signal_number: int
) -> None:
    zoo = tmp_path / "zoo"
    with start_stuck_publisher(model_path, zoo) as process:
        process.send_signal(signal_number)
    assert publish_model(model_path, zoo) == zoo / "small" / "1" / "model.onnx"
    assert list_names(zoo / "small") == ["1"]


def test_files_of_working_publisher_are_kept(model_path: Path, tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    with start_stuck_publisher(model_path, zoo) as process:
        try:
            names_before = list_names(zoo / "small")
            publish_model(model_path, zoo)
            assert list_names(zoo / "small") == [*names_before, "1"]
        finally:
            process.kill()


def test_process_can_publish_again_after_full_disk(model_path: Path, tmp_path: Path) -> None:
    """A limit on the file size simulates the full disk."""
    zoo = tmp_path / "zoo"
    code = (
        "import pathlib, resource, shutil, signal, sys\n"
        "from fovea.service.errors import ModelError\n"
        "from fovea.service.rollout.publish import publish_model\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "path, zoo = map(pathlib.Path, sys.argv[1:])\n"
        "remove = shutil.rmtree\n"
        "shutil.rmtree = lambda *arguments, **named: None\n"  # simulates a process killed at this point
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "try: publish_model(path, zoo)\n"
        "except ModelError as error: print(error)\n"
        "shutil.rmtree = remove\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "print(publish_model(path, zoo))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(model_path), str(zoo)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    error_line, path_line = result.stdout.splitlines()
    assert "cannot write into" in error_line
    assert "File too large" in error_line
    assert path_line == str(zoo / "small" / "1" / "model.onnx")
    assert list_names(zoo / "small") == ["1"]


def test_failed_publication_leaves_no_folder(model_path: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ModelError, match="File too large"):
            publish_model(model_path, tmp_path / "zoo")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous_handler)
    assert list_names(tmp_path / "zoo") == []


def test_concurrent_publications_get_distinct_versions(model_path: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: publish_model(model_path, tmp_path / "zoo", "pets"), range(8)))
    assert sorted(int(path.parent.name) for path in paths) == list(range(1, 9))
    assert list_names(tmp_path / "zoo" / "pets") == [str(number) for number in range(1, 9)]


def test_concurrent_publications_of_new_model_all_succeed(tmp_path: Path) -> None:
    """Calls create and remove the same folder, and each must still add its version."""
    source = tmp_path / "model.onnx"
    source.write_bytes(b"any bytes: they were validated before")
    stamp = fingerprint_of(source)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for number in range(100):
                folder = tmp_path / "zoo" / str(number)
                list(pool.map(lambda _, folder=folder: _add_version(source, stamp, folder), range(8)))
                assert list_names(folder) == [str(version) for version in range(1, 9)]
    finally:
        sys.setswitchinterval(interval)


def test_dangling_repository_link_is_an_error(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "zoo").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="cannot write into"):
        publish_model(model_path, tmp_path / "zoo")


def test_file_changed_during_publication_is_not_published(model_path: Path, tmp_path: Path) -> None:
    with start_stuck_publisher(model_path, tmp_path / "zoo") as process:
        os.utime(model_path, ns=(0, 0))
        process.kill()
    code = STUCK_PUBLISHER.replace("time.sleep(600)", "__import__('os').utime(source, ns=(1, 1))")
    result = subprocess.run(
        [sys.executable, "-c", code, str(model_path), str(tmp_path / "zoo")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "has changed while it was published" in result.stderr
    assert list_names(tmp_path / "zoo") == []


def test_published_version_is_readable_by_other_users(model_path: Path, tmp_path: Path) -> None:
    """A service may run as another user."""
    path = publish_model(model_path, tmp_path / "zoo")
    umask = os.umask(0)
    os.umask(umask)
    assert path.parent.stat().st_mode & 0o777 == 0o777 & ~umask
