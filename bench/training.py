"""The `make bench-training` benchmark: training steps against a bare loop.

Fovea's steps (gathering and augmenting batches, loss, optimizer, figures) alternate in one run with a bare
loop of forward and backward passes on random tensors of the same shape. The ratio is computed within each
round; the result is the median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Final

import torch

from fovea.model.data.dataset import Dataset, Examples, square_geometry
from fovea.model.evaluation.evaluate import autocast, choose_device, to_device
from fovea.model.networks.network import NETS, Net, NetConfig, compute_loss
from fovea.model.recipe import Recipe
from fovea.model.training.provenance import describe_hardware
from fovea.model.training.training_run import InitialState, TrainingRun, choose_precision
from fovea.service.artifact.contract import Task

LABELS: Final = 10
WARM_UP: Final = 3
"""Number of steps that are not measured."""


def main() -> None:
    """Measure and print a Markdown table."""
    options = _parse_arguments()
    recipe = Recipe(batch=options.batch, epochs=10**6, precision=choose_precision())
    print(f"{describe_hardware()}, torch {torch.__version__}, {recipe.precision}\n")
    print("| network | input | batch | bare, images/s | Fovea, images/s | ratio |\n|---|---|---|---|---|---|")
    for name in options.net or ["cnn"]:
        bare, fovea = _measure_rates(name, options.size, recipe, options.rounds, options.steps)
        ratio = statistics.median(ours / one for one, ours in zip(bare, fovea, strict=True))
        print(
            f"| {name} | {options.size} px | {recipe.batch} | {statistics.median(bare):.0f} "
            f"| {statistics.median(fovea):.0f} | {ratio:.2f} |"
        )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", action="append", choices=list(NETS))
    parser.add_argument("--size", type=int, default=32, help="side of the input, in pixels (default: 32)")
    parser.add_argument("--batch", type=int, default=Recipe().batch)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--steps", type=int, default=12, help="steps of each contestant in each round (default: 12)"
    )
    return parser.parse_args()


def _measure_rates(
    name: str, size: int, recipe: Recipe, rounds: int, steps: int
) -> tuple[list[float], list[float]]:
    """Return the images per second of the bare loop and of Fovea's steps, one pair per round."""
    torch.manual_seed(0)
    data = _build_data(size, recipe.batch)
    bare = _make_bare_step(_build_net(name, size), recipe)
    with TrainingRun(data, recipe, InitialState(_build_net(name, size))) as run:
        for step in (bare, run.step):
            _measure_rate(step, WARM_UP, recipe.batch)
        pairs = [
            (_measure_rate(bare, steps, recipe.batch), _measure_rate(run.step, steps, recipe.batch))
            for _ in range(rounds)
        ]
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)


def _build_net(name: str, size: int) -> Net:
    return Net(NetConfig(Task.MULTICLASS, LABELS, name, size))


def _build_data(size: int, batch: int) -> Dataset:
    """Return a set of noise images, because the content does not affect the time."""
    count = 40 * batch
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)
    train = Examples(pixels, torch.arange(count) % LABELS)
    empty = train.select(torch.empty(0, dtype=torch.int64))
    labels = tuple(f"label {number}" for number in range(LABELS))
    return Dataset("noise", labels, Task.MULTICLASS, square_geometry(size), train, empty, empty, empty, ())


def _make_bare_step(net: Net, recipe: Recipe) -> Callable[[], None]:
    target_device, size = choose_device(), net.config.size
    net = to_device(net, target_device).train()
    pixels = torch.randint(0, 256, (recipe.batch, size, size, 3), dtype=torch.uint8, device=target_device)
    targets = torch.randint(0, LABELS, (recipe.batch,), device=target_device)

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with autocast(target_device, recipe.precision):
            logits = net(pixels).float()
        compute_loss(logits, targets, Task.MULTICLASS, label_smoothing=0.0).backward()  # type: ignore[no-untyped-call]

    return step


def _measure_rate(step: Callable[[], None], steps: int, batch: int) -> float:
    _synchronize()
    started_at = time.monotonic()
    for _ in range(steps):
        step()
    _synchronize()
    return steps * batch / (time.monotonic() - started_at)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
