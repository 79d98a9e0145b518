"""Large weights outside of the message of a model: shared while importing, and whole in the written file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fovea.export.importer.foreign_model import ReferenceModel
from fovea.export.importer.import_files import write_import
from fovea.export.importer.inspect import ImportRequest
from fovea.export.importer.large_weights import NO_WEIGHTS, take_large_weights
from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
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
    assert np.array_equal(ReferenceModel(rest, threads=1, weights=weights)(images)["scores"], expected)
    shown = ReferenceModel(rest, threads=1, weights=weights).with_outputs("square").run_batch(images[:1])
    assert np.array_equal(shown["square"], weights.arrays["square"])  # weights can be outputs too
    whole = onnx.load_from_string(weights.serialize(rest))
    assert np.array_equal(ReferenceModel(whole, threads=1)(images)["scores"], expected)
    onnx.checker.check_model(whole)
    assert NO_WEIGHTS.serialize(whole) == whole.SerializeToString()


def test_version_that_another_import_takes_first_leaves_the_weights_whole(tmp_path: Path) -> None:
    model = import_graph(build_wide_network(200), tmp_path)
    request = ImportRequest(
        tmp_path / "foreign.onnx", None, "thing", tmp_path / "zoo", PreprocessingOptions(preset=IMAGENET)
    )
    # Version 1 exists when the checked import is written, as if another import had just added it.
    report = write_import(request, model.report, model.contract, model.path.read_bytes())
    assert report.version == "2"
    second = Engine.load(tmp_path / "zoo" / "thing" / "2" / "model.onnx", provider="cpu", threads=1)
    assert second.contract.version == "2"
    assert np.array_equal(second.run(model.pixels(IMAGES[0])[None]), model(IMAGES[0]))


@pytest.mark.slow
def test_import_takes_little_more_memory_than_its_file(tmp_path: Path) -> None:
    """The peak above that of a small import is at most three and a half times the file; it was nine times."""
    peaks = {}
    for width in (200, 3600):
        folder = tmp_path / str(width)
        folder.mkdir()
        content = build_wide_network(width).SerializeToString()
        (folder / "model.onnx").write_bytes(content)
        (folder / "labels.txt").write_text("\n".join(make_labels(5)))
        command = [sys.executable, "-m", "fovea", "import", folder / "model.onnx"]
        command += ["--labels", folder / "labels.txt", "--name", "wide", "--out", folder / "zoo"]
        measured = subprocess.run(
            [sys.executable, "-c", MEASURE, *map(str, command), "--preset", "imagenet"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        assert (folder / "zoo" / "wide" / "1" / "model.onnx").is_file()
        peaks[width] = int(measured.stdout.split()[-1]) * 1024, len(content)
    (small, _), (large, size) = peaks.values()
    print(f"{(large - small) / size:.2f} times the file")
    assert (large - small) / size < 3.5


MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""Program that runs a command and prints its peak of memory, in KiB."""
