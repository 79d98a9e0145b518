"""The networks of the benchmark."""

from __future__ import annotations

import pytest
import torch

from fovea.bench.networks import NETWORKS, calibrate_network, count_multiply_adds


@pytest.mark.parametrize(("name", "side", "millions"), [("resnet20", 32, 41), ("mobilenetv2", 224, 301)])
def test_networks_have_the_expected_multiply_adds(name: str, side: int, millions: int) -> None:
    net, _ = NETWORKS[name]()
    assert round(count_multiply_adds(net, side) / 1e6) == millions


def test_calibrated_head_gives_each_image_its_own_label() -> None:
    torch.manual_seed(0)
    net, labels = NETWORKS["resnet20"]()
    images = torch.randn(labels, 3, 32, 32)
    calibrate_network(net, images)
    with torch.inference_mode():
        assert net(images).argmax(dim=1).tolist() == list(range(labels))
