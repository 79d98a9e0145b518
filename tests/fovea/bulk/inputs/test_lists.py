"""Lists of names on standard input."""

from __future__ import annotations

import io
import os
import pty
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fovea.bulk.inputs import count_entries, list_entries
from fovea.bulk.inputs.name_list import ListedName, read_names
from fovea.errors import StartError
from tests.fovea.bulk.inputs.listing import read_sources


class SlowStream(io.BytesIO):
    """A stream that gives a byte at each reading, as a pipe may."""

    def read1(self, size: int | None = -1) -> bytes:
        return self.read(1)


def read_texts(content: bytes) -> list[str | None]:
    texts = [name.text for name in read_names(io.BytesIO(content))]
    if b"\0" not in content or b"\n" not in content:
        assert [name.text for name in read_names(SlowStream(content))] == texts
    return texts


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"\n\n \n", []),
        (b"a.jpg\nb.jpg\n", ["a.jpg", "b.jpg"]),
        (b"a.jpg\r\n\r\n b.jpg", ["a.jpg", " b.jpg"]),
        (b"\xef\xbb\xbfa.jpg\n", ["a.jpg"]),
        (b"\xef\xbb\xbfa.jpg", ["a.jpg"]),
        (b"a.jpg\0b c.jpg\0", ["a.jpg", "b c.jpg"]),
        (b"a\nb.jpg\0c.jpg\0", ["a\nb.jpg", "c.jpg"]),
        (b"a.jpg\r\0\0", ["a.jpg\r"]),
        (b"caf\xe9.jpg\n", ["caf\udce9.jpg"]),
    ],
)
def test_names_of_a_list(content: bytes, expected: list[str]) -> None:
    assert read_texts(content) == expected


def test_null_byte_behind_the_first_lines_belongs_to_a_name() -> None:
    content = b"a.jpg\n" * 20_000 + b"b\0c.jpg\n"
    assert read_texts(content)[-1] == "b\0c.jpg"


def test_long_name_is_one_name() -> None:
    content = b"a.jpg\n" + b"x" * 1_000_000 + b"\nb.jpg\n"
    assert list(read_names(io.BytesIO(content))) == [
        ListedName(1, "a.jpg"),
        ListedName(2, None),
        ListedName(3, "b.jpg"),
    ]
    assert read_texts(b"x" * 100_000) == [None]


def test_names_are_yielded_as_they_arrive() -> None:
    """A program that finds photos may take hours."""
    reader, writer = os.pipe()
    with open(reader, "rb") as stream:  # noqa: PTH123 - a pipe
        names = read_names(stream)
        os.write(writer, b"a.jpg\nb")
        assert next(names).text == "a.jpg"
        os.write(writer, b".jpg\n")
        assert next(names).text == "b.jpg"
        os.close(writer)
        assert list(names) == []


def test_list_may_have_every_kind_of_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "folder/b", "no-suffix", "[1].jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "table.csv").write_text("path\nfolder/b\n")
    (tmp_path / "broken.zip").write_bytes(b"")
    (tmp_path / "other.csv").write_text("id\n1\n")
    names = (
        "a.jpg ./folder/ no-suffix [1].jpg missing table.csv broken.zip other.csv ftp://host/a.zip - *.jpg"
    )
    rows = read_sources("a.jpg", "-", stdin=io.BytesIO("\n".join(names.split()).encode()))
    missing = "unreadable_file: the file cannot be read: No such file or directory"
    assert rows[:7] == [
        ("a.jpg", b"a.jpg"),
        ("a.jpg", b"a.jpg"),
        ("folder/b", b"folder/b"),
        ("no-suffix", b"no-suffix"),
        ("[1].jpg", b"[1].jpg"),
        ("missing", missing),
        ("folder/b", b"folder/b"),
    ]
    assert [name for name, _ in rows[7:]] == ["broken.zip", "other.csv", "ftp://host/a.zip", "-", "*.jpg"]
    assert "its directory" in str(rows[7][1]) or "no directory" in str(rows[7][1])
    assert "no column named path" in str(rows[8][1])
    assert "is not the URI of a store" in str(rows[9][1])
    assert rows[10:] == [("-", missing), ("*.jpg", missing)]
    assert count_entries(["-"]) is None


def test_listed_images_are_named() -> None:
    entries = list_entries(["-"], stdin=io.BytesIO(b"a.txt\nb.jpg\n"))
    assert [(entry.name, entry.is_named) for entry in entries] == [("a.txt", True), ("b.jpg", True)]


def test_listed_pipe_does_not_stop_the_run(tmp_path: Path) -> None:
    for name in ("pipe", "pipe.jpg"):
        os.mkfifo(tmp_path / name)
    names = [f"{tmp_path}/pipe", f"{tmp_path}/pipe.jpg", "/dev/zero"]
    assert read_sources("-", stdin=io.BytesIO("\n".join(names).encode())) == [
        (name, "unsupported_format: the file is a device, a pipe or a socket") for name in names
    ]


def test_listed_uri_that_is_no_utf8_is_a_row() -> None:
    rows = read_sources("-", stdin=io.BytesIO(b"memory://bucket\xe9/a.zip\nmemory://bucket\xe9/a.jpg\n"))
    assert [name for name, _ in rows] == [rf"memory://bucket\xe9/{name}" for name in ("a.zip", "a.jpg")]


def test_list_on_a_terminal_or_twice_is_refused() -> None:
    leader, follower = pty.openpty()
    terminal: Any = open(follower, "rb", buffering=0)  # noqa: PTH123, SIM115
    with closing(terminal), pytest.raises(StartError, match="- reads names from standard input; write `find"):
        list_entries(["-"], stdin=terminal)
    os.close(leader)
    with pytest.raises(StartError, match="- can be named only once"):
        list_entries(["-", "-"], stdin=io.BytesIO())
