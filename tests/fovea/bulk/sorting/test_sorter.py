"""Copying and moving into a folder for each label: no image is lost, whatever happens."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fovea.bulk.rows import Row
from fovea.bulk.sorting.names import name_folders
from fovea.bulk.sorting.plan import PlannedFile, plan_sorting
from fovea.bulk.sorting.sorter import Action, Sorter, SortingSummary
from fovea.errors import FileError, StartError
from fovea.service.atomic_files import WriteError

LABELS = ("cat", "dog")


class MemoryEntry(NamedTuple):
    """An image of an archive."""

    name: str
    content: bytes
    is_named: bool = False

    def read(self, max_bytes: int) -> bytes:
        if len(self.content) > max_bytes:
            raise FileError("it is too large")
        return self.content


def make_files(folder: Path, **contents: str) -> list[str]:
    """Write files, named by their keys with `__` for `/`, and return their paths."""
    paths = [folder / f"{name.replace('__', '/')}.jpg" for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return [str(path) for path in paths]


def plan(folder: Path, *rows: tuple[str, str | None]) -> list[PlannedFile]:
    table = [Row(path, label, None if label is None else 0.9) for path, label in rows]
    return list(plan_sorting(table, folder, name_folders(LABELS)))


def make_sorter(folder: Path, action: Action, *entries: Any) -> Sorter:
    return Sorter(folder, action, list_entries=lambda: iter(entries), max_bytes=100)


def sort(folder: Path, action: Action, *rows: tuple[str, str | None], entries: Any = ()) -> SortingSummary:
    return make_sorter(folder, action, *entries).sort(plan(folder, *rows))


def read_tree(folder: Path) -> dict[str, str]:
    """Return the content of all files below a folder by their paths in it."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def preview(folder: Path, action: Action, *rows: tuple[str, str | None]) -> list[tuple[str, str | None]]:
    """Return (source, target) pairs; the target is None for an image that stays."""
    lines = make_sorter(folder, action).preview(plan(folder, *rows))
    return [(one.source, str(one.target.relative_to(folder)) if one.target else None) for one in lines]


@pytest.mark.parametrize("action", Action)
def test_images_are_sorted_by_label(tmp_path: Path, action: Action) -> None:
    paths = make_files(tmp_path / "in", a__1="one", a__2="two", b__3="three", broken="bad")
    rows = [(paths[0], "cat"), (paths[1], "dog"), (paths[2], "cat"), (paths[3], None)]
    out = tmp_path / "out"
    expected_preview = [(paths[0], "cat/1.jpg"), (paths[1], "dog/2.jpg"), (paths[2], "cat/3.jpg")]
    assert preview(out, action, *rows) == expected_preview
    assert not out.exists()
    summary = sort(out, action, *rows)
    assert read_tree(out) == {"cat/1.jpg": "one", "cat/3.jpg": "three", "dog/2.jpg": "two"}
    assert summary.placed == {"cat": 2, "dog": 1}
    left = {"broken.jpg": "bad"}
    if action is Action.COPY:
        left |= {"a/1.jpg": "one", "a/2.jpg": "two", "b/3.jpg": "three"}
    assert read_tree(tmp_path / "in") == left


@pytest.mark.parametrize("action", Action)
def test_images_of_one_name_get_different_files_as_the_preview_says(tmp_path: Path, action: Action) -> None:
    """Also where a stranger's file has the name before."""
    paths = make_files(tmp_path / "in", a__1="one", b__1="two", c__1="three")
    rows = [(path, "cat") for path in paths]
    out = tmp_path / "out"
    make_files(out, cat__1="stranger")
    lines = preview(out, action, *rows)
    sort(out, action, *rows)
    tree = read_tree(out)
    assert tree.pop("cat/1.jpg") == "stranger"
    assert tree == {
        target: content for (_, target), content in zip(lines, ("one", "two", "three"), strict=True)
    }


@pytest.mark.parametrize("action", Action)
def test_sorting_twice_changes_nothing(tmp_path: Path, action: Action) -> None:
    paths = make_files(tmp_path / "in", a__1="one", b__1="two", c__1="one")
    rows = [(path, "cat") for path in paths]
    out = tmp_path / "out"
    sort(out, action, *rows)
    tree = read_tree(out)
    assert sorted(tree.values()) == (["one", "one", "two"] if action is Action.MOVE else ["one", "two"])
    assert [target for _, target in preview(out, action, *rows)] == [None] * 3
    summary = sort(out, action, *rows)
    assert read_tree(out) == tree
    assert (summary.placed.total(), summary.present_count, summary.failure_count) == (0, 3, 0)


@pytest.mark.parametrize("action", Action)
def test_folder_is_sorted_in_place(tmp_path: Path, action: Action) -> None:
    """An image that lies where it belongs stays, also by another path to its folder."""
    right, wrong = make_files(tmp_path, cat__1="one", dog__2="two")
    (tmp_path / "link").symlink_to(tmp_path / "cat")
    rows = [(right, "cat"), (str(tmp_path / "link" / "1.jpg"), "cat"), (wrong, "cat")]
    assert preview(tmp_path, action, *rows) == [(right, None), (rows[1][0], None), (wrong, "cat/2.jpg")]
    sort(tmp_path, action, *rows)
    (tmp_path / "link").unlink()
    expected = {"cat/1.jpg": "one", "cat/2.jpg": "two"}
    assert read_tree(tmp_path) == expected | ({"dog/2.jpg": "two"} if action is Action.COPY else {})


def test_image_that_is_gone_is_no_image_of_an_archive(tmp_path: Path) -> None:
    """The messages of a move say which of them may be copied instead."""
    (gone,) = make_files(tmp_path / "in", a__1="one")
    Path(gone).unlink()
    (tmp_path / "a.zip").touch()
    for source, reason in {
        gone: "it is gone: it was deleted or moved elsewhere since the table was made",
        f"{tmp_path}/a.zip/1.jpg": "it is no file of this machine, so it cannot be moved; use --copy-to",
        "s3://bucket/1.jpg": "it is no file of this machine, so it cannot be moved; use --copy-to",
    }.items():
        (line,) = make_sorter(tmp_path / "out", Action.MOVE).preview(plan(tmp_path / "out", (source, "cat")))
        assert (line.target, line.reason) == (None, reason)
        summary = sort(tmp_path / "out", Action.MOVE, (source, "cat"))
        assert [failure.message for failure in summary.failures] == [reason]


def test_copy_keeps_the_time_and_a_move_keeps_the_file(tmp_path: Path) -> None:
    copied, moved = make_files(tmp_path, one="one", two="two")
    os.utime(copied, (1_000, 1_000))
    inode = Path(moved).stat().st_ino
    sort(tmp_path / "out", Action.COPY, (copied, "cat"))
    sort(tmp_path / "out", Action.MOVE, (moved, "cat"))
    assert (tmp_path / "out" / "cat" / "one.jpg").stat().st_mtime == 1_000
    assert (tmp_path / "out" / "cat" / "two.jpg").stat().st_ino == inode


def test_images_of_archives_are_copied_but_not_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sources are listed once, in the order of the rows; some of their images have no row."""
    names = [f"photos.zip/{folder}/1.jpg" for folder in "abcd"]
    entries = [MemoryEntry(name, name.encode() * (10 if "/d/" in name else 1)) for name in names]
    rows = [(names[0], "cat"), (names[2], "cat"), (names[3], "dog"), ("photos.zip/gone.jpg", "dog")]
    summary = sort(tmp_path, Action.COPY, *rows, entries=entries)
    assert sorted(read_tree(tmp_path).values()) == [names[0], names[2]]
    assert [failure.message for failure in summary.failures] == [
        "it is too large",
        "it is no longer in the sources",
    ]
    assert sort(tmp_path, Action.COPY, *rows[:2], entries=entries).present_count == 2
    make_files(tmp_path / "moved", cat__1="stranger")
    (tmp_path / "photos.zip").touch()
    monkeypatch.chdir(tmp_path)
    summary = sort(tmp_path / "moved", Action.MOVE, *rows, entries=entries)
    assert summary.failure_count == 4
    assert "cannot be moved; use --copy-to" in summary.failures[0].message
    assert read_tree(tmp_path / "moved") == {"cat/1.jpg": "stranger"}


def test_symbolic_link_is_copied_as_its_image_and_not_moved(tmp_path: Path) -> None:
    (image,) = make_files(tmp_path, image="one")
    link = tmp_path / "link.jpg"
    link.symlink_to("image.jpg")
    assert sort(tmp_path / "out", Action.MOVE, (str(link), "cat")).failure_count == 1
    assert preview(tmp_path / "out", Action.MOVE, (str(link), "cat")) == [(str(link), None)]
    sort(tmp_path / "out", Action.COPY, (str(link), "cat"))
    assert link.is_symlink()
    assert Path(image).read_text() == "one"
    assert not (tmp_path / "out" / "cat" / "link.jpg").is_symlink()
    assert read_tree(tmp_path / "out") == {"cat/link.jpg": "one"}


@pytest.mark.parametrize("action", Action)
def test_image_that_fails_stays_and_the_others_are_sorted(tmp_path: Path, action: Action) -> None:
    first, last = make_files(tmp_path / "in", first="one", last="two")
    rows = [(first, "cat"), (str(tmp_path / "in" / "gone.jpg"), "cat"), (last, "dog")]
    summary = sort(tmp_path / "out", action, *rows)
    assert read_tree(tmp_path / "out") == {"cat/first.jpg": "one", "dog/last.jpg": "two"}
    assert [failure.source for failure in summary.failures] == [rows[1][0]]
    assert summary.describe(action, Path("out")) == (
        f"{action.value} 2 images into 2 folders below out; 1 could not be {action.value}"
    )


@pytest.mark.parametrize("action", Action)
def test_full_disk_ends_the_run_and_keeps_every_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Action
) -> None:
    """The second image meets a full disk, after half of its content was written to another file system."""
    paths = make_files(tmp_path / "in", a__1="one", b__2="two", c__3="three")
    rows = [(path, "cat") for path in paths]

    def copy_until_full(source: Any, target: Path) -> None:
        content = Path(source).read_bytes()
        is_full = content == b"two"
        target.write_bytes(content[:1] if is_full else content)
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", refuse_links(errno.EXDEV))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copy_until_full)
        with pytest.raises(WriteError, match=r"No space left on device; .* 1 image into .* --resume goes on"):
            sort(tmp_path / "out", action, *rows)
    assert read_tree(tmp_path / "out") == {"cat/1.jpg": "one"}
    assert len(read_tree(tmp_path / "in")) == (3 if action is Action.COPY else 2)
    sort(tmp_path / "out", action, *rows)
    assert read_tree(tmp_path / "out") == {"cat/1.jpg": "one", "cat/2.jpg": "two", "cat/3.jpg": "three"}


def refuse_links(code: int) -> Any:
    def link(source: Any, target: Any, **options: Any) -> None:
        if code != errno.EXDEV or not str(source).endswith("-tmp"):
            raise OSError(code, os.strerror(code))
        real_link(source, target, **options)

    real_link = os.link
    return link


@pytest.mark.parametrize("action", Action)
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EXDEV])
def test_file_systems_without_links_or_apart_get_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Action, code: int
) -> None:
    monkeypatch.setattr(os, "link", refuse_links(code))
    paths = make_files(tmp_path / "in", a__1="one", b__1="two", b__2="two")
    rows = [(path, "cat") for path in paths]
    sort(tmp_path / "out", action, *rows)
    tree = read_tree(tmp_path / "out")
    assert sorted(tree.values()) == ["one", "two", "two"]
    assert not any(name.endswith("-tmp") for name in tree)
    assert bool(read_tree(tmp_path / "in")) is (action is Action.COPY)


def test_move_that_is_not_allowed_leaves_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = make_files(tmp_path / "in", one="one")

    real_unlink = os.unlink

    def refuse(unlinked_path: Any) -> None:
        if str(unlinked_path) == path:
            raise PermissionError(errno.EACCES, "Permission denied")
        real_unlink(unlinked_path)

    monkeypatch.setattr(os, "unlink", refuse)
    summary = sort(tmp_path / "out", Action.MOVE, (path, "cat"))
    assert summary.failures[0].message == "Permission denied"
    assert (read_tree(tmp_path / "out"), read_tree(tmp_path / "in")) == ({}, {"one.jpg": "one"})


def test_another_run_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    (path,) = make_files(tmp_path / "in", one="one")
    planned = plan(tmp_path, (path, "cat"))

    def sort_again() -> None:
        with pytest.raises(StartError, match="another run sorts into"):
            make_sorter(tmp_path, Action.COPY).sort(planned)

    make_sorter(tmp_path, Action.COPY).sort(planned, sort_again)


class Killed(BaseException):
    """The end of a process; nothing that it would clean up happens."""


def kill_after(monkeypatch: pytest.MonkeyPatch, step_count: int) -> None:
    """Let only the next `step_count` changes of the file system happen."""
    left = step_count

    def limit(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    for module, name in ((os, "link"), (os, "unlink"), (os, "rename"), (shutil, "copyfile")):
        limit(module, name)


@pytest.mark.parametrize("action", Action)
@pytest.mark.parametrize("code", [0, errno.EXDEV])
def test_run_that_is_killed_at_any_step_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Action, code: int
) -> None:
    """After a kill every image is somewhere; after the next run each is where it belongs, once."""
    if code:
        monkeypatch.setattr(os, "link", refuse_links(code))
    for step_count in range(100):
        folder = tmp_path / str(step_count)
        paths = make_files(folder / "in", a__1="one", b__1="two")
        rows = [(path, "cat") for path in paths]
        is_killed = False
        with monkeypatch.context() as patch:
            kill_after(patch, step_count)
            try:
                sort(folder / "out", action, *rows)
            except Killed:
                is_killed = True
        contents = [*read_tree(folder / "in").values(), *read_tree(folder / "out").values()]
        assert {"one", "two"} <= set(contents)
        sort(folder / "out", action, *rows)
        tree = read_tree(folder / "out")
        assert sorted(tree.values()) == ["one", "two"], tree
        assert tree["cat/1.jpg"] == "one"
        assert len(read_tree(folder / "in")) == (2 if action is Action.COPY else 0)
        if not is_killed:
            assert step_count > 3
            return
    raise AssertionError("the run has more steps than the test")
