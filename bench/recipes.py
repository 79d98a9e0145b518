"""Changes of the training recipe and their gains: `make bench-recipes`, one at a time (hours; resumable).

Each row is the recipe of `fovea train` for CIFAR-10 (JPEG files) with one change, trained by the same steps
for each seed and measured on the 5,000 held-out images. A finished run is kept in a file, so that an
interrupted table goes on where it stopped. The test images are not looked at.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from fovea.bench.known import CIFAR10_FILE
from fovea.model.data.dataset import Dataset, load_dataset
from fovea.model.data.pixels import compute_statistics
from fovea.model.evaluation.evaluate import autocast, measure_accuracy
from fovea.model.networks.network import Net, NetConfig
from fovea.model.recipe import Augmentation, Recipe
from fovea.model.training.batches import Batch
from fovea.model.training.distillation import compute_teacher_logits
from fovea.model.training.provenance import describe_hardware
from fovea.model.training.training_run import InitialState, TrainingRun, choose_precision
from fovea.service.atomic_files import write_file

RUNS_FOLDER: Final = Path("runs/recipes")
EPOCHS: Final = 10

Mixed = tuple[Tensor, Tensor]
"""Pixels, uint8 (B, H, W, 3), and the share of each label, float32 (B, labels)."""


@dataclass(frozen=True)
class Variant:
    """A recipe with one change."""

    name: str
    source: str
    """Library or recipe of the field that has the change."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Changed fields of the recipe."""
    mix: Callable[[Tensor, Tensor, torch.Generator], Mixed] | None = None
    """Change of a batch, from pixels and the share of each label."""
    averaging: float | None = None
    """Decay of an exponential moving average of the weights, for each step."""
    dropout: float = 0.0
    """Share of the pooled features that is dropped before the head."""
    optimizer: str = "sgd"
    has_teacher: bool = False
    epochs_factor: int = 1


# --- changes of a batch --------------------------------------------------------------------------


def mix_images(pixels: Tensor, shares: Tensor, generator: torch.Generator) -> Mixed:
    """Blend each image with another one (mixup: Zhang et al., 2018; alpha 0.2)."""
    weight = _sample_beta(0.2, generator)
    order = torch.randperm(len(pixels), generator=generator)
    mixed = (weight * pixels.float() + (1 - weight) * pixels[order].float()).round().to(torch.uint8)
    return mixed, weight * shares + (1 - weight) * shares[order]


def paste_pieces(pixels: Tensor, shares: Tensor, generator: torch.Generator) -> Mixed:
    """Replace a rectangle of each image by that of another one (CutMix: Yun et al., 2019; alpha 1)."""
    height, width = pixels.shape[1:3]
    side = math.sqrt(1 - _sample_beta(1.0, generator))
    top, left = (int(torch.randint(0, length, (), generator=generator)) for length in (height, width))
    rows = slice(max(0, top - round(side * height / 2)), top + round(side * height / 2))
    columns = slice(max(0, left - round(side * width / 2)), left + round(side * width / 2))
    order = torch.randperm(len(pixels), generator=generator)
    mixed = pixels.clone()
    mixed[:, rows, columns] = pixels[order][:, rows, columns]
    area = len(range(height)[rows]) * len(range(width)[columns]) / (height * width)
    return mixed, (1 - area) * shares + area * shares[order]


def _sample_beta(alpha: float, generator: torch.Generator) -> float:
    first, second = torch._standard_gamma(torch.tensor([alpha, alpha]), generator=generator)
    return float(first / (first + second).clamp(min=1e-9))


def change_one_way(pixels: Tensor, shares: Tensor, generator: torch.Generator) -> Mixed:
    """Change each image in one way of any strength (TrivialAugment: Müller and Hutter, 2021)."""
    return _change_images(pixels, 1, 1.0, generator), shares


def change_two_ways(pixels: Tensor, shares: Tensor, generator: torch.Generator) -> Mixed:
    """Change each image in two ways of at most half the strength (RandAugment: Cubuk et al., 2020)."""
    return _change_images(pixels, 2, 0.5, generator), shares


def _change_images(pixels: Tensor, count: int, strength: float, generator: torch.Generator) -> Tensor:
    planes = pixels.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
    for _ in range(count):
        ways = torch.randint(0, len(_WAYS), (len(planes),), generator=generator)
        amounts = strength * (2 * torch.rand(len(planes), generator=generator) - 1)
        for number, change in enumerate(_WAYS):
            rows = torch.where(ways == number)[0]
            if len(rows):
                planes[rows] = change(planes[rows], amounts[rows, None, None, None])
    return planes.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _transform(planes: Tensor, matrix: Callable[[Tensor], list[Tensor]], amounts: Tensor) -> Tensor:
    matrices = torch.stack(matrix(amounts.flatten()), dim=1).view(-1, 2, 3)
    grid = affine_grid(matrices, list(planes.shape), align_corners=False)
    return grid_sample(planes, grid, padding_mode="reflection", align_corners=False)


def _zeros(a: Tensor) -> Tensor:
    return torch.zeros_like(a)


def _ones(a: Tensor) -> Tensor:
    return torch.ones_like(a)


_WAYS: Final[tuple[Callable[[Tensor, Tensor], Tensor], ...]] = (
    lambda x, a: x,
    lambda x, a: x + 100 * a,  # brightness
    lambda x, a: x.mean(dim=(1, 2, 3), keepdim=True) + (x - x.mean(dim=(1, 2, 3), keepdim=True)) * (1 + a),
    lambda x, a: x.mean(dim=1, keepdim=True) + (x - x.mean(dim=1, keepdim=True)) * (1 + a),  # saturation
    lambda x, a: torch.where(x > 255 * (1 - a.abs()), 255 - x, x),  # solarize
    lambda x, a: (x / 2 ** (4 * a.abs()).round()).floor() * 2 ** (4 * a.abs()).round(),  # posterize
    lambda x, a: _transform(x, lambda t: [t.cos(), -t.sin(), _zeros(t), t.sin(), t.cos(), _zeros(t)], a / 2),
    lambda x, a: _transform(x, lambda t: [_ones(t), t, _zeros(t), _zeros(t), _ones(t), _zeros(t)], a / 3),
    lambda x, a: _transform(x, lambda t: [_ones(t), _zeros(t), _zeros(t), t, _ones(t), _zeros(t)], a / 3),
    lambda x, a: _transform(x, lambda t: [_ones(t), _zeros(t), t, _zeros(t), _ones(t), _zeros(t)], a / 2),
    lambda x, a: _transform(x, lambda t: [_ones(t), _zeros(t), _zeros(t), _zeros(t), _ones(t), t], a / 2),
)
"""Changes of planes, float32 (B, 3, H, W), by amounts of -1 to 1, float32 (B, 1, 1, 1)."""


VARIANTS: Final = (
    Variant("the recipe of `fovea train`", ""),
    Variant("no label smoothing", "timm", {"label_smoothing": 0.0}),
    Variant("label smoothing of 0.2", "airbench", {"label_smoothing": 0.2}),
    Variant("no cutout", "airbench94", {"cutout": 0.0}),
    Variant("mixup", "timm", mix=mix_images),
    Variant("CutMix instead of cutout", "timm", {"cutout": 0.0}, mix=paste_pieces),
    Variant("TrivialAugment", "timm", mix=change_one_way),
    Variant("RandAugment", "timm", mix=change_two_ways),
    Variant("random crops", "timm", {"augmentation": Augmentation.CROP}),
    Variant(
        "random crops that grow from half the side",
        "fastai",
        {"augmentation": Augmentation.CROP, "growth": 0.6},
    ),
    Variant("moving average of the weights, 0.99", "timm", averaging=0.99),
    Variant("moving average of the weights, 0.999", "timm", averaging=0.999),
    Variant("dropout of 0.2 before the head", "timm", dropout=0.2),
    Variant("Muon for the convolutions", "airbench96", optimizer="muon"),
    Variant(
        "distillation from the same network",
        "timm",
        {"teaching": 0.8, "label_smoothing": 0.0},
        has_teacher=True,
    ),
    Variant("twice the epochs", "timm", epochs_factor=2),
)


# --- a run ---------------------------------------------------------------------------------------


class VariantRun(TrainingRun):
    """A training run with a changed step."""

    def __init__(
        self, variant: Variant, data: Dataset, recipe: Recipe, net: Net, teacher_logits: Any
    ) -> None:
        super().__init__(data, recipe, InitialState(net), teacher_logits)
        self._variant = variant
        self._average = copy.deepcopy(self.net) if variant.averaging else None
        self._muon = _build_muon(self.net, self.optimizer, recipe) if variant.optimizer == "muon" else None
        if variant.dropout:
            dropout = nn.Dropout(variant.dropout)
            self.net.head.register_forward_pre_hook(
                lambda head, inputs: dropout.train(head.training)(inputs[0])
            )

    @property
    def result(self) -> Net:
        """Return the network to measure."""
        return self._average or self.net

    def step(self) -> None:
        """Train on one batch."""
        if self._muon:
            for group in self._muon.param_groups:
                group["lr"] = _MUON_RATE * self.set_learning_rate() / self.recipe.peak_lr
            self._muon.zero_grad(set_to_none=True)
        if self._variant.mix:
            self._step_mixed(self.batches.get(self.state.step), self._variant.mix)
        else:
            super().step()
        if self._muon:
            self._muon.step()
        if self._average and self._variant.averaging:
            _move_average(self._average, self.net, self._variant.averaging, self.state.step)

    def _step_mixed(self, batch: Batch, mix: Callable[[Tensor, Tensor, torch.Generator], Mixed]) -> None:
        started_at = time.monotonic()
        recipe, state = self.recipe, self.state
        self.set_learning_rate()
        generator = torch.Generator().manual_seed((recipe.seed << 32) + state.step)
        shares = nn.functional.one_hot(batch.targets, len(self.data.labels)).float()
        pixels, shares = mix(batch.pixels, shares, generator)
        with autocast(self.device, recipe.precision):
            logits = self.net.train()(pixels).float()
        loss = cross_entropy(logits, shares, label_smoothing=recipe.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        state.step += 1
        state.seconds += time.monotonic() - started_at


_MUON_RATE: Final = 0.02
"""Peak learning rate of Muon, for updates of orthogonal matrices."""


def _build_muon(net: Net, sgd: torch.optim.Optimizer, recipe: Recipe) -> torch.optim.Optimizer:
    """Move the weights of the 3 x 3 convolutions from `sgd` to Muon (Jordan et al., 2024)."""
    weights = [
        layer.weight
        for layer in net.features.modules()
        if isinstance(layer, nn.Conv2d) and layer.weight.requires_grad
    ]
    moved = set(weights)
    for group in sgd.param_groups:
        group["params"] = [weight for weight in group["params"] if weight not in moved]
    return _Muon(weights, recipe.momentum)


class _Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five steps of Newton and Schulz (Jordan et al., 2024)."""

    def __init__(self, weights: list[Tensor], momentum: float) -> None:
        super().__init__(weights, {"lr": _MUON_RATE, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(weight))
                buffer.mul_(group["momentum"]).add_(weight.grad)
                update = weight.grad.add(buffer, alpha=group["momentum"])
                # weights keep their norm, as in airbench96
                weight.mul_(math.sqrt(len(weight)) / weight.norm().clamp(min=1e-7))
                weight.add_(_orthogonalize(update.flatten(1)).view_as(weight), alpha=-group["lr"])


def _orthogonalize(matrix: Tensor) -> Tensor:
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    is_tall = len(x) > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(5):
        product = x @ x.T
        x = 3.4445 * x + (-4.775 * product + 2.0315 * product @ product) @ x
    return x.T if is_tall else x


@torch.no_grad()
def _move_average(average: Net, net: Net, decay: float, step: int) -> None:
    decay = min(decay, (1 + step) / (10 + step))  # short at first, so that the first weights are forgotten
    for mean, value in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


def _train_variant(variant: Variant, data: Dataset, seed: int, epochs: int) -> dict[str, float]:
    """Return accuracy on the held-out images, 0 to 1, and the seconds of the training steps."""
    base = Recipe(epochs=epochs * variant.epochs_factor, seed=seed, precision=choose_precision())
    recipe = replace(base, **variant.fields)
    torch.manual_seed(seed)
    mean, std = compute_statistics(data.train.pixels)
    net = Net(NetConfig(data.task, len(data.labels), "cnn", data.geometry.height, mean=mean, std=std))
    net.fit_whitening(data.train.pixels)
    teacher_logits = _compute_logits(data, recipe, net) if variant.has_teacher else None
    with VariantRun(variant, data, recipe, net, teacher_logits) as run:
        while run.state.step < recipe.epochs * run.batches.steps:
            run.step()
        parts = (data.validation, data.conformal)
        right = sum((measure_accuracy(run.result, part) * len(part) for part in parts), start=0.0)
        return {"accuracy": right / sum(map(len, parts)), "seconds": run.state.seconds}


def _compute_logits(data: Dataset, recipe: Recipe, net: Net) -> Any:
    """Return the logits of a network of the plain recipe for all views, float16 (views, N, n)."""
    teacher = copy.deepcopy(net)
    plain = replace(recipe, teaching=0.0, label_smoothing=0.1)
    with TrainingRun(data, plain, InitialState(teacher)) as run:
        while run.state.step < plain.epochs * run.batches.steps:
            run.step()
    return compute_teacher_logits(
        [run.net.eval()], net.config, data, recipe, RUNS_FOLDER / "logits", Console(quiet=True)
    )


def main() -> None:
    """Train the missing runs and print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.recipes", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each row (default: 2)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"epochs of a run (default: {EPOCHS})")
    options = parser.parse_args()
    data = load_dataset(CIFAR10_FILE, validation=0.1, seed=0, cache=RUNS_FOLDER / "data")
    print(f"{describe_hardware()}\n")
    print("| change | from | held-out accuracy | gain | time | n |\n|---|---|---|---|---|---|", flush=True)
    base: list[dict[str, float]] = []
    for variant in VARIANTS:
        runs = [_finish_run(variant, data, seed, options.epochs) for seed in range(options.seeds)]
        base = base or runs
        print(_format_row(variant, runs, base), flush=True)


def _finish_run(variant: Variant, data: Dataset, seed: int, epochs: int) -> dict[str, float]:
    """Return the result of a run, from its file if it is finished."""
    words = "".join(letter if letter.isalnum() else "-" for letter in variant.name)
    path = RUNS_FOLDER / f"{words}-{epochs}-{seed}.json"
    if not path.exists():
        write_file(path, json.dumps(_train_variant(variant, data, seed, epochs)))
    result: dict[str, float] = json.loads(path.read_text())
    return result


def _format_row(variant: Variant, runs: list[dict[str, float]], base: list[dict[str, float]]) -> str:
    accuracies, base_accuracies = ([100 * run["accuracy"] for run in one] for one in (runs, base))
    gain = statistics.mean(accuracies) - statistics.mean(base_accuracies)
    time_ratio = sum(run["seconds"] for run in runs) / sum(run["seconds"] for run in base)
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
    return (
        f"| {variant.name} | {variant.source} | {statistics.mean(accuracies):.2f}{spread} % "
        f"| {gain:+.2f} | {time_ratio:.2f} | {len(runs)} |"
    )


if __name__ == "__main__":
    main()
