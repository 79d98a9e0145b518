"""Models of Keras 3, converted with Keras on torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fovea.export.importer.preprocessing import KERAS_MOBILENET, PreprocessingOptions
from tests.export.importer.sources.imports import import_source, read_refusal
from tests.export.importer.sources.layouts import LABELS
from tests.tools import SYSTEM_REASON

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("keras") is None, reason=f"{SYSTEM_REASON}has no Keras: pip install keras"
    ),
]
OPTIONS: dict[str, Any] = {"preprocessing": PreprocessingOptions(preset=KERAS_MOBILENET)}

SAVE = """
import json, sys, keras, numpy as np
keras.utils.set_random_seed(0)
layers = [keras.layers.Input((16, 16, 3)), keras.layers.Conv2D(8, 3, activation="relu")]
if sys.argv[2] == "lambda":
    layers.append(keras.layers.Lambda(lambda x: x * 2))
layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(5, activation="softmax")]
model = keras.Sequential(layers)
model.save(sys.argv[1])
pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
print(json.dumps(np.asarray(model.predict(pixels / 127.5 - 1, verbose=0)).tolist()))
"""


def save_model(path: Path, kind: str = "plain") -> np.ndarray[Any, Any]:
    """Save a small model in a process with Keras on torch; return its probabilities."""
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    command = [sys.executable, "-c", SAVE, str(path), kind]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return np.array(json.loads(result.stdout.splitlines()[-1]))


def test_keras_file_is_converted(tmp_path: Path) -> None:
    expected = save_model(tmp_path / "pets.keras")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    report, engine = import_source(
        tmp_path, f"keras:{tmp_path / 'pets.keras'}", labels=tmp_path / "labels.txt", **OPTIONS
    )
    assert (report.model, engine.contract.labels) == ("pets", LABELS)
    assert report.sha256 == hashlib.sha256((tmp_path / "pets.keras").read_bytes()).hexdigest()
    assert dict(report.facts)["compared"].startswith("with the network in Keras 3")
    assert report.comparison is not None
    assert report.comparison.probability_difference < 1e-5
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert np.abs(engine.run(pixels) - expected).max() < 1e-5


def test_missing_facts_are_asked_for(tmp_path: Path) -> None:
    save_model(tmp_path / "pets.keras")
    message = read_refusal(tmp_path, tmp_path / "pets.keras")
    assert "`fovea import` needs --labels; the file does not say how to normalise pixels" in message


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    save_model(tmp_path / "pets.keras", "lambda")
    message = read_refusal(tmp_path, tmp_path / "pets.keras", labels=tmp_path / "x", **OPTIONS)
    assert "cannot load pets.keras" in message
