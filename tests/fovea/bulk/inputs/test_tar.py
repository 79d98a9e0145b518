"""Tar archives, compressed or not, good and hostile."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from fovea.bulk.inputs import count_entries, list_entries
from fovea.bulk.inputs.tar_archive import TarMember
from tests.fovea.bulk.inputs.listing import MAX_BYTES, read_entries, read_sources
from tests.pictures import make_jpeg

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar.gz": lambda content: gzip.compress(content, 1),
    "tar.bz2": bz2.compress,
    "tar.xz": lambda content: lzma.compress(content, preset=0),
}

PHOTO = b"\xff\xd8\xff" + random.Random(0).randbytes(50_000)  # noqa: S311 - content that does not compress

MEMBER_BYTES = 512 + 50_176
"""Size of `PHOTO` in an archive, with its header and its padding."""

DAMAGED = "unreadable_file: the tar archive is damaged or incomplete behind its member number"

compressed = pytest.mark.parametrize("suffix", COMPRESSIONS)


def make_tar(members: dict[str, bytes | tarfile.TarInfo], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def make_special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def make_header(name: str, kind: bytes, size: int) -> bytes:
    """Return a single header block, whatever size it states."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def write_archive(suffix: str, content: bytes) -> Path:
        path = tmp_path / f"photos.{suffix}"
        path.write_bytes(COMPRESSIONS[suffix](content))
        return path

    return write_archive


Write = Callable[[str, bytes], Path]

LONG = "/".join(["folder" * 10] * 5)


@compressed
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_in_place(suffix: str, format: int, write: Write) -> None:
    names = ["b.jpg", "cats/a.jpg", "é.jpg"] + ([] if format == tarfile.USTAR_FORMAT else [f"{LONG}/1.jpg"])
    path = write(suffix, make_tar({name: PHOTO + name.encode() for name in names}, format))
    assert read_sources(path) == [(f"{path}/{name}", PHOTO + name.encode()) for name in names]
    assert count_entries([str(path)]) == (len(names) if suffix == "tar" else None)


@pytest.mark.parametrize("suffix", ["tgz", "gz", "tbz2", "txz"])
def test_short_suffixes_and_wrong_ones(suffix: str, tmp_path: Path) -> None:
    """The first bytes decide which archive it is."""
    path = tmp_path / f"photos.{suffix}"
    path.write_bytes(gzip.compress(make_tar({"a.jpg": PHOTO})))
    assert read_sources(path) == [(f"{path}/a.jpg", PHOTO)]
    path = tmp_path / "photos.zip"
    path.write_bytes(make_tar({"a.jpg": PHOTO}))
    assert read_sources(path) == [(f"{path}/a.jpg", PHOTO)]


@compressed
def test_clutter_folders_links_and_devices(suffix: str, write: Write) -> None:
    path = write(
        suffix,
        make_tar(
            {
                "a": make_special("a", tarfile.DIRTYPE),
                "a/._1.jpg": PHOTO,
                "__MACOSX/1.jpg": PHOTO,
                "link.jpg": make_special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
                "hard.jpg": make_special("hard.jpg", tarfile.LNKTYPE, "a/1.jpg"),
                "dev": make_special("dev", tarfile.CHRTYPE),
                "pipe": make_special("pipe", tarfile.FIFOTYPE),
                "a/1.jpg": PHOTO,
            }
        ),
    )
    special = "unsupported_format: a link or a device in an archive is not read"
    assert read_sources(path) == [
        *((f"{path}/{name}", special) for name in ("link.jpg", "hard.jpg", "dev", "pipe")),
        (f"{path}/a/1.jpg", PHOTO),
    ]
    assert not any(entry.is_named for entry in list_entries([str(path)]))


@compressed
def test_names_that_lead_out_and_names_that_are_no_utf8(suffix: str, write: Write) -> None:
    names = {
        "../../evil.jpg": PHOTO,
        "/etc/a.jpg": PHOTO,
        "caf\udce9.jpg": PHOTO,
        r"caf\xe9.jpg": PHOTO,
        "a\nb.jpg": PHOTO,
        r"a\x0ab.jpg": PHOTO,
    }
    path = write(suffix, make_tar({**names}, tarfile.GNU_FORMAT))
    assert [(name, str(content)[:40]) for name, content in read_sources(path)] == [
        (f"{path}/__/__/evil.jpg", "unreadable_file: the file's name leads o"),
        (f"{path}/etc/a.jpg", str(PHOTO)[:40]),
        (f"{path}/caf\\xe9.jpg", str(PHOTO)[:40]),
        (f"{path}/caf\\x5cxe9.jpg", str(PHOTO)[:40]),
        (f"{path}/a\\x0ab.jpg", str(PHOTO)[:40]),
        (f"{path}/a\\x5cx0ab.jpg", str(PHOTO)[:40]),
    ]


@compressed
def test_two_members_of_one_name_are_two_rows(suffix: str, write: Write) -> None:
    first, second = make_tar({"a.jpg": PHOTO}), make_tar({"a.jpg": PHOTO + b"2"})
    path = write(suffix, first[:MEMBER_BYTES] + second)
    assert read_sources(path) == [(f"{path}/a.jpg", PHOTO), (f"{path}/a.jpg", PHOTO + b"2")]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sparse_file_is_one_row(format: int, write: Write) -> None:
    if format == tarfile.PAX_FORMAT:
        info = tarfile.TarInfo("holes.jpg")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "holes.jpg"}
        content = info.tobuf(tarfile.PAX_FORMAT)
    else:
        block = bytearray(make_header("holes.jpg", tarfile.GNUTYPE_SPARSE, 0))
        block[482] = 1  # maps go on in a block
        block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
        content = bytes(block) + bytes(512)
    path = write("tar", content + make_tar({"a.jpg": PHOTO}))
    assert read_sources(path) == [
        (f"{path}/holes.jpg", "unreadable_file: the file has holes (a sparse file); unpack the archive"),
        (f"{path}/a.jpg", PHOTO),
    ]


@compressed
def test_large_member_is_never_unpacked(suffix: str, write: Write) -> None:
    bomb = b"\xff\xd8\xff" + bytes(8 << 20)
    path = write(suffix, make_tar({"a.jpg": PHOTO, "bomb.jpg": bomb, "b.jpg": PHOTO}))
    del bomb
    tracemalloc.start()
    try:
        rows = read_sources(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == [
        (f"{path}/a.jpg", PHOTO),
        (f"{path}/bomb.jpg", f"body_too_large: the file has more than {MAX_BYTES} bytes (FOVEA_BODY_BYTES)"),
        (f"{path}/b.jpg", PHOTO),
    ]
    assert peak < 4 << 20


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_extended_header_is_limited(suffix: str, kind: bytes, write: Write) -> None:
    """`tarfile` reads a header of 8 MB, which takes 8 kB in an archive, into memory."""
    path = write(
        suffix, make_tar({"a.jpg": PHOTO})[:MEMBER_BYTES] + make_header("x", kind, 8 << 20) + bytes(8 << 20)
    )
    tracemalloc.start()
    try:
        rows = read_sources(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == [
        (f"{path}/a.jpg", PHOTO),
        (str(path), f"{DAMAGED} 1: an extended header has 8388608 bytes, more than 1048576"),
    ]
    assert peak < 4 << 20


def test_chain_of_extended_headers_is_limited(write: Write) -> None:
    chain = (make_header("x", tarfile.XGLTYPE, 0)) * 17
    path = write("tar", chain + make_tar({"a.jpg": PHOTO}))
    assert read_sources(path) == [(str(path), f"{DAMAGED} 0: a file has more than 16 headers")]


@pytest.mark.parametrize(
    "content",
    [b"9999999999 path=x\n", b"path=x\n", b"0 path=x\n", b"-5 path=x\n", b"11 size=-1\n", b"8 size=\n"],
)
def test_damaged_extended_header_is_one_row(content: bytes, write: Write) -> None:
    header = make_header("x", tarfile.XHDTYPE, len(content)) + content.ljust(512, b"\0")
    path = write("tar", header + make_tar({"a.jpg": PHOTO}))
    assert read_sources(path) == [(str(path), f"{DAMAGED} 0: an extended header is damaged")]


def test_negative_size_is_refused(write: Write) -> None:
    """A size below zero would lead back to its own header, for ever."""
    block = bytearray(make_header("a.jpg", tarfile.REGTYPE, 0))
    block[124:136] = b"\xff" * 10 + b"\xfe\x00"
    block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
    path = write("tar", bytes(block))
    assert read_sources(path) == [(str(path), f"{DAMAGED} 0: a size is negative")]


@compressed
def test_archive_that_is_cut_short_gives_what_is_before_the_cut(suffix: str, write: Write) -> None:
    random_numbers = random.Random(1)  # noqa: S311
    photos = {f"{number}.jpg": PHOTO[:3] + random_numbers.randbytes(50_000) for number in range(8)}
    path = write(suffix, make_tar({**photos}))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    rows = read_sources(path)
    assert 3 <= len(rows) <= 5 or suffix == "tar.bz2"  # bzip2 loses its last block of 900 kB
    assert rows[:-1] == [(f"{path}/{name}", photos[name]) for name in list(photos)[: len(rows) - 1]]
    assert rows[-1][0] == str(path)
    assert str(rows[-1][1]).startswith(f"{DAMAGED} {len(rows) - 1}: ")


@compressed
def test_archive_without_its_end_mark_may_be_cut_short(suffix: str, write: Write) -> None:
    path = write(suffix, make_tar({"a.jpg": PHOTO})[:MEMBER_BYTES])
    assert read_sources(path) == [(f"{path}/a.jpg", PHOTO), (str(path), f"{DAMAGED} 1: it has no end mark")]


@compressed
def test_damage_in_the_middle(suffix: str, write: Write) -> None:
    content = bytearray(make_tar({"a.jpg": PHOTO, "b.jpg": PHOTO, "c.jpg": PHOTO}))
    content[MEMBER_BYTES + 10] ^= 1  # in the name of b.jpg
    path = write(suffix, bytes(content))
    assert read_sources(path) == [
        (f"{path}/a.jpg", PHOTO),
        (str(path), f"{DAMAGED} 1: what follows is no header"),
    ]


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.bz2", "tar.xz"])
def test_damage_of_the_compression_is_one_row(suffix: str, write: Write) -> None:
    path = write(suffix, make_tar({f"{number}.jpg": PHOTO for number in range(8)}))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20] = bytes(20)
    path.write_bytes(content)
    rows = read_sources(path)
    assert rows[-1][0] == str(path)
    assert str(rows[-1][1]).startswith(DAMAGED)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8\xff" * 1000, b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh9", bytes(100)]
)
def test_what_is_no_archive_is_one_row(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "photos.tar.gz"
    path.write_bytes(content)
    rows = read_sources(path)
    assert [name for name, _ in rows] == [str(path)]
    assert str(rows[0][1]).startswith(f"{DAMAGED} 0: ")


def test_zstd_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "photos.tar.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    assert read_sources(path) == [
        (
            str(path),
            "unreadable_file: the archive is compressed with zstd, which is not supported; "
            "unpack it with `zstd -d`",
        )
    ]


def test_xz_may_not_take_much_memory(tmp_path: Path) -> None:
    """A stream states how much memory its decompressor needs: up to 4 GiB."""
    path = tmp_path / "photos.tar.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    content = bytearray(lzma.compress(make_tar({"a.jpg": PHOTO}), filters=filters))
    assert content[12:18] == b"\x02\x00\x21\x01\x10\x00"
    content[16] = 0x28  # 4 GiB
    content[20:24] = zlib.crc32(content[12:20]).to_bytes(4, "little")
    path.write_bytes(content)
    assert read_sources(path) == [(str(path), f"{DAMAGED} 0: Memory usage limit exceeded")]


def test_several_compressed_streams_in_a_row(tmp_path: Path) -> None:
    """`pigz` and `pixz` write such archives."""
    content = make_tar({"a.jpg": PHOTO, "b.jpg": PHOTO})
    for suffix, compress in COMPRESSIONS.items():
        path = tmp_path / f"photos.{suffix}"
        path.write_bytes(compress(content[:60_000]) + compress(content[60_000:]) + bytes(1024))
        assert read_sources(path) == [(f"{path}/a.jpg", PHOTO), (f"{path}/b.jpg", PHOTO)]


@compressed
def test_what_is_no_image_does_not_wait_in_memory(suffix: str, write: Write) -> None:
    path = write(suffix, make_tar({"notes.txt": b"text" * 10_000, "empty.jpg": b"", "a.jpg": make_jpeg()}))
    entries = list(list_entries([str(path)]))
    if suffix != "tar":
        assert not hasattr(entries[0], "content")
        rows = read_entries(entries[:1])
        assert str(rows[0][1]).startswith("unsupported_format: the bytes are not an image of a known format")
    assert read_entries(entries[1:]) == [(f"{path}/empty.jpg", b""), (f"{path}/a.jpg", make_jpeg())]


def test_compressed_archive_holds_only_what_is_asked_for(write: Write) -> None:
    path = write("tar.gz", make_tar({f"{number}.jpg": PHOTO for number in range(50)}))
    tracemalloc.start()
    try:
        number = sum(len(entry.read(MAX_BYTES)) for entry in list_entries([str(path)]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert number == 50 * len(PHOTO)
    assert peak < 1 << 20


def test_plain_archive_is_listed_without_its_content(tmp_path: Path) -> None:
    """A file of 100 GB with holes is listed at once; slices are cheap."""
    path = tmp_path / "photos.tar"
    with path.open("wb") as file:
        for number in range(10):
            file.write(make_header(f"{number}.jpg", tarfile.REGTYPE, 10 << 30))
            file.seek(10 << 30, io.SEEK_CUR)
        file.write(bytes(1024))
    entries = list(islice(list_entries([str(path)]), 8, None))
    assert [entry.name for entry in entries] == [f"{path}/8.jpg", f"{path}/9.jpg"]
    assert all(isinstance(entry, TarMember) and entry.size == 10 << 30 for entry in entries)
    assert "body_too_large" in str(read_entries(entries))


@pytest.mark.parametrize("seed", range(5))
@compressed
def test_random_damage_gives_rows_and_no_other_error(suffix: str, seed: int, write: Write) -> None:
    random_numbers = random.Random(seed)  # noqa: S311
    names: dict[str, Any] = {f"{name}.jpg": PHOTO[:300] for name in "abcdef"}
    path = write(suffix, make_tar({**names, f"{LONG}.jpg": PHOTO[:300]}))
    content = bytearray(path.read_bytes())
    for _ in range(3):
        content[random_numbers.randrange(len(content))] = random_numbers.randrange(256)
    path.write_bytes(content[: random_numbers.randrange(len(content) // 2, len(content) + 1)])
    assert read_sources(path)
