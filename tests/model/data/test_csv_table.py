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
def image_folder(tmp_path: Path) -> Path:
    """A folder with `pictures/<number>.png`, five blue, five green, then five red ones."""
    (tmp_path / "pictures").mkdir()
    square_folder = draw_images(tmp_path / "drawn")
    for number, (label, row) in enumerate((label, row) for label in COLOURS for row in range(5)):
        (square_folder / label / f"{row}.png").rename(tmp_path / "pictures" / f"{number:02}.png")
    for label in COLOURS:
        (square_folder / label).rmdir()
    square_folder.rmdir()
    return tmp_path


def make_rows(labels: Sequence[str] = tuple(COLOURS)) -> list[str]:
    """Return one row for each image, with its label."""
    return [f"pictures/{number:02}.png,{labels[number // 5]}" for number in range(15)]


def load_csv(folder: Path, lines: Sequence[str], encoding: str = "utf-8", end: str = "\n") -> Dataset:
    """Write these lines to a CSV file and load the data set that it describes."""
    path = folder / "labels.csv"
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return load_dataset(path, size=16, validation=0.2, seed=0)


def map_targets_by_name(data: Dataset) -> dict[str, list[float]]:
    """Return the targets by file name, and check that the pixels are those of the file."""
    targets: dict[str, list[float]] = {}
    for part in (data.train, data.validation, data.conformal, data.test):
        brightest = stack_pixels(part.pixels).float().mean(dim=(1, 2)).argmax(dim=1)  # 0 is red, 2 is blue
        for name, target, colour in zip(part.names, part.targets, brightest.tolist(), strict=True):
            assert int(name[-6:-4]) // 5 == 2 - colour
            assert name not in targets
            targets[name] = [float(value) for value in target.reshape(-1)]
    return targets


def test_csv_rows_give_images_and_labels(image_folder: Path) -> None:
    data = load_csv(image_folder, ["path,label", *make_rows()])
    assert (data.name, data.labels, data.task) == ("labels.csv", ("blue", "green", "red"), Task.MULTICLASS)
    assert data.train.targets.dtype == torch.int64
    assert map_targets_by_name(data) == {f"pictures/{number:02}.png": [number // 5] for number in range(15)}


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
def test_csv_dialects_and_line_ends_are_detected(
    image_folder: Path, encoding: str, end: str, header: str, row: str
) -> None:
    lines = [row.format(*line.split(",")).replace('" ;', '";') for line in make_rows(("süß", "green", "rød"))]
    data = load_csv(image_folder, [header, *lines[:7], "", *lines[7:]], encoding, end)
    assert data.labels == ("green", "rød", "süß")
    assert len(map_targets_by_name(data)) == 15


def test_two_labels_make_a_binary_task(image_folder: Path) -> None:
    assert load_csv(image_folder, ["path,label", *make_rows()[:10]]).task is Task.BINARY


def test_split_column_sets_the_test_part(image_folder: Path) -> None:
    splits = ["train", "", "Val", "test", "train"] * 3
    lines = [f"{row},{split}" for row, split in zip(make_rows(), splits, strict=True)]
    data = load_csv(image_folder, ["path,label,split", *lines])
    assert data.test.names == ("pictures/03.png", "pictures/08.png", "pictures/13.png")
    assert data.test.targets.tolist() == [0, 1, 2]
    assert len(map_targets_by_name(data)) == 15


@pytest.mark.parametrize("joined_labels", ["a;b", "b|a", " a ; b; ", None])
def test_several_labels_per_image_make_a_multilabel_task(
    image_folder: Path, joined_labels: str | None
) -> None:
    labels = [["a"], ["b"], ["a", "b"], []] * 4
    lines = []
    for number, image_labels in enumerate(labels[:15]):
        name = f"pictures/{number:02}.png"
        if len(image_labels) < 2:
            lines.append(f"{name},{''.join(image_labels)}")
        elif joined_labels:
            lines.append(f'{name},"{joined_labels}"')
        else:
            lines += [f"{name},a", f"./{name},b", f"{name},a"]
    data = load_csv(image_folder, ["path,label", *lines])
    assert (data.task, data.labels) == (Task.MULTILABEL, ("a", "b"))
    assert data.train.targets.dtype == torch.float32
    assert data.train.targets.shape == (len(data.train), 2)
    assert map_targets_by_name(data) == {
        f"pictures/{number:02}.png": [float("a" in image_labels), float("b" in image_labels)]
        for number, image_labels in enumerate(labels[:15])
    }
    assert data.label_counts == tuple(data.train.targets.sum(dim=0).tolist())
    assert (data.validation.targets.sum(dim=0) > 0).all()


def test_folder_with_one_csv_file_is_read_from_it(image_folder: Path) -> None:
    expected = map_targets_by_name(load_csv(image_folder, ["path,label", *make_rows()]))
    data = load_dataset(image_folder, size=16, validation=0.2, seed=0)
    assert data.name == "labels.csv"
    assert map_targets_by_name(data) == expected


def test_label_folders_take_precedence_over_a_csv_file(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "squares")
    (folder / "notes.csv").write_text("path,label\nred/0.png,mine\n")
    assert load_dataset(folder, size=16, validation=0.2, seed=0).labels == ("blue", "green", "red")


def test_absolute_paths_are_accepted(image_folder: Path) -> None:
    lines = [f"{image_folder}/{row}" for row in make_rows()]
    assert len(map_targets_by_name(load_csv(image_folder, ["path,label", *lines]))) == 15


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
def test_unusable_csv_file_is_refused_in_one_line(image_folder: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as error_info:
        load_csv(image_folder, lines)
    assert "\n" not in str(error_info.value)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_windows_1252_and_utf_16_files_are_read(image_folder: Path, encoding: str) -> None:
    data = load_csv(
        image_folder,
        ["path;label", *(row.replace(",", ";") for row in make_rows(("blue", "green", "süß")))],
        encoding,
    )
    assert data.labels == ("blue", "green", "süß")
    assert len(map_targets_by_name(data)) == 15
    notes = () if encoding == "utf-16" else (
        "labels.csv is not UTF-8 and was read as Windows-1252: line 12 is 'pictures/10.png;süß'",
    )  # fmt: skip
    assert data.inventory.notes == notes


def test_unknown_encoding_is_refused_with_the_line_number(image_folder: Path) -> None:
    lines = ["path,label", *make_rows()]
    (image_folder / "labels.csv").write_bytes("\n".join(lines).encode().replace(b"red", b"r\x81d", 1))
    with pytest.raises(DataError, match=r"labels.csv, line 12: this is neither UTF-8 nor Windows-1252; save"):
        load_dataset(image_folder / "labels.csv", size=16, validation=0.2, seed=0)


# --- tables of other tools -----------------------------------------------------------------------


def load_table(folder: Path, content: str, name: str = "labels.csv", **choices: Any) -> Dataset:
    """Write a table of this content and load the data set that it describes."""
    (folder / name).write_text(content)
    return load_dataset(folder / name, size=16, validation=0.2, seed=0, choices=Choices(**choices))


def format_table(header: str, row: str, labels: Sequence[str] = tuple(COLOURS)) -> str:
    """Return the header, and `row` formatted with {path}, {stem}, {name}, {label} and {n} of each image."""
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
def test_common_table_formats_are_read(image_folder: Path, header: str, row: str) -> None:
    data = load_table(image_folder, format_table(header, row))
    assert (data.labels, data.task) == (("blue", "green", "red"), Task.MULTICLASS)
    assert map_targets_by_name(data) == {f"pictures/{number:02}.png": [number // 5] for number in range(15)}


def test_completed_paths_are_noted(image_folder: Path) -> None:
    assert load_table(image_folder, format_table("path,label", "{path},{label}")).inventory.notes == ()
    data = load_table(image_folder, format_table("id,breed", "{id},{label}"))
    assert data.inventory.notes == ("15 paths completed: 00 is pictures/00.png",)
    assert "labels are in the column 'breed': blue, green, red" in data.description


def test_paths_may_start_with_the_data_set_folder(image_folder: Path) -> None:
    data = load_table(image_folder, format_table("path,label", f"{image_folder.name}/{{path}},{{label}}"))
    assert len(map_targets_by_name(data)) == 15


@pytest.mark.parametrize(
    ("choices", "labels"),
    [
        ({"path_column": "where", "label_columns": ("what",)}, ("blue", "green", "red")),
        ({"path_column": "WHERE", "label_columns": ("label",)}, ("a", "b", "c")),
    ],
)
def test_path_and_label_columns_can_be_chosen(
    image_folder: Path, choices: dict[str, Any], labels: tuple[str, ...]
) -> None:
    content = format_table("where,what,label,x,path", "{path},{label},L,0.5,nowhere")
    for number in range(15):
        content = content.replace(",L,", f",{'abc'[number // 5]},", 1)
    assert load_table(image_folder, content, **choices).labels == labels


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
def test_unclear_columns_are_refused_in_one_line(
    image_folder: Path, header: str, choices: dict[str, Any], message: str
) -> None:
    row = "{path},x,5" if header.count(",") == 2 else "{path},{label}"
    with pytest.raises(DataError, match=message) as error_info:
        load_table(image_folder, format_table(header, row), **choices)
    assert "\n" not in str(error_info.value)


@pytest.mark.parametrize(("true", "false"), [("1", "0"), ("1.0", "0.0"), ("True", "False"), ("1", "-1")])
def test_one_column_per_label_is_read(image_folder: Path, true: str, false: str) -> None:
    lines = ["image,blue,green,Red"]
    for number in range(15):
        flags = [true if number // 5 == label else false for label in range(3)]
        lines.append(f"{number:02},{','.join(flags)}")
    data = load_table(image_folder, "\n".join(lines))
    assert (data.labels, data.task) == (("Red", "blue", "green"), Task.MULTICLASS)
    assert "labels are in the columns 'blue', 'green', 'Red': Red, blue, green" in data.description
    lines[1] = f"00,{true},{true},{false}"
    lines[2] = f"01,{false},{false},{false}"
    multilabel_data = load_table(image_folder, "\n".join(lines))
    assert multilabel_data.task is Task.MULTILABEL
    assert map_targets_by_name(multilabel_data)["pictures/00.png"] == [0, 1, 1]
    assert map_targets_by_name(multilabel_data)["pictures/01.png"] == [0, 0, 0]
    multiclass_data = load_table(
        image_folder, "\n".join([lines[0], *lines[3:]]), label_columns=("blue", "green", "red")
    )
    assert multiclass_data.task is Task.MULTICLASS


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
def test_split_column_accepts_common_spellings(
    image_folder: Path, column: str, names: dict[str, str]
) -> None:
    lines = [f"path,label,{column}"]
    lines += [
        f"{row},{names.get(SPLITS[number % 5], SPLITS[number % 5])}" for number, row in enumerate(make_rows())
    ]
    data = load_csv(image_folder, lines)
    held_out_names = {*data.validation.names, *data.conformal.names}
    assert held_out_names == {f"pictures/{number:02}.png" for number in (3, 8, 13)}
    assert data.test.names == ("pictures/04.png", "pictures/09.png", "pictures/14.png")
    assert len(data.train) == 9


def test_is_valid_column_sets_the_held_out_part(image_folder: Path) -> None:
    lines = ["fname,label,is_valid"]
    lines += [f"{row},{number % 5 == 3}" for number, row in enumerate(make_rows())]
    data = load_csv(image_folder, lines)
    assert len(data.train) == 12
    assert {*data.validation.names, *data.conformal.names} == {
        "pictures/03.png", "pictures/08.png", "pictures/13.png",
    }  # fmt: skip


def test_split_column_with_unknown_values_is_noted(image_folder: Path) -> None:
    data = load_csv(
        image_folder,
        ["path,label,partition", *(f"{row},{number % 3}" for number, row in enumerate(make_rows()))],
    )
    assert data.inventory.notes == (
        "the column 'partition' does not split the data: it has values that name no part, such as "
        "'0', '1', '2'",
    )


def test_images_missing_from_the_table_are_counted(image_folder: Path) -> None:
    data = load_csv(image_folder, ["path,label", *make_rows()[:13]])
    (group,) = data.inventory.skipped_files
    assert (group.kind, group.reason) == ("in pictures/", "not named in labels.csv")
    assert group.names == ("pictures/13.png", "pictures/14.png")
    assert data.description[0].startswith("15 files found: 13 images used, 0 unreadable, 2 left out")


def test_ambiguous_path_is_refused(image_folder: Path) -> None:
    draw_images(image_folder / "other", "blue", count=5)
    (image_folder / "other" / "blue" / "0.png").rename(image_folder / "other" / "00.png")
    with pytest.raises(
        DataError, match=r"several files: 00 matches other/00.png, pictures/00.png; write the whole"
    ):
        load_table(image_folder, format_table("id,label", "{id},{label}"))


def test_equivalent_unicode_spellings_are_one_label(image_folder: Path) -> None:
    labels = ["cafe\u0301", "café"]
    lines = [f"pictures/{number:02}.png,{labels[number % 2]}" for number in range(10)]
    data = load_csv(image_folder, ["path,label", *lines, *make_rows()[10:]])
    assert data.labels == ("café", "red")
    assert "'café' is written in 2 ways" in data.inventory.notes[0]


def test_labels_differing_only_in_case_are_refused(image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"differ only in case, spaces, _ or -: 'Red' .* and 'red'"):
        load_csv(image_folder, ["path,label", *make_rows(), "pictures/00.png,Red"])


def test_hugging_face_json_lines_are_read(image_folder: Path) -> None:
    lines = [json.dumps({"file_name": row.split(",")[0], "label": row.split(",")[1]}) for row in make_rows()]
    data = load_table(image_folder, "\n".join(lines) + "\n\n", "metadata.jsonl")
    assert data.labels == ("blue", "green", "red")
    assert len(map_targets_by_name(data)) == 15
    labels = [["a"], ["a", "b"], []]
    multilabel_lines = [
        json.dumps({"file_name": f"{number:02}", "labels": labels[number % 3]}) for number in range(15)
    ]
    assert load_table(image_folder, "\n".join(multilabel_lines), "metadata.jsonl").task is Task.MULTILABEL
    for damaged_line, message in (
        ("{", "line 2: this is not JSON"),
        ("[1]", "line 2: this is not a JSON object"),
    ):
        with pytest.raises(DataError, match=message):
            load_table(image_folder, f"{lines[0]}\n{damaged_line}", "metadata.jsonl")


def test_tables_in_part_folders_make_one_data_set(tmp_path: Path) -> None:
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


def test_part_folders_and_a_csv_without_labels_are_refused(tmp_path: Path) -> None:
    draw_images(tmp_path / "set", "train", "val", colours=("red", "blue"))
    (tmp_path / "set" / "classes.csv").write_text("number,word\n1,cat")
    with pytest.raises(
        DataError, match=r"directly in train/ and val/: .*; the CSV file there does not give the labels"
    ):
        load_dataset(tmp_path / "set", size=16, validation=0.2, seed=0)


def test_training_table_of_a_contest_is_recognised(image_folder: Path) -> None:
    """The table of the test has no labels, and the sample submission holds no training labels."""
    (image_folder / "train.csv").write_text(format_table("image_id,label", "{id},{label}"))
    (image_folder / "test.csv").write_text("image_id,width\n90,1\n91,2")
    (image_folder / "sample_submission.csv").write_text("image_id,label\n90,red")
    data = load_dataset(image_folder, size=16, validation=0.2, seed=0)
    assert len(map_targets_by_name(data)) == 15
    (image_folder / "more.csv").write_text("image_id,label\n90,red")
    (image_folder / "train.csv").rename(image_folder / "labels.csv")
    with pytest.raises(
        DataError, match=r"several CSV files: labels.csv, more.csv, .*; pass the one with the labels"
    ):
        load_dataset(image_folder, size=16, validation=0.2, seed=0)


def test_undecodable_image_is_skipped(image_folder: Path) -> None:
    (image_folder / "pictures" / "07.png").write_bytes(b"")
    data = load_csv(image_folder, ["path,label", *make_rows()])
    assert data.unreadable_files == ("pictures/07.png: the image is empty",)
    assert len(map_targets_by_name(data)) == 14
