"""Files that are complete or absent, whoever else writes them and however the writer ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fovea.service.artifact.repository import record_default_model
from fovea.service.atomic_files import (
    WriteError,
    remove_abandoned_files,
    replace_file,
    stage_file,
    write_file,
)
from tests.servers import ROOT

KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from fovea.service.atomic_files import replace_file
with replace_file(Path(sys.argv[1])) as partial:
    partial.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writers_of_one_path_do_not_share_their_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replace_file(path) as slow:
        slow.write_text("slow")
        write_file(path, "quick")
        assert path.read_text() == "quick"
    assert path.read_text() == "slow"
    assert list_names(tmp_path) == ["file"]


def test_file_of_a_killed_writer_is_removed_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "[a]*"
    path.write_text("before")
    process = subprocess.run([sys.executable, "-c", KILLED_WRITER, path], cwd=ROOT, check=False)
    assert process.returncode == -signal.SIGKILL
    assert path.read_text() == "before"
    (left,) = tmp_path.glob(".*")
    (tmp_path / ".[a]*-notes").touch()  # no file of a writer
    with replace_file(path) as partial:
        assert not left.exists()
        partial.write_text("after")
    assert path.read_text() == "after"
    assert list_names(tmp_path) == [".[a]*-notes", "[a]*"]


def test_files_in_use_are_not_abandoned(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, tmp_path / "a" / "b" / "file"], cwd=ROOT, check=False
    )
    (left,) = (tmp_path / "a" / "b").iterdir()
    with stage_file(tmp_path / "a" / "file") as staged:
        assert remove_abandoned_files(tmp_path) == [left]
        staged.partial.write_text("content")
        assert not staged.path.exists()
        staged.publish()
    assert list_names(tmp_path / "a") == ["b", "file"]


def test_failed_block_leaves_the_previous_file_and_nothing_else(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "before")
    with pytest.raises(ZeroDivisionError), replace_file(tmp_path / "file") as partial:
        partial.write_text("after")
        raise ZeroDivisionError
    assert (tmp_path / "file").read_text() == "before"
    assert list_names(tmp_path) == ["file"]


def test_file_has_the_usual_permissions(tmp_path: Path) -> None:
    """Services of other users read what a command wrote."""
    write_file(tmp_path / "file", b"")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_path_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot write .*/file/inner"):
        write_file(tmp_path / "file" / "inner", "")


def test_default_model_is_recorded_beside_another_publication(tmp_path: Path) -> None:
    (tmp_path / "pets" / "1").mkdir(parents=True)
    (tmp_path / "pets" / "1" / "model.onnx").touch()
    with replace_file(tmp_path / "default") as slow:
        slow.write_text("pets\n")
        record_default_model(tmp_path)
        assert (tmp_path / "default").read_text() == "pets\n"
