"""Weights to start from: the hub's, files, and our own runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fovea.model.networks import checkpoint
from fovea.model.networks.checkpoint import WEIGHTS_FILE, Checkpoint
from fovea.model.networks.network import Net, NetConfig
from fovea.model.networks.pretrained import PretrainedError, read_pretrained
from fovea.service.artifact.contract import Task
from tests.conftest import ROOT

LABELS = ("blue", "green", "red")
CONFIG = {
    "architecture": "resnet18",
    "num_classes": 1000,
    "pretrained_cfg": {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "input_size": [3, 224, 224],
    },
}
"""As timm writes it, in part."""


def make_net(name: str = "resnet18", labels: int = 3, size: int = 32, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(NetConfig(Task.MULTICLASS, labels, name, size))


def rename_weights(source: Net, head: str = "fc") -> dict[str, Tensor]:
    """The weights of `source` by the names that timm would give them."""
    weights = {}
    for key, tensor in source.state_dict().items():
        if key.startswith("features."):
            weights[key.removeprefix("features.")] = tensor
        elif key.startswith("head."):
            weights[key.replace("head", head)] = tensor
    return weights


def write_published(folder: Path, source: Net, config: object = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(rename_weights(source), folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_same(first: Net, second: Net, part: str = "features.") -> bool:
    others = second.state_dict()
    return all(
        torch.equal(tensor, others[key]) for key, tensor in first.state_dict().items() if key.startswith(part)
    )


# --- names and shapes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("mobilenet_v2", 3_504_872),
    ],
)
def test_the_networks_are_the_published_ones(name: str, parameters: int) -> None:
    """The numbers are torchvision's, for 1000 labels."""
    with torch.device("meta"):
        built = Net(NetConfig(Task.MULTICLASS, 1000, name, 224))
    assert sum(weight.numel() for weight in built.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("resnet18", "conv1.weight bn1.running_var layer1.0.conv1.weight layer2.0.downsample.0.weight "
         "layer4.1.bn2.bias"),
        ("resnet50", "layer1.0.conv3.weight layer1.0.downsample.1.weight layer3.5.bn3.running_mean"),
        ("mobilenet_v2", "conv_stem.weight bn1.weight blocks.0.0.conv_dw.weight blocks.0.0.conv_pw.weight "
         "blocks.1.0.conv_pw.weight blocks.6.0.conv_pwl.weight blocks.6.0.bn3.bias conv_head.weight "
         "bn2.bias"),
    ],
)  # fmt: skip
def test_parameters_are_called_as_in_published_weights(name: str, keys: str) -> None:
    assert set(keys.split()) <= rename_weights(make_net(name)).keys()


# --- files ---------------------------------------------------------------------------------------


def test_a_published_file_gives_all_but_the_head(tmp_path: Path) -> None:
    source, target = make_net(labels=1000, seed=1), make_net(seed=2)
    head = target.head.weight.clone()
    known = read_pretrained(str(write_published(tmp_path, source)))
    assert (known.net, known.mean, known.std) == ("resnet18", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert not is_same(target, source)
    known.load_into(target, LABELS)
    assert is_same(target, source)
    assert torch.equal(target.head.weight, head)


def test_weights_fit_whatever_the_size_of_the_input(tmp_path: Path) -> None:
    known = read_pretrained(str(write_published(tmp_path, make_net(size=224))))
    for size in (32, 96, 224):
        known.load_into(make_net(size=size, seed=3), LABELS)


def test_a_file_alone_needs_the_network_named(tmp_path: Path) -> None:
    source = make_net(seed=1)
    known = read_pretrained(str(write_published(tmp_path, source, config=None) / "model.safetensors"))
    assert (known.net, known.mean) == (None, None)
    target = make_net()
    known.load_into(target, LABELS)
    assert is_same(target, source)


@pytest.mark.parametrize(("labels", "kept"), [(LABELS, True), (("cat", "cow", "dog"), False)])
def test_a_run_of_ours_gives_its_head_to_the_same_labels(
    tmp_path: Path, labels: tuple[str, ...], kept: bool
) -> None:
    source, target = make_net("cnn", seed=1), make_net("cnn", seed=2)
    about = {"net": source.config.to_dict(), "labels": list(LABELS)}
    checkpoint.save_checkpoint(tmp_path, WEIGHTS_FILE, Checkpoint(dict(source.state_dict()), about))
    known = read_pretrained(str(tmp_path))
    assert (known.net, known.labels) == ("cnn", LABELS)
    known.load_into(target, labels)
    assert is_same(target, source)
    assert is_same(target, source, "head.") is kept


# --- what is refused -----------------------------------------------------------------------------


def test_a_head_of_another_task_is_left_where_it_is(tmp_path: Path) -> None:
    """Its labels are the same: is it either of two, or each of two by itself?"""
    labels = ("cat", "dog")
    source, target = (Net(NetConfig(task, 2, widths=(4, 4))) for task in (Task.BINARY, Task.MULTILABEL))
    about = {"net": source.config.to_dict(), "labels": list(labels)}
    checkpoint.save_checkpoint(tmp_path, WEIGHTS_FILE, Checkpoint(dict(source.state_dict()), about))
    head = target.head.weight.clone()
    read_pretrained(str(tmp_path)).load_into(target, labels)
    assert is_same(target, source)
    assert torch.equal(target.head.weight, head)


def test_what_was_loaded_computes_what_its_source_computed(tmp_path: Path) -> None:
    source, target = make_net("mobilenet_v2", seed=1), make_net("mobilenet_v2", seed=2)
    pixels = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        source.train()(pixels)  # so that the running statistics are its own
        save_file(rename_weights(source, "classifier"), tmp_path / "model.safetensors")
        read_pretrained(str(tmp_path)).load_into(target, LABELS)
        maps = [one.eval().features(one.normalize(pixels)) for one in (source, target)]
    assert torch.equal(*maps)


def test_halved_weights_become_whole_ones(tmp_path: Path) -> None:
    source, target = make_net("mobilenet_v2", seed=1).half(), make_net("mobilenet_v2", seed=2)
    save_file(rename_weights(source), tmp_path / "model.safetensors")
    read_pretrained(str(tmp_path)).load_into(target, LABELS)
    assert target.features.conv_stem.weight.dtype is torch.float32
    assert torch.equal(target.features.conv_stem.weight, source.features.conv_stem.weight.float())


def test_early_configs_say_the_normalisation_beside_the_architecture(tmp_path: Path) -> None:
    config = {"architecture": "resnet18", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    known = read_pretrained(str(write_published(tmp_path, make_net(), config)))
    assert (known.mean, known.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))


def test_a_deeper_network_does_not_pass_for_a_shallower_one(tmp_path: Path) -> None:
    """All that a ResNet-18 needs is in a ResNet-34, at the same names and shapes."""
    target = make_net()
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    file = write_published(tmp_path, make_net("resnet34"), config=None) / "model.safetensors"
    with pytest.raises(
        PretrainedError, match=r"layer1\.2\.bn1\.bias is not a tensor of this network.*, and 77 more$"
    ):
        read_pretrained(str(file)).load_into(target, LABELS)
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    source = make_net()
    source.features.bn1.running_var[3] = torch.nan
    with pytest.raises(PretrainedError, match=r"features\.bn1\.running_var is not finite$"):
        read_pretrained(str(write_published(tmp_path, source))).load_into(make_net(), LABELS)


def test_the_message_names_the_network_that_it_is_of(tmp_path: Path) -> None:
    known = read_pretrained(str(write_published(tmp_path, make_net())))
    with pytest.raises(PretrainedError, match="has weights of resnet18 and does not fit resnet50 at 32 px"):
        known.load_into(make_net("resnet50"), LABELS)


def test_another_network_is_told_by_what_does_not_fit(tmp_path: Path) -> None:
    known = read_pretrained(str(write_published(tmp_path, make_net(), config=None)))
    with pytest.raises(
        PretrainedError, match=r"does not fit resnet34 at 32 px: features.layer1.2.conv1.weight is"
    ):
        known.load_into(make_net("resnet34"), LABELS)
    with pytest.raises(
        PretrainedError, match=r"features.layer1.0.conv1.weight is \(64, 64, 3, 3\), not \(64, 64, 1, 1\)"
    ):
        known.load_into(make_net("resnet50"), LABELS)


def test_an_architecture_that_is_not_ours_is_named(tmp_path: Path) -> None:
    write_published(tmp_path, make_net(), {**CONFIG, "architecture": "vit_base_patch16_224"})
    with pytest.raises(
        PretrainedError, match=r"has weights of 'vit_base_patch16_224'; supported are resnet18"
    ):
        read_pretrained(str(tmp_path))


def make_config(**values: object) -> dict[str, object]:
    return {"architecture": "resnet18", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.2] * 3, **values}}


@pytest.mark.parametrize(
    "config",
    [
        [],
        {},
        {"architecture": "resnet18"},
        {"architecture": "resnet18", "pretrained_cfg": None},
        make_config(mean=[1, 2]),
        make_config(mean=[float("nan")] * 3),
        make_config(std=[0.2, 0, 0.2]),
        make_config(std=None),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(tmp_path: Path, config: object) -> None:
    write_published(tmp_path, make_net(), config)
    with pytest.raises(PretrainedError, match=r"its config\.json cannot be used"):
        read_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "about",
    [[1], {}, {"net": {"name": "cnn"}, "labels": ["cat"]}, {"net": make_net("cnn").config.to_dict()}, "cnn"],
    ids=str,
)
def test_a_run_that_says_nothing_of_use_is_refused(tmp_path: Path, about: object) -> None:
    weights = dict(make_net("cnn").state_dict())
    save_file(weights, tmp_path / WEIGHTS_FILE, metadata={checkpoint.METADATA_KEY: json.dumps(about)})
    with pytest.raises(PretrainedError, match="its metadata cannot be used"):
        read_pretrained(str(tmp_path))


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"\x80\x04pickle" * 10)
    with pytest.raises(PretrainedError, match="is damaged or is not a safetensors file"):
        read_pretrained(str(tmp_path))
    with pytest.raises(PretrainedError, match="for weights on the hub, write hf:owner/repository"):
        read_pretrained(str(tmp_path / "nowhere"))


# --- the hub -------------------------------------------------------------------------------------


REFUSED = {"timm/gated": (403, "GatedRepo"), "timm/private": (401, "RepoNotFound")}
"""Repositories that are not for everyone, with the hub's answer."""


class HubHandler(BaseHTTPRequestHandler):
    """The part of the hub that serves files: `/<owner>/<repository>/resolve/<revision>/<file>`."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send_file(has_body=True)

    def do_HEAD(self) -> None:
        self._send_file(has_body=False)

    def _send_file(self, *, has_body: bool) -> None:
        owner, _, rest = self.path.lstrip("/").partition("/resolve/")
        file = self.folder / owner / rest.partition("/")[2]
        if owner in REFUSED:
            return self._send_refusal(*REFUSED[owner])
        if rest.partition("/")[0] != "main":
            return self._send_refusal(404, "RevisionNotFound")
        if not file.is_file():
            return self._send_refusal(404, "EntryNotFound" if file.parent.is_dir() else "RepoNotFound")
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if has_body:
            self.wfile.write(content)
        return None

    def _send_refusal(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def run_hub(folder: Path) -> Iterator[str]:
    """Serve the repositories in `folder`; gives the address."""
    handler = type("Handler", (HubHandler,), {"folder": folder})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


READ = """
import sys
from fovea.model.networks.pretrained import PretrainedError, read_pretrained

for source in sys.argv[1:]:
    try:
        known = read_pretrained(source)
        print(known.net, known.mean, float(known.tensors["features.conv1.weight"].sum()))
    except PretrainedError as error:
        print(error)
"""


def read_in_process(tmp_path: Path, address: str, *sources: str) -> list[str]:
    """Return a line for each source, by `read_pretrained` in a process of its own.

    The library reads its address when it is imported.
    """
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", READ, *sources],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, "Traceback" in result.stderr) == (0, False), result.stderr
    return result.stdout.splitlines()


@pytest.mark.long
def test_weights_come_from_the_hub_by_its_own_library(tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    source = make_net(seed=5)
    write_published(tmp_path / "timm" / "resnet18.a1_in1k", source)
    with run_hub(tmp_path) as address:
        first = read_in_process(tmp_path, address, "hf:timm/resnet18.a1_in1k")
    total = float(source.state_dict()["features.conv1.weight"].sum())
    assert first == [f"resnet18 (0.485, 0.456, 0.406) {total}"]
    with run_hub(tmp_path / "nothing") as address:  # a second time it is there already
        assert read_in_process(tmp_path, address, "hf:timm/resnet18.a1_in1k") == first


REASONS = {
    "hf:nobody/nothing": "config.json of .*: there is no such repository, or it is private",
    "hf:timm/private": "config.json of .*: there is no such repository, or it is private",
    "hf:timm/gated": (
        "config.json of .*: the repository is gated; accept its terms on the hub, then run `hf auth login`"
    ),
    "hf:timm/no-weights@v9": "config.json of .*: there is no such revision",
    "hf:timm/no-weights": "model.safetensors of .*: there is no such file in the repository",
    "hf:not a name": "config.json of .*: Repo id must use .*'not a name'.",
    "hf:": "config.json of .*: Repo id must use .*''.",
}


@pytest.mark.long
def test_what_the_hub_has_not_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "timm" / "no-weights").mkdir(parents=True)
    (tmp_path / "timm" / "no-weights" / "config.json").write_text(json.dumps(CONFIG))
    with run_hub(tmp_path) as address:
        lines = read_in_process(tmp_path, address, *REASONS)
    for line, reason in zip(lines, REASONS.values(), strict=True):
        assert re.fullmatch(f"cannot download {reason}", line)


@pytest.mark.long
def test_weights_of_another_network_are_not_even_fetched(tmp_path: Path) -> None:
    (tmp_path / "timm" / "vit").mkdir(parents=True)
    (tmp_path / "timm" / "vit" / "config.json").write_text(json.dumps({**CONFIG, "architecture": "vit"}))
    with run_hub(tmp_path) as address:
        (line,) = read_in_process(tmp_path, address, "hf:timm/vit")
    assert "hf:timm/vit has weights of 'vit'; supported are resnet18" in line


@pytest.mark.slow
def test_without_a_network_it_is_one_sentence_too(tmp_path: Path) -> None:
    assert read_in_process(tmp_path, "http://127.0.0.1:9", "hf:timm/resnet18.a1_in1k") == [
        "cannot download config.json of hf:timm/resnet18.a1_in1k: the hub cannot be reached, "
        "and the file is not in the local cache"
    ]
