"""The networks, their loss and their evaluation."""

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

NARROW_WIDTHS = (8, 8, 8, 8)
TARGETS = {
    Task.MULTICLASS: torch.tensor([0, 1, 2]),
    Task.BINARY: torch.tensor([0, 1, 1]),
    Task.MULTILABEL: torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]),
}
"""Targets of three images."""

VARIED_NETS = [
    pytest.param(name, marks=pytest.mark.long) if name == "resnet34" else name
    for name in NETS  # it has more of the blocks of resnet18
]

AVERAGING_NETS = [name for name in NETS if name != "tiny_vgg"]
"""Networks whose head reads the mean of each map."""


def make_net(task: Task = Task.MULTICLASS, labels: int = 3, **statistics: tuple[float, float, float]) -> Net:
    torch.manual_seed(0)
    return Net(NetConfig(task, labels, widths=NARROW_WIDTHS, **statistics)).eval()  # type: ignore[arg-type]  # mean, std


def make_images(count: int, height: int = 16, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def make_certain_logits(task: Task) -> Tensor:
    """Return logits of a network that is certain of `TARGETS[task]`."""
    targets = TARGETS[task]
    if task is Task.MULTICLASS:
        return 20 * torch.nn.functional.one_hot(targets).float() - 10
    return 20 * targets.float().view(len(targets), -1) - 10


# --- pixels to logits ----------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 32), (33, 20), (24, 56)])
def test_images_of_any_size_give_one_row_of_logits(height: int, width: int) -> None:
    with torch.inference_mode():
        logits = make_net()(make_images(4, height, width))
    assert (logits.shape, logits.dtype) == ((4, 3), torch.float32)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("task", "labels", "logit_count"), [(Task.MULTICLASS, 5, 5), (Task.BINARY, 2, 1), (Task.MULTILABEL, 4, 4)]
)
def test_binary_task_has_one_logit_others_one_per_label(task: Task, labels: int, logit_count: int) -> None:
    with torch.inference_mode():
        logits = make_net(task, labels)(make_images(2))
    assert logits.shape == (2, logit_count)
    assert to_probabilities(logits, task).shape == (2, labels)


def test_normalisation_gives_zero_mean_and_unit_deviation() -> None:
    pixels = make_images(50)
    pixels[..., 1] //= 3  # channels that differ
    pixels[..., 2] = 200 + pixels[..., 2] % 16
    scaled = pixels.double() / 255
    mean, std = scaled.mean(dim=(0, 1, 2)).tolist(), scaled.std(dim=(0, 1, 2), correction=0).tolist()
    planes = make_net(mean=tuple(mean), std=tuple(std)).normalize(pixels)
    assert planes.shape == (50, 3, 16, 16)
    torch.testing.assert_close(planes.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(planes.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


def test_normalisation_keeps_channels_and_positions() -> None:
    pixels = make_images(1)
    planes = make_net(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).normalize(pixels)
    expected = (pixels[0, 3, 7, 2].item() / 255 - 0.3) / 0.7
    assert planes[0, 2, 3, 7].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("task", [Task.MULTICLASS, Task.BINARY])
def test_class_activation_maps_average_to_the_task_logits(task: Task) -> None:
    network, pixels = make_net(task, 2), make_images(3, 32, 32)
    with torch.inference_mode():
        maps = network.features(network.normalize(pixels))  # (B, C, h, w)
        activation = torch.einsum("lc,bchw->blhw", network.head.weight, maps)
        map_means = activation.mean(dim=(2, 3)) + network.head.bias
        torch.testing.assert_close(map_means, network(pixels))
    assert maps.shape == (3, 8, 3, 3)


# --- every backbone ------------------------------------------------------------------------------


def build_net(name: str, size: int = 32, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(NetConfig(Task.MULTICLASS, 3, name, size)).eval()


MAP_SIDES = {
    "cnn_large": {32: 3},
    "cnn": {16: 1, 32: 3, 48: 5, 64: 3, 96: 5, 128: 4, 224: 7},
    "resnet18": {16: 2, 32: 4, 48: 6, 64: 8, 95: 12, 96: 3, 128: 4},
    "resnet34": {32: 4, 96: 3},
    "resnet50": {16: 2, 32: 4, 64: 8, 96: 3, 128: 4},
    "mobilenet_v2": {16: 2, 32: 4, 48: 6, 64: 8, 95: 12, 96: 3, 128: 4},
}
"""Side of the last maps by side of the input, in pixels."""


@pytest.mark.parametrize(
    ("name", "size", "side"),
    [(name, *sides) for name, map_sides in MAP_SIDES.items() for sides in map_sides.items()],
)
def test_backbone_maps_have_the_expected_side(name: str, size: int, side: int) -> None:
    network = build_net(name, size)
    with torch.inference_mode():
        maps = network.features(network.normalize(make_images(1, size, size)))
    assert maps.shape == (1, network.head.in_features, side, side)


def test_expected_map_sides_cover_all_networks() -> None:
    assert MAP_SIDES.keys() == set(AVERAGING_NETS)


@pytest.mark.parametrize("name", AVERAGING_NETS)
def test_logits_are_the_mean_of_maps(name: str) -> None:
    network, pixels = build_net(name), make_images(2, 32, 32)
    with torch.inference_mode():
        maps = network.features(network.normalize(pixels))
        activation = torch.einsum("lc,bchw->blhw", network.head.weight, maps)
        map_means = activation.mean(dim=(2, 3)) + network.head.bias
        torch.testing.assert_close(map_means, network(pixels), atol=1e-4, rtol=1e-4)
    assert maps.std(dim=(2, 3)).max() > 0  # the maps are not flat


@pytest.mark.parametrize("name", VARIED_NETS)
def test_seed_decides_the_initial_weights(name: str) -> None:
    first, repeated, other = (build_net(name, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, repeated[key]) for key, tensor in first.items())
    kernels = {
        key: kernel for key, kernel in first.items() if kernel.ndim == 4 and not key.startswith("normalize.")
    }
    random_keys = [
        key for key, kernel in kernels.items() if not torch.equal(kernel, nn.init.dirac_(kernel.clone()))
    ]
    assert random_keys
    assert not any(torch.equal(first[key], other[key]) for key in random_keys)


@pytest.mark.parametrize("name", VARIED_NETS)
def test_every_parameter_has_a_gradient_after_a_step(name: str) -> None:
    """Blocks that begin as their shortcuts have gradients only after the first step."""
    network, pixels, targets = build_net(name).train(), make_images(4, 32, 32), torch.tensor([0, 1, 2, 0])
    trained_weights = {key: weight for key, weight in network.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.SGD(trained_weights.values(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        compute_loss(network(pixels), targets, Task.MULTICLASS, label_smoothing=0.0).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for key, weight in trained_weights.items():
        assert weight.grad is not None
        assert weight.grad.abs().max() > 0, key


def test_tiny_vgg_has_only_the_layers_of_a_first_lesson() -> None:
    network = build_net("tiny_vgg")
    block = ["Conv2d", "ReLU"] * 2 + ["MaxPool2d"]
    assert [type(layer).__name__ for layer in network.features] == [*block, *block, "Flatten"]
    assert isinstance(network.head, nn.Linear)
    assert sum(weight.numel() for weight in network.features.parameters()) == 1_976


@pytest.mark.parametrize(("size", "side"), [(16, 1), (32, 5), (33, 5), (64, 13), (384, 93)])
def test_tiny_vgg_head_reads_every_value_of_the_last_maps(size: int, side: int) -> None:
    network, pixels = build_net("tiny_vgg", size), make_images(2, size, size)
    with torch.inference_mode():
        maps = nn.Sequential(*list(network.features)[:-1])(network.normalize(pixels))
        assert maps.shape == (2, 8, side, side)
        flat = maps.reshape(2, -1)  # map by map, row by row
        torch.testing.assert_close(flat @ network.head.weight.T + network.head.bias, network(pixels))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "tiny_vgg"])
def test_initial_convolution_weights_have_he_variance(name: str) -> None:
    """He et al. (2015), equation 14: half the outgoing paths, times the variance, is one."""
    for layer in build_net(name).modules():
        if isinstance(layer, nn.Conv2d):
            paths = layer.weight[0, 0].numel() * layer.out_channels / layer.groups
            standard_error = 5 / layer.weight.numel() ** 0.5
            assert paths / 2 * layer.weight.var().item() == pytest.approx(1, abs=2 * standard_error)


def test_cnn_stem_output_is_whitened() -> None:
    """The first half of the channels is uncorrelated with unit variance; the second is its negative."""
    smooth_images = nn.functional.avg_pool2d(make_images(40, 40, 40).permute(0, 3, 1, 2).float(), 3, stride=1)
    pixels = smooth_images.permute(0, 2, 3, 1)[:, :32, :32].round().byte()
    mean, std = compute_statistics(pixels)
    network = Net(NetConfig(Task.MULTICLASS, 3, mean=mean, std=std))
    network.fit_whitening(pixels)
    stem = network.features[0]
    with torch.inference_mode():
        output = stem(network.normalize(pixels)) - stem.bias.view(1, -1, 1, 1)
    positive, negative = output.transpose(0, 1).flatten(1).chunk(2)
    torch.testing.assert_close(positive, -negative)
    torch.testing.assert_close(positive @ positive.T / positive.shape[1], torch.eye(12), atol=0.02, rtol=0)


def test_whitening_leaves_other_networks_unchanged() -> None:
    network = build_net("resnet18")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.fit_whitening(make_images(4, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_cnn_block_begins_as_the_identity() -> None:
    block = ConvBlock(4, 8)
    inputs = make_images(2).float()[..., [0, 1, 2, 0]].permute(0, 3, 1, 2)
    torch.testing.assert_close(block[0](inputs)[:, :4], inputs)


def count_multiplications(network: Net) -> int:
    """Multiplications of the convolutions for one image."""
    total = 0

    def count_layer(layer: nn.Module, _inputs: object, result: Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Conv2d)
        total += result[0].numel() * layer.weight[0].numel()

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count_layer)
    with torch.inference_mode():
        network(make_images(1, network.config.size, network.config.size))
    return total


def test_cnn_cost_hardly_depends_on_the_input_size() -> None:
    """The network was chosen with 118 million multiplications at 32 pixels."""
    assert count_multiplications(build_net("cnn")) == 118_144_800
    assert 1 <= count_multiplications(build_net("cnn", 64)) / count_multiplications(build_net("cnn")) < 1.02
    assert 1 <= count_multiplications(build_net("cnn", 128)) / count_multiplications(build_net("cnn")) < 1.5
    network = Net(NetConfig(Task.MULTICLASS, 10))
    assert sum(weight.numel() for weight in network.parameters()) == 1_972_802


def test_unknown_network_error_lists_the_networks() -> None:
    with pytest.raises(
        NetError, match="there is no network 'vgg16'; choose one of cnn, cnn_large, resnet18, "
    ):
        NetConfig(Task.MULTICLASS, 3, "vgg16")


@pytest.mark.parametrize("size", [-32, 0, SIZES[0] - 1, SIZES[-1] + 1])
def test_unsupported_size_error_names_the_limits(size: int) -> None:
    with pytest.raises(NetError, match=f"size {size} px: the networks take 16 to 384"):
        NetConfig(Task.MULTICLASS, 3, size=size)


@pytest.mark.parametrize("size", [SIZES[0], SIZES[-1]])
def test_smallest_and_largest_sizes_are_supported(size: int) -> None:
    with torch.inference_mode():
        assert make_net_of_size(size)(make_images(1, size, size)).shape == (1, 3)


def make_net_of_size(size: int) -> Net:
    return Net(NetConfig(Task.MULTICLASS, 3, size=size, widths=NARROW_WIDTHS)).eval()


def test_configuration_survives_a_json_round_trip() -> None:
    config = NetConfig(
        Task.BINARY, 2, "resnet18", 96, widths=(4, 8, 8, 4), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
    )
    values = json.loads(json.dumps(config.to_dict()))
    assert values == config.to_dict()
    assert NetConfig.from_dict(values) == config


# --- probabilities and loss ----------------------------------------------------------------------


def test_multiclass_probabilities_are_a_softmax_of_each_row() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [-5.0, 0.0, 80.0]])
    probabilities = to_probabilities(logits, Task.MULTICLASS)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(probabilities[0], torch.tensor([0.0900, 0.2447, 0.6652]), atol=1e-4, rtol=0)


def test_binary_probabilities_cover_both_labels() -> None:
    probabilities = to_probabilities(torch.tensor([[0.0], [2.0], [-40.0]]), Task.BINARY)
    expected = torch.tensor([[0.5, 0.5], [0.1192, 0.8808], [1.0, 0.0]])
    torch.testing.assert_close(probabilities, expected, atol=1e-4, rtol=0)


def test_multilabel_probabilities_are_independent() -> None:
    probabilities = to_probabilities(torch.tensor([[0.0, 2.0, -2.0]]), Task.MULTILABEL)
    torch.testing.assert_close(probabilities, torch.tensor([[0.5, 0.8808, 0.1192]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", Task)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_least_for_correct_logits(task: Task, smoothing: float) -> None:
    def measure_loss(logits: Tensor) -> float:
        return compute_loss(logits, TARGETS[task], task, label_smoothing=smoothing).item()

    correct_logits = make_certain_logits(task) / 5
    assert (
        0
        <= measure_loss(correct_logits)
        < measure_loss(0 * correct_logits)
        < measure_loss(-correct_logits)
        < 10
    )


@pytest.mark.parametrize("task", Task)
def test_gradient_step_lowers_the_loss(task: Task) -> None:
    logits = torch.zeros_like(make_certain_logits(task), requires_grad=True)
    loss_before = compute_loss(logits, TARGETS[task], task, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss_before, logits)
    loss_after = compute_loss(logits.detach().sub(gradient), TARGETS[task], task, label_smoothing=0.1)
    assert loss_after < loss_before


@pytest.mark.parametrize("task", Task)
def test_label_smoothing_penalises_overconfidence(task: Task) -> None:
    extreme, moderate = make_certain_logits(task), make_certain_logits(task) / 5
    assert compute_loss(extreme, TARGETS[task], task, label_smoothing=0) < 1e-3
    losses = [
        compute_loss(logits, TARGETS[task], task, label_smoothing=0.1).item()
        for logits in (extreme, moderate)
    ]
    assert losses[0] > losses[1]


# --- weights of labels ---------------------------------------------------------------------------


@pytest.mark.parametrize("task", Task)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equal_label_weights_do_not_change_the_loss(task: Task, smoothing: float) -> None:
    logits, targets = make_certain_logits(task) / 10, TARGETS[task]
    plain_loss = compute_loss(logits, targets, task, label_smoothing=smoothing)
    label_count = 2 if task is Task.BINARY else 3
    weighted_loss = compute_loss(
        logits, targets, task, label_smoothing=smoothing, weights=torch.ones(label_count)
    )
    torch.testing.assert_close(weighted_loss, plain_loss)


@pytest.mark.parametrize(("task", "weights"), [(Task.MULTICLASS, (3.0, 1.0, 1.0)), (Task.BINARY, (3.0, 1.0))])
def test_label_weight_acts_like_repeated_images(task: Task, weights: tuple[float, ...]) -> None:
    """Weights 3 and 1 give the mean of a batch that contains each image of label 0 three times."""
    logits = torch.tensor([[0.3, -0.2, 0.7], [1.0, 0.1, -0.4], [-0.6, 0.2, 0.9]])
    logits, targets = logits[:, : 1 if task is Task.BINARY else 3], torch.tensor([0, 1, 1])
    repeated_rows = torch.tensor([0, 0, 0, 1, 2])
    torch.testing.assert_close(
        compute_loss(logits, targets, task, label_smoothing=0.0, weights=torch.tensor(weights)),
        compute_loss(logits[repeated_rows], targets[repeated_rows], task, label_smoothing=0.0),
    )


def test_label_weight_scales_the_gradient_of_true_labels() -> None:
    targets, logits = TARGETS[Task.MULTILABEL], torch.zeros(3, 3, requires_grad=True)
    weights = torch.tensor([4.0, 1.0, 1.0])
    loss = compute_loss(logits, targets, Task.MULTILABEL, label_smoothing=0.0, weights=weights)
    (gradient,) = torch.autograd.grad(loss, logits)
    relative_gradient = (gradient / gradient[0, 1]).tolist()  # relative to that of a false label
    assert relative_gradient == [[-4, 1, -1], [1, 1, 1], [-4, -1, -1]]


# --- evaluation ----------------------------------------------------------------------------------


def test_evaluation_in_batches_leaves_the_network_unchanged() -> None:
    network, pixels = make_net().train(), make_images(evaluate.BATCH_SIZE + 3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    logits = evaluate.compute_logits(network, pixels)
    assert logits.shape == (evaluate.BATCH_SIZE + 3, 3)
    torch.testing.assert_close(logits[-5:], evaluate.compute_logits(network, pixels[-5:]))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(("task", "labels"), [(Task.MULTICLASS, 3), (Task.BINARY, 2)])
def test_accuracy_is_the_fraction_of_correct_labels(task: Task, labels: int) -> None:
    network, pixels = make_net(task, labels), make_images(10)
    with torch.no_grad():  # so that the chosen labels differ between images
        network.head.bias.sub_(evaluate.compute_logits(network, pixels).mean(dim=0))
    labels_of_images = to_probabilities(evaluate.compute_logits(network, pixels), task).argmax(dim=1)
    assert len(set(labels_of_images.tolist())) > 1
    assert evaluate.measure_accuracy(network, Examples(pixels, labels_of_images)) == 1
    labels_of_images[:3] = (labels_of_images[:3] + 1) % labels
    assert evaluate.measure_accuracy(network, Examples(pixels, labels_of_images)) == pytest.approx(0.7)
