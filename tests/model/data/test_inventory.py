"""The inventory of a data set: every file is used, or left out for a reason."""

from __future__ import annotations

import io
import os
import socket
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fovea.model.data import decoding
from fovea.model.data.choices import Choices
from fovea.model.data.dataset import DataError, Dataset, load_dataset
from fovea.model.data.inventory import Inventory, Part
from tests.model.data.test_dataset import list_examples, list_image_bytes, make_archive
from tests.pictures import draw_picture, encode_image
from tests.training import draw_images


def read_dataset(source: Path, **options: Any) -> Dataset:
    return load_dataset(source, **{"size": 16, "validation": 0.2, "seed": 0, **options})


def count_used_images(data: Dataset) -> int:
    return sum(map(len, (data.train, data.validation, data.conformal, data.test)))


def count_skipped_files(data: Dataset) -> dict[str, int]:
    """Count the skipped files of each kind."""
    counts: Counter[str] = Counter()
    for group in data.inventory.skipped_files:
        counts[group.kind] += len(group.names)
    return dict(counts)


def assert_file_counts(data: Dataset) -> None:
    assert (
        data.inventory.file_count
        == count_used_images(data) + len(data.unreadable_files) + data.inventory.skipped_count
    )
    assert data.description[0] == (
        f"{data.inventory.file_count} files found: {count_used_images(data)} images used, "
        f"{len(data.unreadable_files)} unreadable, {data.inventory.skipped_count} left out"
    )


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("names", [("train", "valid", "test"), ("Training", "Validation_Set", "TESTING")])
def test_validation_folder_is_the_held_out_part(
    tmp_path: Path, names: tuple[str, ...], is_packed: bool
) -> None:
    for seed, (name, count) in enumerate(zip(names, (6, 4, 3), strict=True)):
        draw_images(tmp_path / "squares" / name, count=count, seed=seed)
    source = tmp_path / "squares"
    data = read_dataset(make_archive(source, tmp_path / "squares.tar") if is_packed else source)
    prefix = "squares/" if is_packed else ""
    for part, index in (("train", 0), ("validation", 1), ("conformal", 1), ("test", 2)):
        assert {image_name.rsplit("/", 2)[0] for image_name in getattr(data, part).names} == {
            f"{prefix}{names[index]}"
        }
    assert [len(data.train), len(data.validation), len(data.conformal), len(data.test)] == [18, 6, 6, 9]
    for examples in (data.validation, data.conformal):
        assert examples.targets.bincount().tolist() == [2, 2, 2]
    assert_file_counts(data)
    assert data.description[2] == (
        f"parts: {prefix}{names[0]}/: 18 images to train on; {prefix}{names[1]}/: 12 images held out; "
        f"{prefix}{names[2]}/: 9 images to test"
    )


def test_seed_alone_splits_the_validation_part(tmp_path: Path) -> None:
    draw_images(tmp_path / "set" / "train", count=3)
    draw_images(tmp_path / "set" / "val", count=10, seed=1)
    first, repeated, other = (
        read_dataset(tmp_path / "set", seed=seed, validation=fraction)
        for seed, fraction in ((3, 0.1), (3, 0.4), (4, 0.1))
    )
    assert first.validation.names == repeated.validation.names
    assert first.train.names == other.train.names
    assert first.validation.names != other.validation.names
    held_out_names = [{*data.validation.names, *data.conformal.names} for data in (first, other)]
    assert held_out_names[0] == held_out_names[1]


def test_one_training_image_suffices_with_a_validation_folder(tmp_path: Path) -> None:
    draw_images(tmp_path / "set" / "train", count=1)
    draw_images(tmp_path / "set" / "val", "blue", "green", count=1, seed=1)
    data = read_dataset(tmp_path / "set")
    assert (len(data.train), len(data.validation), len(data.conformal)) == (3, 2, 0)
    assert data.warnings[0] == "no held-out images of 1 label: red"
    for file in (tmp_path / "set" / "val").rglob("*.png"):
        file.write_bytes(b"GIF89a")
    with pytest.raises(DataError, match="no validation image of set can be read"):
        read_dataset(tmp_path / "set")


def test_label_without_training_images_is_refused(tmp_path: Path) -> None:
    draw_images(tmp_path / "set" / "train", "blue", "green")
    draw_images(tmp_path / "set" / "val", seed=1)
    with pytest.raises(
        DataError, match="label 'red' has 0 readable images to train on; at least 1 is needed"
    ):
        read_dataset(tmp_path / "set")


def test_folder_outside_the_parts_is_skipped(tmp_path: Path) -> None:
    draw_images(tmp_path / "set" / "train")
    draw_images(tmp_path / "set" / "val", seed=1)
    draw_images(tmp_path / "set" / "unlabeled", "blue", seed=2)
    data = read_dataset(tmp_path / "set")
    assert count_skipped_files(data) == {"in unlabeled/": 5}
    assert_file_counts(data)


# --- files ---------------------------------------------------------------------------------------


def make_jpeg_xl() -> bytes:
    """Return the beginning of a JPEG XL file."""
    return b"\xff\x0a" + bytes(64)


@pytest.mark.parametrize("is_packed", [False, True])
def test_images_are_recognised_by_content(tmp_path: Path, is_packed: bool) -> None:
    folder = tmp_path / "set"
    files = {
        "0.jfif": encode_image(draw_picture(20, 20, 0), "JPEG"),
        "1": encode_image(draw_picture(20, 20, 1), "PNG"),
        "2.JPG_large": encode_image(draw_picture(20, 20, 2), "JPEG"),
        "3.dat": encode_image(draw_picture(20, 20, 3), "WEBP"),
        "4.txt": encode_image(draw_picture(20, 20, 4), "GIF"),
        "5.jxl": make_jpeg_xl(),
        "6.ppm": encode_image(draw_picture(20, 20, 5), "PPM"),
        "7.ppm": encode_image(draw_picture(20, 20, 6), "PPM"),
        "notes.txt": b"no image",
        "nothing": b"",
        "8.pdf": b"%PDF-1.7",
        "9.png": make_jpeg_xl(),
    }
    for label in ("blue", "red"):
        (folder / label).mkdir(parents=True)
        for seed, (name, content) in enumerate(files.items()):
            content = (
                encode_image(draw_picture(20, 20, 99 + seed), "PNG")
                if label == "red" and name == "1"
                else content
            )
            (folder / label / name).write_bytes(content)
    source = make_archive(folder, tmp_path / "set.tar.gz") if is_packed else folder
    data = read_dataset(source)
    assert count_used_images(data) == 10
    assert count_skipped_files(data) == {
        "*.ppm": 4,
        "*.jxl": 2,
        "*.pdf": 2,
        "*.txt": 2,
        "without a suffix": 2,
    }
    reasons = {group.kind: group.reason for group in data.inventory.skipped_files}
    assert reasons["*.jxl"] == "JPEG XL is not served"
    assert reasons["without a suffix"] == "the image is empty"
    assert len(data.unreadable_files) == 2  # by their suffix, they are images
    assert "JPEG XL is not served" in data.unreadable_files[0]
    assert_file_counts(data)
    assert any(
        line.startswith("left out 4 files *.ppm: the bytes are not an image of a")
        for line in data.description
    )


@pytest.mark.parametrize("is_packed", [False, True])
def test_system_files_are_skipped_and_counted(tmp_path: Path, is_packed: bool) -> None:
    folder = draw_images(tmp_path / "squares")
    before = read_dataset(folder)
    image = (folder / "red" / "0.png").read_bytes()
    system_files = (
        "red/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "@eaDir/x.jpg", ".thumbnails/0.png", "__MACOSX/red/._0.png",
        "red/Thumbs.db", "blue/.ipynb_checkpoints/0-checkpoint.png", "lost+found/0.png", "#recycle/red/0.png",
        "$RECYCLE.BIN/0.png", "red/._0.png", "red/.DS_Store", "blue/desktop.ini",
        "System Volume Information/0.png", "@__thumb/0.png", "red/THUMBS.DB", ".Trash-1000/files/0.png",
    )  # fmt: skip
    for name in system_files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)
    data = read_dataset(make_archive(folder, tmp_path / "squares.tar") if is_packed else folder)
    assert (list_examples(data), data.labels) == (list_examples(before), before.labels)
    assert data.inventory.skipped_count == len(system_files)
    assert {group.reason for group in data.inventory.skipped_files} == {"a hidden file or a system file"}
    assert count_skipped_files(data)["in @eaDir/"] == 2
    assert_file_counts(data)


def test_unlistable_system_folder_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = draw_images(tmp_path / "squares")
    (folder / "lost+found").mkdir()
    scandir = os.scandir

    # root can list every folder, and tests may be run by root
    def scan_all_but_lost_and_found(path: Path) -> Any:
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan_all_but_lost_and_found)
    data = read_dataset(folder)
    assert count_skipped_files(data) == {"in lost+found/": 1}


def test_broken_links_loops_pipes_and_sockets_are_skipped(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    (folder / "red" / "gone.png").symlink_to("nowhere.png")
    (folder / "red" / "up").symlink_to(folder)
    os.mkfifo(folder / "red" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as unix_socket:
        unix_socket.bind(os.path.relpath(folder / "red" / "socket.png"))
    data = read_dataset(folder)
    assert count_skipped_files(data) == {"link": 2, "*.png": 2}
    assert_file_counts(data)


def test_oversized_image_file_is_unreadable(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    with (folder / "red" / "0.png").open("r+b") as file:
        file.truncate(600 << 20)  # takes no room on the disk
    data = read_dataset(folder)
    assert data.unreadable_files == ("red/0.png: the file is over 512 MB, the limit for an image",)


def test_skipped_files_are_updated_despite_the_cache(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    assert count_skipped_files(read_dataset(folder, cache=tmp_path / "cache")) == {}
    (folder / "red" / "new.jxl").write_bytes(make_jpeg_xl())
    assert count_skipped_files(read_dataset(folder, cache=tmp_path / "cache")) == {"*.jxl": 1}


def test_missing_label_error_names_the_skipped_files(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares", "blue")
    (folder / "red").mkdir()
    (folder / "red" / "0.jxl").write_bytes(make_jpeg_xl())
    with pytest.raises(DataError, match=r"found only 'blue'; left out 1 file \*.jxl: JPEG XL is not served"):
        read_dataset(folder)


def test_inventory_survives_a_json_round_trip() -> None:
    inventory = Inventory(3, {Part.TEST: ("test/",)}, "so", (), ("a note",))
    assert Inventory.from_dict(inventory.to_dict()) == inventory


# --- labels --------------------------------------------------------------------------------------


def test_equivalent_unicode_spellings_are_one_label(tmp_path: Path) -> None:
    composed, decomposed = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    draw_images(tmp_path / "set", composed, "blue", colours=("red", "blue"), count=4)
    draw_images(tmp_path / "set", decomposed, colours=("red",), count=3, seed=1)
    draw_images(tmp_path / "set", " blue ", colours=("blue",), count=2, seed=2)
    data = read_dataset(tmp_path / "set")
    assert data.labels == ("blue", composed)
    targets = torch.cat([data.train.targets, data.validation.targets, data.conformal.targets])
    assert targets.bincount().tolist() == [6, 7]
    assert [note.split(" is ")[0] for note in data.inventory.notes] == ["label 'blue'", f"label {composed!r}"]


def test_unicode_spellings_are_merged_across_parts(tmp_path: Path) -> None:
    composed, decomposed = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    for part, label in (("train", composed), ("val", decomposed), ("test", decomposed)):
        draw_images(tmp_path / "set" / part, label, "blue", colours=("red", "blue"))
    assert read_dataset(tmp_path / "set").labels == ("blue", "café")


@pytest.mark.parametrize(
    ("first_label", "second_label"),
    [("Cat", "cat"), ("golden retriever", "golden_retriever"), ("top-5", "Top 5")],
)
def test_labels_differing_only_in_case_need_a_choice(
    tmp_path: Path, first_label: str, second_label: str
) -> None:
    draw_images(tmp_path / "set", first_label, "blue", colours=("red", "blue"), count=4)
    draw_images(tmp_path / "set", second_label, colours=("red",), count=6, seed=1)
    with pytest.raises(
        DataError, match=r"differ only in case, spaces, _ or -: .* --label-case merge if they are"
    ):
        read_dataset(tmp_path / "set")
    merged_data = read_dataset(tmp_path / "set", choices=Choices(label_case="merge"))
    assert set(merged_data.labels) == {"blue", second_label}  # most images have it
    assert any(note.endswith(f"are merged: {second_label!r}") for note in merged_data.inventory.notes)
    assert len(read_dataset(tmp_path / "set", choices=Choices(label_case="keep")).labels) == 3


def test_cache_is_specific_to_the_label_case_choice(tmp_path: Path) -> None:
    draw_images(tmp_path / "set", "Cat", "cat", "blue", colours=("red", "green", "blue"))
    for case, labels in (("merge", 2), ("keep", 3), ("merge", 2)):
        data = read_dataset(tmp_path / "set", cache=tmp_path / "cache", choices=Choices(label_case=case))  # type: ignore[arg-type]
        assert len(data.labels) == labels


@pytest.mark.parametrize("name", ["minus-1", "-1"])
def test_labels_differing_in_a_minus_sign_are_distinct(tmp_path: Path, name: str) -> None:
    assert len(read_dataset(draw_images(tmp_path / "set", "1", name, colours=("red", "blue"))).labels) == 2


def test_blank_and_control_character_labels_are_not_used(tmp_path: Path) -> None:
    draw_images(tmp_path / "set", "red", "blue")
    draw_images(tmp_path / "set", "  ", colours=("green",))
    data = read_dataset(tmp_path / "set")
    assert count_skipped_files(data) == {"in '  '/": 5}
    assert_file_counts(data)
    (tmp_path / "set" / "  ").rename(tmp_path / "set" / "a\nb")
    with pytest.raises(DataError, match=r"'a\\nb' has control characters in it; rename it"):
        read_dataset(tmp_path / "set")


def test_non_utf_8_names_get_question_marks(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / os.fsdecode(b"squ\xffres"))
    (folder / "red" / os.fsdecode(b"n\xfftes.txt")).write_text("no image")
    (folder / "red" / "0.png").rename(folder / "red" / os.fsdecode(b"\xfe.png"))
    data = read_dataset(folder)
    assert data.name == "squ?res"
    texts = [
        data.name,
        *data.description,
        *data.inventory.list_skipped_files(),
        *data.train.names,
        *data.warnings,
    ]
    io.BytesIO().write("\n".join(texts).encode())


def test_label_depth_can_be_chosen(tmp_path: Path) -> None:
    draw_images(tmp_path / "set" / "cat", "tabby", "siamese", colours=("red", "blue"))
    draw_images(tmp_path / "set", "dog", colours=("green",))
    with pytest.raises(DataError, match="labels lie at several depths"):
        read_dataset(tmp_path / "set")
    data = read_dataset(tmp_path / "set", choices=Choices(label_depth=1))
    assert data.labels == ("cat", "dog")
    assert_file_counts(data)


def test_images_without_suffix_keep_their_pixels(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "set", "blue", "red", count=2)
    expected = list_examples(read_dataset(folder, validation=0.5))
    for file in list(folder.rglob("*.png")):
        file.rename(file.with_suffix(""))
    renamed_data = read_dataset(folder, validation=0.5)
    assert list_examples(renamed_data) == expected
    with Image.open(folder / renamed_data.train.names[0]) as image:
        assert (
            list_image_bytes(renamed_data.train.pixels)[0]
            == decoding.decode_pixels(
                (folder / renamed_data.train.names[0]).read_bytes(), decoding.square_geometry(16)
            ).tobytes()
        )
        assert image.format == "PNG"
