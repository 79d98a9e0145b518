"""Labels and parts, from the folders that images lie in."""

from __future__ import annotations

import pytest

from fovea.model.data.examples import DataError
from fovea.model.data.folders import FolderLayout, detect_layout
from fovea.model.data.inventory import Part
from fovea.model.data.parts import parse_part

TRAIN, VALIDATION, TEST = Part


def make_layout(*folders: str, depth: int | None = None) -> FolderLayout:
    """Return the layout that is detected for two images in each folder."""
    prefixes = [f"{folder}/" if folder else "" for folder in folders]
    return detect_layout([f"{folder}{number}.png" for folder in prefixes for number in (0, 1)], depth)


def collect_placements(layout: FolderLayout) -> set[tuple[str, Part]]:
    return {(placement.label, placement.part) for placement in layout.placements.values()}


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (TRAIN, "train Train TRAINING training_set trainset TrainData train2017 train-01 tRAIN Train_Images"),
        (TRAIN, "trainval train_val training-split TrainingImages train.data"),
        (VALIDATION, "val Valid VALIDATION validation_set dev val2017 valid-2 ValSet validation.images"),
        (TEST, "test Testing test_set testdata test1 PublicTest eval Evaluation holdout hold-out held_out"),
        (None, "cat test_tube train_station bullet_train trains devices images seg_train 1 latest contest"),
    ],
)  # fmt: skip
def test_common_part_names_are_recognised(part: Part | None, names: str) -> None:
    assert {name: parse_part(name) for name in names.split()} == dict.fromkeys(names.split(), part)
    assert parse_part(" Test set ") is TEST
    assert parse_part("ｔｅｓｔ") is TEST  # full width


@pytest.mark.parametrize("parent", ["", "dataset/", "pets/v2/"])
@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("train", "test"), (TRAIN, TEST)),
        (("Training", "Testing"), (TRAIN, TEST)),
        (("train", "valid", "test"), (TRAIN, VALIDATION, TEST)),
        (("TRAIN", "dev"), (TRAIN, VALIDATION)),
        (("training_set/training_set", "test_set/test_set"), (TRAIN, TEST)),
        (("seg_train/seg_train", "seg_test/seg_test"), (TRAIN, TEST)),
        (("asl_alphabet_train", "asl_alphabet_test"), (TRAIN, TEST)),
        (("fold1_train", "fold1_val"), (TRAIN, VALIDATION)),
    ],
)
def test_part_folders_are_recognised_below_parent_folders(
    parent: str, names: tuple[str, ...], parts: tuple[Part, ...]
) -> None:
    folders = [f"{parent}{name}/{label}" for name in names for label in ("cat", "dog")]
    layout = make_layout(*folders)
    assert collect_placements(layout) == {(label, part) for part in parts for label in ("cat", "dog")}
    assert not layout.skipped_images
    assert not layout.notes
    part_folders = {placement.part_folder for placement in layout.placements.values()}
    assert part_folders == {f"{parent}{name}/" for name in names}


def test_part_folders_may_lie_below_labels() -> None:
    layout = make_layout("x/cat/train", "x/cat/val", "x/dog/train", "x/dog/val")
    assert collect_placements(layout) == {
        (label, part) for label in ("cat", "dog") for part in (TRAIN, VALIDATION)
    }
    assert {placement.part_folder for placement in layout.placements.values()} == {"…/train/", "…/val/"}


def test_test_folder_with_the_same_labels_is_a_part() -> None:
    assert collect_placements(make_layout("cat", "dog", "test/cat", "test/dog")) == {
        ("cat", TRAIN), ("dog", TRAIN), ("cat", TEST), ("dog", TEST),
    }  # fmt: skip


def test_parts_inside_a_test_folder_are_kept() -> None:
    layout = make_layout("test/train/cat", "test/train/dog", "test/val/cat")
    assert collect_placements(layout) == {("cat", TRAIN), ("dog", TRAIN), ("cat", VALIDATION)}


def test_train_folder_among_labels_is_a_label() -> None:
    layout = make_layout("bus", "car", "train")
    assert collect_placements(layout) == {("bus", TRAIN), ("car", TRAIN), ("train", TRAIN)}
    assert layout.notes == ("train/ is read as a label, because it lies among labels: bus/, car/",)
    nested_layout = make_layout(
        *(f"{part}/{label}" for part in ("train", "test") for label in ("bus", "car", "train"))
    )
    assert collect_placements(nested_layout) == {
        (label, part) for part in (TRAIN, TEST) for label in ("bus", "car", "train")
    }


@pytest.mark.parametrize(
    ("folders", "skipped_kind"),
    [
        (("train/cat", "train/dog", "test/cat", "unlabeled"), "in unlabeled/"),
        (("train/cat", "train/dog", "extra/cat"), "in extra/"),
        (("seg_train/seg_train/cat", "seg_train/seg_train/dog", "seg_test/x", "seg_pred/p"), "in seg_pred/"),
        (("d/train/cat", "d/train/dog", "d/old/cat"), "in d/old/"),
    ],
)  # fmt: skip
def test_folders_beside_the_parts_are_skipped_with_reason(
    folders: tuple[str, ...], skipped_kind: str
) -> None:
    layout = make_layout(*folders)
    assert {label for label, _ in collect_placements(layout)} <= {"cat", "dog", "x"}
    assert {kind for kind, _ in layout.skipped_images.values()} == {skipped_kind}
    assert all(
        "the folder is in no part: it lies beside " in reason for _, reason in layout.skipped_images.values()
    )


def test_unknown_folders_above_labels_are_noted() -> None:
    layout = make_layout("animals/cat", "animals/dog", "plants/rose")
    assert {label for label, _ in collect_placements(layout)} == {"cat", "dog", "rose"}
    (note,) = layout.notes
    assert note.endswith("are used neither as labels nor as parts: animals/, plants/")
    assert make_layout("photos/cat", "photos/dog").notes == ()  # the set's own folder


@pytest.mark.parametrize(
    ("folders", "kind", "reason"),
    [
        (("", "cat", "dog"), "at the top", "images above the labels have no label"),
        (("pets", "pets/cat", "pets/dog"), "in pets/", "images above the labels have no label"),
        (("train", "train/cat", "train/dog"), "in train/", "images directly in a part have no label"),
        (("train/cat", "train/dog", "test"), "in test/", "images directly in a part have no label"),
    ],
)
def test_images_without_a_label_are_skipped(folders: tuple[str, ...], kind: str, reason: str) -> None:
    layout = make_layout(*folders)
    assert collect_placements(layout) == {("cat", TRAIN), ("dog", TRAIN)}
    assert set(layout.skipped_images.values()) == {(kind, reason)}
    assert len(layout.skipped_images) == 2


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ("train", "val"),
            "images lie directly in train/ and val/: these are parts of a data set, not labels",
        ),
        (("flat/Train", "flat/Test"), "directly in flat/Train/ and flat/Test/: these are parts"),
        (("images/train", "images/val"), "directly in images/train/ and images/val/: these are parts"),
        (("images/train", "masks/train"), "directly in images/train/ and masks/train/: these are parts"),
        (("images", "masks"), "images lie in images/ and masks/, as in a data set for detection"),
        (("train/images", "train/labels"), "images lie in images/ and labels/, as in a data set"),
        (("cat", "dog", "test"), "test/ is named like a part .* lies beside cat/, dog/: .*--label-depth 1"),
        (("cat", "train"), "train/ is named like a part .* lies beside cat/"),
        (("train/cat", "train/dog", "train/eval"), "train/eval/ is named like a part .*--label-depth 2"),
        (
            ("cat", "cat/tabby", "dog"),
            "depths: the label of cat/0.png would be 'cat', and that of cat/tabby/.* 'tabby'; pass",
        ),
        (("dog", "cats/tabby", "cats/siamese"), "labels lie at several depths.*--label-depth 1"),
        (("train/test/cat", "train/cat", "val/cat"), "lie in train/ and in test/, which are different parts"),
    ],
)  # fmt: skip
def test_ambiguous_layout_is_refused(folders: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_layout(*folders)


def test_label_depth_selects_the_label_folder() -> None:
    deep_layout = make_layout("cat", "cat/tabby", "dog/puppies", "", depth=1)
    assert collect_placements(deep_layout) == {("cat", TRAIN), ("dog", TRAIN)}
    assert set(deep_layout.skipped_images.values()) == {("at the top", "images above folder 1 have no label")}
    split_layout = make_layout("train/cat/tabby", "train/dog", "test/dog", depth=2)
    assert collect_placements(split_layout) == {("cat", TRAIN), ("dog", TRAIN), ("dog", TEST)}
    flat_layout = make_layout("test", "train", "eval", depth=1)
    assert collect_placements(flat_layout) == {("test", TRAIN), ("train", TRAIN), ("eval", TRAIN)}
