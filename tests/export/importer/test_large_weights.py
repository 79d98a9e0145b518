"""Large weights outside of the message of a model: shared while importing, and whole in the written file."""

from __future__ import annotations

import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fovea.bench.import_memory import (
    MAX_RATIO,
    build_transformer,
    measure_import,
    write_labels,
    write_onnx,
    write_program,
)
from fovea.export.importer import pipeline
from fovea.export.importer.foreign_model import ReferenceModel
from fovea.export.importer.import_files import write_import
from fovea.export.importer.inspect import ImportRequest
from fovea.export.importer.large_weights import NO_WEIGHTS, take_large_weights
from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
from fovea.export.verification_error import VerificationError
from fovea.service.inference.engine import Engine
from tests.export.classifiers import build_classifier, prepare_imagenet, run_onnx, softmax
from tests.export.importer.test_pipeline import IMAGES, find_largest_difference
from tests.export.imports import import_graph, make_labels
from tests.servers import ROOT


def build_wide_network(width: int, *, dtype: str = "float32") -> onnx.ModelProto:
    """Build a graph with a square matrix of `width` between its average and its last matrix."""
    random = np.random.default_rng(0)
    graph = build_classifier(count=width, dtype=dtype, spread=1, names=("image", "wide"))
    square = random.normal(0, width**-0.5, (width, width)).astype(dtype)
    last = random.normal(0, 3 * width**-0.5, (width, 5)).astype(dtype)
    graph.graph.initializer.extend(
        [numpy_helper.from_array(square, "square"), numpy_helper.from_array(last, "last")]
    )
    graph.graph.node.extend(
        [
            helper.make_node("MatMul", ["wide", "square"], ["turned"]),
            helper.make_node("Relu", ["turned"], ["positive"]),
            helper.make_node("MatMul", ["positive", "last"], ["scores"]),
        ]
    )
    kind = TensorProto.FLOAT16 if dtype == "float16" else TensorProto.FLOAT
    graph.graph.output[0].CopyFrom(helper.make_tensor_value_info("scores", kind, ["N", 5]))
    return graph


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_large_weights_are_whole_in_the_file(tmp_path: Path, dtype: str) -> None:
    graph = build_wide_network(200, dtype=dtype)
    model = import_graph(graph, tmp_path)
    planes = [prepare_imagenet(image, 18, 16).astype(dtype) for image in IMAGES]
    expected = [softmax(run_onnx(graph, one)) for one in planes]
    tolerance = 1e-5 if dtype == "float32" else 5e-3
    assert find_largest_difference(model, expected) <= tolerance
    weights = {tensor.name: tensor for tensor in onnx.load(model.path).graph.initializer}
    for tensor in graph.graph.initializer:
        values = numpy_helper.to_array(weights[tensor.name])
        assert np.array_equal(values, numpy_helper.to_array(tensor))
    assert not any(tensor.external_data for tensor in weights.values())


def test_model_without_its_weights_runs_with_them() -> None:
    graph = build_wide_network(200)
    images = np.concatenate([prepare_imagenet(image, 18, 16) for image in IMAGES])
    expected = ReferenceModel(graph, threads=1)(images)["scores"]
    size = graph.ByteSize()
    rest, weights = take_large_weights(graph)
    assert set(weights.arrays) == {"square"}  # the others are small
    assert rest.ByteSize() < size / 2
    scores = ReferenceModel(rest, threads=1, weights=weights)(images)["scores"]
    np.testing.assert_allclose(scores, expected, atol=1e-5)  # other kernels add in another order
    shown = ReferenceModel(rest, threads=1, weights=weights).with_outputs("square").run_batch(images[:1])
    assert np.array_equal(shown["square"], weights.arrays["square"])  # weights can be outputs too
    file = BytesIO()
    weights.write(rest, file)
    whole = onnx.load_from_string(file.getvalue())
    assert np.array_equal(ReferenceModel(whole, threads=1)(images)["scores"], expected)
    onnx.checker.check_model(whole)
    NO_WEIGHTS.write(whole, same_file := BytesIO())
    assert same_file.getvalue() == whole.SerializeToString()


def test_version_that_another_import_takes_first_leaves_the_weights_whole(tmp_path: Path) -> None:
    model = import_graph(build_wide_network(200), tmp_path)
    request = ImportRequest(
        tmp_path / "foreign.onnx", None, "thing", tmp_path / "zoo", PreprocessingOptions(preset=IMAGENET)
    )
    content = model.path.read_bytes()

    def write_model(file: BinaryIO) -> None:
        file.write(content)

    # Version 1 exists when the checked import is written, as if another import had just added it.
    report = write_import(request, model.contract, write_model, lambda file: model.report)
    assert report.version == "2"
    second = Engine.load(tmp_path / "zoo" / "thing" / "2" / "model.onnx", provider="cpu", threads=1)
    assert second.contract.version == "2"
    assert np.array_equal(second.run(model.pixels(IMAGES[0])[None]), model(IMAGES[0]))


def test_import_that_fails_its_verification_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is verified after it has been written into a hidden folder."""

    def refuse(*_arguments: object) -> NoReturn:
        assert list((tmp_path / "new" / "zoo" / "thing").iterdir())  # the hidden folder
        raise VerificationError("a probability of the imported graph is off")

    monkeypatch.setattr(pipeline, "compare_with_file", refuse)
    (tmp_path / "new").mkdir()
    file, labels = tmp_path / "model.onnx", tmp_path / "labels.txt"
    file.write_bytes(build_wide_network(200).SerializeToString())
    labels.write_text("\n".join(make_labels(5)))
    zoo, preprocessing = tmp_path / "new" / "zoo", PreprocessingOptions(preset=IMAGENET)
    with pytest.raises(VerificationError, match="is off"):
        pipeline.import_model(ImportRequest(file, labels, "thing", zoo, preprocessing))
    assert not list((tmp_path / "new").iterdir())


def test_import_of_an_onnx_file_needs_no_torch(tmp_path: Path) -> None:
    """torch takes 190 MB of memory, and two seconds."""
    (tmp_path / "model.onnx").write_bytes(build_wide_network(200).SerializeToString())
    (tmp_path / "labels.txt").write_text("\n".join(make_labels(5)))
    arguments = ["import", "model.onnx", "--labels", "labels.txt", "--name", "wide", "--out", "zoo"]
    program = f"""
import sys
from fovea.cli import main
sys.modules["torch"] = None
sys.argv[1:] = {[*arguments, "--preset", "imagenet"]}
main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "zoo" / "wide" / "1" / "model.onnx").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_import_takes_little_more_memory_than_its_file(tmp_path: Path, kind: str) -> None:
    """The peak of all processes above that of a small import; it was nine times the file."""
    peaks = {}
    for width in (64, 512):
        network = build_transformer(4 if width == 512 else 1, width)
        folder = tmp_path / str(width)
        folder.mkdir()
        file, labels = folder / f"vit.{kind}", folder / "labels.txt"
        {"onnx": write_onnx, "pt2": write_program}[kind](network, file)
        write_labels(labels)
        options = ["--labels", str(labels), "--preset", "imagenet"]
        peaks[width] = measure_import(kind, file, file, folder, options)
    small, large = peaks.values()
    ratio = (large.peak_bytes - small.peak_bytes) / (large.file_bytes - small.file_bytes)
    print(f"{kind}: {ratio:.2f} times the file")
    assert ratio < MAX_RATIO
