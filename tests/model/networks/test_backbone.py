"""The backbone: when training starts from it, what speaks against it, and how its file is made."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open

from fovea.model import run
from fovea.model.data import raw_dataset
from fovea.model.data.choices import Choices
from fovea.model.data.dataset import load_dataset
from fovea.model.networks import backbone
from fovea.model.networks.checkpoint import METADATA_KEY, Checkpoint
from fovea.model.networks.network import Net, NetConfig
from fovea.model.networks.pretrained import PretrainedError
from fovea.model.recipe import Augmentation
from fovea.model.run import TrainingOptions, run_training
from fovea.service.artifact.contract import Task
from tests.training import draw_dataset, draw_images


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("photos") / "squares", count=4)


def train(
    data: Path,
    out: Path,
    *,
    net: str | None = None,
    size: int | None = None,
    start: str | None = None,
    resume: bool = False,
) -> tuple[dict[str, object], str]:
    """Train for one epoch; return the metadata of the run and what was printed."""
    text = io.StringIO()
    options = TrainingOptions(
        out=out, data=data, choices=Choices(), net=net, size=size, start=start, teachers=[],
        epochs=None if resume else 1, minutes=None, seed=0, validation=0.25, flip=True,
        augmentation=Augmentation.SHIFT, resume=resume, tensorboard=False, command="fovea train",
    )  # fmt: skip
    result = run_training(options, Console(file=text, width=1000))
    assert result
    return result[0].metadata, text.getvalue()


@pytest.mark.long
def test_few_images_start_from_the_backbone(photos: Path, tmp_path: Path) -> None:
    metadata, text = train(photos, tmp_path)
    assert "starts from the backbone, a cnn_large trained on 190 classes of photographs" in text
    assert "--from scratch starts from random weights" in text
    assert metadata["start"] == {"from": "backbone"}
    net = metadata["net"]
    assert isinstance(net, dict)
    assert (net["name"], net["size"]) == ("cnn_large", 64)
    resumed_metadata, _ = train(photos, tmp_path, resume=True)
    assert resumed_metadata["start"] == {"from": "backbone"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("net", "size", "start"),
    [(None, None, "scratch"), ("cnn", None, None), (None, 32, None), (None, 128, None)],
)
def test_other_choices_start_from_random_weights(
    photos: Path, tmp_path: Path, net: str | None, size: int | None, start: str | None
) -> None:
    metadata, text = train(photos, tmp_path, net=net, size=size, start=start)
    assert "backbone" not in text
    assert metadata["start"] == {}
    if start:  # a run goes on as it began, without the option
        assert train(photos, tmp_path, resume=True)[0]["start"] == {}


@pytest.mark.long
def test_run_goes_on_from_random_weights_though_its_images_suit_the_backbone(tmp_path: Path) -> None:
    data = draw_images(tmp_path / "squares", count=4, side=64)
    metadata, _ = train(data, tmp_path / "run", start="scratch")
    resumed_metadata, _ = train(data, tmp_path / "run", resume=True)
    assert metadata["start"] == resumed_metadata["start"] == {}


@pytest.mark.long
def test_many_images_start_from_random_weights(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (run, raw_dataset):
        monkeypatch.setattr(module, "SMALL_SET", 5)
    assert train(photos, tmp_path / "many")[0]["start"] == {}
    metadata, text = train(photos, tmp_path / "chosen", start="backbone")
    assert metadata["start"] == {"from": "backbone"}
    assert "starts from the backbone" in text


@pytest.mark.parametrize(
    ("net", "size", "chosen"),
    [("cnn", None, "cnn"), (None, 32, "cnn_large at 32 px"), ("resnet18", 224, "resnet18 at 224 px")],
)
def test_backbone_that_does_not_fit_is_an_error_with_the_way_out(
    photos: Path, tmp_path: Path, net: str | None, size: int | None, chosen: str
) -> None:
    message = (
        f"is a cnn_large for images of 64 to 127 px, not a {chosen}; leave out --net and --size, or pass"
    )
    with pytest.raises(PretrainedError, match=message):
        train(photos, tmp_path, net=net, size=size, start="backbone")
    assert not list(tmp_path.iterdir())  # before anything is read


def test_first_outputs_are_those_of_the_backbone(photos: Path) -> None:
    weights = backbone.read_backbone()
    net = Net(NetConfig(Task.MULTICLASS, 3, "cnn_large", 64))
    weights.load_into(net, ("a", "b", "c"))
    assert torch.equal(net.features[3][0].weight, weights.tensors["features.3.0.weight"].float())


# --- doubts --------------------------------------------------------------------------------------


def test_good_set_gives_no_doubts(tmp_path: Path) -> None:
    assert backbone.find_doubts(draw_dataset(tmp_path, count=100)) == []


def test_grey_images_are_told(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(100):
            Image.fromarray(random.integers(0, 256, (20, 20), np.uint8)).save(
                tmp_path / label / f"{number}.jpg"
            )
    data = load_dataset(tmp_path, size=16, validation=0.3, seed=0)
    (doubt,) = backbone.find_doubts(data)
    assert doubt.startswith("the images are grey") and "--from scratch" in doubt


def test_few_held_out_images_are_told_with_their_margin(tmp_path: Path) -> None:
    (doubt,) = backbone.find_doubts(draw_dataset(tmp_path, count=40))
    assert doubt == (
        "only 24 images are held out, so the accuracy may be off by 20 points: add images, or pass "
        "--validation 0.3"
    )


def test_classes_of_the_backbone_are_told(tmp_path: Path) -> None:
    data = draw_dataset(tmp_path, count=100)
    known = type(data)(**{**vars(data), "labels": ("golden retriever", "plum", "Banana")})
    (doubt,) = backbone.find_doubts(known)
    assert doubt.startswith("the backbone was trained on images of golden retriever, Banana, so images")


# --- its file ------------------------------------------------------------------------------------


def test_file_is_small_and_says_how_it_was_made() -> None:
    assert backbone.BACKBONE_FILE.stat().st_size < 12e6
    with safe_open(backbone.BACKBONE_FILE, framework="pt") as file:
        facts = json.loads(file.metadata()[METADATA_KEY])
        assert all(file.get_tensor(key).isfinite().all() for key in file.keys())  # noqa: SIM118 - no dict
    assert len(facts["classes"]) == 190
    assert facts["data"]["train"] == 85_500
    assert facts["command"].startswith("fovea train ")
    assert facts["measured"]["accuracy"] > 0.4


def make_checkpoint(name: str = "cnn_large", size: int = 64, **facts: object) -> Checkpoint:
    net = Net(NetConfig(Task.MULTICLASS, 3, name, size))
    metadata = {
        "net": net.config.to_dict(), "labels": ["a", "b", "c"], "recipe": {}, "data": {}, "command": "",
        "commit": "", "torch": "", "measured": {}, **facts,
    }  # fmt: skip
    return Checkpoint(net.state_dict(), metadata)


def test_written_file_is_read_as_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "BACKBONE_FILE", tmp_path / "backbone.safetensors")
    checkpoint = make_checkpoint()
    backbone.write_backbone(checkpoint, backbone.BACKBONE_FILE)
    weights = backbone.read_backbone()
    assert (weights.source, weights.net) == ("backbone", "cnn_large")
    assert all(key.startswith("features.") for key in weights.tensors)
    for key, tensor in weights.tensors.items():
        assert tensor.dtype == torch.float16
        assert torch.allclose(tensor.float(), checkpoint.tensors[key], rtol=1e-3, atol=1e-6)


def test_file_is_made_of_a_finished_run_of_its_network(tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    for wrong in (make_checkpoint("cnn"), make_checkpoint(size=96)):
        with pytest.raises(PretrainedError, match="the backbone is a cnn_large at 64 px"):
            backbone.write_backbone(wrong, path)
    unfinished = make_checkpoint()
    del unfinished.metadata["measured"]
    with pytest.raises(PretrainedError, match="the run is not finished"):
        backbone.write_backbone(unfinished, path)
    large = make_checkpoint()
    large.tensors["features.3.1.running_var"] += 1e6
    with pytest.raises(PretrainedError, match=r"float16 cannot hold features\.3\.1\.running_var"):
        backbone.write_backbone(large, path)
    assert not path.exists()


@pytest.mark.long
def test_installation_without_the_file_trains_from_random_weights(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (run, backbone):
        monkeypatch.setattr(module, "BACKBONE_FILE", tmp_path / "nowhere")
    assert train(photos, tmp_path / "run")[0]["start"] == {}
    with pytest.raises(PretrainedError, match="this installation has no nowhere; pass --from scratch"):
        train(photos, tmp_path / "chosen", start="backbone")
