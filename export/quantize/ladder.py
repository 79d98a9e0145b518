"""The ladder: conversions from the fastest to the most accurate, until one passes the gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from onnx import ModelProto

from fovea.export.quantize.calibration import CalibrationMethod, Histogram, collect_histograms
from fovea.export.quantize.candidate import GraphRunner, compute_sqnr
from fovea.export.quantize.gate import Gate, Verdict
from fovea.export.quantize.images import PixelSelection
from fovea.export.quantize.recipe import Recipe, RecipeKind, convert_graph
from fovea.export.quantize.regions import Region
from fovea.service.artifact.contract import Contract
from fovea.service.resources.threads import get_thread_count

_SENSITIVITY_IMAGES: Final = 16
"""Number of calibration images on which the sensitivity of each layer is measured."""

_FLOAT_SHARES: Final = (0.05, 0.1, 0.2, 0.35)
"""Shares of the layers that stay in float on the last rungs, the most sensitive first."""


@dataclass(frozen=True)
class Passed:
    """A candidate that has passed."""

    verdict: Verdict
    graph: ModelProto


@dataclass(frozen=True)
class Climb:
    """The result of a ladder."""

    passed: Passed | None
    verdicts: tuple[Verdict, ...]

    @property
    def compared(self) -> int:
        """Number of candidates that were compared with the float model on the held-out images."""
        return sum(verdict.counts is not None for verdict in self.verdicts)


class Ladder:
    """The conversions of one graph to int8."""

    def __init__(
        self,
        graph: ModelProto,
        region: Region,
        contract: Contract,
        calibration: PixelSelection,
        weight_bits: int,
        say: Callable[[str], None],
    ) -> None:
        """Collect the histograms of the activations. `say` prints a line. Raises `ModelError`."""
        self._graph, self._region, self._contract = graph, region, contract
        self._calibration = calibration
        self._weight_bits = weight_bits
        self._say = say
        self._histograms: Mapping[str, Histogram] = collect_histograms(
            graph, region.activations, calibration.iterate_images, get_thread_count()
        )

    def climb(self, gate: Gate) -> Climb:
        """Try the recipes until one passes, or until no further recipe can be fast enough.

        Raises `QuantizeRefused` if the graph cannot be converted, and `ModelError`.
        """
        verdicts: list[Verdict] = []
        for recipes in (self._list_static_recipes(), self._list_dynamic_recipes()):
            for recipe in recipes:
                graph = convert_graph(self._graph, self._region, self._histograms, recipe)
                verdict = gate.judge(recipe, graph, provider="cpu")
                verdicts.append(verdict)
                self._say(gate.describe(verdict, Climb(None, tuple(verdicts)).compared or 1))
                if verdict.passes:
                    return Climb(Passed(verdict, graph), tuple(verdicts))
                if not verdict.is_fast:
                    break  # the next rungs compute more in float
        return Climb(None, tuple(verdicts))

    def _list_static_recipes(self) -> Iterator[Recipe]:
        layers = self._region.weighted
        recipe = self._choose_method()
        yield recipe
        ends = tuple(dict.fromkeys((layers[0], layers[-1])))
        if len(layers) <= len(ends):
            return
        yield recipe.with_float_layers(ends)
        inner_layers = self._rank_layers(recipe, [name for name in layers if name not in ends])
        previous_count = 0
        for share in _FLOAT_SHARES:
            count = math.ceil(share * len(inner_layers))
            if previous_count < count < len(inner_layers):
                yield recipe.with_float_layers((*ends, *inner_layers[:count]))
            previous_count = count

    def _list_dynamic_recipes(self) -> Iterator[Recipe]:
        if self._region.is_mostly_matrices:
            float_layers = tuple(name for name in self._region.weighted if name not in self._region.matrices)
            yield Recipe(RecipeKind.DYNAMIC, self._weight_bits, float_layers=float_layers)

    def _choose_method(self) -> Recipe:
        """Return the recipe with the calibration method whose logits have the least noise.

        The methods are compared on the calibration images, so that the held-out images stay unseen.
        """
        expected = GraphRunner(self._graph, self._contract, threads=get_thread_count()).run_images(
            self._calibration
        )
        sqnr_by_recipe: dict[Recipe, float] = {}
        for method in CalibrationMethod:
            recipe = Recipe(RecipeKind.STATIC, self._weight_bits, method)
            outputs = self._open(recipe).run_images(self._calibration)
            sqnr_by_recipe[recipe] = compute_sqnr(expected.logits, outputs.logits)
        ratios = ", ".join(f"{recipe.method} {sqnr:.1f} dB" for recipe, sqnr in sqnr_by_recipe.items())
        self._say(f"signal to noise of the logits on {len(self._calibration)} images: {ratios}")
        return max(sqnr_by_recipe, key=lambda recipe: sqnr_by_recipe[recipe])

    def _rank_layers(self, recipe: Recipe, names: list[str]) -> list[str]:
        """Return layers by the noise of the logits if this layer alone is int8, the noisiest first."""
        images = self._calibration.take(_SENSITIVITY_IMAGES)
        expected = GraphRunner(self._graph, self._contract, threads=get_thread_count()).run_images(images)
        self._say(f"measuring the sensitivity of {len(names)} layers")

        def measure_layer(name: str) -> float:
            others = tuple(one for one in self._region.weighted if one != name)
            outputs = self._open(recipe.with_float_layers(others)).run_images(images)
            return compute_sqnr(expected.logits, outputs.logits)

        sqnr_by_name = {name: measure_layer(name) for name in names}
        return sorted(names, key=lambda name: sqnr_by_name[name])

    def _open(self, recipe: Recipe) -> GraphRunner:
        graph = convert_graph(self._graph, self._region, self._histograms, recipe)
        return GraphRunner(graph, self._contract, threads=get_thread_count())
