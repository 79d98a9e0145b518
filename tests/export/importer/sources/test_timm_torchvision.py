"""Models of timm and torchvision with random weights, compared with their own transforms.

Both need a working torchvision: `pip install --no-deps timm torchvision` beside the right build of torch.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.export.importer.sources.imports import import_source, read_refusal
from tests.tools import SYSTEM_REASON

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None,
    reason=f"{SYSTEM_REASON}has no timm with torchvision: pip install timm torchvision",
)
needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason=f"{SYSTEM_REASON}has no torchvision: pip install torchvision",
)
pytestmark = pytest.mark.long


def save_timm_model(folder: Path, **pretrained: Any) -> Path:
    """Save timm's smallest network as timm saves it for the hub."""
    import timm
    import torch
    from timm.models import save_for_hf

    torch.manual_seed(0)
    save_for_hf(timm.create_model("test_resnet", pretrained=False), folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"].update(pretrained)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@needs_timm
@pytest.mark.parametrize(
    "pretrained",
    [
        {"crop_pct": 0.875},
        {"crop_pct": 1.0, "crop_mode": "squash"},
        {"crop_pct": 0.9, "crop_mode": "squash"},
        {"crop_pct": 1.0, "crop_mode": "border"},
        {"crop_pct": 0.9, "input_size": [3, 128, 160]},
    ],
    ids=str,
)
def test_timm_model_is_converted_and_compared(tmp_path: Path, pretrained: dict[str, Any]) -> None:
    report, engine = import_source(tmp_path, save_timm_model(tmp_path / "test-resnet", **pretrained))
    assert len(engine.contract.labels) == 1000
    assert "(ImageNetInfo of timm)" in dict(report.facts)["labels"]
    comparison = report.comparison
    assert comparison is not None
    assert comparison.pipeline.startswith("the transform of timm ")
    assert comparison.pixel_difference < 1e-2
    assert comparison.probability_difference < 1e-4


@needs_timm
def test_number_of_outputs_alone_is_not_taken_for_imagenet(tmp_path: Path) -> None:
    message = read_refusal(tmp_path, save_timm_model(tmp_path / "own", tag="plants"))
    assert "`fovea import` needs --labels" in message
    assert "own has as many outputs as ImageNet, but no tag such as a1_in1k that says so" in message


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return torch's cache with random weights of SqueezeNet."""
    import torch
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    weights = models.get_model_weights("squeezenet1_1").DEFAULT
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    network = models.get_model("squeezenet1_1", weights=None)
    torch.save(network.state_dict(), folder / weights.url.rpartition("/")[2])
    return folder


@needs_torchvision
def test_torchvision_model_is_converted_and_compared(tmp_path: Path, torch_home: Path) -> None:
    report, engine = import_source(tmp_path, "torchvision:squeezenet1_1")
    assert (report.model, len(engine.contract.labels)) == ("squeezenet1_1", 1000)
    assert dict(report.facts)["source"] == "torchvision:squeezenet1_1:IMAGENET1K_V1, squeezenet1_1.onnx"
    comparison = report.comparison
    assert comparison is not None
    assert comparison.pixel_difference < 1e-2
    assert comparison.probability_difference < 1e-4


@needs_torchvision
def test_unknown_names_of_torchvision_are_refused(tmp_path: Path, torch_home: Path) -> None:
    message = read_refusal(tmp_path, "torchvision:squeezenet")
    assert message.startswith("torchvision has no classifier 'squeezenet'; did you mean squeezenet1_")
    message = read_refusal(tmp_path, "torchvision:squeezenet1_1:V9")
    assert message == "squeezenet1_1 has no weights 'V9'; it has IMAGENET1K_V1"


@needs_torchvision
def test_pickle_in_the_cache_of_torch_does_not_run(tmp_path: Path, torch_home: Path) -> None:
    import torch

    from tests.export.importer.sources.test_torch_files import Bomb

    (file,) = torch_home.iterdir()
    torch.save(Bomb(tmp_path / "exploded"), file)
    assert "does not load with weights_only=True" in read_refusal(tmp_path, "torchvision:squeezenet1_1")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason=f"{SYSTEM_REASON}has it")
def test_missing_torchvision_is_one_sentence(tmp_path: Path) -> None:
    assert read_refusal(tmp_path, "torchvision:resnet18") == (
        "the conversion of torchvision:resnet18 needs torchvision: pip install torchvision"
    )
