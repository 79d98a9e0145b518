"""Labelled images in ZIP archives."""

from __future__ import annotations

import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fovea.model.data.dataset import DataError, Dataset, load_dataset
from fovea.model.data.zip_archive import ZipArchive
from tests.model.data.test_dataset import list_examples
from tests.training import draw_images


def make_zip(folder: Path, target: Path, top: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Write `folder` as a ZIP archive to `target`, with the files below `top`."""
    with zipfile.ZipFile(target, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{top}{file.relative_to(folder).as_posix()}")
    return target


def read_dataset(source: Path, cache: Path | None = None) -> Dataset:
    return load_dataset(source, size=16, validation=0.2, seed=0, cache=cache)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("top", ["", "squares/", "a/b/squares/"])
def test_zip_archive_is_read_like_its_folder(tmp_path: Path, top: str, method: int) -> None:
    folder = draw_images(tmp_path / "squares")
    archive_data = read_dataset(make_zip(folder, tmp_path / "set.zip", top, method))
    assert (archive_data.name, archive_data.labels) == ("set.zip", ("blue", "green", "red"))
    assert list_examples(archive_data) == list_examples(read_dataset(folder))
    assert not archive_data.inventory.notes


def test_zip_archive_without_suffix_is_read(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    assert list_examples(read_dataset(make_zip(folder, tmp_path / "anything"))) == list_examples(
        read_dataset(folder)
    )


def test_parts_and_skipped_files_are_found_in_an_archive(tmp_path: Path) -> None:
    draw_images(tmp_path / "set" / "Training", count=4)
    draw_images(tmp_path / "set" / "valid", count=2, seed=1)
    draw_images(tmp_path / "set" / "__MACOSX" / "Training", count=1, seed=2)
    (tmp_path / "set" / "Training" / "red" / "notes.txt").write_text("no image")
    (tmp_path / "set" / "Training" / "red" / "0.png").rename(tmp_path / "set" / "Training" / "red" / "0")
    data = read_dataset(make_zip(tmp_path / "set", tmp_path / "set.zip"))
    assert (len(data.train), len(data.validation) + len(data.conformal)) == (12, 6)
    assert {group.kind: len(group.names) for group in data.inventory.skipped_files} == {
        "in __MACOSX/": 3, "*.txt": 1,
    }  # fmt: skip
    assert data.inventory.file_count == 12 + 6 + 3 + 1


def test_cached_archive_keeps_its_description(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    (folder / "red" / "notes.txt").write_text("no image")
    archive_path = make_zip(folder, tmp_path / "set.zip")
    first = read_dataset(archive_path, tmp_path / "cache")
    assert read_dataset(archive_path, tmp_path / "cache").description == first.description


def test_member_names_without_utf_8_flag_are_read_as_utf_8(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares", "blue", "café", colours=("blue", "red"))
    archive_path = make_zip(folder, tmp_path / "set.zip")
    content = archive_path.read_bytes()
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # as the Finder writes them
        position = content.find(signature)
        while position >= 0:
            position += flags
            (flag,) = struct.unpack_from("<H", content, position)
            content = content[:position] + struct.pack("<H", flag & ~0x800) + content[position + 2 :]
            position = content.find(signature, position)
    archive_path.write_bytes(content)
    assert read_dataset(archive_path).labels == ("blue", "café")


def test_links_are_followed_only_inside_the_archive(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    archive_path = make_zip(folder, tmp_path / "set.zip", "squares/")
    with zipfile.ZipFile(archive_path, "a") as archive:
        for name, target in (
            ("squares/blue/link.png", "0.png"),
            ("squares/blue/out.png", "/etc/hostname"),
            ("squares/blue/up.png", "../../../../etc/hostname"),
            ("squares/blue/itself.png", "itself.png"),
        ):
            member = zipfile.ZipInfo(name)
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(member, target)
    data = read_dataset(archive_path)
    assert len(data.train) + len(data.validation) == 16
    (group,) = data.inventory.skipped_files
    assert (group.reason, len(group.names)) == ("a link to a missing member of the archive", 3)


def test_escaping_names_and_zip_bombs_are_skipped(tmp_path: Path) -> None:
    archive_path = make_zip(draw_images(tmp_path / "squares"), tmp_path / "set.zip")
    with zipfile.ZipFile(archive_path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../evil/0.png", b"\x89PNG")
        archive.writestr("red/../../../evil.png", b"\x89PNG")
        archive.writestr("red/bomb.png", bytes(32 << 20))
    data = read_dataset(archive_path)
    assert len(data.train) + len(data.validation) == 15
    assert {group.reason: len(group.names) for group in data.inventory.skipped_files} == {
        "its name leads out of the archive": 2,
        "it unpacks to over 200 times its size, as no image does": 1,
    }
    assert not (tmp_path.parent / "evil").exists()


def test_damaged_member_does_not_affect_other_images(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    archive_path = make_zip(folder, tmp_path / "set.zip", method=zipfile.ZIP_STORED)
    content = bytearray(archive_path.read_bytes())
    image = (folder / "red" / "2.png").read_bytes()
    content[content.index(image) + len(image) // 2] ^= 0xFF
    archive_path.write_bytes(content)
    data = read_dataset(archive_path)
    (line,) = data.unreadable_files
    assert line.startswith("red/2.png: it is damaged in the archive: Bad CRC-32")
    assert len(data.train) + len(data.validation) == 14


def encrypt_archive(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = content.find(signature)
        while position >= 0:
            content[position + flags] |= 1
            position = content.find(signature, position + 1)
    path.write_bytes(content)


def change_method(path: Path) -> None:
    content = bytearray(path.read_bytes())
    position = content.index(b"PK\x01\x02")
    content[position + 10] = 9  # deflate64, of Windows for large files
    path.write_bytes(content)


def truncate_archive(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def empty_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w"):
        pass


def nest_archive(path: Path) -> None:
    inner = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.zip", inner)


@pytest.mark.parametrize(
    ("damage_archive", "message"),
    [
        (encrypt_archive, "is encrypted; unpack it with its password, and pass the folder"),
        (change_method, "compression method 9, which is not supported; unpack it"),
        (truncate_archive, "is not a complete ZIP archive: .*; unpack or repair it"),
        (empty_archive, "must have at least two labels.*found none"),
        (
            nest_archive,
            r"found none; left out 1 file \*.zip: an archive inside a data set is not read; unpack it",
        ),
    ],
)
def test_unusable_archive_is_refused_in_one_line(
    tmp_path: Path, damage_archive: Callable[[Path], None], message: str
) -> None:
    archive_path = make_zip(draw_images(tmp_path / "squares"), tmp_path / "set.zip")
    damage_archive(archive_path)
    with pytest.raises(DataError, match=message) as error_info:
        read_dataset(archive_path)
    assert "\n" not in str(error_info.value)


def test_images_are_read_in_archive_order(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.png"))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in names[::-1]:
            archive.write(folder / name, name)
    contents = list(ZipArchive(tmp_path / "set.zip").read_contents(names))
    assert [index for index, _ in contents] == list(range(len(names)))[::-1]
    assert all(content == (folder / names[index]).read_bytes() for index, content in contents)
