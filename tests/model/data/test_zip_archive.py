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
from tests.model.data.test_dataset import all_examples
from tests.training import draw_images


def make_zip(folder: Path, target: Path, top: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    """`folder` as a ZIP archive, its files below `top`."""
    with zipfile.ZipFile(target, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{top}{file.relative_to(folder).as_posix()}")
    return target


def read_dataset(source: Path, cache: Path | None = None) -> Dataset:
    return load_dataset(source, size=16, validation=0.2, seed=0, cache=cache)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("top", ["", "squares/", "a/b/squares/"])
def test_a_zip_archive_is_the_folder_that_is_in_it(tmp_path: Path, top: str, method: int) -> None:
    folder = draw_images(tmp_path / "squares")
    packed = read_dataset(make_zip(folder, tmp_path / "set.zip", top, method))
    assert (packed.name, packed.labels) == ("set.zip", ("blue", "green", "red"))
    assert all_examples(packed) == all_examples(read_dataset(folder))
    assert not packed.inventory.notes


def test_what_the_archive_is_called_does_not_matter(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    assert all_examples(read_dataset(make_zip(folder, tmp_path / "anything"))) == all_examples(
        read_dataset(folder)
    )


def test_parts_clutter_and_other_files_are_as_in_a_folder(tmp_path: Path) -> None:
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


def test_a_cached_archive_is_described_as_before(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    (folder / "red" / "notes.txt").write_text("no image")
    packed = make_zip(folder, tmp_path / "set.zip")
    first = read_dataset(packed, tmp_path / "cache")
    assert read_dataset(packed, tmp_path / "cache").description == first.description


def test_names_without_a_flag_are_utf_8_where_they_can_be(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares", "blue", "café", colours=("blue", "red"))
    packed = make_zip(folder, tmp_path / "set.zip")
    content = packed.read_bytes()
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # as the Finder writes them
        place = content.find(signature)
        while place >= 0:
            place += flags
            (flag,) = struct.unpack_from("<H", content, place)
            content = content[:place] + struct.pack("<H", flag & ~0x800) + content[place + 2 :]
            place = content.find(signature, place)
    packed.write_bytes(content)
    assert read_dataset(packed).labels == ("blue", "café")


def test_links_are_followed_inside_the_archive_alone(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    packed = make_zip(folder, tmp_path / "set.zip", "squares/")
    with zipfile.ZipFile(packed, "a") as archive:
        for name, target in (
            ("squares/blue/link.png", "0.png"),
            ("squares/blue/out.png", "/etc/hostname"),
            ("squares/blue/up.png", "../../../../etc/hostname"),
            ("squares/blue/itself.png", "itself.png"),
        ):
            member = zipfile.ZipInfo(name)
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(member, target)
    data = read_dataset(packed)
    assert len(data.train) + len(data.validation) == 16
    (group,) = data.inventory.skipped_files
    assert (group.reason, len(group.names)) == ("a link to a missing member of the archive", 3)


def test_names_that_lead_out_and_bombs_are_left_out(tmp_path: Path) -> None:
    packed = make_zip(draw_images(tmp_path / "squares"), tmp_path / "set.zip")
    with zipfile.ZipFile(packed, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../evil/0.png", b"\x89PNG")
        archive.writestr("red/../../../evil.png", b"\x89PNG")
        archive.writestr("red/bomb.png", bytes(32 << 20))
    data = read_dataset(packed)
    assert len(data.train) + len(data.validation) == 15
    assert {group.reason: len(group.names) for group in data.inventory.skipped_files} == {
        "its name leads out of the archive": 2,
        "it unpacks to over 200 times its size, as no image does": 1,
    }
    assert not (tmp_path.parent / "evil").exists()


def test_a_damaged_image_costs_only_itself(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    packed = make_zip(folder, tmp_path / "set.zip", method=zipfile.ZIP_STORED)
    content = bytearray(packed.read_bytes())
    image = (folder / "red" / "2.png").read_bytes()
    content[content.index(image) + len(image) // 2] ^= 0xFF
    packed.write_bytes(content)
    data = read_dataset(packed)
    (line,) = data.unreadable_files
    assert line.startswith("red/2.png: it is damaged in the archive: Bad CRC-32")
    assert len(data.train) + len(data.validation) == 14


def encrypt_archive(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(signature)
        while place >= 0:
            content[place + flags] |= 1
            place = content.find(signature, place + 1)
    path.write_bytes(content)


def change_method(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02")
    content[place + 10] = 9  # deflate64, of Windows for large files
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
    ("spoil", "message"),
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
def test_an_archive_that_cannot_be_used_is_refused_in_a_sentence(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    packed = make_zip(draw_images(tmp_path / "squares"), tmp_path / "set.zip")
    spoil(packed)
    with pytest.raises(DataError, match=message) as refused:
        read_dataset(packed)
    assert "\n" not in str(refused.value)


def test_images_are_read_in_the_order_of_the_archive(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.png"))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in names[::-1]:
            archive.write(folder / name, name)
    found = list(ZipArchive(tmp_path / "set.zip").read_contents(names))
    assert [index for index, _ in found] == list(range(len(names)))[::-1]
    assert all(content == (folder / names[index]).read_bytes() for index, content in found)
