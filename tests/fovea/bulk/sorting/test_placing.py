"""Single files: what a killed run, another program or a second path may have left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fovea.bulk.sorting.placing import copy_file, has_content, has_same_content, move_file, write_image

DIGEST = "0" * 24

Place = Callable[[Path, Path], bool]
"""Function that puts the content of a file under a new name."""


def write(source: Path, target: Path) -> bool:
    return write_image(source.read_bytes(), target, digest=DIGEST)


PLACES: dict[str, Place] = {
    "copy": lambda source, target: copy_file(str(source), target, digest=DIGEST),
    "move": lambda source, target: move_file(str(source), target, digest=DIGEST),
    "write": write,
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """Return each of the ways to place a file."""
    return PLACES[request.param]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "1.jpg"
    path.parent.mkdir()
    (tmp_path / "out").mkdir()
    path.write_text("new")
    return path


def test_file_that_appears_meanwhile_is_not_replaced(
    place: Place, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program makes the file after the look whether the name is free."""
    target = tmp_path / "out" / "1.jpg"
    target.write_text("of another program")
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    assert not place(source, target)
    assert (source.read_text(), target.read_text()) == ("new", "of another program")
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("content", ["new", ""])
def test_pipe_of_the_same_name_is_another_file(source: Path, tmp_path: Path, content: str) -> None:
    source.write_text(content)
    target = tmp_path / "out" / "1.jpg"
    os.mkfifo(target)
    assert not has_same_content(str(source), target)
    assert not has_content(target, content.encode())
    assert not copy_file(str(source), target, digest=DIGEST)


def test_hidden_file_of_a_killed_run_is_replaced_and_not_written_into(
    place: Place, source: Path, tmp_path: Path
) -> None:
    """The hidden file is a link to a file that is finished, whose source has other content now."""
    finished, target = tmp_path / "out" / "0.jpg", tmp_path / "out" / "1.jpg"
    finished.write_text("finished")
    os.link(finished, target.with_name(f".{DIGEST}.fovea-tmp"))
    assert place(source, target)
    assert (finished.read_text(), target.read_text()) == ("finished", "new")
    assert sorted(target.parent.iterdir()) == [finished, target]


def test_only_name_of_a_file_is_never_removed(source: Path, tmp_path: Path) -> None:
    """A second path to the folder is no second file, whatever the caller has missed."""
    (tmp_path / "link").symlink_to(source.parent)
    move_file(str(tmp_path / "link" / "1.jpg"), source, digest=DIGEST)
    assert source.read_text() == "new"
