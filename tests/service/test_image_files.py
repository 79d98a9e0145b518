"""Reading of image files, whatever kind of file it is."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import pytest

from fovea.service.errors import BodyTooLarge, FileError, UnsupportedFormat
from fovea.service.image_files import read_image_file
from tests.open_files import list_open_files


@pytest.mark.parametrize("size", [0, 1, 9, 10])
def test_file_up_to_the_limit_is_read_whole(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(bytes(range(size)))
    assert read_image_file(path, 10) == bytes(range(size))
    assert read_image_file(str(path), 10, only_regular=True) == bytes(range(size))


@pytest.mark.parametrize("size", [11, 12, 1000])
def test_file_above_the_limit_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(bytes(size))
    with pytest.raises(BodyTooLarge, match="more than 10 bytes"):
        read_image_file(path, 10)


def test_pipe_and_device_are_read_if_they_are_named(tmp_path: Path) -> None:
    """A pipe states no size, and gives its content in parts."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = os.urandom(300_000)
    for limit, expected in ((300_000, content), (299_999, None)):
        writer = threading.Thread(target=_write_quietly, args=(pipe, content))
        writer.start()
        if expected is None:
            with pytest.raises(BodyTooLarge):
                read_image_file(pipe, limit)
        else:
            assert read_image_file(pipe, limit) == expected
        writer.join()
    with pytest.raises(BodyTooLarge):
        read_image_file("/dev/zero", 3 << 20)
    assert read_image_file("/proc/self/cmdline", 1 << 20)  # has a size of 0


def _write_quietly(path: Path, content: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # the reader has reached its limit
        path.write_bytes(content)


def test_only_regular_files_are_read_in_folders(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(UnsupportedFormat, match="the file is a device, a pipe or a socket"):
            read_image_file(path, 10, only_regular=True)


@pytest.mark.parametrize("only_regular", [True, False])
def test_what_cannot_be_read_is_a_file_error(only_regular: bool, tmp_path: Path) -> None:
    before = list_open_files()
    for path, message in (
        (tmp_path, "Is a directory"),
        (tmp_path / "nowhere", "No such file or directory"),
        ("a\0b", "embedded null byte"),
    ):
        with pytest.raises(FileError, match=f"the file cannot be read: {message}"):
            read_image_file(path, 10, only_regular=only_regular)
    assert list_open_files() <= before
