"""Labels and parts by the folders that images lie in."""

from __future__ import annotations

import pytest

from fovea.model.data.examples import DataError
from fovea.model.data.folders import FolderLayout, detect_layout
from fovea.model.data.inventory import Part
from fovea.model.data.parts import parse_part

TRAIN, VALIDATION, TEST = Part


def make_arrangement(*folders: str, depth: int | None = None) -> FolderLayout:
    """Two images in each of the folders."""
    above = [f"{folder}/" if folder else "" for folder in folders]
    return detect_layout([f"{folder}{number}.png" for folder in above for number in (0, 1)], depth)


def placement_set(arrangement: FolderLayout) -> set[tuple[str, Part]]:
    return {(placement.label, placement.part) for placement in arrangement.placements.values()}


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
def test_the_usual_names_of_parts_are_known_and_no_others(part: Part | None, names: str) -> None:
    assert {name: parse_part(name) for name in names.split()} == dict.fromkeys(names.split(), part)
    assert parse_part(" Test set ") is TEST
    assert parse_part("ｔｅｓｔ") is TEST  # full width


@pytest.mark.parametrize("above", ["", "dataset/", "pets/v2/"])
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
def test_parts_are_known_at_the_top_or_folders_down(
    above: str, names: tuple[str, ...], parts: tuple[Part, ...]
) -> None:
    folders = [f"{above}{name}/{label}" for name in names for label in ("cat", "dog")]
    arrangement = make_arrangement(*folders)
    assert placement_set(arrangement) == {(label, part) for part in parts for label in ("cat", "dog")}
    assert not arrangement.skipped_images
    assert not arrangement.notes
    wheres = {placement.part_folder for placement in arrangement.placements.values()}
    assert wheres == {f"{above}{name}/" for name in names}


def test_parts_may_be_below_the_labels() -> None:
    arrangement = make_arrangement("x/cat/train", "x/cat/val", "x/dog/train", "x/dog/val")
    assert placement_set(arrangement) == {
        (label, part) for label in ("cat", "dog") for part in (TRAIN, VALIDATION)
    }
    assert {placement.part_folder for placement in arrangement.placements.values()} == {"…/train/", "…/val/"}


def test_a_test_folder_beside_the_labels_is_a_part_where_it_has_the_same_labels() -> None:
    assert placement_set(make_arrangement("cat", "dog", "test/cat", "test/dog")) == {
        ("cat", TRAIN), ("dog", TRAIN), ("cat", TEST), ("dog", TEST),
    }  # fmt: skip


def test_a_whole_set_in_a_folder_test_keeps_its_parts() -> None:
    arrangement = make_arrangement("test/train/cat", "test/train/dog", "test/val/cat")
    assert placement_set(arrangement) == {("cat", TRAIN), ("dog", TRAIN), ("cat", VALIDATION)}


def test_a_vehicle_is_a_label_and_that_is_said() -> None:
    arrangement = make_arrangement("bus", "car", "train")
    assert placement_set(arrangement) == {("bus", TRAIN), ("car", TRAIN), ("train", TRAIN)}
    assert arrangement.notes == ("train/ is read as a label, because it lies among labels: bus/, car/",)
    both = make_arrangement(
        *(f"{part}/{label}" for part in ("train", "test") for label in ("bus", "car", "train"))
    )
    assert placement_set(both) == {
        (label, part) for part in (TRAIN, TEST) for label in ("bus", "car", "train")
    }


@pytest.mark.parametrize(
    ("folders", "stray"),
    [
        (("train/cat", "train/dog", "test/cat", "unlabeled"), "in unlabeled/"),
        (("train/cat", "train/dog", "extra/cat"), "in extra/"),
        (("seg_train/seg_train/cat", "seg_train/seg_train/dog", "seg_test/x", "seg_pred/p"), "in seg_pred/"),
        (("d/train/cat", "d/train/dog", "d/old/cat"), "in d/old/"),
    ],
)  # fmt: skip
def test_folders_beside_the_parts_are_left_out_and_named(folders: tuple[str, ...], stray: str) -> None:
    arrangement = make_arrangement(*folders)
    assert {label for label, _ in placement_set(arrangement)} <= {"cat", "dog", "x"}
    assert {kind for kind, _ in arrangement.skipped_images.values()} == {stray}
    assert all(
        "the folder is in no part: it lies beside " in why for _, why in arrangement.skipped_images.values()
    )


def test_unknown_folders_above_the_labels_are_named() -> None:
    arrangement = make_arrangement("animals/cat", "animals/dog", "plants/rose")
    assert {label for label, _ in placement_set(arrangement)} == {"cat", "dog", "rose"}
    (note,) = arrangement.notes
    assert note.endswith("are used neither as labels nor as parts: animals/, plants/")
    assert make_arrangement("photos/cat", "photos/dog").notes == ()  # the set's own folder


@pytest.mark.parametrize(
    ("folders", "kind", "reason"),
    [
        (("", "cat", "dog"), "at the top", "images above the labels have no label"),
        (("pets", "pets/cat", "pets/dog"), "in pets/", "images above the labels have no label"),
        (("train", "train/cat", "train/dog"), "in train/", "images directly in a part have no label"),
        (("train/cat", "train/dog", "test"), "in test/", "images directly in a part have no label"),
    ],
)
def test_images_without_a_label_are_left_out(folders: tuple[str, ...], kind: str, reason: str) -> None:
    arrangement = make_arrangement(*folders)
    assert placement_set(arrangement) == {("cat", TRAIN), ("dog", TRAIN)}
    assert set(arrangement.skipped_images.values()) == {(kind, reason)}
    assert len(arrangement.skipped_images) == 2


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
def test_what_can_be_read_in_two_ways_is_refused(folders: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_arrangement(*folders)


def test_the_user_may_say_which_folder_is_the_label() -> None:
    deep = make_arrangement("cat", "cat/tabby", "dog/puppies", "", depth=1)
    assert placement_set(deep) == {("cat", TRAIN), ("dog", TRAIN)}
    assert set(deep.skipped_images.values()) == {("at the top", "images above folder 1 have no label")}
    split = make_arrangement("train/cat/tabby", "train/dog", "test/dog", depth=2)
    assert placement_set(split) == {("cat", TRAIN), ("dog", TRAIN), ("dog", TEST)}
    named = make_arrangement("test", "train", "eval", depth=1)
    assert placement_set(named) == {("test", TRAIN), ("train", TRAIN), ("eval", TRAIN)}
