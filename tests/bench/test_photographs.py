"""The training set of the default model, and its measurement on photographs, from small archives."""

from __future__ import annotations

import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest

from fovea.bench import known, photographs, ten_things
from tests.pictures import draw_picture, encode_image
from tests.servers import FLOAT_MODEL


def write_archive(path: Path, *names: str) -> None:
    """Write a small picture, each a different one, under each name."""
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(names):
            content = encode_image(draw_picture(20 + number % 40, 16 + number // 40), "JPEG")
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the archives by small ones: two labels of CIFAR-10, and six classes of Tiny ImageNet."""
    folder = tmp_path / "data"
    folder.mkdir()
    files = {name: folder / f"{name}.tar" for name in ("cifar10", "tiny", "photos")}
    cifar10 = [
        f"cifar10/{part}/{label}/{number}.jpg"
        for part, count in (("train", 105), ("test", 3))
        for label in ("cat", "ship")
        for number in range(count)
    ]
    classes = ("tabby", "gondola", "goose", "police_van", "banana", "wok")
    tiny = [
        f"tiny-imagenet/{part}/{name}/{name}_{number}.jpg"
        for part, count in (("train", 4), ("val", 2))
        for name in classes
        for number in range(count)
    ]
    photos = [f"photos/n1_{name}.JPEG" for name in ("malinois", "lifeboat", "golfcart", "barn", "hook")]
    for (_, path), names in zip(files.items(), (cifar10, tiny, photos), strict=True):
        write_archive(path, *names)
    for module in (ten_things, known):
        monkeypatch.setattr(module, "CIFAR10_FILE", files["cifar10"])
    for module in (ten_things, known, photographs):
        monkeypatch.setattr(module, "TINY_IMAGENET_FILE", files["tiny"])
    monkeypatch.setattr(photographs, "PHOTOS_FILE", files["photos"])
    return tmp_path


def test_set_joins_pictures_and_photographs(archives: Path) -> None:
    counts = ten_things.write_archive(archives / "set.tar")
    assert counts == {
        "train/cat": 5 + 2 * 4, "train/ship": 5 + 2 * 4, "train/bird": 2 * 4,
        "val/cat": 100 + 2, "val/ship": 100 + 2, "val/bird": 2, "test/cat": 3, "test/ship": 3,
        "train/other": 4,  # woks; bananas are never trained on, and police vans are left out
        "val/other": 2,
    }  # fmt: skip
    with tarfile.open(archives / "set.tar") as archive:
        names = archive.getnames()
    assert len(set(names)) == len(names)
    assert Counter(str(Path(name).parent) for name in names) == {
        f"ten-things/{folder}": count for folder, count in counts.items()
    }
    assert sorted(name for name in names if "val/other" in name) == [
        "ten-things/val/other/banana_0.jpg", "ten-things/val/other/banana_1.jpg",
    ]  # fmt: skip


def test_photographs_have_the_label_of_their_class(archives: Path) -> None:
    images, labels = photographs.read_photographs()
    assert labels == ["bird"] * 2 + ["cat"] * 2 + ["ship"] * 2 + ["dog", "ship"]
    assert all(image.startswith(b"\xff\xd8") for image in images)
    assert len(set(images)) == len(images)


def test_figures_of_a_model_are_printed(
    archives: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photographs, "_MIN_IMAGES", 2)
    monkeypatch.setattr("sys.argv", ["photographs", str(FLOAT_MODEL)])
    assert photographs.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{FLOAT_MODEL}: right on ") and lines[0].endswith("of 8 photographs")
    assert lines[1].startswith("  mean over 3 labels: ")
    assert "bird" in lines[2] and "of 3" in lines[2]
    assert lines[4].endswith("of 2 photographs of other things count as known")
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][2:]
    assert [row[0] for row in table] == ["bird", "cat", "dog", "ship"]
    assert [sum(map(int, row[1:])) for row in table] == [2, 2, 1, 3]
    header = next(line for line in lines if line.startswith("| true")).strip("| ").split(" | ")
    right = sum(int(row[header.index(row[0])]) for row in table)
    assert f"right on {right / 8:.1%}" in lines[0]


def test_missing_archives_are_named(
    archives: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs.PHOTOS_FILE.unlink()
    monkeypatch.setattr("sys.argv", ["photographs"])
    assert photographs.main() == 2
    assert "photos.tar missing; TEST_DATA names the folder" in capsys.readouterr().err
