"""Recognition of photographs of the ten labels of CIFAR-10: `make bench-photographs`, one minute.

The photographs are the validation images of Tiny ImageNet that show one of the labels (64 x 64 px, 50 of each
class), and those of `photos.tar` (around 500 x 375 px) that do. No model was trained on them; the calibration
of the default model uses half of the former. Neither has airplanes, deer or horses, and the ships are
gondolas and a lifeboat. Photographs of `photos.tar` that show something else should count as unknown.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageOps

import fovea
from fovea.bench.known import DATA, TINY_IMAGENET_FILE, decode_images, read_images
from fovea.bench.ten_things import CLASSES
from fovea.model.evaluation.scores import calibration_error, split_into_bins
from fovea.service.inference.engine import Engine, Floats
from fovea.service.inference.known import compute_known_scores

PHOTOS_FILE: Final = DATA / "photos.tar"

_PHOTO_LABELS: Final = {
    "Siberian_husky": "dog",
    "Tibetan_terrier": "dog",
    "black_swan": "bird",
    "lifeboat": "ship",
    "malinois": "dog",
    "moving_van": "truck",
    "otterhound": "dog",
}
"""Labels of the photographs in `photos.tar` that show one."""

_UNCLEAR_PHOTOS: Final = frozenset({"African_hunting_dog", "golfcart"})
"""Photographs that show something close to a label."""

_MIN_IMAGES: Final = 5
"""Number of photographs from which a label counts in the mean over the labels."""


def main() -> int:
    """Print the figures of each model."""
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.photographs", description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="model files (default: those in zoo/cifar10)")
    parser.add_argument("--sheet", type=Path, help="picture to write: 20 photographs, answers and heat maps")
    options = parser.parse_args()
    models = options.models or sorted(Path("zoo/cifar10").glob("*/model.onnx"))
    if missing := [str(path) for path in (TINY_IMAGENET_FILE, PHOTOS_FILE) if not path.exists()]:
        print(f"bench: {', '.join(missing)} missing; TEST_DATA names the folder", file=sys.stderr)
        return 2
    images, labels = read_photographs()
    others = [image for name, image in _read_photos() if name not in _PHOTO_LABELS.keys() | _UNCLEAR_PHOTOS]
    for path in models:
        _measure_model(path, images, labels, others)
    if options.sheet:
        _draw_sheet(models[-1], options.sheet)
    return 0


def read_photographs() -> tuple[list[bytes], list[str]]:
    """Return all photographs of a label, and the label of each."""
    images, labels = [], []
    for label, classes in CLASSES.items():
        found = list(read_images(TINY_IMAGENET_FILE, "val", frozenset(classes)))
        images += found
        labels += [label] * len(found)
    for name, image in _read_photos():
        if name in _PHOTO_LABELS:
            images.append(image)
            labels.append(_PHOTO_LABELS[name])
    return images, labels


def _read_photos() -> Iterator[tuple[str, bytes]]:
    """Yield the class and the file of each photograph in `photos.tar`."""
    with tarfile.open(PHOTOS_FILE) as archive:
        for member in archive:
            if file := archive.extractfile(member):  # None for a folder
                yield Path(member.name).stem.partition("_")[2], file.read()


def _measure_model(path: Path, images: list[bytes], labels: Sequence[str], others: list[bytes]) -> None:
    engine = Engine.load(path, provider="cpu", threads=1)
    names = engine.contract.labels
    if missing := set(labels) - set(names):
        print(f"{path}: has no label {', '.join(sorted(missing))}")
        return
    probabilities = np.concatenate([engine.run(pixels) for pixels in decode_images(engine, images)])
    truth = np.array([names.index(label) for label in labels])
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    is_right = predicted == truth
    recalls = {
        label: is_right[truth == names.index(label)]
        for label in names
        if (truth == names.index(label)).sum() >= _MIN_IMAGES
    }
    print(f"{path}: right on {is_right.mean():.1%} of {len(images):,} photographs")
    print(f"  mean over {len(recalls)} labels: {np.mean([one.mean() for one in recalls.values()]):.1%}")
    print("  " + ", ".join(f"{label} {one.sum()} of {len(one)}" for label, one in recalls.items()))
    is_sure = confidence > 0.9
    print(
        f"  calibration error {_measure_calibration(confidence, is_right):.3f}; "
        f"{is_right[is_sure].sum()} of the {is_sure.sum()} with more than 90 % are right"
    )
    if limit := engine.contract.known:
        logits = np.concatenate([engine.compute_logits(pixels) for pixels in decode_images(engine, others)])
        accepted = compute_known_scores(logits, engine.contract.task) >= limit.threshold
        print(f"  {accepted.sum()} of {len(others)} photographs of other things count as known")
    _print_confusion(truth, predicted, names)


def _measure_calibration(confidence: Floats, is_right: np.ndarray) -> float:
    order = np.argsort(confidence)
    return calibration_error(
        split_into_bins(
            np.ones(len(order), np.int64),
            confidence[order].astype(np.float64),
            is_right[order].astype(np.float64),
        )
    )


def _print_confusion(truth: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> None:
    """Print a Markdown table with a row for each true label and a column for each answer."""
    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, (truth, predicted), 1)
    print(f"\n| true | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for name, row in zip(names, counts, strict=True):
        if row.any():
            print(f"| {name} | {' | '.join(map(str, row))} |")
    print()


# --- the sheet -----------------------------------------------------------------------------------

_SHEET_PHOTOS: Final = 20
_COLUMNS: Final = 4
_THUMBNAIL: Final = (180, 135)
_LINE_HEIGHT: Final = 16


def _draw_sheet(model: Path, out: Path) -> None:
    """Draw photographs of `photos.tar` and their heat maps side by side, with name, answer and `known`."""
    width, height = 2 * _THUMBNAIL[0], _THUMBNAIL[1] + 2 * _LINE_HEIGHT
    sheet = Image.new("RGB", (_COLUMNS * width, _SHEET_PHOTOS // _COLUMNS * height), "white")
    draw = ImageDraw.Draw(sheet)
    loaded = fovea.load(model.parent)
    photos = list(_read_photos())
    step = len(photos) // _SHEET_PHOTOS
    for number, (name, content) in enumerate(photos[::step][:_SHEET_PHOTOS]):
        left, top = number % _COLUMNS * width, number // _COLUMNS * height
        result = loaded.classify(content)
        for column, picture in enumerate((content, _explain_photo(model, content))):
            with Image.open(BytesIO(picture)) as image:
                sheet.paste(
                    ImageOps.fit(image.convert("RGB"), _THUMBNAIL), (left + column * _THUMBNAIL[0], top)
                )
        answer = f"{result.label} {result.probability:.0%}{'' if result.known else ', unknown'}"
        draw.text((left + 2, top + _THUMBNAIL[1]), name, "black")
        draw.text((left + 2, top + _THUMBNAIL[1] + _LINE_HEIGHT), answer, "black")
    sheet.save(out)


def _explain_photo(model: Path, content: bytes) -> bytes:
    """Return the photograph with the heat map of the model's answer, as PNG."""
    with TemporaryDirectory() as folder:
        photo, heat = Path(folder, "photo.jpg"), Path(folder, "heat.png")
        photo.write_bytes(content)
        command = [sys.executable, "-m", "fovea", "explain", str(photo), "--out", str(heat)]
        command += ["--models", str(model)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return heat.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
