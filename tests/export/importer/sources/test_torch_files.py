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

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
from fovea.export.importer.sources.torch_code import check_script, restrict_json
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
    compared = dict(report.facts)["compared"]
    assert compared.startswith(f"with the network in torch {torch.__version__} on 32 generated images")
    assert compared.endswith("all labels the same; the file states no preprocessing to compare")
    assert report.comparison is not None
    assert report.comparison.probability_difference < 1e-5
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


EVIL_TEXTS: dict[str, tuple[str, str]] = {
    "size": ("\"Symbol('s84', positive=True, integer=True)\"", '"print(PATH.touch())"'),
    "text in a size": ("\"Symbol('s84', positive=True, integer=True)\"", "\"Max('print(1)', 1)\""),
    "name": ('"planes"', '"planes=PATH.touch()"'),
    "target": ('"torch.ops.aten.relu.default"', '"torch.os.system"'),
    "operator that writes": ('"torch.ops.aten.relu.default"', '"torch.ops.aten.save.default"'),
    "module to import": ('"context\\": \\"null\\"', '"context\\": {\\"__enum__\\": 1}'),
}
"""Texts in the JSON of a program, and what replaces them. `PATH` is a path as a Python expression."""


@pytest.mark.long
@pytest.mark.parametrize("kind", EVIL_TEXTS)
def test_text_inside_a_program_never_runs(tmp_path: Path, labels: Path, kind: str) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(SmallNet(), (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "good.pt2")
    path = f"__import__('pathlib').Path({str(tmp_path / 'exploded')!r})"
    old, new = (one.encode() for one in EVIL_TEXTS[kind])
    with (
        zipfile.ZipFile(tmp_path / "good.pt2") as good,
        zipfile.ZipFile(tmp_path / "evil.pt2", "w") as evil,
    ):
        for member in good.infolist():
            content = good.read(member)
            if member.filename.endswith("models/model.json"):
                assert old in content
                content = content.replace(old, new.replace(b"PATH", path.encode()))
            evil.writestr(member, content)
    message = read_refusal(tmp_path, tmp_path / "evil.pt2", labels=labels, **OPTIONS)
    assert "evil.pt2 has a text that might run any program when torch reads it" in message
    assert not (tmp_path / "exploded").exists()


@pytest.mark.long
def test_compiled_code_inside_a_program_is_refused(tmp_path: Path, labels: Path) -> None:
    torch.export.save(torch.export.export(SmallNet(), (torch.zeros(2, 3, 16, 16),)), tmp_path / "evil.pt2")
    with zipfile.ZipFile(tmp_path / "evil.pt2", "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/data/aotinductor/model/model.so", b"code")
    message = read_refusal(tmp_path, tmp_path / "evil.pt2", labels=labels, **OPTIONS)
    assert "evil.pt2 has compiled code, which Fovea does not run" in message


class Writer(nn.Module):
    """A network that writes a file when it runs."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = str(file)

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        """Write the file."""
        torch.save(planes, self.file)
        return planes.mean(dim=(2, 3))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_writes_no_file(tmp_path: Path, labels: Path) -> None:
    torch.jit.save(torch.jit.script(Writer(tmp_path / "exploded")), tmp_path / "evil.pt")
    message = read_refusal(tmp_path, tmp_path / "evil.pt", labels=labels, size=(16, 16), **OPTIONS)
    assert "evil.pt has code that might write or read files ('save' in code/" in message
    assert not (tmp_path / "exploded").exists()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*tracer:DeprecationWarning")
def test_usual_torchscript_passes_the_check(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Flatten())
    torch.jit.save(torch.jit.script(net), tmp_path / "scripted.pt")
    trace: Any = torch.jit.trace
    torch.jit.save(trace(net.eval(), torch.zeros(1, 3, 8, 8)), tmp_path / "traced.pt")
    check_script(tmp_path / "scripted.pt")
    check_script(tmp_path / "traced.pt")


@pytest.mark.parametrize(
    "code",
    [
        "torch.save(x, y)",
        "t = torch\nt . from_file(y)",
        "ops.aten.x(y)",
        "o = ops",
        'f = getattr(torch, "\\x73ave")',
        'getattr(torch, "sa" "ve")(x)',
    ],
)
def test_other_ways_to_files_are_refused(tmp_path: Path, code: str) -> None:
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/version", "3\n")
        archive.writestr("evil/code/__torch__.py", code)
    with pytest.raises(ImportRefused, match="has code that might write or read files"):
        check_script(tmp_path / "evil.pt")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_usual_program_passes_the_check(tmp_path: Path) -> None:
    class Net(nn.Module):
        """Sizes that are computed, in several ways."""

        def forward(self, planes: torch.Tensor) -> dict[str, torch.Tensor]:
            """Return logits."""
            count, _, height, width = planes.shape
            rows = planes.reshape(count, 3, height // 2, 2, width).permute(0, 2, 1, 3, 4).flatten(2)
            rows = torch.einsum("bij,bkj->bik", rows, rows) * max(height, 20) + height % 2
            return {"logits": rows.mean(dim=2)[:, :5]}

    height = 2 * torch.export.Dim("half", min=4, max=64)
    shapes = {"planes": {0: torch.export.Dim("batch"), 2: height}}
    program = torch.export.export(Net(), (torch.zeros(2, 3, 16, 16),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "net.pt2")
    with restrict_json():
        torch.export.load(tmp_path / "net.pt2")


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
