"""Comparison of torch with ONNX Runtime."""

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


def test_batches_of_1_2_and_64_agree(exported_model: ExportedModel) -> None:
    agreements = compare_outputs(
        exported_model.net, exported_model.engine, exported_model.data.test.pixels[:64]
    )
    assert [agreement.batch for agreement in agreements] == [1, 2, 64]
    for agreement in agreements:
        assert 0 <= agreement.logits <= LOGIT_TOLERANCE
        assert 0 <= agreement.probabilities <= PROBABILITY_TOLERANCE


@pytest.mark.parametrize(("change", "agrees"), [(0.0, True), (0.0005, True), (0.01, False), (1.0, False)])
def test_logit_differences_above_the_tolerance_are_refused(
    exported_model: ExportedModel, change: float, agrees: bool
) -> None:
    net = exported_model.net
    with torch.no_grad():
        net.head.bias.add_(torch.tensor([0.0, change, 0.0]))
    pixels = exported_model.data.test.pixels[:64]
    if agrees:
        largest_difference = compare_outputs(net, exported_model.engine, pixels)[-1].logits
        assert largest_difference == pytest.approx(change, abs=1e-4)
    else:
        with pytest.raises(VerificationError, match=f"at batch 1 a logit .* is off by {change:g}"):
            compare_outputs(net, exported_model.engine, pixels)


def test_one_different_image_of_64_is_refused(exported_model: ExportedModel) -> None:
    """The maximum difference counts, not the mean: the network is changed for red images only."""
    net, pixels = exported_model.net, exported_model.data.test.pixels[:64].clone()
    pixels[-1] = torch.tensor([255, 0, 0])
    with torch.no_grad():
        head, maps = net.head.weight, net.features(net.normalize(pixels)).mean(dim=(2, 3))
        others, last = maps[:-1].double(), maps[-1].double()
        # the part of the last image's features that is orthogonal to all other images
        _, _, basis = torch.linalg.svd(others, full_matrices=False)
        own_part = last - basis.T @ (basis @ last)
        head[0] += (0.1 * own_part / own_part.dot(last)).float()
    with pytest.raises(VerificationError, match="at batch 64 a logit"):
        compare_outputs(net, exported_model.engine, pixels)


def test_nan_logits_are_refused(exported_model: ExportedModel) -> None:
    net = exported_model.net
    with torch.no_grad():
        net.head.bias.fill_(float("nan"))
    with pytest.raises(VerificationError, match="off by nan"):
        compare_outputs(net, exported_model.engine, exported_model.data.test.pixels[:64])


def test_accuracy_equals_torch_accuracy(exported_model: ExportedModel) -> None:
    examples = exported_model.data.test
    assert measure_accuracy(exported_model.engine, examples, "test").top1 == evaluate.measure_accuracy(
        exported_model.net, examples
    )


def test_accuracy_counts_several_batches(exported_model: ExportedModel) -> None:
    count = evaluate.BATCH_SIZE + 60
    pixels = stack_pixels(exported_model.data.test.pixels).repeat(4, 1, 1, 1)[:count]
    predictions = torch.from_numpy(exported_model.engine.run(pixels.numpy()).argmax(axis=1))
    examples = Examples(pixels, predictions)
    assert measure_accuracy(exported_model.engine, examples, "test").top1 == 1
    targets = torch.where(torch.arange(count) % 4 == 0, (predictions + 1) % 3, predictions)
    accuracy = measure_accuracy(exported_model.engine, replace(examples, targets=targets), "test")
    assert (accuracy.data, accuracy.images) == ("test", count)
    assert accuracy.top1 == pytest.approx(0.75)
