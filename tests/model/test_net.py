"""The network, its loss, and what is measured of it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from model import evaluate
from model.data import Examples
from model.net import Net, NetConfig, loss, probabilities
from service.contract import Task

NARROW = (8, 8, 8, 8)
RIGHT = {
    Task.MULTICLASS: torch.tensor([0, 1, 2]),
    Task.BINARY: torch.tensor([0, 1, 1]),
    Task.MULTILABEL: torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]),
}
"""Targets of three images."""


def net(task: Task = Task.MULTICLASS, labels: int = 3, **statistics: tuple[float, float, float]) -> Net:
    torch.manual_seed(0)
    return Net(NetConfig(task, labels, widths=NARROW, **statistics)).eval()  # type: ignore[arg-type]  # mean, std


def images(count: int, height: int = 16, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def certain(task: Task) -> Tensor:
    """Logits of a network that is right about `RIGHT[task]` and knows it."""
    targets = RIGHT[task]
    if task is Task.MULTICLASS:
        return 20 * torch.nn.functional.one_hot(targets).float() - 10
    return 20 * targets.float().view(len(targets), -1) - 10


# --- pixels to logits ----------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (32, 32), (33, 20), (24, 56)])
def test_pixels_of_any_size_become_one_row_of_logits_each(height: int, width: int) -> None:
    with torch.inference_mode():
        logits = net()(images(4, height, width))
    assert (logits.shape, logits.dtype) == ((4, 3), torch.float32)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("task", "labels", "logits"), [(Task.MULTICLASS, 5, 5), (Task.BINARY, 2, 1), (Task.MULTILABEL, 4, 4)]
)
def test_binary_takes_one_logit_and_the_others_one_for_each_label(
    task: Task, labels: int, logits: int
) -> None:
    with torch.inference_mode():
        said = net(task, labels)(images(2))
    assert said.shape == (2, logits)
    assert probabilities(said, task).shape == (2, labels)


def test_normalisation_is_inside_and_gives_zero_mean_and_unit_deviation() -> None:
    pixels = images(50)
    pixels[..., 1] //= 3  # channels that differ
    pixels[..., 2] = 200 + pixels[..., 2] % 16
    scaled = pixels.double() / 255
    mean, std = scaled.mean(dim=(0, 1, 2)).tolist(), scaled.std(dim=(0, 1, 2), correction=0).tolist()
    planes = net(mean=tuple(mean), std=tuple(std)).normalize(pixels)
    assert planes.shape == (50, 3, 16, 16)
    torch.testing.assert_close(planes.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(planes.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


def test_normalisation_takes_each_channel_and_each_place_to_its_own() -> None:
    pixels = images(1)
    planes = net(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).normalize(pixels)
    by_hand = (pixels[0, 3, 7, 2].item() / 255 - 0.3) / 0.7
    assert planes[0, 2, 3, 7].item() == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("task", [Task.MULTICLASS, Task.BINARY])
def test_class_activation_maps_average_to_the_logits(task: Task) -> None:
    network, pixels = net(task, 2), images(3)
    with torch.inference_mode():
        maps = network.features(network.normalize(pixels))  # (B, C, H / 8, W / 8)
        activation = torch.einsum("lc,bchw->blhw", network.head.weight, maps)
        explained = activation.mean(dim=(2, 3)) + network.head.bias
        torch.testing.assert_close(explained, network(pixels))
    assert maps.shape == (3, 8, 2, 2)


def test_a_configuration_comes_back_from_json() -> None:
    config = NetConfig(Task.BINARY, 2, widths=(4, 8, 8, 4), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    written = json.loads(json.dumps(config.to_dict()))
    assert written == config.to_dict()
    assert NetConfig.from_dict(written) == config


# --- probabilities and loss ----------------------------------------------------------------------


def test_multiclass_probabilities_are_a_softmax_of_each_row() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [-5.0, 0.0, 80.0]])
    said = probabilities(logits, Task.MULTICLASS)
    torch.testing.assert_close(said.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(said[0], torch.tensor([0.0900, 0.2447, 0.6652]), atol=1e-4, rtol=0)


def test_binary_probabilities_are_of_both_labels() -> None:
    said = probabilities(torch.tensor([[0.0], [2.0], [-40.0]]), Task.BINARY)
    expected = torch.tensor([[0.5, 0.5], [0.1192, 0.8808], [1.0, 0.0]])
    torch.testing.assert_close(said, expected, atol=1e-4, rtol=0)


def test_multilabel_probabilities_are_independent() -> None:
    said = probabilities(torch.tensor([[0.0, 2.0, -2.0]]), Task.MULTILABEL)
    torch.testing.assert_close(said, torch.tensor([[0.5, 0.8808, 0.1192]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", Task)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_least_where_the_network_is_right(task: Task, smoothing: float) -> None:
    def of(logits: Tensor) -> float:
        return loss(logits, RIGHT[task], task, label_smoothing=smoothing).item()

    right = certain(task) / 5
    assert 0 <= of(right) < of(0 * right) < of(-right) < 10


@pytest.mark.parametrize("task", Task)
def test_a_step_against_the_gradient_lowers_the_loss(task: Task) -> None:
    logits = torch.zeros_like(certain(task), requires_grad=True)
    before = loss(logits, RIGHT[task], task, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(before, logits)
    after = loss(logits.detach().sub(gradient), RIGHT[task], task, label_smoothing=0.1)
    assert after < before


@pytest.mark.parametrize("task", Task)
def test_smoothing_punishes_too_much_certainty(task: Task) -> None:
    extreme, moderate = certain(task), certain(task) / 5
    assert loss(extreme, RIGHT[task], task, label_smoothing=0) < 1e-3
    costs = [loss(said, RIGHT[task], task, label_smoothing=0.1).item() for said in (extreme, moderate)]
    assert costs[0] > costs[1]


# --- evaluation ----------------------------------------------------------------------------------


def test_evaluation_is_the_same_in_batches_and_leaves_the_network_alone() -> None:
    network, pixels = net().train(), images(evaluate.BATCH + 3, 8, 8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    said = evaluate.logits(network, pixels)
    assert said.shape == (evaluate.BATCH + 3, 3)
    torch.testing.assert_close(said[-5:], evaluate.logits(network, pixels[-5:]))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(("task", "labels"), [(Task.MULTICLASS, 3), (Task.BINARY, 2)])
def test_accuracy_is_the_fraction_that_is_right(task: Task, labels: int) -> None:
    network, pixels = net(task, labels), images(10)
    with torch.no_grad():  # so that the answers differ between images
        network.head.bias.sub_(evaluate.logits(network, pixels).mean(dim=0))
    chosen = probabilities(evaluate.logits(network, pixels), task).argmax(dim=1)
    assert len(set(chosen.tolist())) > 1
    assert evaluate.accuracy(network, Examples(pixels, chosen)) == 1
    chosen[:3] = (chosen[:3] + 1) % labels
    assert evaluate.accuracy(network, Examples(pixels, chosen)) == pytest.approx(0.7)
