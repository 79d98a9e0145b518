"""Object stores, by the file systems that fsspec itself has: memory, and a folder."""

from __future__ import annotations

import gzip
import io
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from fovea.bulk.inputs import count_entries, list_entries
from fovea.bulk.inputs.stores import StoreEntry
from fovea.bulk.inputs.zip_archive import ZipMember
from fovea.errors import StartError
from tests.fovea.bulk.inputs.listing import MAX_BYTES, read_entries, read_sources
from tests.fovea.bulk.inputs.test_tar import COMPRESSIONS, DAMAGED, MEMBER_BYTES, PHOTO, make_tar
from tests.fovea.bulk.inputs.test_zip import make_zip

PHOTOS = ["a.jpg", "cats/1.jpg", "cats/2.jpg", "cats/deep/3.png"]


@pytest.fixture
def memory() -> Iterator[Any]:
    file_system = fsspec.filesystem("memory")
    for path in [*PHOTOS, ".hidden.jpg", "__MACOSX/x.jpg", "cats/.DS_Store"]:
        file_system.pipe(f"/bucket/photos/{path}", path.encode())
    yield file_system
    file_system.store.clear()
    file_system.pseudo_dirs[:] = [""]


@pytest.fixture(params=["memory", "file"])
def root(request: pytest.FixtureRequest, memory: Any, tmp_path: Path) -> str:
    """Return the URI of a folder with photos."""
    if request.param == "memory":
        return "memory://bucket/photos"
    memory.get("/bucket/photos/", str(tmp_path / "photos"), recursive=True)
    return f"file://{tmp_path}/photos"


def test_folder_is_listed_without_clutter(root: str) -> None:
    assert read_sources(f"{root}/") == [(f"{root}/{path}", path.encode()) for path in PHOTOS]
    assert not any(entry.is_named for entry in list_entries([root]))
    assert count_entries([root]) is None


def test_image_and_pattern(root: str) -> None:
    assert read_sources(f"{root}/cats/1.jpg") == [(f"{root}/cats/1.jpg", b"cats/1.jpg")]
    assert next(list_entries([f"{root}/cats/1.jpg"])).is_named
    for pattern, expected in (
        ("*.jpg", [0]),
        ("**/*.jpg", [0, 1, 2]),
        ("cats/[12].*", [1, 2]),
        ("*.gif", []),
    ):
        names = [entry.name for entry in list_entries([f"{root}/{pattern}"])]
        assert names == [f"{root}/{PHOTOS[index]}" for index in expected]


def test_large_and_empty_images(memory: Any) -> None:
    memory.pipe("/bucket/large/a.jpg", bytes(MAX_BYTES + 1))
    memory.pipe("/bucket/large/b.jpg", b"")
    too_large = f"body_too_large: the file has more than {MAX_BYTES} bytes (FOVEA_BODY_BYTES)"
    assert read_sources("memory://bucket/large") == [
        ("memory://bucket/large/a.jpg", too_large),
        ("memory://bucket/large/b.jpg", b""),
    ]
    (entry,) = list_entries(["memory://bucket/large/b.jpg"])
    memory.pipe("/bucket/large/b.jpg", bytes(MAX_BYTES + 1))  # it grew since it was listed
    assert str(read_entries([entry])[0][1]).startswith("body_too_large: ")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("memory://bucket/nowhere", "there is no memory://bucket/nowhere, or you may not see it"),
        (
            "memory://bucket/nowhere.zip",
            "memory://bucket/nowhere.zip: there is no memory://bucket/nowhere.zip",
        ),
        (
            "memory://bucket/nowhere.csv",
            "memory://bucket/nowhere.csv: there is no memory://bucket/nowhere.csv",
        ),
        ("ftp://host/photos", "'ftp://host/photos' is not the URI of a store; Fovea knows s3://"),
        ("s3://user:secret@bucket/photos", "has credentials in it"),
        ("s3://", "names no bucket"),
        ("memory://bucket/../x/*.jpg", "has an empty name, '.', '..' or a control character"),
    ],
)
def test_what_is_no_store_is_refused(uri: str, message: str, memory: Any) -> None:
    with pytest.raises(StartError, match=message.replace("*", r"\*")) as caught:
        list_entries([uri])
    assert "secret" not in str(caught.value)


def test_lost_store_is_a_row_behind_the_images_before(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = list_entries(["memory://bucket/photos", "memory://bucket/photos/a.jpg"])
    first = next(entries)

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("the network is down")

    monkeypatch.setattr(type(memory), "ls", fail)
    rest = list(entries)
    monkeypatch.setattr(type(memory), "cat_file", fail)
    lost = "unreadable_file: cannot read memory://bucket/photos: the network is down"
    assert read_entries([first, *rest])[:2] == [
        (
            "memory://bucket/photos/a.jpg",
            "unreadable_file: cannot read memory://bucket/photos/a.jpg: the network is down",
        ),
        ("memory://bucket/photos", lost),
    ]


def test_zip_archive_is_read_in_place(memory: Any) -> None:
    memory.pipe("/bucket/photos.zip", make_zip({"a.jpg": PHOTO, "cats/b.jpg": b"b" * 90_000}))
    uri = "memory://bucket/photos.zip"
    assert read_sources(uri) == [(f"{uri}/a.jpg", PHOTO), (f"{uri}/cats/b.jpg", b"b" * 90_000)]
    assert all(isinstance(entry, ZipMember) for entry in list_entries([uri]))
    memory.pipe("/bucket/photos.zip", memory.cat("/bucket/photos.zip")[:-30])
    assert read_sources(uri)[-1][0] == uri


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_tar_archive_is_read_as_a_stream(suffix: str, memory: Any) -> None:
    uri = f"memory://bucket/photos.{suffix}"
    content = make_tar({"a.jpg": PHOTO, "b.jpg": PHOTO})
    memory.pipe(f"/bucket/photos.{suffix}", COMPRESSIONS[suffix](content))
    assert read_sources(uri) == [(f"{uri}/a.jpg", PHOTO), (f"{uri}/b.jpg", PHOTO)]
    memory.pipe(f"/bucket/photos.{suffix}", COMPRESSIONS[suffix](content[: MEMBER_BYTES + 1000]))
    assert read_sources(uri) == [(f"{uri}/a.jpg", PHOTO), (uri, f"{DAMAGED} 1: it is cut short")]


def test_lost_store_in_an_archive_is_a_row(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/bucket/photos.tar.gz", gzip.compress(make_tar({"a.jpg": PHOTO, "b.jpg": PHOTO}), 0))
    uri = "memory://bucket/photos.tar.gz"
    entries = list_entries([uri])
    first = next(entries)

    def fail(*_: object) -> None:
        raise ConnectionError("the network is down")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", fail, raising=False)
    rows = read_entries([first, *entries])
    assert [name for name, _ in rows] == [f"{uri}/a.jpg", uri]
    assert rows[1][1] == f"{DAMAGED} 1: cannot read {uri}: the network is down"


def test_tables_name_images_beside_them_and_anywhere(memory: Any) -> None:
    names = [
        "a.jpg",
        "./cats/1.jpg",
        "memory://bucket/photos/cats/2.jpg",
        "/etc/passwd",
        "../up.jpg",
        "no.jpg",
    ]
    memory.pipe("/bucket/photos/list.csv", "\n".join(["path", *names]).encode())
    rows = read_sources("memory://bucket/photos/list.csv")
    assert rows[:3] == [(f"memory://bucket/photos/{path}", path.encode()) for path in PHOTOS[:3]]
    assert [str(message).partition(": ")[2] for _, message in rows[3:]] == [
        "a table in a store names images by a URI, or relative to its own folder",
        "'../up.jpg' is not a path below memory://bucket/photos",
        "there is no memory://bucket/photos/no.jpg, or you may not see it",
    ]


def test_parquet_in_a_store(memory: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    parquet.write_table(arrow.table({"bytes": [b"1", b"2"]}), buffer)
    memory.pipe("/bucket/photos.parquet", buffer.getvalue())
    uri = "memory://bucket/photos.parquet"
    assert read_sources(uri) == [(f"{uri}/0", b"1"), (f"{uri}/1", b"2")]


def test_local_table_and_list_name_images_in_stores(memory: Any, tmp_path: Path) -> None:
    names = ["memory://bucket/photos/a.jpg", "memory://bucket/no.jpg", "s3://u:secret@b/a.jpg", "gs://"]
    path = tmp_path / "photos.csv"
    path.write_text("\n".join(["url", *names]))
    rows = read_sources(path)
    assert rows[0] == ("memory://bucket/photos/a.jpg", b"a.jpg")
    assert all(str(message).startswith("unreadable_file: ") for _, message in rows[1:])
    assert rows == read_sources("-", stdin=io.BytesIO("\n".join(names).encode()))


def test_entries_of_a_bucket_share_its_connection() -> None:
    path = "s3://bucket/a/b/c.jpg"
    (entry,) = list_entries(["-"], stdin=io.BytesIO(path.encode()))
    assert entry == StoreEntry("s3://bucket", "a/b/c.jpg", is_named=True)
    assert entry.name == path


def read_name(entry: StoreEntry) -> bytes:
    return entry.read(MAX_BYTES)


def test_entries_are_read_in_threads_and_in_forked_processes(root: str) -> None:
    entries: list[Any] = list(list_entries([root])) * 5
    expected = [path.encode() for path in PHOTOS] * 5
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read_name, entries)) == expected
    if root.startswith("file:"):
        with multiprocessing.get_context("spawn").Pool(1) as processes:
            assert processes.map(read_name, entries) == expected
