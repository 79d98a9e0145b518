"""Quantizations that are refused say what to do, and leave no file."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from fovea.export.quantize.float_model import modernize_graph
from fovea.export.quantize.pipeline import quantize_model
from fovea.export.quantize.refusal import QuantizeRefused
from tests.commands import Command, make_command, read_error_line
from tests.export.quantize.models import (
    add_version,
    build_colour_graph,
    draw_images,
    make_graph,
    make_request,
    quantize_quietly,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("photos"), 8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return add_version(build_colour_graph(), tmp_path / "zoo")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    return make_command(monkeypatch)


def list_files(source: Path) -> list[str]:
    root = source.parent.parent
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def require_refusal(
    command: Command, capsys: pytest.CaptureFixture[str], source: Path, *arguments: object
) -> str:
    """Run the command, which must write nothing; return its error line."""
    files = list_files(source)
    assert command("quantize", source, *arguments) == 2
    assert list_files(source) == files
    assert [path.name for path in source.parent.iterdir()] == ["1"]
    return read_error_line(capsys)


def test_folder_without_images(
    command: Command, capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no images; give images" in require_refusal(command, capsys, source, "--images", empty)
    nowhere = tmp_path / "nowhere"
    assert "is not a folder; it takes" in require_refusal(command, capsys, source, "--images", nowhere)


def test_too_few_images(
    command: Command, capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    few = draw_images(tmp_path / "few", 3)
    line = require_refusal(command, capsys, source, "--images", few)
    assert "has 12 readable images; at least 16 are needed" in line


def test_images_of_another_task(
    command: Command, capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    others = draw_images(tmp_path / "others", 8, ("cat", "dog", "red", "blue"))
    line = require_refusal(command, capsys, source, "--images", others)
    assert "the folder 'cat' is not a label; the nearest is" in line
    assert "or --unlabelled to compare" in line


def test_model_that_is_int8_already(
    command: Command, capsys: pytest.CaptureFixture[str], source: Path, images: Path, tmp_path: Path
) -> None:
    _, folder, _ = quantize_quietly(make_request(source, images))
    assert command("quantize", folder, "--images", images) == 2
    assert "is int8 already; quantize version 1, from which it was made" in read_error_line(capsys)
    foreign = onnx.load(folder / "model.onnx")
    graph = add_version(foreign, tmp_path / "foreign")  # int8 by another tool: its contract does not say so
    line = require_refusal(command, capsys, graph, "--images", images)
    assert "is int8 already: it has DequantizeLinear, QuantizeLinear; import the float model" in line


def test_full_disk(source: Path, images: Path) -> None:
    """A limit on the file size simulates the full disk while the version is written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill_disk(line: str) -> None:
        if "right" in line:  # the candidate has passed: only the version is written after this
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with pytest.raises(
            QuantizeRefused, match=r"cannot write version 2 into .*: File too large; nothing was"
        ):
            quantize_model(make_request(source, images), fill_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous_handler)
    assert [path.name for path in source.parent.iterdir()] == ["1"]


def test_read_only_repository_is_refused_before_any_measurement(
    source: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user of the tests may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != source.parent)
    lines: list[str] = []
    with pytest.raises(QuantizeRefused, match=r"cannot write the next version into .*read-only; copy the"):
        quantize_model(make_request(source, images), lines.append)
    assert lines == []


def test_float16_with_reduced_range(
    command: Command, capsys: pytest.CaptureFixture[str], source: Path, images: Path
) -> None:
    for option in ("--reduced-range", "--full-range"):
        line = require_refusal(command, capsys, source, "--images", images, "--fp16", option)
        assert "--fp16 has weights of 16 bits; leave out --reduced-range and --full-range" in line


def test_full_temporary_disk(source: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(QuantizeRefused, match=r"cannot store the pixels of 32 images.*No space left.*TMPDIR"):
        quantize_quietly(make_request(source, images))
    assert list_files(source) == ["colours/1/model.onnx"]


@pytest.mark.parametrize("moment", ["held out", "signal to noise", "right"])
def test_interruption_leaves_no_file(
    source: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def interrupt(line: str) -> None:
        if moment in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(make_request(source, images), interrupt)
    assert list_files(source) == ["colours/1/model.onnx"]
    assert list(temporary.iterdir()) == []


def test_graph_without_weights_that_int8_can_use(
    command: Command, capsys: pytest.CaptureFixture[str], images: Path, tmp_path: Path
) -> None:
    """The matrix is computed in the graph, so it is no constant of the file."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=onnx.TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        helper.make_node("Neg", ["matrix"], ["computed"]),
        helper.make_node("MatMul", ["means", "computed"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    matrix = np.random.default_rng(0).normal(0, 0.01, (3, 4)).astype(np.float32)
    graph = make_graph(nodes, {"matrix": matrix, "axes": np.array([1, 2], np.int64)})
    source = add_version(graph, tmp_path / "zoo")
    line = require_refusal(command, capsys, source, "--images", images)
    assert "no layer of the graph can be quantized" in line
    assert "the graph has 1 MatMul); serve the float model" in line


def test_operator_whose_values_have_no_range(
    command: Command, capsys: pytest.CaptureFixture[str], images: Path, tmp_path: Path
) -> None:
    """Divisions by 0 give infinite values, which a Clip makes finite again."""
    graph = build_colour_graph()
    nodes = list(graph.graph.node)
    index = next(number for number, node in enumerate(nodes) if node.op_type == "ReduceMean")
    nodes[index].input[0] = "clipped"
    nodes[index:index] = [
        helper.make_node("Div", ["one", "maps_1"], ["divided"]),
        helper.make_node("Clip", ["divided", "zero", "one"], ["bounded"]),
        helper.make_node("Conv", ["bounded", "last"], ["clipped"]),
    ]
    for name, value in (("zero", 0.0), ("one", 1.0), ("last", np.ones((8, 8, 1, 1)))):
        array = np.asarray(value, np.float32)
        graph.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    source = add_version(graph, tmp_path / "zoo")
    line = require_refusal(command, capsys, source, "--images", images)
    assert "the tensor 'divided' is not finite for some calibration images" in line


def lower_opset(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph as an older tool writes it: `axes` of a mean was an attribute."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    copy.opset_import[0].version = 12
    for node in copy.graph.node:
        if node.op_type == "ReduceMean":
            del node.input[1]
            node.attribute.append(helper.make_attribute("axes", [2, 3]))
    return copy


def test_old_opset_is_raised_and_unknown_operator_refused() -> None:
    graph = build_colour_graph()
    assert modernize_graph(lower_opset(graph)).opset_import[0].version == 13
    graph.graph.node[4].op_type = "Nonsense"
    with pytest.raises(QuantizeRefused, match=r"has opset 12, int8 needs 13, .* export the model again"):
        modernize_graph(lower_opset(graph))


def test_path_that_is_no_version(
    command: Command, capsys: pytest.CaptureFixture[str], source: Path, images: Path, tmp_path: Path
) -> None:
    assert command("quantize", source / "nothing", "--images", images) == 2
    assert "give the folder of a version in a repository, such as zoo/pets/1" in read_error_line(capsys)
    assert command("quantize", source.parent, "--images", images) == 2
    assert f"give the folder of a version in a repository, such as {source}" in read_error_line(capsys)
    loose = tmp_path / "loose.onnx"
    loose.write_bytes((source / "model.onnx").read_bytes())
    assert command("quantize", loose, "--images", images) == 2
    assert "add it to one with `fovea publish" in read_error_line(capsys)
