"""The folder of compiled engines: for its owner alone, locked, and refused if others can write to it."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fovea.service.errors import ModelError
from fovea.service.inference.engine_cache import lock_engine_cache
from fovea.service.rollout.trial import is_provider_error
from fovea.service.serving.process_plan import find_engine_cache
from fovea.service.settings import Settings


def test_folder_is_created_for_its_owner_and_locked_inside_the_block(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "engines"
    with lock_engine_cache(str(folder)):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with (folder / "lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (folder / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_no_folder_is_no_lock() -> None:
    with lock_engine_cache(""):
        pass


def _open_to_others(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def _link(folder: Path) -> None:
    (folder.parent / "target").mkdir(mode=0o700)
    folder.symlink_to("target")


def _link_lock(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "lock").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (_open_to_others, "others can write to it"),
        (_link, "it is not a folder itself"),
        (_link_lock, "Too many levels of symbolic links"),
        (lambda folder: folder.write_text(""), "File exists"),
    ],
)
def test_unsafe_folder_is_refused(tmp_path: Path, prepare: Callable[[Path], None], reason: str) -> None:
    folder = tmp_path / "engines"
    prepare(folder)
    with pytest.raises(ModelError, match=reason) as error_info, lock_engine_cache(str(folder)):
        pass
    assert str(error_info.value).startswith(f"FOVEA_PROVIDER needs FOVEA_ENGINE_CACHE, {folder}: ")
    assert is_provider_error(error_info.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="this system runs the tests without the rights of root")
def test_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(ModelError, match="others can write to it"), lock_engine_cache(str(folder)):
        pass


def test_only_a_provider_that_compiles_gets_the_folder(tmp_path: Path) -> None:
    settings = Settings(models=tmp_path, engine_cache=tmp_path / "engines")
    assert find_engine_cache(settings, "tensorrt") == str(tmp_path / "engines")
    assert [find_engine_cache(settings, one) for one in ("auto", "cpu", "cuda", "openvino")] == [""] * 4
    assert find_engine_cache(Settings(models=tmp_path), "tensorrt") == ""
