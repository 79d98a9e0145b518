"""Pretrained weights from the hub, from files and from earlier runs."""

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
"""A part of the configuration that timm writes."""


def make_net(name: str = "resnet18", labels: int = 3, size: int = 32, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(NetConfig(Task.MULTICLASS, labels, name, size))


def rename_weights(source: Net, head: str = "fc") -> dict[str, Tensor]:
    """Return the weights of `source` by their names in timm."""
    weights = {}
    for key, tensor in source.state_dict().items():
        if key.startswith("features."):
            weights[key.removeprefix("features.")] = tensor
        elif key.startswith("head."):
            weights[key.replace("head", head)] = tensor
    return weights


def write_published_weights(folder: Path, source: Net, config: object = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(rename_weights(source), folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_same(first: Net, second: Net, part: str = "features.") -> bool:
    second_tensors = second.state_dict()
    return all(
        torch.equal(tensor, second_tensors[key])
        for key, tensor in first.state_dict().items()
        if key.startswith(part)
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
def test_parameter_counts_equal_the_published_ones(name: str, parameters: int) -> None:
    """The expected numbers are those of torchvision for 1000 labels."""
    with torch.device("meta"):
        net = Net(NetConfig(Task.MULTICLASS, 1000, name, 224))
    assert sum(weight.numel() for weight in net.parameters()) == parameters


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
def test_parameter_names_equal_the_published_ones(name: str, keys: str) -> None:
    assert set(keys.split()) <= rename_weights(make_net(name)).keys()


# --- files ---------------------------------------------------------------------------------------


def test_published_weights_are_loaded_without_the_head(tmp_path: Path) -> None:
    source, target = make_net(labels=1000, seed=1), make_net(seed=2)
    head = target.head.weight.clone()
    pretrained = read_pretrained(str(write_published_weights(tmp_path, source)))
    assert (pretrained.net, pretrained.mean, pretrained.std) == (
        "resnet18",
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
    assert not is_same(target, source)
    pretrained.load_into(target, LABELS)
    assert is_same(target, source)
    assert torch.equal(target.head.weight, head)


def test_weights_fit_every_input_size(tmp_path: Path) -> None:
    pretrained = read_pretrained(str(write_published_weights(tmp_path, make_net(size=224))))
    for size in (32, 96, 224):
        pretrained.load_into(make_net(size=size, seed=3), LABELS)


def test_weights_without_config_fit_a_named_network(tmp_path: Path) -> None:
    source = make_net(seed=1)
    pretrained = read_pretrained(
        str(write_published_weights(tmp_path, source, config=None) / "model.safetensors")
    )
    assert (pretrained.net, pretrained.mean) == (None, None)
    target = make_net()
    pretrained.load_into(target, LABELS)
    assert is_same(target, source)


@pytest.mark.parametrize(("labels", "is_head_loaded"), [(LABELS, True), (("cat", "cow", "dog"), False)])
def test_head_of_a_run_is_loaded_only_for_the_same_labels(
    tmp_path: Path, labels: tuple[str, ...], is_head_loaded: bool
) -> None:
    source, target = make_net("cnn", seed=1), make_net("cnn", seed=2)
    metadata = {"net": source.config.to_dict(), "labels": list(LABELS)}
    checkpoint.save_checkpoint(tmp_path, WEIGHTS_FILE, Checkpoint(dict(source.state_dict()), metadata))
    pretrained = read_pretrained(str(tmp_path))
    assert (pretrained.net, pretrained.labels) == ("cnn", LABELS)
    pretrained.load_into(target, labels)
    assert is_same(target, source)
    assert is_same(target, source, "head.") is is_head_loaded


# --- partial loading and refusals ----------------------------------------------------------------


def test_head_of_another_task_is_not_loaded(tmp_path: Path) -> None:
    """The labels are the same, but a binary head does not suit a multilabel task."""
    labels = ("cat", "dog")
    source, target = (Net(NetConfig(task, 2, widths=(4, 4))) for task in (Task.BINARY, Task.MULTILABEL))
    metadata = {"net": source.config.to_dict(), "labels": list(labels)}
    checkpoint.save_checkpoint(tmp_path, WEIGHTS_FILE, Checkpoint(dict(source.state_dict()), metadata))
    head = target.head.weight.clone()
    read_pretrained(str(tmp_path)).load_into(target, labels)
    assert is_same(target, source)
    assert torch.equal(target.head.weight, head)


def test_loaded_weights_compute_the_same_features(tmp_path: Path) -> None:
    source, target = make_net("mobilenet_v2", seed=1), make_net("mobilenet_v2", seed=2)
    pixels = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        source.train()(pixels)  # changes the running statistics
        save_file(rename_weights(source, "classifier"), tmp_path / "model.safetensors")
        read_pretrained(str(tmp_path)).load_into(target, LABELS)
        maps = [net.eval().features(net.normalize(pixels)) for net in (source, target)]
    assert torch.equal(*maps)


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    source, target = make_net("mobilenet_v2", seed=1).half(), make_net("mobilenet_v2", seed=2)
    save_file(rename_weights(source), tmp_path / "model.safetensors")
    read_pretrained(str(tmp_path)).load_into(target, LABELS)
    assert target.features.conv_stem.weight.dtype is torch.float32
    assert torch.equal(target.features.conv_stem.weight, source.features.conv_stem.weight.float())


def test_normalisation_is_read_from_early_configs(tmp_path: Path) -> None:
    config = {"architecture": "resnet18", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    pretrained = read_pretrained(str(write_published_weights(tmp_path, make_net(), config)))
    assert (pretrained.mean, pretrained.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))


def test_weights_of_a_deeper_network_are_refused(tmp_path: Path) -> None:
    """A ResNet-34 contains all tensors of a ResNet-18, with the same names and shapes."""
    target = make_net()
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    file = write_published_weights(tmp_path, make_net("resnet34"), config=None) / "model.safetensors"
    with pytest.raises(
        PretrainedError, match=r"layer1\.2\.bn1\.bias is not a tensor of this network.*, and 77 more$"
    ):
        read_pretrained(str(file)).load_into(target, LABELS)
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())


def test_non_finite_weights_are_refused(tmp_path: Path) -> None:
    source = make_net()
    source.features.bn1.running_var[3] = torch.nan
    with pytest.raises(PretrainedError, match=r"features\.bn1\.running_var is not finite$"):
        read_pretrained(str(write_published_weights(tmp_path, source))).load_into(make_net(), LABELS)


def test_mismatch_error_names_the_source_network(tmp_path: Path) -> None:
    pretrained = read_pretrained(str(write_published_weights(tmp_path, make_net())))
    with pytest.raises(PretrainedError, match="has weights of resnet18 and does not fit resnet50 at 32 px"):
        pretrained.load_into(make_net("resnet50"), LABELS)


def test_mismatch_error_names_a_tensor_that_does_not_fit(tmp_path: Path) -> None:
    pretrained = read_pretrained(str(write_published_weights(tmp_path, make_net(), config=None)))
    with pytest.raises(
        PretrainedError, match=r"does not fit resnet34 at 32 px: features.layer1.2.conv1.weight is"
    ):
        pretrained.load_into(make_net("resnet34"), LABELS)
    with pytest.raises(
        PretrainedError, match=r"features.layer1.0.conv1.weight is \(64, 64, 3, 3\), not \(64, 64, 1, 1\)"
    ):
        pretrained.load_into(make_net("resnet50"), LABELS)


def test_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    write_published_weights(tmp_path, make_net(), {**CONFIG, "architecture": "vit_base_patch16_224"})
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
def test_unusable_config_is_refused(tmp_path: Path, config: object) -> None:
    write_published_weights(tmp_path, make_net(), config)
    with pytest.raises(PretrainedError, match=r"its config\.json cannot be used"):
        read_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "metadata",
    [[1], {}, {"net": {"name": "cnn"}, "labels": ["cat"]}, {"net": make_net("cnn").config.to_dict()}, "cnn"],
    ids=str,
)
def test_run_with_unusable_metadata_is_refused(tmp_path: Path, metadata: object) -> None:
    weights = dict(make_net("cnn").state_dict())
    save_file(weights, tmp_path / WEIGHTS_FILE, metadata={checkpoint.METADATA_KEY: json.dumps(metadata)})
    with pytest.raises(PretrainedError, match="its metadata cannot be used"):
        read_pretrained(str(tmp_path))


def test_invalid_or_missing_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"\x80\x04pickle" * 10)
    with pytest.raises(PretrainedError, match="is damaged or is not a safetensors file"):
        read_pretrained(str(tmp_path))
    with pytest.raises(PretrainedError, match="for weights on the hub, write hf:owner/repository"):
        read_pretrained(str(tmp_path / "nowhere"))


# --- the hub -------------------------------------------------------------------------------------


REFUSED_REPOSITORIES = {"timm/gated": (403, "GatedRepo"), "timm/private": (401, "RepoNotFound")}
"""Repositories without public access, with the hub's answer."""


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
        if owner in REFUSED_REPOSITORIES:
            return self._send_refusal(*REFUSED_REPOSITORIES[owner])
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
    """Serve the repositories in `folder`; yield the address."""
    handler = type("Handler", (HubHandler,), {"folder": folder})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


READ_SCRIPT = """
import sys, time
time.sleep = lambda seconds: None  # the library of the hub waits between its tries
from fovea.model.networks.pretrained import PretrainedError, read_pretrained

for source in sys.argv[1:]:
    try:
        known = read_pretrained(source)
        print(known.net, known.mean, float(known.tensors["features.conv1.weight"].sum()))
    except PretrainedError as error:
        print(error)
"""


def read_in_process(tmp_path: Path, address: str, *sources: str) -> list[str]:
    """Run `read_pretrained` in a new process; return its line of output for each source.

    The library of the hub reads the address of the hub when it is imported.
    """
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", READ_SCRIPT, *sources],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, "Traceback" in result.stderr) == (0, False), result.stderr
    return result.stdout.splitlines()


@pytest.mark.long
def test_hub_weights_are_downloaded_and_cached(tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    source = make_net(seed=5)
    write_published_weights(tmp_path / "timm" / "resnet18.a1_in1k", source)
    with run_hub(tmp_path) as address:
        first = read_in_process(tmp_path, address, "hf:timm/resnet18.a1_in1k")
    total = float(source.state_dict()["features.conv1.weight"].sum())
    assert first == [f"resnet18 (0.485, 0.456, 0.406) {total}"]
    with run_hub(tmp_path / "nothing") as address:  # the second time, the weights are in the cache
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
def test_missing_hub_files_give_one_line_errors(tmp_path: Path) -> None:
    (tmp_path / "timm" / "no-weights").mkdir(parents=True)
    (tmp_path / "timm" / "no-weights" / "config.json").write_text(json.dumps(CONFIG))
    with run_hub(tmp_path) as address:
        lines = read_in_process(tmp_path, address, *REASONS)
    for line, reason in zip(lines, REASONS.values(), strict=True):
        assert re.fullmatch(f"cannot download {reason}", line)


@pytest.mark.long
def test_unsupported_hub_weights_are_not_downloaded(tmp_path: Path) -> None:
    (tmp_path / "timm" / "vit").mkdir(parents=True)
    (tmp_path / "timm" / "vit" / "config.json").write_text(json.dumps({**CONFIG, "architecture": "vit"}))
    with run_hub(tmp_path) as address:
        (line,) = read_in_process(tmp_path, address, "hf:timm/vit")
    assert "hf:timm/vit has weights of 'vit'; supported are resnet18" in line


@pytest.mark.long
def test_unreachable_hub_gives_a_one_line_error(tmp_path: Path) -> None:
    assert read_in_process(tmp_path, "http://127.0.0.1:9", "hf:timm/resnet18.a1_in1k") == [
        "cannot download config.json of hf:timm/resnet18.a1_in1k: the hub cannot be reached, "
        "and the file is not in the local cache"
    ]
