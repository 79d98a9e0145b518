"""CSV and Parquet tables with a column of paths, URIs or images."""

from __future__ import annotations

import base64
import csv
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from fovea.bulk.inputs import count_entries, list_entries, parquet_table
from fovea.errors import StartError
from tests.fovea.bulk.inputs.listing import MAX_BYTES, read_sources
from tests.servers import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "cats/b.jpg", "é.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def write(folder: Path, content: str | bytes, name: str = "photos.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(target: Path, **columns: Any) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), target)
    return target


@pytest.mark.parametrize(
    "content",
    [
        "path,label\na.jpg,cat\ncats/b.jpg,dog\n",
        "label;File Name\ncat;a.jpg\ndog;cats/b.jpg\n",
        "label\tIMAGE\r\ncat\ta.jpg\r\ndog\tcats\\b.jpg\r\n",
        "\ufefffilename\na.jpg\n\n\ncats/b.jpg",
        '\n"url, or path"|"image"\n1|"a.jpg"\n2|"cats/b.jpg"\n',
        'note,path\n"two\nlines, with a "" quote",a.jpg\n, cats/b.jpg \n',
    ],
)
def test_csv_in_many_forms(content: str, folder: Path) -> None:
    path = write(folder, content)
    assert read_sources(path) == [(f"{folder}/a.jpg", b"a.jpg"), (f"{folder}/cats/b.jpg", b"cats/b.jpg")]
    assert all(entry.is_named for entry in list_entries([str(path)]))
    write(folder, content.removeprefix("\ufeff").encode("utf-16"))
    assert len(read_sources(path)) == 2


def test_paths_are_relative_to_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, f"path\na.jpg\n./cats/b.jpg\ncats/../a.jpg\n{folder}/a.jpg\n")
    monkeypatch.chdir(folder)
    assert [name for name, _ in read_sources("photos.csv")] == [
        "a.jpg",
        "./cats/b.jpg",
        "cats/../a.jpg",
        f"{folder}/a.jpg",
    ]
    monkeypatch.chdir(folder.parent)
    assert read_sources(f"{folder.name}/photos.csv")[0] == (f"{folder.name}/a.jpg", b"a.jpg")
    assert count_entries([f"{folder.name}/photos.csv"]) == 4


def test_column_is_named_or_found(folder: Path) -> None:
    path = write(folder, "bytes,path,image,other\n,a.jpg,é.jpg,cats/b.jpg\n")
    assert read_sources(path) == [(f"{folder}/a.jpg", b"a.jpg")]
    assert read_sources(path, column="Image") == [(f"{folder}/é.jpg", "é.jpg".encode())]
    assert read_sources(path, column="other") == [(f"{folder}/cats/b.jpg", b"cats/b.jpg")]
    with pytest.raises(
        StartError, match=r"photos.csv: the table has no column 'photo'; its columns are 'bytes', "
    ):
        list_entries([str(path)], column="photo")
    path = write(folder, "id,label\n1,cat\n")
    with pytest.raises(StartError) as caught:
        list_entries([str(path)])
    assert str(caught.value) == (
        f"{path}: the table has no column named path, file, filename, image, url or bytes; its columns are "
        "'id', 'label'; name one with --column"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the table is empty; its first line must name the columns"),
        (b"\n \n", "the table is empty; its first line must name the columns"),
        (b"a" * (1 << 21), "the table has no header: a line has more than 1048576 characters"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "the table has no column named path"),
    ],
)
def test_table_without_a_header_is_refused(content: bytes, message: str, folder: Path) -> None:
    path = write(folder, content)
    with pytest.raises(StartError, match=f"photos.csv: {message}"):
        list_entries([str(path)])


def test_missing_table_is_refused(folder: Path) -> None:
    with pytest.raises(StartError, match=r"nowhere.csv: the file cannot be read: No such file or directory"):
        list_entries([f"{folder}/nowhere.csv"])


def test_table_of_a_pattern_without_the_column_is_one_row(folder: Path) -> None:
    write(folder, "id\n1\n", "1.csv")
    write(folder, "path\na.jpg\n", "2.csv")
    rows = read_sources(f"{folder}/*.csv")
    assert rows[0][0] == f"{folder}/1.csv"
    assert str(rows[0][1]).startswith("unreadable_file: the table has no column named path")
    assert rows[1:] == [(f"{folder}/a.jpg", b"a.jpg")]


def test_rows_with_errors_do_not_end_the_table(folder: Path) -> None:
    path = write(folder, "label,path\ncat\ncat,\ncat,missing.jpg\ncat,a\0b.jpg\ncat,cats\ncat,a.jpg,more\n")
    empty = "unreadable_file: the row has nothing in the column of images"
    assert read_sources(path) == [
        (f"{path}/0", empty),
        (f"{path}/1", empty),
        (f"{folder}/missing.jpg", "unreadable_file: the file cannot be read: No such file or directory"),
        (f"{folder}/a\0b.jpg", "unreadable_file: the file cannot be read: embedded null byte"),
        (f"{folder}/cats", "unreadable_file: the file cannot be read: Is a directory"),
        (f"{folder}/a.jpg", b"a.jpg"),
    ]


def test_names_that_are_no_utf8_are_found_on_disk(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg")).write_bytes(b"coffee")
    path = write(folder, b"path\ncaf\xe9.jpg\n")
    assert read_sources(path) == [(f"{folder}/caf\\xe9.jpg", b"coffee")]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_pipe_in_a_table_does_not_stop_the_run(folder: Path, suffix: str) -> None:
    os.mkfifo(folder / "pipe.jpg")
    if suffix == "csv":
        path = write(folder, "path\npipe.jpg\na.jpg\n")
    else:
        path = write_parquet(folder / "photos.parquet", path=["pipe.jpg", "a.jpg"])
    assert read_sources(path) == [
        (f"{folder}/pipe.jpg", "unsupported_format: the file is a device, a pipe or a socket"),
        (f"{folder}/a.jpg", b"a.jpg"),
    ]


def test_huge_fields_and_lines_are_rows_in_bounded_memory(folder: Path) -> None:
    limit = csv.field_size_limit()
    long = "x" * (1 << 22)
    path = write(
        folder, f'path\n{long}\na.jpg\n"{long[: 1 << 19]}\n{long[: 1 << 19]}\n{long[:99]}"\na.jpg\n"a.jpg\n'
    )
    del long
    tracemalloc.start()
    try:
        rows = read_sources(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows[:3] == [
        (f"{path}/0", "unreadable_file: the row is damaged: a line has more than 1048576 characters"),
        (f"{folder}/a.jpg", b"a.jpg"),
        (f"{path}/2", "unreadable_file: the row is damaged: field larger than field limit (1048576)"),
    ]
    assert (f"{folder}/a.jpg", b"a.jpg") in rows[3:]
    assert peak < 12 << 20
    assert csv.field_size_limit() == limit


def test_images_in_base64(folder: Path) -> None:
    photo = bytes(range(256)) * 300
    text = base64.b64encode(photo).decode()
    too_large = base64.b64encode(bytes(MAX_BYTES + 1)).decode()
    path = write(folder, f'bytes\n{text}\n"data:image/png;base64,{text}"\n{too_large}\nno base64!\n{text}\n')
    assert read_sources(path) == [
        (f"{path}/0", photo),
        (f"{path}/1", photo),
        (f"{path}/2", f"body_too_large: the file has more than {MAX_BYTES} bytes (FOVEA_BODY_BYTES)"),
        (
            f"{path}/3",
            "unreadable_file: the field is not an image in base64: Only base64 data is allowed",
        ),
        (f"{path}/4", photo),
    ]


def test_parquet_with_paths(folder: Path) -> None:
    path = write_parquet(
        folder / "photos.parquet", label=["cat"] * 4, file_name=["a.jpg", None, "cats/b.jpg", ""]
    )
    assert read_sources(path) == [
        (f"{folder}/a.jpg", b"a.jpg"),
        (f"{path}/1", "unreadable_file: the row has nothing in the column of images"),
        (f"{folder}/cats/b.jpg", b"cats/b.jpg"),
        (f"{path}/3", "unreadable_file: the row has nothing in the column of images"),
    ]
    assert count_entries([str(path)]) == 4


def test_parquet_with_a_dictionary_of_paths(folder: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    path = write_parquet(folder / "photos.parquet", path=arrow.array(["a.jpg"] * 3).dictionary_encode())
    assert read_sources(path) == [(f"{folder}/a.jpg", b"a.jpg")] * 3


def test_parquet_with_images(folder: Path) -> None:
    path = write_parquet(folder / "photos.pq", bytes=[b"1", None, bytes(MAX_BYTES + 1), b"", b"2"])
    empty = "unreadable_file: the row has nothing in the column of images"
    assert read_sources(path) == [
        (f"{path}/0", b"1"),
        (f"{path}/1", empty),
        (f"{path}/2", f"body_too_large: the file has more than {MAX_BYTES} bytes (FOVEA_BODY_BYTES)"),
        (f"{path}/3", empty),
        (f"{path}/4", b"2"),
    ]


def test_parquet_of_the_hub(folder: Path) -> None:
    """The feature `Image` has content, path or both; its paths lead nowhere."""
    images = [
        {"bytes": b"1", "path": "cats/1.jpg"},
        {"bytes": b"2", "path": None},
        {"bytes": b"3", "path": "../../3.jpg"},
        {"bytes": None, "path": "a.jpg"},
        None,
    ]
    path = write_parquet(folder / "train.parquet", image=images)
    assert read_sources(path) == [
        (f"{path}/cats/1.jpg", b"1"),
        (f"{path}/1", b"2"),
        (f"{path}/2", b"3"),
        (f"{folder}/a.jpg", b"a.jpg"),
        (f"{path}/4", "unreadable_file: the row has nothing in the column of images"),
    ]


def test_parquet_with_another_type_or_column_is_refused(folder: Path) -> None:
    path = write_parquet(folder / "photos.parquet", image=[1, 2], name=["a.jpg", "b.jpg"])
    message = r"the column 'image' has the type int64; it must be text \(paths\) or binary \(images\)"
    with pytest.raises(StartError, match=f"photos.parquet: {message}"):
        list_entries([str(path)])
    with pytest.raises(StartError, match="no column 'photo'; its columns are 'image', 'name'"):
        list_entries([str(path)], column="photo")
    assert [name for name, _ in read_sources(path, column="name")] == [f"{folder}/a.jpg", f"{folder}/b.jpg"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 100, b"\xff\xd8\xff"])
def test_damaged_parquet_is_refused(content: bytes, folder: Path) -> None:
    pytest.importorskip("pyarrow")
    path = write(folder, content, "photos.parquet")
    with pytest.raises(StartError, match=r"photos.parquet: the Parquet file is damaged or incomplete"):
        list_entries([str(path)])


def write_images(path: Path, images: list[bytes], **options: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"bytes": images})
    parquet.write_table(table, path, use_dictionary=False, write_batch_size=1, **options)


def test_parquet_that_is_damaged_in_the_middle(folder: Path) -> None:
    path = folder / "photos.parquet"
    photos = [bytes([number]) + os.urandom(1000) for number in range(40)]
    write_images(path, photos, row_group_size=10, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    rows = read_sources(path)
    assert 10 <= len(rows) <= 31
    assert rows[:-1] == [(f"{path}/{number}", photos[number]) for number in range(len(rows) - 1)]
    assert rows[-1][0] == str(path)
    assert str(rows[-1][1]).startswith("unreadable_file: the Parquet file is damaged or incomplete: ")


def test_large_row_group_is_read_in_small_parts(folder: Path) -> None:
    """pyarrow would take the whole row group, which may have 1 GB."""
    arrow = pytest.importorskip("pyarrow")
    path = folder / "photos.parquet"
    write_images(path, [os.urandom(60_000) for _ in range(500)])
    before = arrow.default_memory_pool().bytes_allocated()
    largest = 0
    for entry in list_entries([str(path)]):
        assert len(entry.read(MAX_BYTES)) == 60_000
        largest = max(largest, arrow.default_memory_pool().bytes_allocated())
    assert largest - before < 8 << 20


def test_bomb_in_parquet_is_not_unpacked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_table, "_BOMB_BYTES", 4 << 20)
    path = folder / "photos.parquet"
    write_images(path, [os.urandom(1000), bytes(8 << 20)], row_group_size=1, compression="zstd")
    ((name, message),) = read_sources(path)
    assert name == str(path)
    assert "bytes, as no images or paths do" in str(message)
    write_images(path, [bytes(1 << 19)] * 16, compression="zstd")  # many rows may be as large
    assert len(read_sources(path)) == 16


def test_parquet_without_pyarrow_is_refused(folder: Path) -> None:
    path = write(folder, b"PAR1", "photos.parquet")
    code = (
        "import sys\n"
        "sys.modules['pyarrow'] = None\n"
        "from fovea.bulk.inputs import list_entries\n"
        "list_entries([sys.argv[1]])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stderr.splitlines()[-1] == (
        "fovea.service.errors.StartError: reading Parquet needs pyarrow: pip install 'fovea-serve[bulk]'"
    )


def test_listing_imports_no_optional_package(folder: Path) -> None:
    code = (
        "import sys\n"
        "from fovea.bulk.inputs import list_entries\n"
        "list(list_entries([sys.argv[1]]))\n"
        "sys.exit(' '.join({'pyarrow', 'fsspec', 'torch', 'pandas'} & sys.modules.keys()) or 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True)
