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


def test_the_hottest_place_is_what_the_score_looks_at() -> None:
    heat = run_occlusion(make_score(slice(3, 9), slice(22, 30)))[-1].heatmap
    assert heat.shape == (24, 36)
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    assert 3 <= row < 9
    assert 22 <= column < 30
    assert heat.max() > 4 * abs(heat[12:, :18]).max()


def test_what_speaks_against_is_negative() -> None:
    heat = run_occlusion(make_score(slice(3, 9), slice(22, 30), sign=-1))[-1].heatmap
    row, column = np.unravel_index(int(heat.argmin()), heat.shape)
    assert 3 <= row < 9
    assert 22 <= column < 30


def test_a_score_that_looks_nowhere_has_a_flat_map() -> None:
    heat = run_occlusion(lambda batch: np.full(len(batch), 1e6, np.float32))[-1].heatmap
    assert np.abs(heat).max() < 1e-3


def test_the_same_seed_gives_the_same_map_and_another_one_another() -> None:
    score = make_score(slice(3, 9), slice(22, 30))
    one, same, other = (run_occlusion(score, seed=seed)[-1].heatmap for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


def test_samples_and_progress_are_told() -> None:
    steps = run_occlusion(make_score(slice(3, 9), slice(22, 30)), samples=40)
    assert [step.samples for step in steps] == [16, 32, 48]
    assert [step.progress for step in steps] == pytest.approx([0.4, 0.8, 1.0])


def test_it_ends_by_the_clock_or_where_more_is_of_no_use() -> None:
    score = make_score(slice(3, 9), slice(22, 30))
    by_clock = run_occlusion(score, samples=0, seconds=0.05)
    assert by_clock[-1].progress == 1
    assert by_clock[-1].samples < MAX_SAMPLES
    assert run_occlusion(score, samples=0, seconds=600.0)[-1].samples == MAX_SAMPLES


def test_more_masks_come_closer() -> None:
    score = make_score(slice(3, 9), slice(22, 30))
    few, many = (
        np.std(
            [run_occlusion(score, seed=seed, samples=samples)[-1].heatmap for seed in range(8)], axis=0
        ).mean()
        for samples in (16, 256)
    )
    assert many < few / 2
