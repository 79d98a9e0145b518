"""The comparison with a source's own pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fovea.export.importer.foreign_model import Arithmetic, ImportRefused, read_model
from fovea.export.importer.inspect import ImportRequest, inspect_model
from fovea.export.importer.pipeline import ImportReport, import_model
from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
from fovea.export.importer.sources.comparison import GENERATED_IMAGES, PipelineRun, compare_with_pipeline
from fovea.export.importer.sources.completion import GivenOptions, complete_request
from fovea.export.importer.sources.facts import (
    NetworkAnswers,
    ReferenceAnswers,
    ReferenceNetwork,
    ReferencePipeline,
)
from fovea.export.importer.sources.resolve import resolve_source
from fovea.export.verify import VerificationError
from tests.export.classifiers import Array, build_classifier, run_onnx
from tests.export.importer.sources.layouts import (
    LABELS,
    PROCESSOR,
    build_hub_graph,
    make_config,
    write_hub_folder,
)
from tests.export.importer.test_labelled_images import draw_labelled_images
from tests.export.imports import import_graph

Resize = Callable[[Image.Image], Image.Image]


def resize_as_transformers(image: Image.Image) -> Image.Image:
    """Return the shorter side as 20 pixels, and the centre of 16 x 16, both rounded down."""
    width, height = (
        20 if side == min(image.size) else int(20 * side / min(image.size)) for side in image.size
    )
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - 16) // 2, (height - 16) // 2
    return resized.crop((left, top, left + 16, top + 16))


def create_pipeline(resize: Resize, outputs: Array | None = None) -> ReferencePipeline:
    def run(images: Sequence[Path]) -> ReferenceAnswers:
        pixels = np.stack([np.asarray(resize(Image.open(one).convert("RGB"))) for one in images])
        values = (pixels / 255 - np.array(PROCESSOR["image_mean"])) / np.array(PROCESSOR["image_std"])
        return ReferenceAnswers("House 1.0", values.transpose(0, 3, 1, 2).astype(np.float32), outputs)

    return ReferencePipeline("house", run)


def import_with(
    tmp_path: Path, pipeline: ReferencePipeline, preprocessing: Any = None, **options: Any
) -> ImportReport:
    """Import a folder of the hub's layout whose own pipeline is `pipeline`."""
    folder = write_hub_folder(tmp_path / "vit")
    given = GivenOptions(tmp_path / "zoo", preprocessing or PreprocessingOptions(), **options)
    with resolve_source(str(folder)) as source:
        return import_model(complete_request(given, replace(source, reference=pipeline)))


def test_report_says_what_was_compared(tmp_path: Path) -> None:
    report = import_with(tmp_path, create_pipeline(resize_as_transformers))
    comparison = report.comparison
    assert comparison is not None
    assert (comparison.pipeline, comparison.images, comparison.user_images) == ("House 1.0", 32, 0)
    assert comparison.pixel_difference < 1e-3
    assert comparison.different_pixels == 0
    assert comparison.probability_difference < 1e-5
    assert comparison.same_labels == GENERATED_IMAGES
    text = dict(report.facts)["compared"]
    assert text.startswith("with House 1.0 on 32 generated images: pixels to ")
    assert text.endswith("(at most 0.001), all labels the same")


def test_images_of_the_user_are_compared_too(tmp_path: Path) -> None:
    photos = draw_labelled_images(tmp_path / "photos", {"tench": (200, 40, 40), "goldfish": (40, 40, 200)}, 3)
    (photos / "tench" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    report = import_with(tmp_path, create_pipeline(resize_as_transformers), check=photos, force=True)
    assert report.comparison is not None
    assert (report.comparison.images, report.comparison.user_images) == (38, 6)


def test_other_pixels_refuse_the_import(tmp_path: Path) -> None:
    pipeline = create_pipeline(lambda image: image.resize((16, 16), Image.Resampling.BICUBIC))
    with pytest.raises(VerificationError, match="does not make the pixels of House"):
        import_with(tmp_path, pipeline)
    assert not (tmp_path / "zoo").exists()


def test_corner_that_is_rounded_refuses_the_import(tmp_path: Path) -> None:
    """One pixel of difference in a crop is enough."""

    def resize(image: Image.Image) -> Image.Image:
        width, height = (
            20 if side == min(image.size) else int(20 * side / min(image.size)) for side in image.size
        )
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = -((16 - width) // 2), -((16 - height) // 2)
        return resized.crop((left, top, left + 16, top + 16))

    with pytest.raises(VerificationError, match="does not make the pixels"):
        import_with(tmp_path, create_pipeline(resize))


def test_other_size_refuses_the_import(tmp_path: Path) -> None:
    pipeline = create_pipeline(lambda image: image.resize((20, 16)))
    with pytest.raises(VerificationError, match="makes images of 16 x 20 pixels, and the import"):
        import_with(tmp_path, pipeline)


def test_other_answers_refuse_the_import(tmp_path: Path) -> None:
    outputs = np.random.default_rng(0).normal(0, 3, (GENERATED_IMAGES, 5)).astype(np.float32)
    with pytest.raises(VerificationError, match="does not give the probabilities of House"):
        import_with(tmp_path, create_pipeline(resize_as_transformers, outputs))


def test_options_of_the_user_are_not_compared(tmp_path: Path) -> None:
    preprocessing = PreprocessingOptions(preset=IMAGENET)
    report = import_with(tmp_path, create_pipeline(resize_as_transformers), preprocessing)
    assert report.comparison is None
    assert dict(report.facts)["compared"] == (
        "not with the source's own pipeline: options replace the source's preprocessing"
    )


@pytest.mark.parametrize("size", [None, (16, 16), (24, 24)])
def test_other_size_of_the_user_is_not_compared(tmp_path: Path, size: tuple[int, int] | None) -> None:
    report = import_with(tmp_path, create_pipeline(resize_as_transformers), size=size)
    assert (report.comparison is None) == (size == (24, 24))
    if size == (24, 24):
        assert dict(report.facts)["compared"].endswith("options replace the source's preprocessing")


@pytest.mark.parametrize("drops_background", [True, False])
def test_network_with_a_background_class_is_compared(tmp_path: Path, drops_background: bool) -> None:
    graph, labels = build_hub_graph(count=6), ("background", *LABELS)
    folder = write_hub_folder(
        tmp_path / "net", **{"onnx/model.onnx": graph, "config.json": make_config(labels)}
    )
    pipeline = create_pipeline(resize_as_transformers)

    def run(images: Sequence[Path]) -> ReferenceAnswers:
        answers = pipeline.run(images)
        return replace(answers, outputs=run_onnx(graph, answers.values))

    given = GivenOptions(tmp_path / "zoo", PreprocessingOptions(), drops_background=drops_background)
    with resolve_source(str(folder)) as source:
        reference = ReferencePipeline("house", run)
        report = import_model(complete_request(given, replace(source, reference=reference)))
    assert report.comparison is not None
    assert report.comparison.probability_difference < 1e-5


def test_other_number_of_answers_refuses_the_import(tmp_path: Path) -> None:
    outputs = np.zeros((GENERATED_IMAGES, 6), np.float32)
    with pytest.raises(VerificationError, match=r"House 1\.0 gives 6 probabilities, and the import gives 5"):
        import_with(tmp_path, create_pipeline(resize_as_transformers, outputs))


def import_with_network(
    tmp_path: Path, change: Callable[[Array], Array], output: str | None = None
) -> ImportReport:
    """Import a folder as if it were converted; its own network is the same graph, with changed logits."""
    folder = write_hub_folder(tmp_path / "vit")
    graph = read_model(folder / "onnx" / "model.onnx")

    def run(inputs: Array) -> NetworkAnswers:
        return NetworkAnswers("the network in House 1.0", change(run_onnx(graph, inputs)))

    given = GivenOptions(tmp_path / "zoo", PreprocessingOptions(), output=output)
    with resolve_source(str(folder)) as source:
        converted_source = replace(source, reference=None, network=ReferenceNetwork(run))
        return import_model(complete_request(given, converted_source))


def test_network_of_a_converted_file_is_compared(tmp_path: Path) -> None:
    report = import_with_network(tmp_path, lambda logits: logits)
    assert report.comparison is not None
    assert report.comparison.probability_difference < 1e-5
    text = dict(report.facts)["compared"]
    assert text.startswith("with the network in House 1.0 on 32 generated images: probabilities to ")
    assert text.endswith("(at most 0.0001), all labels the same; the file states no preprocessing to compare")


def test_other_network_refuses_the_import(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="does not give the probabilities of the network in House"):
        import_with_network(tmp_path, lambda logits: logits + np.linspace(0, 0.01, logits.shape[1]))
    assert not (tmp_path / "zoo").exists()


def test_network_is_not_compared_with_another_output(tmp_path: Path) -> None:
    output = read_model(write_hub_folder(tmp_path / "vit") / "onnx" / "model.onnx").graph.output[0].name
    report = import_with_network(tmp_path, lambda logits: logits, output)
    assert report.comparison is None
    assert "--output chooses a tensor" in dict(report.facts)["compared"]


def test_network_that_does_not_run_is_named(tmp_path: Path) -> None:
    def refuse(_logits: Array) -> Array:
        raise ImportRefused("House has no memory left")

    text = dict(import_with_network(tmp_path, refuse).facts)["compared"]
    assert text == "not with the source's own pipeline: House has no memory left"


@pytest.mark.parametrize(("same", "is_refused"), [(31, False), (30, True)])
def test_int8_must_give_95_percent_of_the_labels(tmp_path: Path, same: int, is_refused: bool) -> None:
    """30 of 32 are 94 %. The probabilities differ by less than the tolerance of int8."""
    model = import_graph(build_classifier(), tmp_path)
    file, labels = tmp_path / "foreign.onnx", tmp_path / "labels.txt"
    preprocessing = PreprocessingOptions(preset=IMAGENET)
    request = ImportRequest(file, labels, "thing", tmp_path / "zoo", preprocessing)
    foreign = replace(inspect_model(request), arithmetic=Arithmetic.INT8)
    shape = (GENERATED_IMAGES, foreign.graph_input.height, foreign.graph_input.width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = model.engine.run(pixels).astype(np.float64)
    gaps = -np.diff(np.sort(expected, axis=1)[:, :-3:-1], axis=1)[:, 0]  # between the two best labels
    for index in gaps.argsort()[: GENERATED_IMAGES - same]:
        row = expected[index]
        first, second = row.argsort()[:-3:-1]
        row[first], row[second] = row[second], row[first]
    run = PipelineRun("House 1.0", pixels, None, expected)
    if is_refused:
        with pytest.raises(VerificationError, match=r"for 30 of 32 images; at least 95% are needed"):
            compare_with_pipeline(run, foreign, model.engine)
    else:
        assert compare_with_pipeline(run, foreign, model.engine).same_labels == same
