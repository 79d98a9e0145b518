"""Labelled images that a CSV file names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from model.data import Data, DataError, load
from service.contract import Task
from tests.training import COLOURS, draw, whole


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with `pictures/<number>.png`, five blue, five green, then five red ones."""
    (tmp_path / "pictures").mkdir()
    drawn = draw(tmp_path / "drawn")
    for number, (label, row) in enumerate((label, row) for label in COLOURS for row in range(5)):
        (drawn / label / f"{row}.png").rename(tmp_path / "pictures" / f"{number:02}.png")
    for label in COLOURS:
        (drawn / label).rmdir()
    drawn.rmdir()
    return tmp_path


def rows(labels: Sequence[str] = tuple(COLOURS)) -> list[str]:
    """One for each image, with its label."""
    return [f"pictures/{number:02}.png,{labels[number // 5]}" for number in range(15)]


def read(folder: Path, lines: Sequence[str], encoding: str = "utf-8", end: str = "\n") -> Data:
    """The set that such lines describe."""
    path = folder / "labels.csv"
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return load(path, size=16, validation=0.2, seed=0)


def told(data: Data) -> dict[str, list[float]]:
    """The targets by the file's name, and proof that the pixels are that file's."""
    targets: dict[str, list[float]] = {}
    for part in (data.train, data.validation, data.conformal, data.test):
        brightest = whole(part.pixels).float().mean(dim=(1, 2)).argmax(dim=1)  # 0 is red, 2 is blue
        for name, target, colour in zip(part.names, part.targets, brightest.tolist(), strict=True):
            assert int(name[-6:-4]) // 5 == 2 - colour
            assert name not in targets
            targets[name] = [float(value) for value in target.reshape(-1)]
    return targets


def test_each_row_names_an_image_and_its_label(images: Path) -> None:
    data = read(images, ["path,label", *rows()])
    assert (data.name, data.labels, data.task) == ("labels.csv", ("blue", "green", "red"), Task.MULTICLASS)
    assert data.train.targets.dtype == torch.int64
    assert told(data) == {f"pictures/{number:02}.png": [number // 5] for number in range(15)}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("path,label", "{0},{1}"),
        ("Path ; LABEL", '"{0}" ; {1}'),
        ("label\tpath", "{1}\t{0}"),
        ("id,label,note;path,path", '7,"{1}","a, b; c",{0}'),
    ],
)
def test_the_layout_of_the_file_does_not_matter(
    images: Path, encoding: str, end: str, header: str, row: str
) -> None:
    lines = [row.format(*line.split(",")).replace('" ;', '";') for line in rows(("süß", "green", "rød"))]
    data = read(images, [header, *lines[:7], "", *lines[7:]], encoding, end)
    assert data.labels == ("green", "rød", "süß")
    assert len(told(data)) == 15


def test_two_labels_are_a_binary_task(images: Path) -> None:
    assert read(images, ["path,label", *rows()[:10]]).task is Task.BINARY


def test_a_split_keeps_the_test_apart(images: Path) -> None:
    splits = ["train", "", "Val", "test", "train"] * 3
    lines = [f"{row},{split}" for row, split in zip(rows(), splits, strict=True)]
    data = read(images, ["path,label,split", *lines])
    assert data.test.names == ("pictures/03.png", "pictures/08.png", "pictures/13.png")
    assert data.test.targets.tolist() == [0, 1, 2]
    assert len(told(data)) == 15


@pytest.mark.parametrize("joined", ["a;b", "b|a", " a ; b; ", None])
def test_several_labels_make_a_multi_label_set(images: Path, joined: str | None) -> None:
    labels = [["a"], ["b"], ["a", "b"], []] * 4
    lines = []
    for number, own in enumerate(labels[:15]):
        name = f"pictures/{number:02}.png"
        if len(own) < 2:
            lines.append(f"{name},{''.join(own)}")
        elif joined:
            lines.append(f'{name},"{joined}"')
        else:
            lines += [f"{name},a", f"./{name},b", f"{name},a"]
    data = read(images, ["path,label", *lines])
    assert (data.task, data.labels) == (Task.MULTILABEL, ("a", "b"))
    assert data.train.targets.dtype == torch.float32
    assert data.train.targets.shape == (len(data.train), 2)
    assert told(data) == {
        f"pictures/{number:02}.png": [float("a" in own), float("b" in own)]
        for number, own in enumerate(labels[:15])
    }
    assert data.counts == tuple(data.train.targets.sum(dim=0).tolist())
    assert (data.validation.targets.sum(dim=0) > 0).all()


def test_a_folder_with_one_such_file_and_no_labels_is_that_file(images: Path) -> None:
    expected = told(read(images, ["path,label", *rows()]))
    data = load(images, size=16, validation=0.2, seed=0)
    assert data.name == "labels.csv"
    assert told(data) == expected


def test_a_folder_of_labels_is_read_as_one_whatever_lies_beside_them(tmp_path: Path) -> None:
    folder = draw(tmp_path / "squares")
    (folder / "notes.csv").write_text("path,label\nred/0.png,mine\n")
    assert load(folder, size=16, validation=0.2, seed=0).labels == ("blue", "green", "red")


def test_an_absolute_path_is_taken_as_it_is(images: Path) -> None:
    lines = [f"{images}/{row}" for row in rows()]
    assert len(told(read(images, ["path,label", *lines]))) == 15


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"needs a first line with the columns path and label; it has ''"),
        (["path,label"], "at least two; found none"),
        (rows(), r"columns path and label; it has 'pictures/00.png,blue'"),
        (["path,path,label", *rows()], "columns path and label; it has 'path,path,label'"),
        (["path label", *rows()], "columns path and label; it has 'path label'"),
        (["path,label", *rows()[:5]], "at least two; found only 'blue'"),
        (["path,label", *rows(), "pictures/00.png"], r"line 17: 1 fields, 2 columns; put a field"),
        (["path,label", *rows(), "a,b.png,red"], r"line 17: 3 fields, 2 columns; put a field"),
        (["path,label", *rows(), ",red"], "line 17: the path is empty"),
        (["path,label", *rows(), '"a.png,red'], "line 17: .*; save it as CSV again"),
        (["path,label", *rows(), f"{'a' * 200_000},red"], "line 17: field larger .*; save it as CSV again"),
        ([f"{'a' * 200_000}"], "needs a first line"),
        (["path,label", *rows(), "pictures/0\0.png,red"], "has zero bytes in it; save it as CSV in UTF-8"),
        (["path,label", *rows()[:14], "pictures/14.png,"], r"no label for 1 images \(pictures/14.png\)"),
        (["path,label,split", "pictures/00.png,a,tset"], "line 2: the split is 'tset'; known are train,"),
        (
            ["path,label,split", "pictures/00.png,a,test", "pictures/00.png,b,train"],
            "line 3: pictures/00.png is named for training and for the test",
        ),
        (
            ["path,label", *rows(), *(f"x/{number}.png,red" for number in range(7))],
            r"names 7 images \(x/0.png, x/1.png, x/2.png, x/3.png, x/4.png, …\) that are not there; "
            "paths are relative to /",
        ),
        (["path,label", *rows(), "pictures,red"], r"names 1 images \(pictures\) that are not there"),
        (["path,label", *rows(), f"{'a' * 3000},red"], "that are not there"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_in_a_sentence(
    images: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message) as refused:
        read(images, lines)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("encoding", "line"), [("latin-1", 12), ("utf-16", 1)])
def test_what_is_not_utf_8_is_refused_with_its_place(images: Path, encoding: str, line: int) -> None:
    with pytest.raises(
        DataError, match=rf"labels.csv, line {line}: this is not UTF-8; save it as CSV in UTF-8"
    ):
        read(images, ["path,label", *rows(("blue", "green", "süß"))], encoding)


def test_a_file_that_cannot_be_decoded_is_skipped(images: Path) -> None:
    (images / "pictures" / "07.png").write_bytes(b"")
    data = read(images, ["path,label", *rows()])
    assert data.unreadable == ("pictures/07.png: the image is empty",)
    assert len(told(data)) == 14
