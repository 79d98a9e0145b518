"""Checkpoints on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fovea.model.atomic_files import WriteError
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
from fovea.service.artifact.contract import Task
from tests.training import limit_file_size

CONFIG = NetConfig(Task.MULTICLASS, 3, widths=(8, 8, 8, 8))


def make_checkpoint(seed: int = 0, **about: Any) -> Checkpoint:
    torch.manual_seed(seed)
    return Checkpoint(
        dict(Net(CONFIG).state_dict()), {"net": CONFIG.to_dict(), "labels": ["ä", "b"], **about}
    )


def is_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is written -----------------------------------------------------------------------------


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    saved = make_checkpoint(progress={"step": 3, "loss": 0.1 + 0.2})
    save_checkpoint(tmp_path / "deep" / "run", WEIGHTS_FILE, saved)
    loaded = load_checkpoint(tmp_path / "deep" / "run")
    assert is_same(loaded.tensors, saved.tensors)
    assert loaded.metadata == saved.metadata
    assert is_same(dict(loaded.build_net().state_dict()), saved.tensors)
    assert loaded.build_net().config == CONFIG


def test_tensors_of_any_memory_format_keep_their_values(tmp_path: Path) -> None:
    last = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path, RESUME_FILE, Checkpoint({"last": last, "count": torch.tensor(7)}, {}))
    assert is_same(load_checkpoint(tmp_path, RESUME_FILE).tensors, {"last": last, "count": torch.tensor(7)})


def test_the_readable_json_is_the_one_in_the_header(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, WEIGHTS_FILE, make_checkpoint(commit="abc"))
    with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as file:
        inside = json.loads(file.metadata()["fovea"])
    assert json.loads((tmp_path / "weights.json").read_text()) == inside
    assert inside["commit"] == "abc"
    assert file_names(tmp_path) == ["weights.json", WEIGHTS_FILE]


def test_the_file_is_safetensors_and_no_pickle(tmp_path: Path) -> None:
    """8 bytes of length, a JSON header, plain numbers: nothing in it can be run."""
    save_checkpoint(tmp_path, WEIGHTS_FILE, make_checkpoint())
    content = (tmp_path / WEIGHTS_FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]
    ends = [entry["data_offsets"][1] for entry in header.values()]
    assert 8 + length + max(ends) == len(content)
    assert header.keys() == Net(CONFIG).state_dict().keys()


def test_a_later_checkpoint_takes_the_place_of_the_earlier(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_checkpoint(tmp_path, WEIGHTS_FILE, make_checkpoint(seed, step=seed))
    assert is_same(load_checkpoint(tmp_path).tensors, make_checkpoint(1).tensors)
    assert load_checkpoint(tmp_path).metadata["step"] == 1
    assert file_names(tmp_path) == ["weights.json", WEIGHTS_FILE]


# --- what fails ----------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path: Path) -> None:
    earlier = make_checkpoint()
    save_checkpoint(tmp_path, WEIGHTS_FILE, earlier)
    large = Checkpoint({"large": torch.zeros(1 << 20)}, earlier.metadata)
    with limit_file_size(1 << 20), pytest.raises(WriteError, match=r"cannot write .*File too large"):
        save_checkpoint(tmp_path, WEIGHTS_FILE, large)
    assert is_same(load_checkpoint(tmp_path).tensors, earlier.tensors)
    assert file_names(tmp_path) == ["weights.json", WEIGHTS_FILE]


def test_an_error_of_our_own_leaves_the_earlier_checkpoint_whole(tmp_path: Path) -> None:
    earlier = make_checkpoint()
    save_checkpoint(tmp_path, WEIGHTS_FILE, earlier)
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        save_checkpoint(tmp_path, WEIGHTS_FILE, Checkpoint({"one": shared, "same": shared}, earlier.metadata))
    assert is_same(load_checkpoint(tmp_path).tensors, earlier.tensors)
    assert file_names(tmp_path) == ["weights.json", WEIGHTS_FILE]


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(WriteError, match=r"cannot write .*run"):
        save_checkpoint(tmp_path / "run", WEIGHTS_FILE, make_checkpoint())


def test_what_cannot_take_its_place_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_FILE).mkdir()
    with pytest.raises(WriteError, match="cannot write"):
        save_checkpoint(tmp_path, WEIGHTS_FILE, make_checkpoint())
    assert file_names(tmp_path) == [WEIGHTS_FILE]


def test_a_missing_checkpoint_is_named_with_the_remedy(tmp_path: Path) -> None:
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
def test_a_file_that_is_no_checkpoint_of_ours_is_refused(tmp_path: Path, change: Any) -> None:
    if change is not Path.touch:
        save_checkpoint(tmp_path, WEIGHTS_FILE, make_checkpoint())
    change(tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="is damaged or is not a Fovea checkpoint"):
        load_checkpoint(tmp_path)


def test_weights_of_another_network_are_refused() -> None:
    tensors = make_checkpoint().tensors
    wider = NetConfig(Task.MULTICLASS, 3, widths=(16, 8, 8, 8)).to_dict()
    with pytest.raises(CheckpointError, match="the weights belong to another network"):
        Checkpoint(tensors, {"net": wider}).build_net()
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


def test_the_momentum_goes_on_where_it_stopped() -> None:
    net, optimizer = make_optimizer()
    assert get_momentum_tensors(optimizer) == {}
    take_step(net, optimizer)
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    momentum = {key: value.clone() for key, value in get_momentum_tensors(optimizer).items()}
    assert len(momentum) == sum(weight.requires_grad for weight in net.parameters())
    take_step(net, optimizer)

    resumed, other = make_optimizer()
    resumed.load_state_dict(weights)
    restore_momentum(other, momentum)
    take_step(resumed, other)
    assert is_same(dict(resumed.state_dict()), dict(net.state_dict()))
    assert is_same(get_momentum_tensors(other), get_momentum_tensors(optimizer))
