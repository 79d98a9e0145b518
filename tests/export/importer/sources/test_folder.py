"""Folders and files of the hub's layout on this machine."""

from __future__ import annotations

import importlib.util
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
from fovea.service.artifact.contract import Task
from fovea.service.artifact.geometry import CropStep, Interpolation
from fovea.service.atomic_files import WriteError
from tests.export.classifiers import build_classifier, run_onnx, softmax
from tests.export.importer.sources.imports import import_source, read_refusal
from tests.export.importer.sources.layouts import (
    LABELS,
    PROCESSOR,
    build_hub_graph,
    make_config,
    write_files,
    write_hub_folder,
)
from tests.export.importer.test_own_normalization import prepend_steps
from tests.export.importer.test_refused import move_matrix_outside
from tests.tools import SYSTEM_REASON

PROCESSOR_ORIGIN = "preprocessor_config.json, CLIPImageProcessor"


def test_folder_needs_no_options(tmp_path: Path) -> None:
    report, engine = import_source(tmp_path, write_hub_folder(tmp_path / "vit-tiny"))
    contract = engine.contract
    assert (report.model, contract.labels, contract.task) == ("vit-tiny", LABELS, Task.MULTICLASS)
    facts = dict(report.facts)
    assert facts["source"] == f"{tmp_path / 'vit-tiny'}, onnx/model.onnx"
    assert facts["licence"] == "apache-2.0"
    assert facts["labels"] == "5, from 'tench' to 'hammerhead' (config.json)"
    assert facts["layout"] == "nchw (from transformers)"
    assert facts["size"] == f"16 x 16 (from {PROCESSOR_ORIGIN}; the graph takes any)"
    assert "(preprocessor_config.json, CLIPImageProcessor)" in facts["normalise"]
    assert facts["geometry"] == (
        "resize cover 20 x 20 bicubic, crop 16 x 16 floor (preprocessor_config.json, CLIPImageProcessor)"
    )
    assert (contract.input.height, contract.input.width) == (16, 16)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    values = (pixels / 255 - np.array(PROCESSOR["image_mean"])) / np.array(PROCESSOR["image_std"])
    logits = run_onnx(build_classifier(size=None), values.transpose(0, 3, 1, 2).astype(np.float32))
    assert np.abs(engine.run(pixels) - softmax(logits)).max() < 1e-5


def test_file_in_the_folder_finds_the_configuration(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "vit-tiny")
    report, engine = import_source(tmp_path, folder / "onnx" / "model.onnx")
    assert (report.model, engine.contract.labels) == ("vit-tiny", LABELS)
    (folder / "onnx" / "model.onnx").rename(folder / "pets.onnx")
    assert import_source(tmp_path, folder / "pets.onnx")[0].model == "pets"


def test_weights_beside_the_file_are_folded_in(tmp_path: Path) -> None:
    graph = build_hub_graph()
    (matrix,) = [one for one in graph.graph.initializer if one.name == "matrix"]
    content = matrix.raw_data
    folder = write_hub_folder(
        tmp_path / "vit",
        **{
            "onnx/model.onnx": move_matrix_outside(graph, "model.onnx_data"),
            "onnx/model.onnx_data": content,
        },
    )
    _, engine = import_source(tmp_path, folder)
    assert engine.contract.labels == LABELS


def test_options_come_before_the_source(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "vit")
    (tmp_path / "own.txt").write_text("a\nb\nc\nd\ne\n")
    preprocessing = PreprocessingOptions(mean=(0.1,) * 3, interpolation=Interpolation.BOX)
    report, engine = import_source(
        tmp_path,
        folder,
        name="own",
        labels=tmp_path / "own.txt",
        task=Task.MULTICLASS,
        preprocessing=preprocessing,
    )
    facts = dict(report.facts)
    assert engine.contract.labels == tuple("abcde")
    assert report.model == "own"
    assert facts["normalise"].startswith("RGB, (pixels / 255 - (0.1, 0.1, 0.1)) / (0.26863, 0.261303")
    assert facts["normalise"].endswith("(preprocessor_config.json, CLIPImageProcessor, --mean)")
    assert facts["geometry"] == (
        "resize cover 20 x 20 box, crop 16 x 16 floor (preprocessor_config.json, CLIPImageProcessor, "
        "--interpolation)"
    )


def test_preset_replaces_the_preprocessing_of_the_source(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "vit")
    report, _ = import_source(tmp_path, folder, preprocessing=PreprocessingOptions(preset=IMAGENET))
    assert "(preset imagenet: " in dict(report.facts)["normalise"]


@pytest.mark.parametrize(
    ("options", "origin"),
    [
        ({"size": (16, 16)}, "from --crop"),
        ({"preprocessing": PreprocessingOptions(preset=IMAGENET)}, f"from {PROCESSOR_ORIGIN}"),
        (
            {"preprocessing": PreprocessingOptions(geometry=(CropStep(16, 16),))},
            "the last step of --geometry",
        ),
    ],
)
def test_size_has_its_origin(tmp_path: Path, options: dict[str, Any], origin: str) -> None:
    report, _ = import_source(tmp_path, write_hub_folder(tmp_path / "vit"), **options)
    assert dict(report.facts)["size"] == f"16 x 16 ({origin}; the graph takes any)"


def test_warning_names_the_source_of_the_normalisation(tmp_path: Path) -> None:
    graph = prepend_steps(build_hub_graph(), ("Div", 255))
    report, _ = import_source(tmp_path, write_hub_folder(tmp_path / "vit", **{"onnx/model.onnx": graph}))
    assert f"from {PROCESSOR_ORIGIN}; if it takes 0 … 255" in dict(report.facts)["warning"]


def test_refusal_of_a_grey_graph_names_the_source_of_the_normalisation(tmp_path: Path) -> None:
    graph = build_hub_graph(channels=1)
    graph.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    message = read_refusal(tmp_path, write_hub_folder(tmp_path / "vit", **{"onnx/model.onnx": graph}))
    assert f"differs between channels ({PROCESSOR_ORIGIN})" in message


def test_everything_that_is_missing_is_asked_for_at_once(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "vit", **{"config.json": None, "preprocessor_config.json": None})
    message = read_refusal(tmp_path, folder, command="fovea import vit")
    for part in (
        "`fovea import` needs --labels",
        "give --layout nchw or --layout nhwc",
        "set the size to serve with --crop",
        "give --preset",
        "such as: fovea import vit --labels labels.txt --layout nchw --crop 224 --preset imagenet",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config.json": make_config(id2label=None)}, "config.json has no id2label"),
        ({"config.json": "{"}, "config.json is not valid JSON; copy or download it again"),
        ({"preprocessor_config.json": "[]"}, "preprocessor_config.json is not a JSON object"),
        (
            {"preprocessor_config.json": {**PROCESSOR, "size": {"longest_edge": 20}}},
            "preprocessor_config.json, CLIPImageProcessor: size has longest_edge; Fovea reproduces",
        ),
    ],
)
def test_reason_for_a_missing_fact_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    assert reason in read_refusal(tmp_path, write_hub_folder(tmp_path / "vit", **changes))


def test_other_number_of_labels_names_the_configuration(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "vit", **{"config.json": make_config(LABELS[:4])})
    message = read_refusal(tmp_path, folder)
    assert f"config.json of {folder} has 4 labels, the graph gives 5 values for an image" in message


def test_size_of_the_graph_that_contradicts_the_source_is_refused(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "vit", **{"onnx/model.onnx": build_classifier(size=24)})
    message = read_refusal(tmp_path, folder)
    assert "CLIPImageProcessor makes images of 16 x 16 pixels, but the graph takes 24 x 24" in message


@pytest.mark.parametrize(
    ("names", "choice", "chosen"),
    [
        (["onnx/model.onnx", "onnx/model_fp16.onnx"], None, "onnx/model.onnx"),
        (["onnx/model.onnx", "onnx/model_fp16.onnx"], "fp16", "onnx/model_fp16.onnx"),
        (["onnx/model.onnx", "onnx/model_fp16.onnx"], "model_fp16.onnx", "onnx/model_fp16.onnx"),
        (["model.onnx", "model_int8.onnx"], None, "model.onnx"),
        (["pets.onnx"], None, "pets.onnx"),
    ],
)
def test_file_is_chosen(tmp_path: Path, names: Sequence[str], choice: str | None, chosen: str) -> None:
    graphs = {name: build_hub_graph() for name in names}
    folder = write_files(
        tmp_path / "vit", {**graphs, "config.json": make_config(), "preprocessor_config.json": PROCESSOR}
    )
    report, _ = import_source(tmp_path, folder, choice)
    assert report.file == chosen


@pytest.mark.parametrize(
    ("names", "choice", "message"),
    [
        (
            ["a.onnx", "b.onnx"],
            None,
            r"has 2 ONNX files: a.onnx \(0.0 MB\), b.onnx \(0.0 MB\); choose one with",
        ),
        (["a.onnx"], "c.onnx", r"has no ONNX file 'c.onnx'; it has a.onnx"),
        (
            ["a/model.onnx", "b/model.onnx"],
            "model.onnx",
            "has several files 'model.onnx'; it has a/model.onnx",
        ),
        (
            ["pytorch_model.bin"],
            None,
            r"weights in a pickle only \(pytorch_model.bin\), which Fovea never loads",
        ),
        (["tf_model.h5"], None, "neither an ONNX file nor model.safetensors; it has tf_model.h5"),
        ([], None, "neither an ONNX file nor model.safetensors; export"),
    ],
)
def test_folder_without_one_onnx_file_is_refused(
    tmp_path: Path, names: Sequence[str], choice: str | None, message: str
) -> None:
    folder = write_files(tmp_path / "vit", {"config.json": make_config(), **dict.fromkeys(names, b"x")})
    with pytest.raises(ImportRefused, match=message):
        import_source(tmp_path, folder, choice)


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    config = make_config(architectures=["YolosForObjectDetection"])
    folder = write_hub_folder(tmp_path / "yolos", **{"config.json": config})
    assert "is an object detector (YolosForObjectDetection)" in read_refusal(tmp_path, folder)


def test_name_without_usable_characters_is_asked_for(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "模型")
    assert "`fovea import` needs --name" in read_refusal(tmp_path, folder)
    assert import_source(tmp_path, write_hub_folder(tmp_path / "my model (2)"))[0].model == "my-model-2"


def test_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """A limit of the size of files stands in for a full disk: writing fails in the middle of the model."""
    folder = write_hub_folder(tmp_path / "vit")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"cannot write .*/zoo/vit: File too large; nothing was written"):
            import_source(tmp_path, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param(
            {},
            "its own pipeline needs transformers, which is not installed",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("transformers") is not None, reason=f"{SYSTEM_REASON}has it"
            ),
        ),
        ({"preprocessor_config.json": None}, "there is no preprocessor_config.json"),
    ],
)
@pytest.mark.parametrize("file", ["", "onnx/model.onnx"])
def test_reason_for_no_comparison_is_named(
    tmp_path: Path, file: str, changes: dict[str, Any], reason: str
) -> None:
    folder = write_hub_folder(tmp_path / "vit", **changes)
    options: dict[str, Any] = {}
    if changes:
        options = {"size": (16, 16), "preprocessing": PreprocessingOptions(preset=IMAGENET)}
    report, _ = import_source(tmp_path, folder / file, **options)
    assert dict(report.facts)["compared"] == f"not with the source's own pipeline: {reason}"


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("transformers") is not None, reason=f"{SYSTEM_REASON}has it")
def test_missing_transformers_is_one_sentence(tmp_path: Path) -> None:
    files = {"onnx/model.onnx": None, "model.safetensors": b"weights"}
    folder = write_hub_folder(tmp_path / "vit", **files)
    assert read_refusal(tmp_path, folder) == (
        f"the conversion of {folder} needs transformers: pip install 'fovea-serve[hub]'"
    )
