"""The gate: a candidate passes if it is accurate enough and fast enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from fovea.export.quantize.candidate import GraphRunner, Outputs, Speed, measure_speed
from fovea.export.quantize.comparison import PairedCounts, share_confidence
from fovea.export.quantize.images import PixelSelection
from fovea.export.quantize.recipe import Recipe
from fovea.service.artifact.contract import Contract
from fovea.service.providers import ProviderSetting
from fovea.service.resources.threads import get_thread_count


@dataclass(frozen=True)
class Limits:
    """Limits that a candidate must meet."""

    max_loss: float
    """Largest loss of accuracy, or share of changed answers without labels, 0 to 1."""
    min_speedup: float
    """Smallest speed relative to the float model's; 0 if it does not count."""


@dataclass(frozen=True)
class Verdict:
    """The measurements of one candidate."""

    recipe: Recipe
    speed: Speed | None
    """None if it was not measured."""
    is_fast: bool
    counts: PairedCounts | None
    """Images by which model is right; without labels the float model is always right. None for a candidate
    that is too slow, which is not compared."""
    agreement: float
    """Share of the images with the same answer; 0 if it was not compared."""
    outputs: Outputs | None
    """Outputs for the held-out images."""
    is_accurate: bool

    @property
    def passes(self) -> bool:
        """Flag for a candidate that may be written."""
        return self.is_accurate and self.is_fast


class Gate:
    """The comparison of candidates with the float model on held-out images."""

    def __init__(self, graph: ModelProto, contract: Contract, images: PixelSelection, limits: Limits) -> None:
        """Run the float model on the images. Raises `ModelError`."""
        self.limits = limits
        self.images = images
        self._contract = contract
        self._graph = graph
        self.source_outputs = GraphRunner(graph, contract, threads=get_thread_count()).run_images(images)
        self._source_answers = self.source_outputs.choose_answers(contract)

    def judge(self, recipe: Recipe, graph: ModelProto, *, provider: ProviderSetting | None) -> Verdict:
        """Return the verdict on a candidate whose speed counts on `provider`.

        The speed is not measured if `provider` is None, or if any speed would do. Raises `ModelError`.
        """
        speed = None
        if provider and self.limits.min_speedup > 0:
            source, candidate = (
                GraphRunner(one, self._contract, threads=1, provider=provider) for one in (self._graph, graph)
            )
            speed = measure_speed(source, candidate, self.images)
            if speed.ratio < self.limits.min_speedup:
                return Verdict(recipe, speed, False, None, 0.0, None, False)
        outputs = GraphRunner(graph, self._contract, threads=get_thread_count()).run_images(self.images)
        answers = outputs.choose_answers(self._contract)
        equal = np.asarray(answers == self._source_answers)
        same = np.asarray(equal.reshape(len(equal), -1).all(axis=1))  # (n, labels) for multilabel
        targets = self.images.targets
        if targets is None:
            counts = PairedCounts.from_hits(np.ones(len(same), bool), same)
        else:
            counts = PairedCounts.from_hits(self._source_answers == targets, answers == targets)
        is_accurate = counts.loss <= self.limits.max_loss + 1e-12  # 1 of 200 is 0.5 points, not more
        return Verdict(recipe, speed, True, counts, float(same.mean()), outputs, is_accurate)

    def describe(self, verdict: Verdict, candidates: int) -> str:
        """Return one line about a candidate; `candidates` have been compared so far."""
        parts = [f"{verdict.speed.ratio:.2f} times as fast"] if verdict.speed else []
        if verdict.counts:
            parts.append(describe_loss(verdict.counts, candidates, is_labelled=self.is_labelled))
        return f"{verdict.recipe.describe()}: {'; '.join(parts)}"

    @property
    def is_labelled(self) -> bool:
        """Flag for images with labels."""
        return self.images.targets is not None


def describe_loss(counts: PairedCounts, candidates: int, *, is_labelled: bool) -> str:
    """Return the loss in points with its interval."""
    low, high = counts.find_interval(share_confidence(candidates))
    if is_labelled:
        first, second = counts.both + counts.only_first, counts.both + counts.only_second
        return (
            f"{first:.0f} → {second:.0f} of {counts.images:.0f} right, {100 * counts.loss:+.2f} points lost "
            f"({100 * low:+.2f} to {100 * high:+.2f})"
        )
    return (
        f"{counts.only_first:.0f} of {counts.images:.0f} answers change, {100 * counts.loss:.2f} % "
        f"({100 * max(low, 0.0):.2f} to {100 * high:.2f})"
    )
