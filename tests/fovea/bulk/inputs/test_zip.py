"""ZIP archives, good and hostile."""

from __future__ import annotations

import io
import random
import stat
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any, cast

import pytest

from fovea.bulk.inputs import count_entries, list_entries
from fovea.bulk.inputs.zip_archive import ZipMember
from fovea.errors import StartError
from tests.fovea.bulk.inputs.listing import MAX_BYTES, read_sources

METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]

PHOTO = random.Random(0).randbytes(50_000)  # noqa: S311 - content that does not compress


def make_zip(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "photos.zip"


@pytest.mark.parametrize("method", METHODS)
def test_members_are_read_in_place(method: int, path: Path) -> None:
    path.write_bytes(make_zip({"b.jpg": PHOTO, "cats/a.jpg": b"a" * 90_000, "empty.jpg": b""}, method))
    assert read_sources(path) == [
        (f"{path}/b.jpg", PHOTO),
        (f"{path}/cats/a.jpg", b"a" * 90_000),
        (f"{path}/empty.jpg", b""),
    ]
    assert count_entries([str(path)]) == 3


def test_clutter_and_folders_are_left_out(path: Path) -> None:
    path.write_bytes(make_zip({"a/": b"", "__MACOSX/a/._1.jpg": b"x", "a/.DS_Store": b"x", "a/1.jpg": b"1"}))
    assert read_sources(path) == [(f"{path}/a/1.jpg", b"1")]


def test_large_archive_takes_little_memory(path: Path) -> None:
    """`zipfile` takes 3.6 MB for a directory of this size."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(5_000):
            archive.writestr(f"{number:090}.jpg", b"")
    tracemalloc.start()
    try:
        number = sum(1 for _ in list_entries([str(path)]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert number == 5_000
    assert peak < 5 << 19


class Pipe(io.RawIOBase):
    """A stream that cannot seek, as a pipe."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.content += content
        return len(content)


def test_archive_of_a_pipe_has_its_sizes_in_the_directory_only(path: Path) -> None:
    pipe = Pipe()
    with zipfile.ZipFile(cast(Any, pipe), "w") as archive:
        with archive.open("a.jpg", "w", force_zip64=True) as file:
            file.write(b"abc" * 1000)
        archive.writestr("b.jpg", b"b")
    path.write_bytes(pipe.content)
    assert read_sources(path) == [(f"{path}/a.jpg", b"abc" * 1000), (f"{path}/b.jpg", b"b")]


def test_directory_of_zip64(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    path.write_bytes(make_zip({"a.jpg": PHOTO, "b.jpg": b"b" * 100}))
    assert b"PK\6\6" in path.read_bytes()
    assert read_sources(path) == [(f"{path}/a.jpg", PHOTO), (f"{path}/b.jpg", b"b" * 100)]
    path.write_bytes(b"#!/bin/sh\n" * 100 + path.read_bytes())
    assert read_sources(path) == [(f"{path}/a.jpg", PHOTO), (f"{path}/b.jpg", b"b" * 100)]


def test_archive_behind_a_program_and_before_a_comment(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", PHOTO)
        archive.comment = b"PK\5\6 no directory"
    path.write_bytes(b"MZ program" * 1000 + path.read_bytes())
    assert read_sources(path) == [(f"{path}/a.jpg", PHOTO)]


def test_bomb_is_not_expanded(path: Path) -> None:
    """The directory tells the truth, so nothing is unpacked; where it lies, one byte more than it says."""
    path.write_bytes(make_zip({"bomb.jpg": bytes(50 << 20), "a.jpg": b"a"}))
    assert len(path.read_bytes()) < 60_000
    too_large = f"body_too_large: the file has more than {MAX_BYTES} bytes (FOVEA_BODY_BYTES)"
    tracemalloc.start()
    try:
        assert read_sources(path) == [(f"{path}/bomb.jpg", too_large), (f"{path}/a.jpg", b"a")]
        truth = struct.pack("<L", 50 << 20)
        path.write_bytes(path.read_bytes().replace(truth, struct.pack("<L", 1000)))
        assert read_sources(path) == [
            (
                f"{path}/bomb.jpg",
                "unreadable_file: the file is damaged in the archive: it has more than 1000 bytes",
            ),
            (f"{path}/a.jpg", b"a"),
        ]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_lzma_dictionary_is_no_larger_than_the_file(path: Path) -> None:
    """A header may ask for 4 GiB."""
    content = make_zip({"a.jpg": PHOTO}, zipfile.ZIP_LZMA)
    start = content.index(b"\x05\x00", 30) + 3
    path.write_bytes(content[:start] + struct.pack("<L", 0xFFFFFFFF) + content[start + 4 :])
    code = (
        "import resource, sys\n"
        "from fovea.bulk.inputs import list_entries\n"
        "entry = next(list_entries(sys.argv[1:]))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "print(len(entry.read(100_000)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert (result.stdout, result.stderr) == ("50000\n", "")


def test_two_members_of_one_name_are_two_rows(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", b"first")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.jpg", b"second")
    assert read_sources(path) == [(f"{path}/a.jpg", b"first"), (f"{path}/a.jpg", b"second")]


def test_names_that_lead_out_of_the_archive(path: Path) -> None:
    path.write_bytes(
        make_zip(
            {
                "../../evil.jpg": b"x",
                "/etc/a.jpg": b"a",
                "x/../b.jpg": b"b",
                "..\\c.jpg": b"c",
                "d\\e.jpg": b"e",
            }
        )
    )
    message = "unreadable_file: the file's name leads out of the archive or is empty"
    assert read_sources(path) == [
        (f"{path}/__/__/evil.jpg", message),
        (f"{path}/etc/a.jpg", b"a"),
        (f"{path}/b.jpg", b"b"),
        (f"{path}/__/c.jpg", message),
        (f"{path}/d/e.jpg", b"e"),
    ]


def test_names_of_old_code_pages_and_with_control_characters(path: Path) -> None:
    content = make_zip({"AAAAA.jpg": b"1", "BBBBB.jpg": b"2", "CCCCC.jpg": b"3", "é.jpg": b"4"})
    content = content.replace(b"AAAAA", "früh".encode()).replace(b"BBBBB", b"fr\x81h_")
    content = content.replace(b"CCCCC", b"a\0b\nc")
    path.write_bytes(content)
    assert [name for name, _ in read_sources(path)] == [
        f"{path}/{name}" for name in ("früh.jpg", "früh_.jpg", "a\\x00b\\x0ac.jpg", "é.jpg")
    ]
    path.write_bytes(content.replace("é".encode(), b"\xff\xfe"))  # it is marked as UTF-8
    assert read_sources(path)[-1] == (f"{path}/\\xff\\xfe.jpg", b"4")


def test_link_in_an_archive_is_not_read(path: Path) -> None:
    link = zipfile.ZipInfo("link.jpg")
    link.create_system = 3
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert read_sources(path) == [
        (f"{path}/link.jpg", "unsupported_format: a link or a device in an archive is not read")
    ]


def test_encrypted_members_and_unknown_methods(path: Path) -> None:
    content = bytearray(make_zip({"a.jpg": b"a", "b.jpg": b"b"}))
    first = content.index(b"PK\1\2")
    second = content.index(b"PK\1\2", first + 1)
    content[first + 8] |= 1
    content[second + 10] = 99
    path.write_bytes(content)
    assert read_sources(path) == [
        (
            f"{path}/a.jpg",
            "unreadable_file: the file is encrypted in the archive; unpack the archive with its password",
        ),
        (
            f"{path}/b.jpg",
            "unreadable_file: the file has the compression method 99 in the archive, which is not supported; "
            "unpack the archive",
        ),
    ]


def test_damaged_member_is_one_row(path: Path) -> None:
    content = bytearray(make_zip({"a.jpg": PHOTO, "b.jpg": PHOTO, "c.jpg": b"c"}, zipfile.ZIP_STORED))
    content[1000] ^= 1
    header = content.index(b"PK\3\4", 10)
    content[header] = 0
    path.write_bytes(content)
    damaged = "unreadable_file: the file is damaged in the archive: "
    assert read_sources(path) == [
        (f"{path}/a.jpg", f"{damaged}its checksum is another"),
        (f"{path}/b.jpg", f"{damaged}there is no header at its place"),
        (f"{path}/c.jpg", b"c"),
    ]


@pytest.mark.parametrize("end", ["missing", "directory", "empty", "no zip", "signature only"])
def test_broken_archive_is_one_row(end: str, path: Path) -> None:
    content = make_zip({"a.jpg": b"a", "b.jpg": b"b"})
    if end == "missing":
        content = content[: content.index(b"PK\1\2") + 10]
    elif end == "directory":
        place = content.rindex(b"PK\1\2")
        content = content[:place] + b"XX" + content[place + 2 :]
    else:
        content = {"empty": b"", "no zip": b"\xff\xd8\xff" * 100, "signature only": b"PK\5\6"}[end]
    path.write_bytes(content)
    rows = read_sources(path)
    if end == "directory":
        assert rows.pop(0) == (f"{path}/a.jpg", b"a")
    assert [name for name, _ in rows] == [str(path)]
    assert str(rows[0][1]).startswith(
        "unreadable_file: the ZIP archive is damaged or incomplete: its directory"
    ) or ("it has no directory" in str(rows[0][1]))
    assert count_entries([str(path)]) in (None, 2)


def test_missing_archive_is_refused_before_the_first_image(path: Path) -> None:
    with pytest.raises(StartError, match=r"photos.zip: the file cannot be read: No such file or directory"):
        list_entries([str(path)])


def test_empty_archive_gives_nothing(path: Path) -> None:
    path.write_bytes(make_zip({}))
    assert read_sources(path) == []


@pytest.mark.parametrize("seed", range(5))
def test_random_damage_gives_rows_and_no_other_error(seed: int, path: Path) -> None:
    random_numbers = random.Random(seed)  # noqa: S311
    content = bytearray(make_zip({f"{name}.jpg": PHOTO[:300] for name in "abcdef"}))
    for _ in range(8):
        content[random_numbers.randrange(len(content))] = random_numbers.randrange(256)
    path.write_bytes(content[: random_numbers.randrange(len(content) // 2, len(content) + 1)])
    assert read_sources(path)


def test_members_are_frozen_and_small(path: Path) -> None:
    path.write_bytes(make_zip({"a.jpg": b"a"}))
    (entry,) = list_entries([str(path)])
    assert isinstance(entry, ZipMember)
    assert not entry.is_named
    assert not hasattr(entry, "__dict__")
