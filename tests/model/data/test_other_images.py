"""Images of other things: a folder that is no label of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fovea.model.data.choices import Choices
from fovea.model.data.dataset import DataError, Dataset, load_dataset
from tests.training import draw_images


def load(folder: Path, other: str | None = "noise") -> Dataset:
    return load_dataset(folder, size=16, validation=0.2, seed=0, choices=Choices(other=other))


def draw_labels(folder: Path, *, other_count: int = 20) -> Path:
    """Draw ten images of three labels, and others in a folder whose name sorts between theirs."""
    draw_images(folder, "blue", "red", colours=("blue", "red"), count=10)
    draw_images(folder, "zebra", colours=("green",), count=10, seed=1)
    draw_images(folder, "noise", colours=("green",), count=other_count, seed=2)
    return folder


def test_other_images_are_no_label(tmp_path: Path) -> None:
    data = load(draw_labels(tmp_path))
    assert data.labels == ("blue", "red", "zebra")
    assert data.label_counts == (8, 8, 8)
    assert data.other is not None and data.held_out_other is not None
    assert (len(data.other), len(data.held_out_other)) == (16, 4)
    assert all(name.startswith("noise/") for part in (data.other, data.held_out_other) for name in part.names)
    for part in (data.train, data.validation, data.conformal):
        labels = [data.labels[target] for target in part.targets.tolist()]
        assert labels == [name.split("/")[0] for name in part.names]
        assert part.pixels[torch.arange(len(part))].shape == (len(part), 16, 16, 3)
    assert "50 images used" in data.description[0]
    assert "images of other things: 20" in data.description


def test_without_the_option_the_folder_is_a_label(tmp_path: Path) -> None:
    data = load(draw_labels(tmp_path), other=None)
    assert data.labels == ("blue", "noise", "red", "zebra")
    assert data.other is data.held_out_other is None


def test_many_other_images_are_no_imbalance(tmp_path: Path) -> None:
    folder = draw_labels(tmp_path, other_count=60)
    assert load(folder).warnings == ()
    assert "imbalanced" in load(folder, other=None).warnings[0]


def test_label_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="--other nois: no image has this label; the labels are blue, noise, red"
    ):
        load(draw_labels(tmp_path), other="nois")


def test_two_labels_are_too_few(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="2 labels would remain, and the score of `known` needs 3; leave --other out"
    ):
        load(draw_images(tmp_path, "blue", "green", "red"), other="red")


def test_images_with_several_labels_have_no_other_things(tmp_path: Path) -> None:
    draw_images(tmp_path, "blue", "red", colours=("blue", "red"))
    rows = [f"blue/{number}.png,{labels}" for number, labels in enumerate(["a", "b", "a|b", "c", "a"])]
    (tmp_path / "labels.csv").write_text("\n".join(["path,labels", *rows]))
    with pytest.raises(DataError, match="these images have several labels, and other things have none"):
        load_dataset(tmp_path / "labels.csv", size=16, validation=0.2, seed=0, choices=Choices(other="a"))
