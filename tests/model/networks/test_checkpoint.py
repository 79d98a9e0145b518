"""Checkpoints on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fovea.model.networks.checkpoint import (
    RESUME_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    CheckpointError,
    get_momentum_tensors,
    load_checkpoint,
    restore_momentum,
    save_checkpoint,
)
from fovea.model.networks.network import Net, NetConfig
from fovea.model.networks.pretrained import PretrainedError, read_pretrained
from fovea.service.artifact.contract import Task
from fovea.service.atomic_files import WriteError
from tests.servers import DEFAULT_MODEL, FLOAT_MODEL
from tests.training import limit_file_size

CONFIG = NetConfig(Task.MULTICLASS, 3, widths=(8, 8, 8, 8))


def make_checkpoint(seed: int = 0, **metadata: Any) -> Checkpoint:
    torch.manual_seed(seed)
    return Checkpoint(
        dict(Net(CONFIG).state_dict()), {"net": CONFIG.to_dict(), "labels": ["ä", "b"], **metadata}
    )


def is_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def list_file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- saving and loading --------------------------------------------------------------------------


def test_saved_checkpoint_is_loaded_unchanged(tmp_path: Path) -> None:
    saved = make_checkpoint(progress={"step": 3, "loss": 0.1 + 0.2})
    save_checkpoint(tmp_path / "deep" / "run", WEIGHTS_FILE, saved)
    loaded = load_checkpoint(tmp_path / "deep" / "run")
    assert is_same(loaded.tensors, saved.tensors)
    assert loaded.metadata == saved.metadata
    assert is_same(dict(loaded.build_net().state_dict()), saved.tensors)
    assert loaded.build_net().config == CONFIG


def test_tensors_of_any_memory_format_keep_their_values(tmp_path: Path) -> None:
    channels_last = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path, RESUME_FILE, Checkpoint({"last": channels_last, "count": torch.tensor(7)}, {}))
    assert is_same(
        load_checkpoint(tmp_path, RESUME_FILE).tensors, {"last": channels_last, "count": torch.tensor(7)}
    )


def test_json_file_equals_the_metadata_in_the_header(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, WEIGHTS_FILE, make_checkpoint(commit="abc"))
    with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as file:
        header_metadata = json.loads(file.metadata()["fovea"])
    assert json.loads((tmp_path / "weights.json").read_text()) == header_metadata
    assert header_metadata["commit"] == "abc"
    assert list_file_names(tmp_path) == ["weights.json", WEIGHTS_FILE]


def test_checkpoint_file_is_safetensors(tmp_path: Path) -> None:
    """The file has 8 bytes of length, a JSON header and plain numbers: nothing in it can be run."""
    save_checkpoint(tmp_path, WEIGHTS_FILE, make_checkpoint())
    content = (tmp_path / WEIGHTS_FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]
    ends = [entry["data_offsets"][1] for entry in header.values()]
    assert 8 + length + max(ends) == len(content)
    assert header.keys() == Net(CONFIG).state_dict().keys()


def test_later_checkpoint_replaces_the_earlier_one(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_checkpoint(tmp_path, WEIGHTS_FILE, make_checkpoint(seed, step=seed))
    assert is_same(load_checkpoint(tmp_path).tensors, make_checkpoint(1).tensors)
    assert load_checkpoint(tmp_path).metadata["step"] == 1
    assert list_file_names(tmp_path) == ["weights.json", WEIGHTS_FILE]


# --- failures ------------------------------------------------------------------------------------


def test_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    earlier = make_checkpoint()
    save_checkpoint(tmp_path, WEIGHTS_FILE, earlier)
    large = Checkpoint({"large": torch.zeros(1 << 20)}, earlier.metadata)
    with limit_file_size(1 << 20), pytest.raises(WriteError, match=r"cannot write .*File too large"):
        save_checkpoint(tmp_path, WEIGHTS_FILE, large)
    assert is_same(load_checkpoint(tmp_path).tensors, earlier.tensors)
    assert list_file_names(tmp_path) == ["weights.json", WEIGHTS_FILE]


def test_failed_save_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    earlier = make_checkpoint()
    save_checkpoint(tmp_path, WEIGHTS_FILE, earlier)
    shared_tensor = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        save_checkpoint(
            tmp_path,
            WEIGHTS_FILE,
            Checkpoint({"one": shared_tensor, "same": shared_tensor}, earlier.metadata),
        )
    assert is_same(load_checkpoint(tmp_path).tensors, earlier.tensors)
    assert list_file_names(tmp_path) == ["weights.json", WEIGHTS_FILE]


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(WriteError, match=r"cannot write .*run"):
        save_checkpoint(tmp_path / "run", WEIGHTS_FILE, make_checkpoint())


def test_failed_replacement_leaves_no_other_file(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_FILE).mkdir()
    with pytest.raises(WriteError, match="cannot write"):
        save_checkpoint(tmp_path, WEIGHTS_FILE, make_checkpoint())
    assert list_file_names(tmp_path) == [WEIGHTS_FILE]


def test_missing_checkpoint_error_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no .*weights.safetensors; `fovea train --out"):
        load_checkpoint(tmp_path / "nowhere")


def damage_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20] ^= 0xFF
    path.write_bytes(content)


def truncate_file(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def write_foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path, metadata={"format": "pt"})


def write_without_metadata(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def write_invalid_json(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path, metadata={"fovea": "{"})


def write_pickle(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    "change",
    [
        damage_header,
        truncate_file,
        write_foreign,
        write_without_metadata,
        write_invalid_json,
        write_pickle,
        Path.touch,
    ],
)
def test_damaged_or_foreign_file_is_refused(tmp_path: Path, change: Any) -> None:
    if change is not Path.touch:
        save_checkpoint(tmp_path, WEIGHTS_FILE, make_checkpoint())
    change(tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="is damaged or is not a Fovea checkpoint"):
        load_checkpoint(tmp_path)


def test_weights_of_another_network_are_refused() -> None:
    tensors = make_checkpoint().tensors
    wider_config = NetConfig(Task.MULTICLASS, 3, widths=(16, 8, 8, 8)).to_dict()
    with pytest.raises(CheckpointError, match="the weights belong to another network"):
        Checkpoint(tensors, {"net": wider_config}).build_net()
    del tensors["head.bias"]
    with pytest.raises(CheckpointError, match=r"(?s)belong to another network.*head\.bias"):
        Checkpoint(tensors, {"net": CONFIG.to_dict()}).build_net()


# --- the optimizer -------------------------------------------------------------------------------


def make_optimizer() -> tuple[Net, torch.optim.SGD]:
    torch.manual_seed(0)
    net = Net(CONFIG).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as in training
    return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def take_step(net: Net, optimizer: torch.optim.SGD) -> None:
    pixels = torch.arange(2 * 16 * 16 * 3).view(2, 16, 16, 3).to(torch.uint8)
    optimizer.zero_grad()
    net(pixels).square().sum().backward()
    optimizer.step()


def test_restored_momentum_gives_the_same_next_step() -> None:
    net, optimizer = make_optimizer()
    assert get_momentum_tensors(optimizer) == {}
    take_step(net, optimizer)
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    momentum = {key: value.clone() for key, value in get_momentum_tensors(optimizer).items()}
    assert len(momentum) == sum(weight.requires_grad for weight in net.parameters())
    take_step(net, optimizer)

    resumed_net, resumed_optimizer = make_optimizer()
    resumed_net.load_state_dict(weights)
    restore_momentum(resumed_optimizer, momentum)
    take_step(resumed_net, resumed_optimizer)
    assert is_same(dict(resumed_net.state_dict()), dict(net.state_dict()))
    assert is_same(get_momentum_tensors(resumed_optimizer), get_momentum_tensors(optimizer))


def test_version_without_weights_says_where_weights_are() -> None:
    """The default model is quantized, and the float version beside it has weights."""
    with pytest.raises(
        CheckpointError,
        match=r"4/weights\.safetensors; .*4/model\.onnx was imported or quantized.* take the float version",
    ):
        load_checkpoint(DEFAULT_MODEL.parent)
    with pytest.raises(PretrainedError, match=r"4 has no weights\.safetensors: .* take the float version"):
        read_pretrained(str(DEFAULT_MODEL.parent))
    assert load_checkpoint(FLOAT_MODEL.parent).tensors
