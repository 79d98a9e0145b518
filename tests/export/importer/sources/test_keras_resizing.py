"""The layer `Resizing` at the start of a `.keras` file states how images are resized."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fovea.export.importer.preprocessing import PreprocessingOptions
from fovea.export.importer.sources.keras_resizing import read_resizing
from fovea.service.artifact.geometry_text import format_steps
from fovea.service.inference.resize import apply_geometry
from tests.export.importer.sources.imports import import_source
from tests.export.importer.sources.layouts import LABELS
from tests.tools import SYSTEM_REASON

RESIZING = {"height": 24, "width": 32, "interpolation": "bilinear", "data_format": "channels_last"}


def write_file(tmp_path: Path, *layers: dict[str, Any], shape: Any = (None, None, None, 3)) -> Path:
    """Write a `.keras` file without weights, as Keras 3.15 writes its configuration."""
    first = {"class_name": "InputLayer", "config": {"batch_shape": shape, "name": "input_layer"}}
    with zipfile.ZipFile(tmp_path / "pets.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"config": {"layers": [first, *layers]}}))
    return tmp_path / "pets.keras"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "resize stretch 24 x 32 bilinear no-antialias"),
        ({"crop_to_aspect_ratio": True}, "crop aspect 24 x 32, resize stretch 24 x 32 bilinear no-antialias"),
        (
            {"pad_to_aspect_ratio": True, "fill_mode": "constant", "fill_value": 7.0},
            "pad aspect 24 x 32 fill 7/7/7, resize stretch 24 x 32 bilinear no-antialias",
        ),
    ],
)
def test_layer_states_the_steps(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    layer = {"class_name": "Resizing", "config": {**RESIZING, **options}}
    geometry = read_resizing(write_file(tmp_path, layer, {"class_name": "Dense", "config": {}}))
    assert geometry is not None
    assert (geometry.height, geometry.width, format_steps(geometry.steps)) == (24, 32, text)


@pytest.mark.parametrize(
    "options",
    [
        {"interpolation": "area"},
        {"antialias": True},
        {"data_format": "channels_first"},
        {"pad_to_aspect_ratio": True, "fill_value": 0.5},
        {"pad_to_aspect_ratio": True, "fill_value": 300},
        {"height": 0},
        {"height": None},
    ],
)
def test_other_layers_state_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    layer = {"class_name": "Resizing", "config": {**RESIZING, **options}}
    assert read_resizing(write_file(tmp_path, layer)) is None


def test_layer_that_is_not_alone_at_the_input_states_nothing(tmp_path: Path) -> None:
    layer = {"class_name": "Resizing", "config": RESIZING}
    history = [{"args": [{"config": {"keras_history": ["input_layer", 0, 0]}}]}]
    assert read_resizing(write_file(tmp_path, layer, {"inbound_nodes": history})) is None
    assert read_resizing(write_file(tmp_path, layer, shape=[None, 64, 64, 3])) is None
    assert read_resizing(write_file(tmp_path, {"class_name": "Dense", "config": {}}, layer)) is None
    (tmp_path / "pets.keras").write_bytes(b"PK\3\4")
    assert read_resizing(tmp_path / "pets.keras") is None


SAVE = """
import sys, keras, numpy as np
keras.utils.set_random_seed(0)
resizing = keras.layers.Resizing(24, 32, pad_to_aspect_ratio=True, fill_value=7)
layers = [keras.layers.Input((None, None, 3)), resizing, keras.layers.Rescaling(1 / 127.5, -1)]
layers += [keras.layers.Conv2D(8, 3), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(5)]
keras.Sequential(layers).save(sys.argv[1])
image = np.load(sys.argv[2])
np.save(sys.argv[2], keras.ops.convert_to_numpy(resizing(image[None].astype("float32"))[0]))
"""


@pytest.mark.long
@pytest.mark.skipif(find_spec("keras") is None, reason=f"{SYSTEM_REASON}has no Keras: pip install keras")
def test_import_makes_the_pixels_of_the_layer(tmp_path: Path) -> None:
    """The layer does not round to levels; Fovea's weights have 11 bits."""
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8))
    image = coarse.resize((101, 140), Image.Resampling.BICUBIC)
    np.save(tmp_path / "image.npy", np.asarray(image))
    command = [sys.executable, "-c", SAVE, str(tmp_path / "pets.keras"), str(tmp_path / "image.npy")]
    subprocess.run(command, env={**os.environ, "KERAS_BACKEND": "torch"}, check=True)
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    ones, zeros = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    preprocessing = PreprocessingOptions(mean=zeros, std=ones, scale=1.0)
    report, engine = import_source(
        tmp_path, tmp_path / "pets.keras", labels=tmp_path / "labels.txt", preprocessing=preprocessing
    )
    assert dict(report.facts)["geometry"].endswith("(layer Resizing of the file)")
    geometry = engine.contract.input
    pixels = apply_geometry(image, geometry, image.size, (0, 0, *image.size), None)
    assert np.abs(pixels - np.load(tmp_path / "image.npy")).max() < 0.75
