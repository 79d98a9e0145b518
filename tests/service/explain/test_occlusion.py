"""Occlusion finds the place that a score depends on, and is reproducible."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from fovea.service.explain.occlusion import MAX_KEPT_BYTES, MAX_SAMPLES, Occlusion, OcclusionStep

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Score = Callable[[Pixels], Floats]
BATCH_SIZE = 16


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
    occlusion = Occlusion(
        lambda batch: score(batch)[:, None], draw_picture(), seed=seed, batch_size=BATCH_SIZE
    )
    return list(occlusion.iterate_steps(select_first, samples=samples, seconds=seconds))


def select_first(logits: Floats) -> Floats:
    return logits[:, 0]


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


class CountingNetwork:
    """A network that counts its calls: its first two labels score the brightness of two places."""

    def __init__(self, labels: int = 2) -> None:
        self.calls = 0
        self._scores = [make_score(slice(3, 9), slice(22, 30)), make_score(slice(12, 20), slice(2, 9))]
        self._labels = labels

    def __call__(self, batch: Pixels) -> Floats:
        self.calls += 1
        logits = np.stack([score(batch) for score in self._scores], axis=1)
        return np.pad(logits, ((0, 0), (0, self._labels - 2)))


def select(label: int) -> Callable[[Floats], Floats]:
    return lambda logits: logits[:, label]


def test_one_run_serves_all_labels_with_the_maps_of_runs_of_their_own() -> None:
    network = CountingNetwork()
    occlusion = Occlusion(network, draw_picture(), seed=3, batch_size=BATCH_SIZE)
    for label in (0, 1):
        (*_, shared) = occlusion.iterate_steps(select(label), samples=640, seconds=60)
        own_run = Occlusion(CountingNetwork(), draw_picture(), seed=3, batch_size=BATCH_SIZE)
        (*_, own) = own_run.iterate_steps(select(label), samples=640, seconds=60)
        assert (shared.heatmap == own.heatmap).all()
        assert shared.samples == own.samples == 640
    assert network.calls == 640 / BATCH_SIZE


def test_second_label_has_as_many_samples_as_the_time_of_the_first_allowed() -> None:
    network = CountingNetwork()
    occlusion = Occlusion(network, draw_picture(), seed=0, batch_size=BATCH_SIZE)
    (*_, first) = occlusion.iterate_steps(select(0), samples=0, seconds=0.1)
    calls = network.calls
    (*_, second) = occlusion.iterate_steps(select(1), samples=0, seconds=0.1)
    assert (second.samples, second.progress) == (first.samples, 1)
    assert network.calls == calls


def test_stopped_run_goes_on_for_another_label() -> None:
    network = CountingNetwork()
    occlusion = Occlusion(network, draw_picture(), seed=0, batch_size=BATCH_SIZE)
    steps = occlusion.iterate_steps(select(0), samples=320, seconds=60)
    for _ in range(5):
        next(steps)
    steps.close()  # type: ignore[attr-defined]  # a generator
    (*_, last) = occlusion.iterate_steps(select(1), samples=320, seconds=60)
    assert last.samples == 320
    assert network.calls == 320 / BATCH_SIZE


def test_fewer_samples_than_kept_give_the_map_of_a_short_run() -> None:
    network = CountingNetwork()
    occlusion = Occlusion(network, draw_picture(), seed=0, batch_size=BATCH_SIZE)
    list(occlusion.iterate_steps(select(0), samples=320, seconds=60))
    (*_, short) = occlusion.iterate_steps(select(0), samples=64, seconds=60)
    own_run = Occlusion(CountingNetwork(), draw_picture(), seed=0, batch_size=BATCH_SIZE)
    (*_, own) = own_run.iterate_steps(select(0), samples=64, seconds=60)
    assert short.samples == 64
    assert (short.heatmap == own.heatmap).all()


def test_logits_beyond_the_limit_are_not_kept() -> None:
    labels = MAX_KEPT_BYTES // (4 * BATCH_SIZE * 3)  # three batches
    network = CountingNetwork(labels)
    occlusion = Occlusion(network, draw_picture(), seed=0, batch_size=BATCH_SIZE)
    for expected_calls in (5, 10):
        (*_, last) = occlusion.iterate_steps(select(1), samples=80, seconds=60)
        assert last.samples == 80
        assert network.calls == expected_calls


def test_occlusion_is_about_one_image_and_seed() -> None:
    occlusion = Occlusion(CountingNetwork(), draw_picture(), seed=0, batch_size=BATCH_SIZE)
    assert occlusion.is_about(draw_picture(), 0)
    assert not occlusion.is_about(draw_picture(), 1)
    assert not occlusion.is_about(255 - draw_picture(), 0)
