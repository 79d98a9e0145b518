"""Labelled images that a CSV file names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fovea.model.data.choices import Choices
from fovea.model.data.dataset import DataError, Dataset, load_dataset
from fovea.model.data.inventory import Part
from fovea.service.artifact.contract import Task
from tests.training import COLOURS, draw_images, stack_pixels


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with `pictures/<number>.png`, five blue, five green, then five red ones."""
    (tmp_path / "pictures").mkdir()
    drawn = draw_images(tmp_path / "drawn")
    for number, (label, row) in enumerate((label, row) for label in COLOURS for row in range(5)):
        (drawn / label / f"{row}.png").rename(tmp_path / "pictures" / f"{number:02}.png")
    for label in COLOURS:
        (drawn / label).rmdir()
    drawn.rmdir()
    return tmp_path


def make_rows(labels: Sequence[str] = tuple(COLOURS)) -> list[str]:
    """One for each image, with its label."""
    return [f"pictures/{number:02}.png,{labels[number // 5]}" for number in range(15)]


def load_csv(folder: Path, lines: Sequence[str], encoding: str = "utf-8", end: str = "\n") -> Dataset:
    """The set that such lines describe."""
    path = folder / "labels.csv"
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return load_dataset(path, size=16, validation=0.2, seed=0)


def targets_by_name(data: Dataset) -> dict[str, list[float]]:
    """The targets by the file's name, and proof that the pixels are that file's."""
    targets: dict[str, list[float]] = {}
    for part in (data.train, data.validation, data.conformal, data.test):
        brightest = stack_pixels(part.pixels).float().mean(dim=(1, 2)).argmax(dim=1)  # 0 is red, 2 is blue
        for name, target, colour in zip(part.names, part.targets, brightest.tolist(), strict=True):
            assert int(name[-6:-4]) // 5 == 2 - colour
            assert name not in targets
            targets[name] = [float(value) for value in target.reshape(-1)]
    return targets


def test_each_row_names_an_image_and_its_label(images: Path) -> None:
    data = load_csv(images, ["path,label", *make_rows()])
    assert (data.name, data.labels, data.task) == ("labels.csv", ("blue", "green", "red"), Task.MULTICLASS)
    assert data.train.targets.dtype == torch.int64
    assert targets_by_name(data) == {f"pictures/{number:02}.png": [number // 5] for number in range(15)}


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
    lines = [row.format(*line.split(",")).replace('" ;', '";') for line in make_rows(("süß", "green", "rød"))]
    data = load_csv(images, [header, *lines[:7], "", *lines[7:]], encoding, end)
    assert data.labels == ("green", "rød", "süß")
    assert len(targets_by_name(data)) == 15


def test_two_labels_are_a_binary_task(images: Path) -> None:
    assert load_csv(images, ["path,label", *make_rows()[:10]]).task is Task.BINARY


def test_a_split_keeps_the_test_apart(images: Path) -> None:
    splits = ["train", "", "Val", "test", "train"] * 3
    lines = [f"{row},{split}" for row, split in zip(make_rows(), splits, strict=True)]
    data = load_csv(images, ["path,label,split", *lines])
    assert data.test.names == ("pictures/03.png", "pictures/08.png", "pictures/13.png")
    assert data.test.targets.tolist() == [0, 1, 2]
    assert len(targets_by_name(data)) == 15


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
    data = load_csv(images, ["path,label", *lines])
    assert (data.task, data.labels) == (Task.MULTILABEL, ("a", "b"))
    assert data.train.targets.dtype == torch.float32
    assert data.train.targets.shape == (len(data.train), 2)
    assert targets_by_name(data) == {
        f"pictures/{number:02}.png": [float("a" in own), float("b" in own)]
        for number, own in enumerate(labels[:15])
    }
    assert data.label_counts == tuple(data.train.targets.sum(dim=0).tolist())
    assert (data.validation.targets.sum(dim=0) > 0).all()


def test_a_folder_with_one_such_file_and_no_labels_is_that_file(images: Path) -> None:
    expected = targets_by_name(load_csv(images, ["path,label", *make_rows()]))
    data = load_dataset(images, size=16, validation=0.2, seed=0)
    assert data.name == "labels.csv"
    assert targets_by_name(data) == expected


def test_a_folder_of_labels_is_read_as_one_whatever_lies_beside_them(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    (folder / "notes.csv").write_text("path,label\nred/0.png,mine\n")
    assert load_dataset(folder, size=16, validation=0.2, seed=0).labels == ("blue", "green", "red")


def test_an_absolute_path_is_taken_as_it_is(images: Path) -> None:
    lines = [f"{images}/{row}" for row in make_rows()]
    assert len(targets_by_name(load_csv(images, ["path,label", *lines]))) == 15


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"needs a first line with the columns path and label; it has ''"),
        (["path,label"], "must have at least two labels.*found none"),
        (make_rows(), r"columns path and label; it has 'pictures/00.png,blue'"),
        (["path,path,label", *make_rows()], "columns path and label; it has 'path,path,label'"),
        (["path label", *make_rows()], "columns path and label; it has 'path label'"),
        (["path,label", *make_rows()[:5]], "must have at least two labels.*found only 'blue'"),
        (["path,label", *make_rows(), "pictures/00.png"], r"line 17: 1 fields, 2 columns; quote a field"),
        (["path,label", *make_rows(), "a,b.png,red"], r"line 17: 3 fields, 2 columns; quote a field"),
        (["path,label", *make_rows(), ",red"], "line 17: the path is empty"),
        (["path,label", *make_rows(), '"a.png,red'], "line 17: .*; save it as CSV again"),
        (
            ["path,label", *make_rows(), f"{'a' * 200_000},red"],
            "line 17: field larger .*; save it as CSV again",
        ),
        ([f"{'a' * 200_000}"], "needs a first line"),
        (
            ["path,label", *make_rows(), "pictures/0\0.png,red"],
            "contains zero bytes; save it as CSV in UTF-8",
        ),
        (["path,label", *make_rows()[:14], "pictures/14.png,"], r"no label for 1 images \(pictures/14.png\)"),
        (["path,label,split", "pictures/00.png,a,tset"], "line 2: the split is 'tset'; use train,"),
        (
            ["path,label,split", "pictures/00.png,a,test", "pictures/00.png,b,train"],
            "line 3: pictures/00.png is listed for training and for test; remove",
        ),
        (
            ["path,label", *make_rows(), *(f"x/{number}.png,red" for number in range(7))],
            r"names 7 images \(x/0.png, x/1.png, x/2.png, x/3.png, x/4.png, …\) that do not exist; "
            "paths are relative to /",
        ),
        (["path,label", *make_rows(), "pictures,red"], r"names 1 images \(pictures\) that do not exist"),
        (["path,label", *make_rows(), f"{'a' * 3000},red"], "that do not exist"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_in_a_sentence(
    images: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message) as refused:
        load_csv(images, lines)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_what_office_programs_write_is_read(images: Path, encoding: str) -> None:
    data = load_csv(
        images,
        ["path;label", *(row.replace(",", ";") for row in make_rows(("blue", "green", "süß")))],
        encoding,
    )
    assert data.labels == ("blue", "green", "süß")
    assert len(targets_by_name(data)) == 15
    notes = () if encoding == "utf-16" else (
        "labels.csv is not UTF-8 and was read as Windows-1252: line 12 is 'pictures/10.png;süß'",
    )  # fmt: skip
    assert data.inventory.notes == notes


def test_what_is_in_no_known_encoding_is_refused_with_its_place(images: Path) -> None:
    lines = ["path,label", *make_rows()]
    (images / "labels.csv").write_bytes("\n".join(lines).encode().replace(b"red", b"r\x81d", 1))
    with pytest.raises(DataError, match=r"labels.csv, line 12: this is neither UTF-8 nor Windows-1252; save"):
        load_dataset(images / "labels.csv", size=16, validation=0.2, seed=0)


# --- the shapes of others ------------------------------------------------------------------------


def load_table(folder: Path, content: str, name: str = "labels.csv", **choices: Any) -> Dataset:
    """The set that a table of this content describes."""
    (folder / name).write_text(content)
    return load_dataset(folder / name, size=16, validation=0.2, seed=0, choices=Choices(**choices))


def format_table(header: str, row: str, labels: Sequence[str] = tuple(COLOURS)) -> str:
    """A header, and a row for each image: {path}, {stem}, {name}, {label} and {n} in it are its own."""
    lines = [header]
    for number in range(15):
        path = f"pictures/{number:02}.png"
        values = {"path": path, "stem": path[:-4], "name": path[9:], "label": labels[number // 5]}
        lines.append(row.format(**values, n=number, id=f"{number:02}", windows=path.replace("/", "\\\\")))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("id,breed", "{stem},{label}"),  # Kaggle
        ("id,breed", "{id},{label}"),
        ("image_id,label", "{id},{label}"),
        ("Image Index,Finding Labels", "{name},{label}"),
        (",image_id,dx", "{n},{id},{label}"),  # pandas' index
        ("lesion_id,image_id,dx,age", "a{n},{id},{label},40"),
        ("Width,Height,ClassId,Path", "20,20,{label},{path}"),
        ("filename,what", "{path},{label}"),  # the only other column
        ("file_name,label", "{path},{label}"),  # Hugging Face
        ("file_name,text,label", "{path},a picture,{label}"),
        ("Path;Label", "{windows};{label}"),  # Windows
        ("path,label", "C:{windows},{label}"),
        ("path,label", "C:\\data\\{windows},{label}"),
        ("path,label", ".\\{windows},{label}"),
        ("path,label", "PICTURES/{id}.PNG,{label}"),
        ("path,label", "/somewhere/else/{path},{label}"),
        ("sep=;\npath;label", "{path};{label}"),  # Excel
        ("IMAGE_ID\tCLASS", "{id}\t{label}"),
    ],
)
def test_the_shapes_of_other_tables_are_read(images: Path, header: str, row: str) -> None:
    data = load_table(images, format_table(header, row))
    assert (data.labels, data.task) == (("blue", "green", "red"), Task.MULTICLASS)
    assert targets_by_name(data) == {f"pictures/{number:02}.png": [number // 5] for number in range(15)}


def test_paths_that_were_completed_are_named(images: Path) -> None:
    assert load_table(images, format_table("path,label", "{path},{label}")).inventory.notes == ()
    data = load_table(images, format_table("id,breed", "{id},{label}"))
    assert data.inventory.notes == ("15 paths completed: 00 is pictures/00.png",)
    assert "labels are in the column 'breed': blue, green, red" in data.description


def test_the_set_s_own_folder_may_be_in_the_paths(images: Path) -> None:
    data = load_table(images, format_table("path,label", f"{images.name}/{{path}},{{label}}"))
    assert len(targets_by_name(data)) == 15


@pytest.mark.parametrize(
    ("choices", "labels"),
    [
        ({"path_column": "where", "label_columns": ("what",)}, ("blue", "green", "red")),
        ({"path_column": "WHERE", "label_columns": ("label",)}, ("a", "b", "c")),
    ],
)
def test_columns_may_be_named(images: Path, choices: dict[str, Any], labels: tuple[str, ...]) -> None:
    content = format_table("where,what,label,x,path", "{path},{label},L,0.5,nowhere")
    for number in range(15):
        content = content.replace(",L,", f",{'abc'[number // 5]},", 1)
    assert load_table(images, content, **choices).labels == labels


@pytest.mark.parametrize(
    ("header", "choices", "message"),
    [
        ("path,label", {"path_column": "file"}, "has no column 'file' for --path-column: it has the"),
        ("path,label", {"label_columns": ("kind",)}, "has no column 'kind' for --label-column: it has"),
        ("path,one,two", {}, "needs a column of labels: it has the columns 'path', 'one', 'two'; name it"),
        (
            "path,one,two",
            {"label_columns": ("one", "two")},
            "line 2: the column 'one' has 'x'; if --label-column is repeated",
        ),
    ],
)  # fmt: skip
def test_what_the_columns_do_not_tell_is_asked_for(
    images: Path, header: str, choices: dict[str, Any], message: str
) -> None:
    row = "{path},x,5" if header.count(",") == 2 else "{path},{label}"
    with pytest.raises(DataError, match=message) as refused:
        load_table(images, format_table(header, row), **choices)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("true", "false"), [("1", "0"), ("1.0", "0.0"), ("True", "False"), ("1", "-1")])
def test_a_column_for_each_label_is_read(images: Path, true: str, false: str) -> None:
    lines = ["image,blue,green,Red"]
    for number in range(15):
        flags = [true if number // 5 == label else false for label in range(3)]
        lines.append(f"{number:02},{','.join(flags)}")
    data = load_table(images, "\n".join(lines))
    assert (data.labels, data.task) == (("Red", "blue", "green"), Task.MULTICLASS)
    assert "labels are in the columns 'blue', 'green', 'Red': Red, blue, green" in data.description
    lines[1] = f"00,{true},{true},{false}"
    lines[2] = f"01,{false},{false},{false}"
    several = load_table(images, "\n".join(lines))
    assert several.task is Task.MULTILABEL
    assert targets_by_name(several)["pictures/00.png"] == [0, 1, 1]
    assert targets_by_name(several)["pictures/01.png"] == [0, 0, 0]
    chosen = load_table(images, "\n".join([lines[0], *lines[3:]]), label_columns=("blue", "green", "red"))
    assert chosen.task is Task.MULTICLASS


SPLITS = ["train", "train", "train", "val", "test"]


@pytest.mark.parametrize(
    ("column", "names"),
    [
        ("split", {}),
        ("Split", {"train": "TRAIN", "val": "Valid", "test": "Testing"}),
        ("split", {"train": "", "val": "dev"}),
        ("Usage", {"train": "Training", "val": "Validation", "test": "PrivateTest"}),
        ("set", {}),
        ("partition", {"val": "validation", "test": "evaluation"}),
    ],
)
def test_a_column_of_parts_is_honoured_in_any_spelling(
    images: Path, column: str, names: dict[str, str]
) -> None:
    lines = [f"path,label,{column}"]
    lines += [f"{row},{names.get(SPLITS[n % 5], SPLITS[n % 5])}" for n, row in enumerate(make_rows())]
    data = load_csv(images, lines)
    held = {*data.validation.names, *data.conformal.names}
    assert held == {f"pictures/{number:02}.png" for number in (3, 8, 13)}
    assert data.test.names == ("pictures/04.png", "pictures/09.png", "pictures/14.png")
    assert len(data.train) == 9


def test_columns_of_yes_and_no_are_parts_too(images: Path) -> None:
    lines = ["fname,label,is_valid".replace("fname", "name")]
    lines += [f"{row},{n % 5 == 3}" for n, row in enumerate(make_rows())]
    data = load_csv(images, lines)
    assert len(data.train) == 12
    assert {*data.validation.names, *data.conformal.names} == {
        "pictures/03.png", "pictures/08.png", "pictures/13.png",
    }  # fmt: skip


def test_a_column_whose_values_are_no_parts_is_not_read_and_named(images: Path) -> None:
    data = load_csv(
        images, ["path,label,partition", *(f"{row},{n % 3}" for n, row in enumerate(make_rows()))]
    )
    assert data.inventory.notes == (
        "the column 'partition' does not split the data: it has values that name no part, such as "
        "'0', '1', '2'",
    )


def test_images_that_the_table_does_not_name_are_counted(images: Path) -> None:
    data = load_csv(images, ["path,label", *make_rows()[:13]])
    (group,) = data.inventory.skipped_files
    assert (group.kind, group.reason) == ("in pictures/", "not named in labels.csv")
    assert group.names == ("pictures/13.png", "pictures/14.png")
    assert data.description[0].startswith("15 files found: 13 images used, 0 unreadable, 2 left out")


def test_a_path_that_several_files_fit_is_refused(images: Path) -> None:
    draw_images(images / "other", "blue", count=5)
    (images / "other" / "blue" / "0.png").rename(images / "other" / "00.png")
    with pytest.raises(
        DataError, match=r"several files: 00 matches other/00.png, pictures/00.png; write the whole"
    ):
        load_table(images, format_table("id,label", "{id},{label}"))


def test_spellings_of_a_label_that_look_the_same_are_one(images: Path) -> None:
    labels = ["cafe\u0301", "café"]
    lines = [f"pictures/{number:02}.png,{labels[number % 2]}" for number in range(10)]
    data = load_csv(images, ["path,label", *lines, *make_rows()[10:]])
    assert data.labels == ("café", "red")
    assert "'café' is written in 2 ways" in data.inventory.notes[0]


def test_labels_that_differ_in_case_need_a_word_here_too(images: Path) -> None:
    with pytest.raises(DataError, match=r"differ only in case, spaces, _ or -: 'Red' .* and 'red'"):
        load_csv(images, ["path,label", *make_rows(), "pictures/00.png,Red"])


def test_json_lines_are_read_as_hugging_face_writes_them(images: Path) -> None:
    lines = [json.dumps({"file_name": row.split(",")[0], "label": row.split(",")[1]}) for row in make_rows()]
    data = load_table(images, "\n".join(lines) + "\n\n", "metadata.jsonl")
    assert data.labels == ("blue", "green", "red")
    assert len(targets_by_name(data)) == 15
    labels = [["a"], ["a", "b"], []]
    several = [json.dumps({"file_name": f"{n:02}", "labels": labels[n % 3]}) for n in range(15)]
    assert load_table(images, "\n".join(several), "metadata.jsonl").task is Task.MULTILABEL
    for spoilt, message in (("{", "line 2: this is not JSON"), ("[1]", "line 2: this is not a JSON object")):
        with pytest.raises(DataError, match=message):
            load_table(images, f"{lines[0]}\n{spoilt}", "metadata.jsonl")


def test_a_table_in_each_part_makes_one_set(tmp_path: Path) -> None:
    for seed, part in enumerate(("train", "test")):
        folder = draw_images(tmp_path / "set" / part, "x", colours=("red",), count=6, seed=seed) / "x"
        lines = [f"{number}.png,{'ab'[number % 2]}" for number in range(6)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
        for file in folder.iterdir():
            file.rename(tmp_path / "set" / part / file.name)
        folder.rmdir()
    data = load_dataset(tmp_path / "set", size=16, validation=0.2, seed=0)
    assert (data.name, data.labels, len(data.train), len(data.test)) == ("set", ("a", "b"), 4, 6)
    assert {name.split("/")[0] for name in data.test.names} == {"test"}
    assert data.inventory.parts == {Part.TRAIN: ("metadata.csv",), Part.TEST: ("metadata.csv",)}


def test_neither_folders_nor_a_table_say_the_labels(tmp_path: Path) -> None:
    draw_images(tmp_path / "set", "train", "val", colours=("red", "blue"))
    (tmp_path / "set" / "classes.csv").write_text("number,word\n1,cat")
    with pytest.raises(
        DataError, match=r"directly in train/ and val/: .*; the CSV file there does not give the labels"
    ):
        load_dataset(tmp_path / "set", size=16, validation=0.2, seed=0)


def test_a_contest_s_files_are_told_apart(images: Path) -> None:
    """Its test has no labels, and its example of an answer is none."""
    (images / "train.csv").write_text(format_table("image_id,label", "{id},{label}"))
    (images / "test.csv").write_text("image_id,width\n90,1\n91,2")
    (images / "sample_submission.csv").write_text("image_id,label\n90,red")
    data = load_dataset(images, size=16, validation=0.2, seed=0)
    assert len(targets_by_name(data)) == 15
    (images / "more.csv").write_text("image_id,label\n90,red")
    (images / "train.csv").rename(images / "labels.csv")
    with pytest.raises(
        DataError, match=r"several CSV files: labels.csv, more.csv, .*; pass the one with the labels"
    ):
        load_dataset(images, size=16, validation=0.2, seed=0)


def test_a_file_that_cannot_be_decoded_is_skipped(images: Path) -> None:
    (images / "pictures" / "07.png").write_bytes(b"")
    data = load_csv(images, ["path,label", *make_rows()])
    assert data.unreadable_files == ("pictures/07.png: the image is empty",)
    assert len(targets_by_name(data)) == 14
