"""Torch against ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fovea.export.verify import (
    LOGIT_TOLERANCE,
    PROBABILITY_TOLERANCE,
    VerificationError,
    compare_outputs,
    measure_accuracy,
)
from fovea.model.data.dataset import Examples
from fovea.model.evaluation import evaluate
from tests.export.conftest import ExportedModel
from tests.training import stack_pixels


def test_batches_of_1_2_and_64_agree(exported: ExportedModel) -> None:
    agreements = compare_outputs(exported.net, exported.engine, exported.data.test.pixels[:64])
    assert [agreement.batch for agreement in agreements] == [1, 2, 64]
    for agreement in agreements:
        assert 0 <= agreement.logits <= LOGIT_TOLERANCE
        assert 0 <= agreement.probabilities <= PROBABILITY_TOLERANCE


@pytest.mark.parametrize(("change", "agrees"), [(0.0, True), (0.0005, True), (0.01, False), (1.0, False)])
def test_a_network_whose_logits_differ_is_told(exported: ExportedModel, change: float, agrees: bool) -> None:
    net = exported.net
    with torch.no_grad():
        net.head.bias.add_(torch.tensor([0.0, change, 0.0]))
    pixels = exported.data.test.pixels[:64]
    if agrees:
        worst = compare_outputs(net, exported.engine, pixels)[-1].logits
        assert worst == pytest.approx(change, abs=1e-4)
    else:
        with pytest.raises(VerificationError, match=f"at batch 1 a logit .* is off by {change:g}"):
            compare_outputs(net, exported.engine, pixels)


def test_one_different_image_of_64_is_enough(exported: ExportedModel) -> None:
    """The maximum difference counts, not the mean: the network is changed for red images only."""
    net, pixels = exported.net, exported.data.test.pixels[:64].clone()
    pixels[-1] = torch.tensor([255, 0, 0])
    with torch.no_grad():
        head, maps = net.head.weight, net.features(net.normalize(pixels)).mean(dim=(2, 3))
        others, last = maps[:-1].double(), maps[-1].double()
        # the part of the last image's features that no other image has a share in
        _, _, basis = torch.linalg.svd(others, full_matrices=False)
        own = last - basis.T @ (basis @ last)
        head[0] += (0.1 * own / own.dot(last)).float()
    with pytest.raises(VerificationError, match="at batch 64 a logit"):
        compare_outputs(net, exported.engine, pixels)


def test_nan_is_a_disagreement(exported: ExportedModel) -> None:
    net = exported.net
    with torch.no_grad():
        net.head.bias.fill_(float("nan"))
    with pytest.raises(VerificationError, match="off by nan"):
        compare_outputs(net, exported.engine, exported.data.test.pixels[:64])


def test_accuracy_is_torch_s_on_the_same_images(exported: ExportedModel) -> None:
    examples = exported.data.test
    assert measure_accuracy(exported.engine, examples, "test").top1 == evaluate.measure_accuracy(
        exported.net, examples
    )


def test_accuracy_counts_what_is_right_over_several_batches(exported: ExportedModel) -> None:
    count = evaluate.BATCH_SIZE + 60
    pixels = stack_pixels(exported.data.test.pixels).repeat(4, 1, 1, 1)[:count]
    chosen = torch.from_numpy(exported.engine.run(pixels.numpy()).argmax(axis=1))
    examples = Examples(pixels, chosen)
    assert measure_accuracy(exported.engine, examples, "test").top1 == 1
    wrong = torch.where(torch.arange(count) % 4 == 0, (chosen + 1) % 3, chosen)
    measured = measure_accuracy(exported.engine, replace(examples, targets=wrong), "test")
    assert (measured.data, measured.images) == ("test", count)
    assert measured.top1 == pytest.approx(0.75)
