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

STUCK = """
import pathlib, shutil, sys, time
import fovea.service.rollout.publish

copy = shutil.copyfile

def stuck(source, target):
    copy(source, target)
    print("copied", flush=True)
    time.sleep(600)

shutil.copyfile = stuck
fovea.service.rollout.publish.publish_model(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""
"""A publisher that stops after it has copied the file."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "made.onnx"
    onnx.save(build_model(), path)
    return path


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start_stuck_publisher(model: Path, zoo: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(model), str(zoo)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "copied\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_what_a_publisher_leaves_blocks_nobody_and_is_removed(
    model: Path, tmp_path: Path, number: int
) -> None:
    zoo = tmp_path / "zoo"
    with start_stuck_publisher(model, zoo) as process:
        process.send_signal(number)
    assert publish_model(model, zoo) == zoo / "small" / "1" / "model.onnx"
    assert list_names(zoo / "small") == ["1"]


def test_one_that_is_at_work_is_left_alone(model: Path, tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    with start_stuck_publisher(model, zoo) as process:
        try:
            before = list_names(zoo / "small")
            publish_model(model, zoo)
            assert list_names(zoo / "small") == [*before, "1"]
        finally:
            process.kill()


def test_a_full_disk_leaves_nothing_and_the_same_process_can_publish_again(
    model: Path, tmp_path: Path
) -> None:
    """A limit on the file size simulates the full disk."""
    zoo = tmp_path / "zoo"
    code = (
        "import pathlib, resource, shutil, signal, sys\n"
        "from fovea.service.errors import ModelError\n"
        "from fovea.service.rollout.publish import publish_model\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "path, zoo = map(pathlib.Path, sys.argv[1:])\n"
        "remove = shutil.rmtree\n"
        "shutil.rmtree = lambda *arguments, **named: None\n"  # as if it had been killed there
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "try: publish_model(path, zoo)\n"
        "except ModelError as error: print(error)\n"
        "shutil.rmtree = remove\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "print(publish_model(path, zoo))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(model), str(zoo)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    refusal, place = ended.stdout.splitlines()
    assert "cannot write into" in refusal
    assert "File too large" in refusal
    assert place == str(zoo / "small" / "1" / "model.onnx")
    assert list_names(zoo / "small") == ["1"]


def test_one_that_fails_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ModelError, match="File too large"):
            publish_model(model, tmp_path / "zoo")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, kept)
    assert list_names(tmp_path / "zoo") == []


def test_many_at_once_have_a_version_each(model: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        places = list(pool.map(lambda _: publish_model(model, tmp_path / "zoo", "pets"), range(8)))
    assert sorted(int(path.parent.name) for path in places) == list(range(1, 9))
    assert list_names(tmp_path / "zoo" / "pets") == [str(number) for number in range(1, 9)]


def test_new_models_can_be_published_many_times_at_once(tmp_path: Path) -> None:
    """Calls create and remove the same folder; each must still find a place for its version."""
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


def test_a_dead_link_in_place_of_the_repository_is_an_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "zoo").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="cannot write into"):
        publish_model(model, tmp_path / "zoo")


def test_a_file_that_changes_meanwhile_is_not_published(model: Path, tmp_path: Path) -> None:
    with start_stuck_publisher(model, tmp_path / "zoo") as process:
        os.utime(model, ns=(0, 0))
        process.kill()
    code = STUCK.replace("time.sleep(600)", "__import__('os').utime(source, ns=(1, 1))")
    ended = subprocess.run(
        [sys.executable, "-c", code, str(model), str(tmp_path / "zoo")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "has changed while it was published" in ended.stderr
    assert list_names(tmp_path / "zoo") == []


def test_a_version_can_be_read_by_others(model: Path, tmp_path: Path) -> None:
    """A service of another user can read it."""
    place = publish_model(model, tmp_path / "zoo")
    umask = os.umask(0)
    os.umask(umask)
    assert place.parent.stat().st_mode & 0o777 == 0o777 & ~umask
