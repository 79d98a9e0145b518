"""Drift: the index, the window, and the gauge on a real server."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fovea.export.drift_reference import measure_reference
from fovea.model.data.examples import Examples
from fovea.service.artifact.contract import DriftReference, Histogram
from fovea.service.inference.drift import SIGNALS, DriftMonitor, chance_index, stability_index
from fovea.service.inference.engine import Engine
from tests.graphs import add_to_repository, build_model, read_contract, with_contract
from tests.pictures import draw_picture, encode_image, make_jpeg
from tests.servers import Server

LABELS = ("ant", "bee", "cow", "dog")
REFERENCE = DriftReference(
    100, {"dog": 60, "ant": 30}, Histogram((0.5, 0.9), (20, 50, 30)), Histogram((0.3,), (50, 50))
)  # fmt: skip


# --- the index -----------------------------------------------------------------------------------


def test_stability_index_matches_the_formula() -> None:
    q, p = (0.5, 0.5), (75.5 / 101, 25.5 / 101)  # half an image more in each bin
    expected = sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert stability_index([50, 50], [75, 25]) == pytest.approx(expected)
    assert stability_index([50, 50], [75, 25]) == pytest.approx(stability_index([75, 25], [50, 50]))
    assert stability_index([30, 50, 20], [30, 50, 20]) == 0
    assert 1 < stability_index([50, 50, 0], [0, 0, 100]) < 20  # empty bins keep it finite


@pytest.mark.parametrize(("images", "window"), [(5000, 1000), (300, 1000), (2000, 100)])
def test_chance_index_is_the_mean_index_of_random_samples(images: int, window: int) -> None:
    random = np.random.default_rng(images)
    shares = [0.1] * 10
    draws = [(random.multinomial(images, shares), random.multinomial(window, shares)) for _ in range(400)]
    mean = np.mean([stability_index(first.tolist(), second.tolist()) for first, second in draws])
    assert mean == pytest.approx(chance_index([images // 10] * 10, [window // 10] * 10), rel=0.1)


# --- the window ----------------------------------------------------------------------------------


def make_drift(*images: tuple[int, float, float], window: int = 4) -> DriftMonitor:
    drift = DriftMonitor(REFERENCE, LABELS, window)
    for image in images:
        drift.add(*image)
    return drift


def test_each_signal_is_compared_in_its_bins() -> None:
    drift = make_drift(
        (3, 0.4, 0.2), (0, 0.5, 0.3), (1, 0.95, 0.9), (2, 0.6, 0.1)
    )  # an edge belongs to the upper bin
    indices = drift.compute_indices()
    assert list(indices) == list(SIGNALS)
    assert indices["label"].psi == stability_index([60, 30, 10], [1, 1, 2])
    assert indices["confidence"].psi == stability_index([20, 50, 30], [1, 2, 1])
    assert indices["brightness"].psi == stability_index([50, 50], [2, 2])
    assert indices["label"].chance == pytest.approx(2 * (1 / 100 + 1 / 4))


def test_images_outside_the_window_are_forgotten() -> None:
    old_images = [(0, 0.1, 0.1)] * 6
    new_images = [(3, 0.7, 0.5), (2, 0.95, 0.2), (1, 0.3, 0.9), (3, 0.5, 0.3)]
    assert make_drift(*old_images, *new_images).compute_indices() == make_drift(*new_images).compute_indices()
    assert not make_drift(*new_images[:3]).is_full
    assert make_drift(*new_images).is_full


# --- on a server ---------------------------------------------------------------------------------


def make_pictures(count: int, seed: int) -> list[bytes]:
    return [make_jpeg(40, 30, seed + number) for number in range(count)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server with the small model and a reference of 200 pictures like those of the tests."""
    graph = build_model()
    held_out = [np.asarray(draw_picture(40, 30, 10_000 + seed).resize((16, 16))) for seed in range(200)]
    examples = Examples(torch.from_numpy(np.stack(held_out)), torch.zeros(200, dtype=torch.int64))
    engine = Engine(graph.SerializeToString(), provider="cpu", threads=1)
    contract = replace(read_contract(graph), reference=measure_reference(engine, examples))
    root = add_to_repository(with_contract(graph, contract), tmp_path)
    with Server(FOVEA_MODELS=str(root), FOVEA_DRIFT_IMAGES="200", FOVEA_RUNNERS="1") as instance:
        yield instance


def classify_images(server: Server, images: list[bytes]) -> list[str]:
    """Return the most probable label of each image."""
    labels = []
    for start in range(0, len(images), 50):
        batch = images[start : start + 50]
        reply = server.client.post(
            "/v1/classify", files=[("image", (f"{len(batch)}.jpg", image)) for image in batch]
        )
        results = reply.json().get("results", [reply.json()])
        labels += [result["predictions"][0]["label"] for result in results]
    return labels


def test_drift_gauge_rises_and_falls_with_the_images(server: Server) -> None:
    def read_psi(signal: str) -> float:
        return server.read_metric("fovea_drift_psi", model="small", version="1", signal=signal)

    count_before = server.read_metric("fovea_prediction_confidence_count")
    labels = classify_images(server, make_pictures(199, seed=0))
    assert "fovea_drift_psi{" not in server.client.get("/metrics").text  # the window is not full
    labels += classify_images(server, make_pictures(1, seed=500))
    for label in LABELS:
        assert server.read_metric("fovea_predictions_total", label=label) == labels.count(label)
    assert server.read_metric("fovea_prediction_confidence_count") - count_before == 200
    for signal in SIGNALS:
        chance = server.read_metric("fovea_drift_chance_psi", signal=signal)
        assert 0 < read_psi(signal) < 3 * chance < 0.5
    rarest_index = labels.index(min(labels, key=labels.count))
    classify_images(server, make_pictures(200, seed=0)[rarest_index : rarest_index + 1] * 200)
    assert all(read_psi(signal) > 1 for signal in SIGNALS)
    classify_images(server, make_pictures(200, seed=1000))
    assert all(
        read_psi(signal) < 3 * server.read_metric("fovea_drift_chance_psi", signal=signal)
        for signal in SIGNALS
    )


def test_image_properties_are_in_histograms(server: Server) -> None:
    classify_images(server, [encode_image(Image.new("RGB", (100, 50), "black"), "PNG")] * 2)
    assert server.read_metric("fovea_image_brightness_bucket", model="small", le="0.1") == 2
    assert server.read_metric("fovea_image_pixels_bucket", side="width", le="64.0") == 0
    assert server.read_metric("fovea_image_pixels_bucket", side="height", le="64.0") == 2
    assert server.read_metric("fovea_prediction_entropy_count", model="small", version="1") == 2


@pytest.mark.long
def test_model_without_a_reference_is_logged(tmp_path: Path) -> None:
    graph = build_model()
    add_to_repository(with_contract(graph, replace(read_contract(graph), reference=None)), tmp_path)
    with Server(FOVEA_MODELS=str(tmp_path), FOVEA_DRIFT_IMAGES="100") as server:
        classify_images(server, make_pictures(100, seed=0))
        assert "fovea_drift_psi{" not in server.client.get("/metrics").text
        assert server.client.get("/v1/models/small/contract").json()["reference"] is None
    assert "model small has no drift reference, so its drift is not measured" in server.log
