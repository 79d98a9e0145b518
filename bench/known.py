"""How well models tell images like those of their training from others: `make bench-known`, one minute.

Known images are the test images of CIFAR-10 (JPEG files). The others are the validation images of twenty
classes of Tiny ImageNet, 50 each, which show none of the ten labels. They are decoded by each model's own
geometry, so both have the same size. AUROC is the probability that a known image has a higher score than
another one. The largest probability is compared with the score, because it costs nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from fovea.model.evaluation.scores import compute_auroc
from fovea.service.inference.engine import Engine, Floats
from fovea.service.inference.known import compute_known_scores
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.preprocess import decode_image

DATA: Final = Path(os.environ.get("TEST_DATA", "data"))
CIFAR10_FILE: Final = DATA / "cifar10-jpeg.tar.gz"
TINY_IMAGENET_FILE: Final = DATA / "tiny-imagenet.tar"

OTHER_CLASSES: Final = frozenset(
    {
        "African_elephant", "American_lobster", "alp", "banana", "bathtub", "bee", "brown_bear",
        "computer_keyboard", "desk", "ice_cream", "jellyfish", "lion", "mushroom", "refrigerator", "seashore",
        "sewing_machine", "sunglasses", "suspension_bridge", "teapot", "umbrella",
    }
)  # fmt: skip
"""Classes of Tiny ImageNet: five animals that are none of the labels, things, food and landscapes."""

_MAX_PIXELS: Final = 1 << 24
_CHUNK_SIZE: Final = 250


def main() -> int:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.known", description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="model files (default: those in zoo/cifar10)")
    models = parser.parse_args().models or sorted(Path("zoo/cifar10").glob("*/model.onnx"))
    archives = [CIFAR10_FILE, TINY_IMAGENET_FILE]
    if missing := [str(path) for path in archives if not path.exists()]:
        print(f"bench: {', '.join(missing)} missing; TEST_DATA names the folder", file=sys.stderr)
        return 2
    known_images = list(read_images(archives[0], "test"))
    other_images = list(read_images(archives[1], "val", OTHER_CLASSES))
    print(f"{len(known_images):,} known images, {len(other_images):,} others")
    for path in models:
        _measure_model(path, known_images, other_images)
    return 0


def read_images(path: Path, part: str, labels: frozenset[str] = frozenset()) -> Iterator[bytes]:
    """Yield the image files below `*/part/<label>/` in an archive, of all labels or of these."""
    with tarfile.open(path) as archive:
        for member in archive:
            folders = Path(member.name).parts[1:-1]
            is_wanted = folders[:1] == (part,) and (not labels or folders[-1] in labels)
            if is_wanted and (file := archive.extractfile(member)):  # None for a folder
                yield file.read()


def _measure_model(path: Path, known_images: list[bytes], other_images: list[bytes]) -> None:
    engine = Engine.load(path, provider="cpu", threads=1)
    known, other = _score_images(engine, known_images), _score_images(engine, other_images)
    print(f"{path}: {engine.contract.known or 'no threshold'}")
    for name, known_scores, other_scores in zip(("score", "largest probability"), known, other, strict=True):
        threshold = np.quantile(known_scores, 0.05)
        auroc, accepted = compute_auroc(known_scores, other_scores), np.mean(other_scores >= threshold)
        print(f"  {name:<20} AUROC {auroc:.3f}; {accepted:.1%} of the others pass where 95 % of the known do")
    if limit := engine.contract.known:
        shares = (np.mean(scores[0] >= limit.threshold) for scores in (known, other))
        print(
            "  accepted by the contract's threshold: {:.1%} of the known, {:.1%} of the others".format(
                *shares
            )
        )


def decode_images(engine: Engine, images: Sequence[bytes]) -> Iterator[Pixels]:
    """Yield the pixels, uint8 (n, H, W, 3), of the next images as the model takes them."""
    for start in range(0, len(images), _CHUNK_SIZE):
        yield np.stack(
            [
                decode_image(image, engine.contract.input, max_pixels=_MAX_PIXELS).pixels
                for image in images[start : start + _CHUNK_SIZE]
            ]
        )


def _score_images(engine: Engine, images: list[bytes]) -> tuple[Floats, Floats]:
    """Return the known score and the largest probability of each image, (n,)."""
    scores, confidences = [], []
    for pixels in decode_images(engine, images):
        scores.append(compute_known_scores(engine.compute_logits(pixels), engine.contract.task))
        confidences.append(engine.run(pixels).max(axis=1))
    return np.concatenate(scores), np.concatenate(confidences)


if __name__ == "__main__":
    sys.exit(main())
