"""Every network that can be trained can be exported, and computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fovea.export.from_checkpoint import build_contract, export_classifier_graph
from fovea.export.model_output import embed_contract
from fovea.export.verify import compare_outputs
from fovea.model.data.dataset import square_geometry
from fovea.model.evaluation import evaluate
from fovea.model.evaluation.calibration import Calibration
from fovea.model.networks.network import NETS, Net, NetConfig
from fovea.service.artifact.contract import Task, Training
from fovea.service.inference.engine import Engine
from tests.export.test_pixel_steps import list_narrow_steps

pytestmark = pytest.mark.long


def make_net(name: str, size: int, task: Task = Task.MULTICLASS) -> Net:
    """Return a network whose batch normalisation is not the identity, as after a training."""
    torch.manual_seed(0)
    labels = 2 if task is Task.BINARY else 5
    net = Net(NetConfig(task, labels, name, size))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.2)
    pixels = torch.randint(0, 256, (16, size, size, 3), dtype=torch.uint8)
    with torch.no_grad():
        for _ in range(5):
            net.train()(pixels)
    return net.eval()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, 16) for name in NETS),
        ("cnn", 32),
        ("cnn", 64),
        ("cnn", 128),
        ("resnet18", 96),
    ],
)
def test_exported_graph_agrees_with_the_network(tmp_path: Path, name: str, size: int) -> None:
    net = make_net(name, size)
    task = list(Task)[len(name) % 3] if size == 16 else Task.MULTICLASS
    if task is not Task.MULTICLASS:
        net = make_net(name, size, task)
    labels = tuple(f"label {number}" for number in range(net.config.labels))
    thresholds = {Task.MULTICLASS: 0, Task.BINARY: 1, Task.MULTILABEL: len(labels)}[task]
    geometry, calibration = square_geometry(size), Calibration(1.7, (0.4,) * thresholds, ())
    graph = export_classifier_graph(net, task, geometry, calibration.temperature)
    contract = build_contract(
        graph,
        lambda pixels: evaluate.compute_logits(net, torch.tensor(pixels)).numpy(),
        name=name,
        version="1",
        task=task,
        labels=labels,
        geometry=geometry,
        training=Training("noise", 0, "none", "none"),
        calibration=calibration,
    )
    engine = Engine(embed_contract(graph, contract), provider="cpu", threads=1)
    pixels = torch.randint(0, 256, (64, size, size, 3), dtype=torch.uint8)
    assert [agreement.batch for agreement in compare_outputs(net, engine, pixels)] == [1, 2, 64]
    assert engine.check_golden_set().images == 8
    assert [node.op_type for node in graph.graph.node[:3]] == ["Transpose", "Cast", "BatchNormalization"]
    assert not list_narrow_steps(graph.SerializeToString(), tmp_path)
