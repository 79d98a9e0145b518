"""Names of folders for labels, and of files for images."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fovea.bulk.sorting.names import generate_names, name_file, name_folders


def test_ordinary_labels_keep_their_names() -> None:
    labels = ("cat", "sea lion", "tench, Tinca tinca", "crème brûlée", "猫")
    assert name_folders(labels) == {label: label for label in labels}


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("a/b", "a_b"),
        ("..", "_"),
        ("../../etc", "_._.._etc"),
        (".hidden", "_hidden"),
        ("", "_"),
        ("  ", "_"),
        ("con", "con_"),
        ("NUL.txt", "NUL.txt_"),
        ("end. ", "end"),
        ("new\nline\x1b[0m", "new_line_[0m"),
        ("half \ud800", "half _"),
        ("é" * 100, "é" * 60),
    ],
)
def test_other_labels_get_safe_names(label: str, name: str) -> None:
    assert name_folders([label]) == {label: name}


def test_labels_whose_names_would_be_equal_get_different_folders() -> None:
    labels = ("a/b", "a:b", "A_B", "Crane", "crane", "x" * 200, "x" * 300)
    names = name_folders(labels)
    assert list(names.values())[:5] == ["a_b", "a_b-2", "A_B-3", "Crane", "crane-2"]
    assert len({name.casefold() for name in names.values()}) == len(labels)


@given(st.lists(st.text(st.characters(), max_size=300), min_size=1, max_size=5, unique=True))
def test_every_label_becomes_one_folder_inside_the_target(labels: list[str]) -> None:
    names = name_folders(labels)
    assert list(names) == labels
    for name in names.values():
        assert name == os.path.basename(name)  # noqa: PTH119
        assert not name.startswith(".")
        assert 0 < len(name.encode()) <= 255


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("photos/cat/1.jpg", "1.jpg"),
        ("1.jpg", "1.jpg"),
        ("photos.zip/cat/1.jpg", "1.jpg"),
        ("https://host/cat/my%20photo.jpg?token=a/b.png", "my photo.jpg"),
        ("https://host/%2e%2e%2fpasswd", "passwd"),
        ("s3://bucket/1.jpg", "1.jpg"),
        ("photos.zip/..", "image"),
        ("photos.zip/a\\..\\b.jpg", "a_.._b.jpg"),
        ("photos/new\nline.jpg", "new_line.jpg"),
        ("photos/" + "x" * 250 + ".jpeg", "x" * 215 + ".jpeg"),
        ("https://host/", "image"),
    ],
)
def test_image_becomes_a_file_inside_its_folder(path: str, name: str) -> None:
    assert name_file(path) == name


def test_further_names_are_the_same_in_each_run_and_keep_the_ending() -> None:
    names = list(islice(generate_names("1.jpg", "a/1.jpg"), 4))
    assert names == list(islice(generate_names("1.jpg", "a/1.jpg"), 4))
    assert len(set(names)) == 4
    assert all(Path(name).suffix == ".jpg" for name in names)
    assert names[1] != list(islice(generate_names("1.jpg", "b/1.jpg"), 2))[1]
