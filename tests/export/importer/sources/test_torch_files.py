"""TorchScript, programs of torch.export, and pickles, which are refused."""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
from tests.export.importer.sources.imports import import_source, read_refusal
from tests.export.importer.sources.layouts import LABELS

OPTIONS: dict[str, Any] = {"preprocessing": PreprocessingOptions(preset=IMAGENET)}


class SmallNet(nn.Module):
    """A convolution, a mean and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, len(LABELS))

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        logits: torch.Tensor = self.head(self.conv(planes).relu().mean(dim=(2, 3)))
        return logits


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    return tmp_path / "labels.txt"


def compute_expected(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values = (pixels / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    with torch.no_grad():
        logits = SmallNet()(torch.from_numpy(values.transpose(0, 3, 1, 2).astype(np.float32)))
    return np.asarray(logits.softmax(dim=1))


def draw_pixels(size: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_converted(tmp_path: Path, labels: Path) -> None:
    torch.jit.save(torch.jit.script(SmallNet()), tmp_path / "pets.pt")
    message = read_refusal(tmp_path, tmp_path / "pets.pt", labels=labels, **OPTIONS)
    assert "takes images of any size: set the size" in message
    report, engine = import_source(tmp_path, tmp_path / "pets.pt", labels=labels, size=(24, 24), **OPTIONS)
    assert (report.model, report.file) == ("pets", "pets.pt")
    digest = hashlib.sha256((tmp_path / "pets.pt").read_bytes()).hexdigest()
    assert report.sha256 == digest
    assert engine.contract.training.commit == f"sha256:{digest}"
    assert "compared as ONNX only, not with torch" in dict(report.facts)["compared"]
    assert np.abs(engine.run(draw_pixels(24)) - compute_expected(draw_pixels(24))).max() < 1e-5


@pytest.mark.long
def test_program_of_torch_export_is_converted(tmp_path: Path, labels: Path) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(SmallNet(), (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "pets.pt2")
    report, engine = import_source(tmp_path, tmp_path / "pets.pt2", labels=labels, **OPTIONS)
    assert report.model == "pets"
    assert np.abs(engine.run(draw_pixels(16)) - compute_expected(draw_pixels(16))).max() < 1e-5


class Bomb:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.long
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_inside_a_program_never_runs(tmp_path: Path, labels: Path, protocol: int) -> None:
    program = torch.export.export(SmallNet(), (torch.zeros(2, 3, 16, 16),))
    torch.export.save(program, tmp_path / "good.pt2")
    bomb = Bomb(tmp_path / "exploded")
    saved = io.BytesIO()
    torch.save(bomb, saved)
    with (
        zipfile.ZipFile(tmp_path / "good.pt2") as good,
        zipfile.ZipFile(tmp_path / "evil.pt2", "w") as evil,
    ):
        for member in good.infolist():
            content = good.read(member)
            if "sample_inputs" in member.filename or "data/weights/weight" in member.filename:
                content = pickle.dumps(bomb, protocol) if protocol else saved.getvalue()
            if member.filename.endswith("weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true')
            evil.writestr(member, content)
    message = read_refusal(tmp_path, tmp_path / "evil.pt2", labels=labels, **OPTIONS)
    assert "evil.pt2 has a pickle that does not load with weights_only=True" in message
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_pickles_are_refused_unread(tmp_path: Path, labels: Path, form: str) -> None:
    bomb = Bomb(tmp_path / "exploded")
    if form == "bare":
        (tmp_path / "pets.bin").write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, tmp_path / "pets.bin", _use_new_zipfile_serialization=form == "zip")
    message = read_refusal(tmp_path, tmp_path / "pets.bin", labels=labels, **OPTIONS)
    assert "is a pickle, which Fovea never loads, because a pickle can run any program; convert it" in message
    assert not (tmp_path / "exploded").exists()
