"""`make bench-geometry`: the windows are always the same, and equal geometries differ in nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fovea.bench.geometry import PIPELINES, Pipeline, compare_geometries, cut_windows, format_row
from fovea.bench.workloads import draw_picture
from fovea.service.inference.engine import Engine

ROOT = Path(__file__).parents[2]


@pytest.fixture
def photographs(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        draw_picture((90 + 20 * number, 80), number).save(file)
    return files


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(ROOT / "zoo" / "cifar10" / "4" / "model.onnx", provider="cpu", threads=1)


def test_windows_are_always_the_same(photographs: list[Path]) -> None:
    windows = list(cut_windows(photographs, 4))
    assert [one.size for one in windows[::4]] == [(90, 80), (110, 80), (130, 80)]
    assert len({one.size for one in windows}) > 8
    for one, other in zip(windows, cut_windows(photographs, 4), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda one: one.name)
def test_other_geometry_changes_pixels(pipeline: Pipeline, photographs: list[Path], engine: Engine) -> None:
    cost = compare_geometries(pipeline, list(cut_windows(photographs, 4)), engine)
    assert cost.images == 12
    assert cost.changed_images > 0
    assert cost.level_difference > 0.01
    assert format_row(pipeline, cost).startswith(f"| {pipeline.name} | ")


def test_same_geometry_changes_nothing(photographs: list[Path], engine: Engine) -> None:
    pipeline = Pipeline("same", PIPELINES[0].right, PIPELINES[0].right)
    cost = compare_geometries(pipeline, list(cut_windows(photographs, 2)), engine)
    assert (cost.changed_images, cost.same_labels, cost.largest_difference) == (0, 1.0, 0.0)
    assert (cost.median_difference, cost.level_difference) == (0.0, 0.0)
