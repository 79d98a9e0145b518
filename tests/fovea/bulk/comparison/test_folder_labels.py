"""Folders of images, and the labels that they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from fovea.bulk.comparison.folder_labels import FolderLabels, find_folder


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("photos/cat/1.jpg", "cat"),
        ("/photos/cat/1.jpg", "cat"),
        ("photos/dog/../cat/1.jpg", "cat"),
        ("photos.zip/train/cat/1.jpg", "cat"),
        ("photos.zip/1.jpg", "photos.zip"),
        ("s3://bucket/photos/cat/1.jpg", "cat"),
        ("s3://bucket//cat//1.jpg", "cat"),
        ("s3://bucket/1.jpg", None),
        ("https://host/sea%20lion/1.jpg?token=a/b/c#d/e", "sea lion"),
        ("https://host/1.jpg?token=a/b", None),
        ("/1.jpg", None),
        ("a\udcff/1.jpg", "a?"),
    ],
)
def test_last_folder_is_found_in_paths_and_addresses(path: str, folder: str | None) -> None:
    assert find_folder(path) == folder


def test_folder_of_a_plain_name_is_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cat" / "new").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cat" / "new")
    assert [find_folder(path) for path in ("1.jpg", "./1.jpg", "../1.jpg")] == ["new", "new", "cat"]


@pytest.mark.parametrize(
    ("folder", "index"),
    [
        ("sea lion", 0),
        ("Sea_Lion", 0),
        ("sea-lion", 0),
        (" sea lion\u200b", 0),
        ("sealion", None),
        ("Cafe\u0301", 1),
        ("Crane", 3),
        ("crane", 2),
        ("CRANE", None),
        ("", None),
    ],
)
def test_folders_match_labels_in_any_spelling_that_is_not_ambiguous(folder: str, index: int | None) -> None:
    assert FolderLabels(("sea lion", "café", "crane", "Crane")).find_index(folder) == index


def test_hint_names_the_nearest_label_or_all_labels_of_one_spelling() -> None:
    labels = FolderLabels(("sea lion", "crane", "Crane"))
    assert labels.explain_mismatch("sea lions") == "the nearest label is 'sea lion'"
    assert labels.explain_mismatch("CRANE").startswith("'crane' and 'Crane' are both spelled like it")
    assert labels.explain_mismatch("holiday") == ""
