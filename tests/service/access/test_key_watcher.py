"""The watcher of the keys file: every way to replace a file, and what does not count as keys."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fovea.service.access import key_watcher
from fovea.service.access.caller import Scope
from fovea.service.access.key_watcher import KeyWatcher
from fovea.service.access.keys_file import ApiKey, hash_key, read_content
from fovea.service.errors import StartError
from tests.tools import SYSTEM_REASON


def line(name: str) -> str:
    return ApiKey(name, frozenset({Scope.CLASSIFY}), hash_key(name.encode())).to_line() + "\n"


def poll_twice(watcher: KeyWatcher) -> None:
    async def poll() -> None:
        await watcher.poll()
        await watcher.poll()

    asyncio.run(poll())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(line("old"))
    return path


def write_in_place(file: Path, text: str) -> None:
    file.write_text(text)


def write_by_rename(file: Path, text: str) -> None:
    other = file.with_name("new")
    other.write_text(text)
    other.rename(file)


def write_with_equal_size_and_time(file: Path, text: str) -> None:
    status = file.stat()
    file.write_text(text)
    assert file.stat().st_size == status.st_size
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("write", [write_in_place, write_by_rename, write_with_equal_size_and_time])
def test_new_keys_are_accepted(file: Path, write: Callable[[Path, str], None]) -> None:
    watcher = KeyWatcher(file)
    write(file, line("new"))
    poll_twice(watcher)
    assert watcher.access.names == ["new"]


def test_secret_of_kubernetes_is_followed(tmp_path: Path) -> None:
    """The kubelet writes a new folder and replaces the link `..data` (pkg/volume/util/atomic_writer.go)."""
    for folder, name in (("..1", "old"), ("..2", "new")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "keys").write_text(line(name))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "keys").symlink_to("..data/keys")
    watcher = KeyWatcher(tmp_path / "keys")
    (tmp_path / "..tmp").symlink_to("..2")
    (tmp_path / "..tmp").rename(tmp_path / "..data")
    poll_twice(watcher)
    assert watcher.access.names == ["new"]


def test_file_counts_only_when_it_has_settled(file: Path) -> None:
    watcher = KeyWatcher(file)
    text = line("new") + line("second")
    for end in range(len(line("new")), len(text) + 1, 7):
        file.write_text(text[:end])
        asyncio.run(watcher.poll())
        assert watcher.access.names == ["old"]
    file.write_text(text)
    poll_twice(watcher)
    assert watcher.access.names == ["new", "second"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_text(""), "it is empty"),
        (lambda file: file.write_text(line("new")[:-1]), "line 1 does not end"),
        (lambda file: file.write_text(line("new") + "second:secret\n"), "line 2: it has 2 fields"),
        (lambda file: file.write_text(line("new") + line("new")), "line 2: its name is already on line 1"),
        (lambda file: file.unlink(), "No such file"),
        (lambda file: (file.unlink(), file.mkdir()), "Is a directory"),
    ],
)
def test_old_keys_stay_until_the_file_is_valid_again(
    file: Path, damage: Callable[[Path], object], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    reloads: list[bool] = []
    watcher = KeyWatcher(file, on_reload=reloads.append)
    damage(file)
    for _ in range(3):
        poll_twice(watcher)
    assert watcher.access.names == ["old"]
    (record,) = caplog.records  # one line, however long the file stays so
    assert message in record.getMessage()
    assert record.levelno == logging.ERROR
    assert "secret" not in record.getMessage()
    assert reloads == [False]
    if file.is_dir():
        file.rmdir()
    file.write_text(line("new"))
    poll_twice(watcher)
    assert watcher.access.names == ["new"]
    assert reloads == [False, True]


@pytest.mark.skipif(os.geteuid() == 0, reason=f"{SYSTEM_REASON}lets root read every file")
def test_unreadable_file_keeps_the_old_keys(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    watcher = KeyWatcher(file)
    file.chmod(0)
    poll_twice(watcher)
    assert watcher.access.names == ["old"]
    assert "Permission denied" in caplog.text


def test_comment_alone_lets_nobody_in(file: Path) -> None:
    watcher = KeyWatcher(file)
    file.write_text("# nobody\n")
    poll_twice(watcher)
    assert watcher.access.names == []


def test_worker_starts_with_the_keys_in_force_when_the_file_is_broken(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = KeyWatcher(file).content
    file.write_text("broken")
    worker = KeyWatcher(file, content)
    for _ in range(3):
        poll_twice(worker)
    assert worker.access.names == ["old"]
    (record,) = caplog.records
    assert "line 1 does not end" in record.getMessage()
    file.write_text(line("new"))
    poll_twice(worker)
    assert worker.access.names == ["new"]
    assert worker.content == file.read_bytes()


def test_worker_reads_a_file_that_has_changed_before_its_start(file: Path) -> None:
    content = KeyWatcher(file).content
    file.write_text(line("new"))
    worker = KeyWatcher(file, content)
    poll_twice(worker)
    assert worker.access.names == ["new"]


@contextmanager
def forbid_new_files() -> Iterator[None]:
    """Let this process open no file inside the block."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_file_is_read_again_when_the_system_could_not_read_it(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = KeyWatcher(file)
    file.write_text(line("new"))

    async def poll() -> None:
        await watcher.poll()
        with forbid_new_files():
            await watcher.poll()
            await watcher.poll()
        assert watcher.access.names == ["old"]
        await watcher.poll()

    asyncio.run(poll())
    assert watcher.access.names == ["new"]
    (record,) = caplog.records
    assert "Too many open files" in record.getMessage()


def test_part_of_a_file_does_not_count(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer may begin between two looks and the reading, and have written some whole lines."""
    watcher = KeyWatcher(file)
    text = line("new") + line("second")
    file.write_text(text)

    def read_and_let_the_writer_continue(path: Path) -> bytes:
        file.write_text(line("new"))
        content = read_content(path)
        file.write_text(text)
        return content

    asyncio.run(watcher.poll())
    with monkeypatch.context() as patch:
        patch.setattr(key_watcher, "read_content", read_and_let_the_writer_continue)
        asyncio.run(watcher.poll())
    assert watcher.access.names == ["old"]
    poll_twice(watcher)
    assert watcher.access.names == ["new", "second"]


def test_first_read_must_succeed(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"FOVEA_KEYS is .*No such file"):
        KeyWatcher(tmp_path / "keys")
