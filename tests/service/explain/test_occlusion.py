"""Occlusion finds the place that a score depends on, and is reproducible."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from fovea.service.explain.occlusion import MAX_SAMPLES, OcclusionStep, occlude_image

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Score = Callable[[Pixels], Floats]


def make_score(rows: slice, columns: slice, sign: float = 1.0) -> Score:
    def score(batch: Pixels) -> Floats:
        return np.asarray(sign * batch[:, rows, columns].mean(axis=(1, 2, 3)), np.float32)

    return score


def draw_picture() -> Pixels:
    pixels = np.zeros((24, 36, 3), np.uint8)
    pixels[:, ::2] = 255
    pixels[3:9, 22:30] = 255  # brighter than the mean, which hides it
    return pixels


def run_occlusion(
    score: Score, seconds: float = 60.0, seed: int = 0, samples: int = 400
) -> list[OcclusionStep]:
    return list(
        occlude_image(score, draw_picture(), seed=seed, samples=samples, seconds=seconds, batch_size=16)
    )


def test_hottest_place_is_the_one_the_score_depends_on() -> None:
    heat = run_occlusion(make_score(slice(3, 9), slice(22, 30)))[-1].heatmap
    assert heat.shape == (24, 36)
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    assert 3 <= row < 9
    assert 22 <= column < 30
    assert heat.max() > 4 * abs(heat[12:, :18]).max()


def test_area_that_lowers_the_score_is_negative() -> None:
    heat = run_occlusion(make_score(slice(3, 9), slice(22, 30), sign=-1))[-1].heatmap
    row, column = np.unravel_index(int(heat.argmin()), heat.shape)
    assert 3 <= row < 9
    assert 22 <= column < 30


def test_constant_score_has_flat_heatmap() -> None:
    heat = run_occlusion(lambda batch: np.full(len(batch), 1e6, np.float32))[-1].heatmap
    assert np.abs(heat).max() < 1e-3


def test_seed_determines_heatmap() -> None:
    score = make_score(slice(3, 9), slice(22, 30))
    first, second, other_seed = (run_occlusion(score, seed=seed)[-1].heatmap for seed in (1, 1, 2))
    assert (first == second).all()
    assert (first != other_seed).any()


def test_steps_report_samples_and_progress() -> None:
    steps = run_occlusion(make_score(slice(3, 9), slice(22, 30)), samples=40)
    assert [step.samples for step in steps] == [16, 32, 48]
    assert [step.progress for step in steps] == pytest.approx([0.4, 0.8, 1.0])


def test_occlusion_ends_at_time_or_sample_limit() -> None:
    score = make_score(slice(3, 9), slice(22, 30))
    steps = run_occlusion(score, samples=0, seconds=0.05)
    assert steps[-1].progress == 1
    assert steps[-1].samples < MAX_SAMPLES
    assert run_occlusion(score, samples=0, seconds=600.0)[-1].samples == MAX_SAMPLES


def test_more_samples_reduce_variation() -> None:
    score = make_score(slice(3, 9), slice(22, 30))
    deviation_of_few, deviation_of_many = (
        np.std(
            [run_occlusion(score, seed=seed, samples=samples)[-1].heatmap for seed in range(8)], axis=0
        ).mean()
        for samples in (16, 256)
    )
    assert deviation_of_many < deviation_of_few / 2
