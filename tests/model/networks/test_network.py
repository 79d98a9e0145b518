"""The network, its loss, and what is measured of it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from fovea.model.data.dataset import Examples
from fovea.model.data.pixels import compute_statistics
from fovea.model.evaluation import evaluate
from fovea.model.networks.cnn import ConvBlock
from fovea.model.networks.network import NETS, SIZES, Net, NetConfig, NetError, compute_loss, to_probabilities
from fovea.service.artifact.contract import Task

NARROW = (8, 8, 8, 8)
RIGHT = {
    Task.MULTICLASS: torch.tensor([0, 1, 2]),
    Task.BINARY: torch.tensor([0, 1, 1]),
    Task.MULTILABEL: torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]),
}
"""Targets of three images."""


def make_net(task: Task = Task.MULTICLASS, labels: int = 3, **statistics: tuple[float, float, float]) -> Net:
    torch.manual_seed(0)
    return Net(NetConfig(task, labels, widths=NARROW, **statistics)).eval()  # type: ignore[arg-type]  # mean, std


def make_images(count: int, height: int = 16, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def make_certain_logits(task: Task) -> Tensor:
    """Logits of a network that is right about `RIGHT[task]` and knows it."""
    targets = RIGHT[task]
    if task is Task.MULTICLASS:
        return 20 * torch.nn.functional.one_hot(targets).float() - 10
    return 20 * targets.float().view(len(targets), -1) - 10


# --- pixels to logits ----------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 32), (33, 20), (24, 56)])
def test_pixels_of_any_size_become_one_row_of_logits_each(height: int, width: int) -> None:
    with torch.inference_mode():
        logits = make_net()(make_images(4, height, width))
    assert (logits.shape, logits.dtype) == ((4, 3), torch.float32)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("task", "labels", "logits"), [(Task.MULTICLASS, 5, 5), (Task.BINARY, 2, 1), (Task.MULTILABEL, 4, 4)]
)
def test_binary_takes_one_logit_and_the_others_one_for_each_label(
    task: Task, labels: int, logits: int
) -> None:
    with torch.inference_mode():
        said = make_net(task, labels)(make_images(2))
    assert said.shape == (2, logits)
    assert to_probabilities(said, task).shape == (2, labels)


def test_normalisation_is_inside_and_gives_zero_mean_and_unit_deviation() -> None:
    pixels = make_images(50)
    pixels[..., 1] //= 3  # channels that differ
    pixels[..., 2] = 200 + pixels[..., 2] % 16
    scaled = pixels.double() / 255
    mean, std = scaled.mean(dim=(0, 1, 2)).tolist(), scaled.std(dim=(0, 1, 2), correction=0).tolist()
    planes = make_net(mean=tuple(mean), std=tuple(std)).normalize(pixels)
    assert planes.shape == (50, 3, 16, 16)
    torch.testing.assert_close(planes.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(planes.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


def test_normalisation_takes_each_channel_and_each_place_to_its_own() -> None:
    pixels = make_images(1)
    planes = make_net(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).normalize(pixels)
    by_hand = (pixels[0, 3, 7, 2].item() / 255 - 0.3) / 0.7
    assert planes[0, 2, 3, 7].item() == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("task", [Task.MULTICLASS, Task.BINARY])
def test_class_activation_maps_average_to_the_logits(task: Task) -> None:
    network, pixels = make_net(task, 2), make_images(3, 32, 32)
    with torch.inference_mode():
        maps = network.features(network.normalize(pixels))  # (B, C, h, w)
        activation = torch.einsum("lc,bchw->blhw", network.head.weight, maps)
        explained = activation.mean(dim=(2, 3)) + network.head.bias
        torch.testing.assert_close(explained, network(pixels))
    assert maps.shape == (3, 8, 3, 3)


# --- whatever the backbone -----------------------------------------------------------------------


def build_net(name: str, size: int = 32, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(NetConfig(Task.MULTICLASS, 3, name, size)).eval()


SHRUNK = {
    "cnn_large": {32: 3},
    "cnn": {16: 1, 32: 3, 48: 5, 64: 3, 96: 5, 128: 4, 224: 7},
    "resnet18": {16: 2, 32: 4, 48: 6, 64: 8, 95: 12, 96: 3, 128: 4},
    "resnet34": {32: 4, 96: 3},
    "resnet50": {16: 2, 32: 4, 64: 8, 96: 3, 128: 4},
    "mobilenet_v2": {16: 2, 32: 4, 48: 6, 64: 8, 95: 12, 96: 3, 128: 4},
}
"""Side of the last maps by side of the input, in pixels."""


@pytest.mark.parametrize(
    ("name", "size", "side"), [(name, *sides) for name, all_ in SHRUNK.items() for sides in all_.items()]
)
def test_every_backbone_leaves_maps_of_some_pixels(name: str, size: int, side: int) -> None:
    network = build_net(name, size)
    with torch.inference_mode():
        maps = network.features(network.normalize(make_images(1, size, size)))
    assert maps.shape == (1, network.head.in_features, side, side)


def test_all_networks_are_tested() -> None:
    assert SHRUNK.keys() == NETS.keys()


@pytest.mark.parametrize("name", NETS)
def test_the_logits_are_the_mean_of_the_class_activation_maps(name: str) -> None:
    network, pixels = build_net(name), make_images(2, 32, 32)
    with torch.inference_mode():
        maps = network.features(network.normalize(pixels))
        activation = torch.einsum("lc,bchw->blhw", network.head.weight, maps)
        explained = activation.mean(dim=(2, 3)) + network.head.bias
        torch.testing.assert_close(explained, network(pixels), atol=1e-4, rtol=1e-4)
    assert maps.std(dim=(2, 3)).max() > 0  # there is something to see


@pytest.mark.parametrize("name", NETS)
def test_the_same_seed_gives_the_same_network_and_another_another(name: str) -> None:
    first, again, other = (build_net(name, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    kernels = {key: one for key, one in first.items() if one.ndim == 4 and not key.startswith("normalize.")}
    drawn = [
        key for key, kernel in kernels.items() if not torch.equal(kernel, nn.init.dirac_(kernel.clone()))
    ]
    assert drawn
    assert not any(torch.equal(first[key], other[key]) for key in drawn)


@pytest.mark.parametrize("name", NETS)
def test_every_parameter_learns_after_a_step(name: str) -> None:
    """The first step opens the blocks that begin as their shortcuts."""
    network, pixels, targets = build_net(name).train(), make_images(4, 32, 32), torch.tensor([0, 1, 2, 0])
    learning = {key: weight for key, weight in network.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.SGD(learning.values(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        compute_loss(network(pixels), targets, Task.MULTICLASS, label_smoothing=0.0).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for key, weight in learning.items():
        assert weight.grad is not None
        assert weight.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_gradients_keep_their_size_behind_each_convolution(name: str) -> None:
    """He et al. (2015), equation 14: half the paths out, times the variance, is one."""
    for layer in build_net(name).modules():
        if isinstance(layer, nn.Conv2d):
            paths = layer.weight[0, 0].numel() * layer.out_channels / layer.groups
            doubt = 5 / layer.weight.numel() ** 0.5
            assert paths / 2 * layer.weight.var().item() == pytest.approx(1, abs=2 * doubt)


def test_what_leaves_the_stem_of_the_cnn_is_white() -> None:
    """Uncorrelated and of one variance, whatever the pixels have in common; then the same, negated."""
    soft = nn.functional.avg_pool2d(make_images(40, 40, 40).permute(0, 3, 1, 2).float(), 3, stride=1)
    pixels = soft.permute(0, 2, 3, 1)[:, :32, :32].round().byte()
    mean, std = compute_statistics(pixels)
    network = Net(NetConfig(Task.MULTICLASS, 3, mean=mean, std=std))
    network.fit_whitening(pixels)
    stem = network.features[0]
    with torch.inference_mode():
        said = stem(network.normalize(pixels)) - stem.bias.view(1, -1, 1, 1)
    positive, negative = said.transpose(0, 1).flatten(1).chunk(2)
    torch.testing.assert_close(positive, -negative)
    torch.testing.assert_close(positive @ positive.T / positive.shape[1], torch.eye(12), atol=0.02, rtol=0)


def test_other_networks_need_to_see_nothing_first() -> None:
    network = build_net("resnet18")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.fit_whitening(make_images(4, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_blocks_of_the_cnn_begin_by_handing_on_what_they_get() -> None:
    block = ConvBlock(4, 8)
    given = make_images(2).float()[..., [0, 1, 2, 0]].permute(0, 3, 1, 2)
    torch.testing.assert_close(block[0](given)[:, :4], given)


def count_multiplications(network: Net) -> int:
    """Multiplications of the convolutions for one image."""
    counted = 0

    def count_layer(layer: nn.Module, _inputs: object, result: Tensor) -> None:
        nonlocal counted
        assert isinstance(layer, nn.Conv2d)
        counted += result[0].numel() * layer.weight[0].numel()

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count_layer)
    with torch.inference_mode():
        network(make_images(1, network.config.size, network.config.size))
    return counted


def test_the_cnn_costs_about_the_same_whatever_the_size() -> None:
    """As it was when it was chosen: at 32 pixels 118 million multiplications."""
    assert count_multiplications(build_net("cnn")) == 118_144_800
    assert 1 <= count_multiplications(build_net("cnn", 64)) / count_multiplications(build_net("cnn")) < 1.02
    assert 1 <= count_multiplications(build_net("cnn", 128)) / count_multiplications(build_net("cnn")) < 1.5
    network = Net(NetConfig(Task.MULTICLASS, 10))
    assert sum(weight.numel() for weight in network.parameters()) == 1_972_802


def test_a_name_that_is_not_there_is_told_what_is() -> None:
    with pytest.raises(
        NetError, match="there is no network 'vgg16'; choose one of cnn, cnn_large, resnet18, "
    ):
        NetConfig(Task.MULTICLASS, 3, "vgg16")


@pytest.mark.parametrize("size", [-32, 0, SIZES[0] - 1, SIZES[-1] + 1])
def test_a_size_that_is_not_offered_is_told_the_limits(size: int) -> None:
    with pytest.raises(NetError, match=f"size {size} px: the networks take 16 to 384"):
        NetConfig(Task.MULTICLASS, 3, size=size)


@pytest.mark.parametrize("size", [SIZES[0], SIZES[-1]])
def test_the_limits_themselves_are_offered(size: int) -> None:
    with torch.inference_mode():
        assert make_net_of_size(size)(make_images(1, size, size)).shape == (1, 3)


def make_net_of_size(size: int) -> Net:
    return Net(NetConfig(Task.MULTICLASS, 3, size=size, widths=NARROW)).eval()


def test_a_configuration_comes_back_from_json() -> None:
    config = NetConfig(
        Task.BINARY, 2, "resnet18", 96, widths=(4, 8, 8, 4), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
    )
    written = json.loads(json.dumps(config.to_dict()))
    assert written == config.to_dict()
    assert NetConfig.from_dict(written) == config


# --- probabilities and loss ----------------------------------------------------------------------


def test_multiclass_probabilities_are_a_softmax_of_each_row() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [-5.0, 0.0, 80.0]])
    said = to_probabilities(logits, Task.MULTICLASS)
    torch.testing.assert_close(said.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(said[0], torch.tensor([0.0900, 0.2447, 0.6652]), atol=1e-4, rtol=0)


def test_binary_probabilities_are_of_both_labels() -> None:
    said = to_probabilities(torch.tensor([[0.0], [2.0], [-40.0]]), Task.BINARY)
    expected = torch.tensor([[0.5, 0.5], [0.1192, 0.8808], [1.0, 0.0]])
    torch.testing.assert_close(said, expected, atol=1e-4, rtol=0)


def test_multilabel_probabilities_are_independent() -> None:
    said = to_probabilities(torch.tensor([[0.0, 2.0, -2.0]]), Task.MULTILABEL)
    torch.testing.assert_close(said, torch.tensor([[0.5, 0.8808, 0.1192]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", Task)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_least_where_the_network_is_right(task: Task, smoothing: float) -> None:
    def of(logits: Tensor) -> float:
        return compute_loss(logits, RIGHT[task], task, label_smoothing=smoothing).item()

    right = make_certain_logits(task) / 5
    assert 0 <= of(right) < of(0 * right) < of(-right) < 10


@pytest.mark.parametrize("task", Task)
def test_a_step_against_the_gradient_lowers_the_loss(task: Task) -> None:
    logits = torch.zeros_like(make_certain_logits(task), requires_grad=True)
    before = compute_loss(logits, RIGHT[task], task, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(before, logits)
    after = compute_loss(logits.detach().sub(gradient), RIGHT[task], task, label_smoothing=0.1)
    assert after < before


@pytest.mark.parametrize("task", Task)
def test_smoothing_punishes_too_much_certainty(task: Task) -> None:
    extreme, moderate = make_certain_logits(task), make_certain_logits(task) / 5
    assert compute_loss(extreme, RIGHT[task], task, label_smoothing=0) < 1e-3
    costs = [
        compute_loss(said, RIGHT[task], task, label_smoothing=0.1).item() for said in (extreme, moderate)
    ]
    assert costs[0] > costs[1]


# --- weights of labels ---------------------------------------------------------------------------


@pytest.mark.parametrize("task", Task)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_that_weigh_alike_change_nothing(task: Task, smoothing: float) -> None:
    logits, targets = make_certain_logits(task) / 10, RIGHT[task]
    plain = compute_loss(logits, targets, task, label_smoothing=smoothing)
    labels = 2 if task is Task.BINARY else 3
    weighed = compute_loss(logits, targets, task, label_smoothing=smoothing, weights=torch.ones(labels))
    torch.testing.assert_close(weighed, plain)


@pytest.mark.parametrize(("task", "weights"), [(Task.MULTICLASS, (3.0, 1.0, 1.0)), (Task.BINARY, (3.0, 1.0))])
def test_an_image_counts_as_often_as_its_label_weighs(task: Task, weights: tuple[float, ...]) -> None:
    """With weights 3 and 1 the mean is that of a batch with each image of label 0 in it three times."""
    logits = torch.tensor([[0.3, -0.2, 0.7], [1.0, 0.1, -0.4], [-0.6, 0.2, 0.9]])
    logits, targets = logits[:, : 1 if task is Task.BINARY else 3], torch.tensor([0, 1, 1])
    repeated = torch.tensor([0, 0, 0, 1, 2])
    torch.testing.assert_close(
        compute_loss(logits, targets, task, label_smoothing=0.0, weights=torch.tensor(weights)),
        compute_loss(logits[repeated], targets[repeated], task, label_smoothing=0.0),
    )


def test_a_label_that_weighs_more_pulls_more_where_it_is_true() -> None:
    targets, logits = RIGHT[Task.MULTILABEL], torch.zeros(3, 3, requires_grad=True)
    weights = torch.tensor([4.0, 1.0, 1.0])
    said = compute_loss(logits, targets, Task.MULTILABEL, label_smoothing=0.0, weights=weights)
    (gradient,) = torch.autograd.grad(said, logits)
    pulls = (gradient / gradient[0, 1]).tolist()  # of what is false, at no certainty: 1
    assert pulls == [[-4, 1, -1], [1, 1, 1], [-4, -1, -1]]


# --- evaluation ----------------------------------------------------------------------------------


def test_evaluation_is_the_same_in_batches_and_leaves_the_network_alone() -> None:
    network, pixels = make_net().train(), make_images(evaluate.BATCH_SIZE + 3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    said = evaluate.compute_logits(network, pixels)
    assert said.shape == (evaluate.BATCH_SIZE + 3, 3)
    torch.testing.assert_close(said[-5:], evaluate.compute_logits(network, pixels[-5:]))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(("task", "labels"), [(Task.MULTICLASS, 3), (Task.BINARY, 2)])
def test_accuracy_is_the_fraction_that_is_right(task: Task, labels: int) -> None:
    network, pixels = make_net(task, labels), make_images(10)
    with torch.no_grad():  # so that the answers differ between images
        network.head.bias.sub_(evaluate.compute_logits(network, pixels).mean(dim=0))
    chosen = to_probabilities(evaluate.compute_logits(network, pixels), task).argmax(dim=1)
    assert len(set(chosen.tolist())) > 1
    assert evaluate.measure_accuracy(network, Examples(pixels, chosen)) == 1
    chosen[:3] = (chosen[:3] + 1) % labels
    assert evaluate.measure_accuracy(network, Examples(pixels, chosen)) == pytest.approx(0.7)
