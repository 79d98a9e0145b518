"""The background class of TensorFlow's models."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fovea.export.importer.preprocessing import KERAS_MOBILENET, PreprocessingOptions
from tests.export.classifiers import GraphEnd, build_classifier, run_onnx, softmax
from tests.export.importer.sources.imports import import_source, read_refusal
from tests.export.importer.sources.layouts import write_files

OPTIONS: dict[str, Any] = {"preprocessing": PreprocessingOptions(preset=KERAS_MOBILENET)}


def write_model(folder: Path, end: GraphEnd, label_count: int) -> Path:
    """Write a graph of 1,001 outputs and its labels, of which 1,001 begin with the background class."""
    names = [f"label {index}" for index in range(1000)]
    labels = ["background", *names] if label_count == 1001 else names
    graph = build_classifier(count=1001, end=end, size=16)
    write_files(folder, {"net.onnx": graph, "names.txt": "\n".join(labels)})
    return folder / "net.onnx"


@pytest.mark.parametrize("end", ["logits", "softmax"])
@pytest.mark.parametrize("label_count", [1000, 1001])
def test_background_class_is_left_out(tmp_path: Path, end: GraphEnd, label_count: int) -> None:
    file = write_model(tmp_path, end, label_count)
    report, engine = import_source(
        tmp_path, file, labels=tmp_path / "names.txt", drops_background=True, **OPTIONS
    )
    assert (report.file, report.sha256) == ("net.onnx", hashlib.sha256(file.read_bytes()).hexdigest())
    assert len(engine.contract.labels) == 1000
    assert engine.contract.labels[0] == "label 0"
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    values = (pixels / 127.5 - 1).transpose(0, 3, 1, 2).astype(np.float32)
    logits = run_onnx(build_classifier(count=1001, size=16), values)
    assert np.abs(engine.run(pixels) - softmax(logits[:, 1:])).max() < 1e-5


def test_missing_label_offers_to_leave_the_background_out(tmp_path: Path) -> None:
    file = write_model(tmp_path, "logits", 1000)
    message = read_refusal(tmp_path, file, labels=tmp_path / "names.txt", **OPTIONS)
    assert "has 1000 labels, the graph gives 1001 values" in message
    assert message.endswith("or leave the class out with --drop-background")


def test_background_stays_without_the_option(tmp_path: Path) -> None:
    file = write_model(tmp_path, "logits", 1001)
    _, engine = import_source(tmp_path, file, labels=tmp_path / "names.txt", **OPTIONS)
    assert engine.contract.labels[0] == "background"
