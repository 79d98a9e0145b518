"""The check of a model on labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fovea.export.importer.check_result import MIN_FAST_IMAGES
from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.label_file import Labels
from fovea.export.importer.labelled_images import (
    LabelLookup,
    Scores,
    choose_best_recipe,
    is_clearly_better,
    is_lossless,
)
from fovea.export.importer.preprocessing import IMAGENET, ZERO_ONE, PreprocessingOptions
from fovea.service.artifact.contract import PixelPath, Task
from tests.export.classifiers import Array, GraphEnd, build_classifier
from tests.export.imports import has_no_output, import_graph
from tests.pictures import encode_image

# --- images and models ---------------------------------------------------------------------------

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
SHADES = {"dark": 30, "middling": 128, "bright": 225}


def build_colour_model(dtype: str = "float32") -> onnx.ModelProto:
    """Build a graph with three logits: ten times the mean of each channel."""
    classifier = build_classifier(count=3, dtype=dtype)
    kernel = np.zeros((8, 3, 3, 3), np.float32)
    kernel[range(3), range(3), 1, 1] = 1
    return replace_weights(
        classifier, kernel=kernel, matrix=10 * np.eye(8, 3, dtype=np.float32), bias=np.zeros(3, np.float32)
    )


def replace_weights(graph: onnx.ModelProto, **values: Array) -> onnx.ModelProto:
    for tensor in graph.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return graph


def build_shade_model() -> onnx.ModelProto:
    """Build a graph with three logits: how near the mean, 0 … 1, is to each of three shades."""
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Reshape", ["mean", "column"], ["means"]),
        helper.make_node("Sub", ["means", "shades"], ["far"]),
        helper.make_node("Mul", ["far", "far"], ["square"]),
        helper.make_node("Mul", ["square", "sharp"], ["scores"]),
    ]
    weights: dict[str, Array] = {
        "column": np.array([-1, 1], np.int64),
        "shades": np.array(list(SHADES.values()), np.float32) / 255,
        "sharp": np.array(-60, np.float32),
    }
    return helper.make_model(
        helper.make_graph(
            nodes,
            "shades",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 16, 16])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 3])],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


def draw_labelled_images(
    folder: Path, colours: dict[str, tuple[int, int, int]], count: int, *, noise: int = 30
) -> Path:
    """Write `count` images of each label."""
    random = np.random.default_rng(0)
    for label, colour in colours.items():
        (folder / label).mkdir(parents=True)
        for number in range(count):
            levels = np.array(colour) + random.integers(-noise, noise + 1, (20, 24, 3))
            image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
            (folder / label / f"{number}.png").write_bytes(encode_image(image, "PNG"))
    return folder


def draw_shade_images(folder: Path, count: int = 6) -> Path:
    return draw_labelled_images(
        folder, {label: (shade, shade, shade) for label, shade in SHADES.items()}, count
    )


# --- measurements --------------------------------------------------------------------------------


def test_accuracy_and_reference_come_from_the_images(tmp_path: Path) -> None:
    folder = draw_labelled_images(tmp_path / "photos", COLOURS, 4)
    for path in (folder / "red").iterdir():
        path.rename(folder / "green" / f"red-{path.name}")  # a third of the labels is wrong
    model = import_graph(build_colour_model(), tmp_path, ["red", "green", "blue"], check=folder)
    check, contract = model.report.check, model.contract
    assert check is not None
    assert (check.data, check.images, check.top1, check.top5) == ("photos", 12, 2 / 3, 1.0)
    assert contract.accuracy is not None
    assert (contract.accuracy.data, contract.accuracy.images) == ("photos", 12)
    assert contract.accuracy.top1 == pytest.approx(2 / 3)
    assert contract.accuracy.ece is not None
    assert 0.2 < contract.accuracy.ece < 0.5
    assert contract.reference is not None
    assert contract.reference.images == 12
    assert contract.reference.labels == {"red": 4, "green": 4, "blue": 4}


@pytest.mark.parametrize(
    ("count", "end", "task"),
    [(1, "logits", None), (2, "softmax", None), (2, "logits", Task.MULTILABEL)],
)
def test_models_with_two_labels_are_checked(
    tmp_path: Path, count: int, end: GraphEnd, task: Task | None
) -> None:
    """The second value measures green; a single value measures green minus red."""
    kernel, matrix = np.zeros((8, 3, 3, 3), np.float32), np.zeros((8, count), np.float32)
    kernel[range(2), range(2), 1, 1] = 1
    matrix[:2] = [[-10], [10]] if count == 1 else 10 * np.eye(2)
    graph = replace_weights(build_classifier(count=count, end=end), kernel=kernel, matrix=matrix)
    folder = draw_labelled_images(
        tmp_path / "photos", {label: COLOURS[label] for label in ("red", "green")}, 5
    )
    model = import_graph(graph, tmp_path, ["red", "green"], check=folder, task=task)
    assert model.contract.accuracy is not None
    assert (model.contract.accuracy.top1, model.contract.task) == (1, task or Task.BINARY)
    assert (model.contract.accuracy.ece is None) == (task is Task.MULTILABEL)


def test_top_5_counts_the_true_label_among_five(tmp_path: Path) -> None:
    """Labels with higher numbers are more probable, for every image."""
    values = np.arange(8, dtype=np.float32)
    matrix = np.eye(8, dtype=np.float32) / 1000  # a graph with a constant answer is refused
    graph = replace_weights(build_classifier(count=8), matrix=matrix, bias=values)
    labels = [f"label {number}" for number in range(8)]
    folder = draw_labelled_images(tmp_path / "photos", dict.fromkeys(labels, (90, 90, 90)), 1)
    check = import_graph(graph, tmp_path, 8, check=folder).report.check
    assert check is not None
    assert (check.top1, check.top5) == (1 / 8, 5 / 8)


def test_images_at_several_depths_have_the_labels_of_the_sub_folders(tmp_path: Path) -> None:
    folder = draw_labelled_images(tmp_path / "photos", COLOURS, 3)
    (folder / "red" / "more").mkdir()
    (folder / "red" / "0.png").rename(folder / "red" / "more" / "0.png")
    check = import_graph(build_colour_model(), tmp_path, list(COLOURS), check=folder).report.check
    assert check is not None
    assert (check.images, check.top1) == (9, 1)


def test_unreadable_images_are_left_out_and_listed(tmp_path: Path) -> None:
    folder = draw_labelled_images(tmp_path / "photos", COLOURS, 2)
    (folder / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    (folder / "blue" / "page.png").write_bytes(b"<html>")
    check = import_graph(build_colour_model(), tmp_path, list(COLOURS), check=folder).report.check
    assert check is not None
    assert check.images == 6
    assert [Path(path).name for path in check.unreadable] == ["page.png", "broken.jpg"]
    assert "not an image of a known format" in check.unreadable[str(folder / "blue" / "page.png")]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "is not a folder"),
        (lambda folder: folder.mkdir(), "has no sub-folder with images in it"),
        (
            lambda folder: draw_labelled_images(folder, {"rde": (0, 0, 0)}, 1),
            "the folder 'rde' is not a label; the nearest is 'red'",
        ),
    ],
)
def test_invalid_check_folders_are_refused(tmp_path: Path, prepare: object, message: str) -> None:
    folder = tmp_path / "photos"
    prepare(folder)  # type: ignore[operator]  # one of the three above
    with pytest.raises(ImportRefused, match=message):
        import_graph(build_colour_model(), tmp_path, list(COLOURS), check=folder)
    assert has_no_output(tmp_path)


def test_folder_without_readable_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos" / "red").mkdir(parents=True)
    (tmp_path / "photos" / "red" / "a.png").write_bytes(b"none")
    with pytest.raises(ImportRefused, match="none of the 1 images in photos can be read"):
        import_graph(build_colour_model(), tmp_path, list(COLOURS), check=tmp_path / "photos")


# --- folder names --------------------------------------------------------------------------------

KERAS = Labels(
    ("tench", "great_white_shark", "crane (2)", "crane (3)"),
    ("n01440764", "n01484850", "n02012849", "n03126707"),
    ("crane",),
)
PLAIN = Labels(("tench, Tinca tinca", "great white shark", "crane (2)", "crane (3)"), ("",) * 4, ("crane",))
SYNSETS = Labels(("n01440764 tench, Tinca tinca", "n01484850 great white shark"), ("n01440764", "n01484850"))


@pytest.mark.parametrize(
    ("labels", "folder", "index"),
    [
        (KERAS, "n01440764", 0),
        (KERAS, "n01440764_tench", 0),
        (KERAS, "n03126707", 3),
        (KERAS, "n03126707_crane", 3),
        (KERAS, "Great White-Shark", 1),
        (KERAS, "crane (3)", 3),
        (PLAIN, "tench", 0),
        (PLAIN, "TENCH,  tinca_tinca", 0),
        (PLAIN, "n01440764_tench", 0),
        (PLAIN, "great_white_shark", 1),
        (SYNSETS, "n01484850", 1),
        (SYNSETS, "tench", 0),
        (SYNSETS, "n01440764 tench, Tinca tinca", 0),
    ],
)
def test_folder_names_match_their_labels(labels: Labels, folder: str, index: int) -> None:
    assert LabelLookup(labels)(folder) == index


@pytest.mark.parametrize(
    ("labels", "folder", "message"),
    [
        (KERAS, "crane", "fits several labels: 'crane (2)', 'crane (3)'; use one of these"),
        (PLAIN, "n02012849_crane", "fits several labels"),
        (PLAIN, "n01440764", "is a WordNet id, but the labels have no ids; name the folder after its label"),
        (KERAS, "n99999999", "is not a label; the nearest is "),
        (PLAIN, "great white shrak", "the nearest is 'great white shark'"),
        (PLAIN, "???", "is not a label"),
    ],
)
def test_ambiguous_or_unknown_folder_names_are_refused(labels: Labels, folder: str, message: str) -> None:
    with pytest.raises(ImportRefused) as error_info:
        LabelLookup(labels)(folder)
    assert message in str(error_info.value)


# --- alternative preprocessing -------------------------------------------------------------------


def test_wrong_preset_is_refused_with_a_better_one(tmp_path: Path) -> None:
    folder = draw_shade_images(tmp_path / "photos")
    options = {"labels": list(SHADES), "check": folder}
    with pytest.raises(
        ImportRefused, match=r"imagenet looks wrong: of 18 images .* with --preset zero-one 100\.0%"
    ) as error_info:
        import_graph(build_shade_model(), tmp_path, **options)  # type: ignore[arg-type]  # as above
    assert str(error_info.value).endswith(
        "import it with --preset zero-one, or keep this recipe with --force"
    )
    assert has_no_output(tmp_path)
    forced_model = import_graph(
        build_shade_model(),
        tmp_path,
        preprocessing=PreprocessingOptions(preset=IMAGENET),
        force=True,
        **options,  # type: ignore[arg-type]
    )
    assert forced_model.report.check is not None
    others = forced_model.report.check.others
    assert others["--preset zero-one"][0] == 1.0 > others["own"][0]
    correct_model = import_graph(
        build_shade_model(),
        tmp_path,
        preprocessing=PreprocessingOptions(preset=ZERO_ONE),
        **options,  # type: ignore[arg-type]
    )
    assert correct_model.contract.accuracy is not None
    assert correct_model.contract.accuracy.top1 == 1


def test_other_channel_order_is_tried(tmp_path: Path) -> None:
    folder = draw_labelled_images(tmp_path / "photos", COLOURS, 5)
    options = PreprocessingOptions(preset=IMAGENET, bgr=True)
    with pytest.raises(ImportRefused, match=r"import it with --rgb, or keep this recipe with --force"):
        import_graph(build_colour_model(), tmp_path, list(COLOURS), preprocessing=options, check=folder)
    assert has_no_output(tmp_path)
    assert import_graph(build_colour_model(), tmp_path, list(COLOURS), check=folder).report.check is not None


def test_uint8_graphs_have_no_alternative_preprocessing(tmp_path: Path) -> None:
    folder = draw_labelled_images(tmp_path / "photos", COLOURS, 3)
    check = import_graph(build_colour_model("uint8"), tmp_path, list(COLOURS), check=folder).report.check
    assert check is not None
    assert list(check.others) == ["own"]


def make_scores(is_correct: Sequence[bool], true_probabilities: Sequence[float]) -> Scores:
    count = len(is_correct)
    zeros = np.zeros(count, np.float32)
    best = np.zeros(count, np.int64)
    rank = np.where(is_correct, 0, 1)
    true_probability = np.array(true_probabilities, np.float32)
    return Scores(best, zeros, true_probability, rank, zeros, np.zeros((count, 2), np.float32), zeros)


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        (make_scores([False] * 20, [0.3] * 20), make_scores([True] * 20, [0.3] * 20), True),
        (
            make_scores([True] * 20, [0.5] * 20),
            make_scores([True] * 20, [0.9] * 20),
            True,
        ),  # more probability for the true label
        (make_scores([True] * 20, [0.5] * 20), make_scores([True] * 20, [0.5] * 20), False),
        (
            make_scores([True] * 20, [0.5] * 20),
            make_scores([True] * 20, [0.52] * 20),
            False,
        ),  # too little to matter
        (make_scores([True, False] * 10, [0.5] * 20), make_scores([False, True] * 10, [0.5] * 20), False),
        (
            make_scores([True] * 19 + [False], [0.5] * 20),
            make_scores([True] * 20, [0.5] * 20),
            False,
        ),  # chance
        (make_scores([False] * 7, [0.1] * 7), make_scores([True] * 7, [0.9] * 7), False),  # too few
    ],
)
def test_clearly_better_needs_a_significant_difference(own: Scores, other: Scores, expected: bool) -> None:
    assert is_clearly_better(other, own) is expected


# --- pixel paths ---------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("count", "side", "path", "reason"),
    [
        (34, 520, PixelPath.FAST, "102 images are large enough to be decoded smaller)"),
        (
            33,
            520,
            PixelPath.EXACT,
            "99 images are large enough to be decoded smaller; at least 100 are needed)",
        ),
        (
            34,
            500,
            PixelPath.EXACT,
            "0 images are large enough to be decoded smaller; at least 100 are needed)",
        ),
    ],
)
def test_fast_path_needs_a_hundred_unchanged_images(
    tmp_path: Path, count: int, side: int, path: PixelPath, reason: str
) -> None:
    folder = tmp_path / "photos"
    for label, colour in COLOURS.items():
        (folder / label).mkdir(parents=True)
        content = encode_image(Image.new("RGB", (side, side), colour), "JPEG")
        for number in range(count):
            (folder / label / f"{number}.jpg").write_bytes(content)
    model = import_graph(build_colour_model(), tmp_path, list(COLOURS), check=folder)
    assert model.contract.input.pixel_path is path
    assert model.facts["pixel path"].startswith(f"{path} (fast changes 0 of {3 * count} answers")
    assert model.facts["pixel path"].endswith(reason)
    assert model.engine.check_golden_set().images == 8


def test_one_changed_answer_keeps_exact_pixels() -> None:
    exact = make_scores([True] * MIN_FAST_IMAGES, [0.5] * MIN_FAST_IMAGES)
    changed_labels = exact.top_label.copy()
    changed_labels[7] = 1
    assert is_lossless(exact, exact, MIN_FAST_IMAGES)
    assert not is_lossless(exact, exact, MIN_FAST_IMAGES - 1)
    assert not is_lossless(replace(exact, top_label=changed_labels), exact, MIN_FAST_IMAGES)


def test_pixel_path_is_exact_without_check_images(tmp_path: Path) -> None:
    model = import_graph(build_classifier(), tmp_path)
    assert model.contract.input.pixel_path is PixelPath.EXACT
    assert model.facts["pixel path"] == "exact (only --check can show whether fast loses nothing)"


def test_certainty_of_a_much_wider_range_is_no_reason() -> None:
    """Pixels 0 … 255 make answers of a network for 0 … 1 more certain, with nearly the same hits."""
    hits = [True] * 90 + [False] * 10
    own_scores = make_scores(hits, [0.7] * 90 + [0.1] * 10)
    certain = make_scores([*hits[1:], False], [1.0] * 89 + [0.0] * 11)
    assert choose_best_recipe({"--preset raw": certain}, own_scores) == "--preset raw"
    assert choose_best_recipe({"--preset raw": certain}, own_scores, {"--preset raw"}) is None
    right = make_scores([True] * 100, [0.8] * 100)
    certain = make_scores([True] * 100, [1.0] * 100)
    recipes = {"--preset raw": certain, "--rgb": right}
    assert choose_best_recipe(recipes, own_scores, {"--preset raw"}) == "--rgb"
