"""Folders, files and patterns."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest

from fovea.bulk.inputs import count_entries, list_entries
from fovea.bulk.inputs.basic_entries import to_path
from fovea.errors import StartError
from fovea.service import image_folders
from fovea.service.image_folders import FolderListing, walk_folder
from tests.fovea.bulk.inputs.listing import read_sources


@pytest.fixture
def album(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a/2.jpg", "a/1.jpg", "c/d/deep.png", "notes.txt", "a.jpg"):
        path = tmp_path / "album" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "album"


def list_names(*sources: Any) -> list[str]:
    return [entry.name for entry in list_entries([str(one) for one in sources])]


ALBUM = ["a/1.jpg", "a/2.jpg", "a.jpg", "b.jpg", "c/d/deep.png", "notes.txt"]


def test_folder_is_listed_in_the_order_of_names(album: Path) -> None:
    assert read_sources(album) == [(f"{album}/{name}", name.encode()) for name in ALBUM]
    assert [entry.is_named for entry in list_entries([str(album)])] == [False] * 6
    assert count_entries([str(album), str(album / "a")]) == 8


def test_named_files_and_folders_keep_their_order(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(album)
    (album / "lost.jpg").symlink_to("nowhere")
    entries = list(list_entries(["b.jpg", "./a/", "b.jpg", "lost.jpg"]))
    assert [(entry.name, entry.is_named) for entry in entries] == [
        ("b.jpg", True),
        ("a/1.jpg", False),
        ("a/2.jpg", False),
        ("b.jpg", True),
        ("lost.jpg", True),
    ]
    assert read_sources("lost.jpg") == [
        ("lost.jpg", "unreadable_file: the file cannot be read: No such file or directory")
    ]
    (album / "lost.jpg").unlink()
    assert list_names(".") == ALBUM


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("photoss", "there is no file or folder 'photoss'"),
        ("b.jpg/x", "there is no file or folder 'b.jpg/x'"),
        ("", "there is no file or folder ''"),
        ("x" * 300, "File name too long"),
        ("a\0b.jpg", "embedded null byte"),
    ],
)
def test_mistyped_source_is_refused_before_the_first_image(
    source: str, message: str, album: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(album)
    with pytest.raises(StartError, match=message):
        list_entries(["b.jpg", source])
    (name, row), _ = read_sources(source, "b.jpg", allow_missing=True)
    assert (name, str(row)[:41]) == (source, "unreadable_file: the file cannot be read:")


def test_clutter_and_links_to_folders_are_left_out(album: Path) -> None:
    for name in (".hidden.jpg", ".git/x.jpg", "__MACOSX/._a.jpg", "@eaDir/a.jpg", "THUMBS.DB"):
        (album / name).parent.mkdir(exist_ok=True)
        (album / name).write_bytes(b"clutter")
    (album / "circle").symlink_to(album)
    (album / "c" / "outside").symlink_to("/etc")
    (album / "linked.jpg").symlink_to(album / "b.jpg")
    (album / "lost.jpg").symlink_to("nowhere")
    assert list_names(album) == [
        f"{album}/{name}" for name in [*ALBUM[:5], "linked.jpg", "lost.jpg", ALBUM[5]]
    ]
    rows = dict(read_sources(album))
    assert rows[f"{album}/linked.jpg"] == b"b.jpg"
    assert rows[f"{album}/lost.jpg"] == "unreadable_file: the file cannot be read: No such file or directory"


def test_link_that_leads_nowhere_costs_only_itself(album: Path) -> None:
    """The system does not say whether a link to itself is a folder's."""
    (album / "a" / "1.5.jpg").symlink_to("1.5.jpg")
    (album / "round").symlink_to("about")
    (album / "about").symlink_to("round")
    loop = "unreadable_file: the file cannot be read: Too many levels of symbolic links"
    expected = {f"{album}/{name}": name.encode() for name in ALBUM} | {
        f"{album}/{name}": loop for name in ("a/1.5.jpg", "about", "round")
    }
    assert read_sources(album) == sorted(expected.items(), key=lambda row: row[0].split("/"))
    assert dict(read_sources(album / "**" / "*")) == expected


def test_entry_that_the_system_does_not_describe_is_a_file(
    album: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network drives list names without their types; the question for a type may fail."""

    class Entry:
        def __init__(self, entry: os.DirEntry[str]) -> None:
            self._entry, self.name = entry, entry.name

        def is_dir(self, *, follow_symlinks: bool = True) -> bool:
            if self.name == "b.jpg":
                raise PermissionError(errno.EACCES, "Permission denied")
            return self._entry.is_dir(follow_symlinks=follow_symlinks)

        def is_symlink(self) -> bool:
            raise OSError(errno.ESTALE, "Stale file handle")

    scan_folder = os.scandir

    @contextmanager
    def scan(folder: str) -> Iterator[Iterator[Entry]]:
        with scan_folder(folder) as entries:
            yield map(Entry, entries)

    monkeypatch.setattr(os, "scandir", scan)
    assert list_names(album) == [f"{album}/{name}" for name in ALBUM]


def test_pipe_in_a_folder_does_not_stop_the_run(album: Path) -> None:
    os.mkfifo(album / "pipe")
    rows = dict(read_sources(album))
    assert rows[f"{album}/pipe"] == "unsupported_format: the file is a device, a pipe or a socket"
    assert len(rows) == 7


def test_named_device_is_read_up_to_the_limit() -> None:
    assert read_sources("/dev/zero", max_bytes=10) == [
        ("/dev/zero", "body_too_large: the file has more than 10 bytes (FOVEA_BODY_BYTES)")
    ]


def test_named_pipe_is_read(tmp_path: Path) -> None:
    """`<(command)` of a shell is one."""
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as executor:
        rows = executor.submit(read_sources, tmp_path / "pipe")
        (tmp_path / "pipe").write_bytes(b"image")
        assert rows.result(timeout=30) == [(f"{tmp_path}/pipe", b"image")]


def test_names_that_are_no_utf8_stay_different(album: Path) -> None:
    for byte in (b"\xe8", b"\xe9"):
        Path(os.fsdecode(os.fsencode(album) + b"/caf" + byte + b".jpg")).write_bytes(byte)
    assert read_sources(album)[-4:-2] == [
        (f"{album}/c/d/deep.png", b"c/d/deep.png"),
        (f"{album}/caf\\xe8.jpg", b"\xe8"),
    ]
    assert read_sources(album)[-2] == (f"{album}/caf\\xe9.jpg", b"\xe9")


def test_name_that_looks_escaped_is_not_that_of_another_file(tmp_path: Path) -> None:
    names = [
        b"\xe9",
        rb"\xe9",
        rb"\x5cxe9",
        rb"\\xe9",
        rb"\x\xe9",
        b"\\\xe9",
        "é".encode(),
        rb"\xE9",
        rb"\ud800",
    ]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    rows = read_sources(tmp_path)
    texts = {content: text.removeprefix(f"{tmp_path}/") for text, content in rows}
    assert len(set(texts.values())) == len(names)
    assert texts[b"\xe9"] == r"\xe9"
    assert texts[rb"\xe9"] == r"\x5cxe9"
    assert texts[rb"\xE9"] == r"\xE9"
    for text, content in rows:
        assert to_path(text) == f"{tmp_path}/{os.fsdecode(cast(bytes, content))}"


def test_large_folder_is_sorted_in_bounded_memory(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of two names are merged from a file; names may have line breaks, and be no UTF-8."""
    for name in ("a\nb.jpg", os.fsdecode(b"\xff.jpg"), "é.jpg"):
        (album / name).write_bytes(b"")
    expected = list(walk_folder(str(album)))
    monkeypatch.setattr(image_folders, "_RUN_NAMES", 2)
    monkeypatch.setattr(image_folders, "_RUN_BLOCK_BYTES", 3)
    assert list(walk_folder(str(album))) == expected
    listing = FolderListing(str(album))
    names = list(listing)
    listing.close()
    assert names == sorted(names) and ("a", True) in names and ("a.jpg", False) in names


def make_deep(folder: Path, name: str, levels: int) -> None:
    """Make folders inside each other, deeper than a path can be."""
    parent = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=parent)
        child = os.open(name, os.O_RDONLY, dir_fd=parent)
        os.close(parent)
        parent = child
    os.close(parent)


@pytest.fixture
def deep_folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder with 1,100 folders inside each other: too deep for recursion, and for pytest."""
    make_deep(tmp_path, "d", 1100)
    yield tmp_path
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def test_deep_folders(deep_folder: Path) -> None:
    bottom = deep_folder.joinpath(*["d"] * 1100)
    (bottom / "a.jpg").write_bytes(b"a")
    (deep_folder / "z.jpg").write_bytes(b"z")
    assert read_sources(deep_folder) == [(f"{bottom}/a.jpg", b"a"), (f"{deep_folder}/z.jpg", b"z")]
    assert list_names(deep_folder / "**" / "a.*") == [f"{bottom}/a.jpg"]


def test_folder_whose_path_is_too_long_is_a_row(tmp_path: Path) -> None:
    make_deep(tmp_path, "d" * 250, 20)
    (tmp_path / "z.jpg").write_bytes(b"z")
    rows = read_sources(tmp_path)
    assert [content for _, content in rows] == [
        "unreadable_file: the file cannot be read: File name too long",
        b"z",
    ]
    assert list_names(tmp_path / "**") == [name for name, _ in rows]


def test_listing_starts_before_the_whole_tree_is_read(album: Path) -> None:
    first = list(islice(list_entries([str(album)]), 1))
    assert [entry.name for entry in first] == [f"{album}/a/1.jpg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg", "b.jpg"]),
        ("?.jpg", ["a.jpg", "b.jpg"]),
        ("[!a].jpg", ["b.jpg"]),
        ("*/*.jpg", ["a/1.jpg", "a/2.jpg"]),
        ("a/[12].jpg", ["a/1.jpg", "a/2.jpg"]),
        ("**/*.jpg", ["a/1.jpg", "a/2.jpg", "a.jpg", "b.jpg"]),
        ("**/**/*.png", ["c/d/deep.png"]),
        ("c/**", ["c/d/deep.png"]),
        ("c/**/deep*", ["c/d/deep.png"]),
        ("./c/*", ["c/d/deep.png"]),
        ("[ac]", ["a/1.jpg", "a/2.jpg", "c/d/deep.png"]),
    ],
)
def test_pattern(pattern: str, expected: list[str], album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(album)
    assert list_names(pattern) == expected
    assert count_entries([pattern]) == len(expected)
    absolute = f"{album}/{pattern.removeprefix('./')}"
    assert list_names(absolute) == [f"{album}/{name}" for name in expected]


def test_pattern_without_match_is_refused_before_the_first_image(album: Path) -> None:
    with pytest.raises(StartError, match=r"no file matches the pattern '.*/\*\.gif'"):
        list_entries([str(album), f"{album}/*.gif"])


def test_name_with_the_signs_of_a_pattern_is_a_name(album: Path) -> None:
    (album / "[1] *.jpg").write_bytes(b"name")
    assert read_sources(album / "[1] *.jpg") == [(f"{album}/[1] *.jpg", b"name")]


def test_pattern_matches_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "b" / "c").write_bytes(b"")
    assert list_names(tmp_path / "a/**/b/**/c") == [f"{tmp_path}/a/b/b/c"]


def test_hidden_files_and_links_to_folders_match_no_pattern(album: Path) -> None:
    (album / ".h.jpg").write_bytes(b"")
    (album / "loop").symlink_to(album)
    assert list_names(album / "**" / "*.jpg") == [f"{album}/{name}" for name in ALBUM[:4]]
