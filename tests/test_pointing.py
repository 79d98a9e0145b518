"""The pointing game (Zhang et al., 2016): the maximum of a heat map lies on the object.

A picture has a test image on one quarter and noise on the other three. Only pictures that the model
classifies correctly are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fovea.service.explain.explainer import Explainer
from fovea.service.explain.messages import ExplanationRequest
from fovea.service.inference.engine import Engine
from fovea.service.runners.load_messages import ProcessPlan
from tests.servers import DEFAULT_MODEL

CAM_CASES = 200
OCCLUSION_CASES = 40
MIN_HIT_SHARE = 0.85


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    content = DEFAULT_MODEL.read_bytes()
    contract = Engine(content, provider="cpu", threads=1).contract
    return Explainer(content, contract, ProcessPlan("cpu", 4, 1, 0, 1, 10_000_000, 1 << 30, 1))


def draw_quarters(folder: Path) -> Iterator[tuple[str, int, bytes]]:
    """Yield the label of the image, the number of its quarter, and the picture."""
    random = np.random.default_rng(0)
    for path in random.permutation(np.array(sorted(folder.rglob("*.jpg")))):
        pixels = random.integers(0, 256, (64, 64, 3)).astype(np.uint8)
        quarter = int(random.integers(4))
        top, left = 32 * (quarter // 2), 32 * (quarter % 2)
        with Image.open(path) as image:
            pixels[top : top + 32, left : left + 32] = np.asarray(image.convert("RGB"))
        content = BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        yield path.parent.name, quarter, content.getvalue()


def measure_hit_share(explainer: Explainer, folder: Path, request: ExplanationRequest, cases: int) -> float:
    """Return the share of the first `cases` pictures whose map has its maximum on the correct quarter."""
    labels = explainer.contract.labels
    count = hits = 0
    for label, quarter, picture in draw_quarters(folder):
        _, _, prediction = explainer.classify_image(picture)
        if labels[np.argmax(prediction.probabilities)] == label:
            heatmap = explainer.explain(picture, request, lambda _: None, lambda *_: None).heatmap
            row, column = np.unravel_index(int(heatmap.argmax()), heatmap.shape)
            hits += quarter == 2 * (2 * row >= heatmap.shape[0]) + (2 * column >= heatmap.shape[1])
            count += 1
        if count == cases:
            break
    assert count == cases
    return hits / count


@pytest.mark.long
def test_class_activation_maps_point_at_the_object(explainer: Explainer, cifar_test: Path) -> None:
    share = measure_hit_share(explainer, cifar_test, ExplanationRequest(method="cam"), CAM_CASES)
    print(f"class activation maps: {share:.1%} of {CAM_CASES}")
    assert share >= MIN_HIT_SHARE


@pytest.mark.long
def test_occlusion_points_at_the_object(explainer: Explainer, cifar_test: Path) -> None:
    request = ExplanationRequest(method="occlusion", samples=400)
    share = measure_hit_share(explainer, cifar_test, request, OCCLUSION_CASES)
    print(f"occlusion, 400 masked images: {share:.1%} of {OCCLUSION_CASES}")
    assert share >= MIN_HIT_SHARE
