"""The `make bench-geometry` benchmark: what a wrong geometry costs on photographs.

Each pipeline resizes and crops in its own way. A service that knows only "resize the shorter side, crop the
middle" gives such a network other pixels. Both geometries prepare the same windows of photographs for one
model, and its answers are compared. The first label of the right geometry is the reference, not the truth.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from fovea.bench.mixed import describe_machine
from fovea.bench.workloads import BenchError, find_photographs
from fovea.service.artifact.geometry import Geometry, PixelPath, find_last_size
from fovea.service.artifact.geometry_text import parse_steps
from fovea.service.inference.engine import Engine
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.resize import apply_geometry

WINDOWS: Final = 10
"""Number of windows of each photograph, from half to all of its sides, so that many aspect ratios occur."""

PIXEL_SIDE: Final = 224
"""Side at which pixels are compared; the model may have another."""

_BATCH_SIZE: Final = 16

USUAL: Final = "resize cover {box} {filter}, crop {side}"
"""The geometry of a service that knows no other."""


@dataclass(frozen=True)
class Pipeline:
    """The geometry of a pipeline, and the geometry that is taken for it; `box` is 8/7 of `side`."""

    name: str
    right: str
    other: str = USUAL
    filter: str = "bilinear"

    def build(self, text: str, side: int) -> Geometry:
        """Return the geometry of a text for an input of this side."""
        steps = parse_steps(text.format(box=round(side * 8 / 7), side=side, filter=self.filter))
        return Geometry(*find_last_size(steps), steps, PixelPath.EXACT)


PIPELINES: Final = (
    Pipeline("DeiT: stretch, then crop", "resize stretch {box} bicubic, crop {side} floor", filter="bicubic"),
    Pipeline("transformers: crop rounded down", "resize cover {box} bilinear, crop {side} floor"),
    Pipeline("letterbox, grey border", "resize contain {side} bilinear round, pad {side} fill 114/114/114"),
    Pipeline(
        "OpenCV: no antialiasing",
        "resize stretch {side} bilinear no-antialias",
        "resize stretch {side} bilinear",
    ),
    Pipeline("slim: middle 87.5 %", "crop fraction 0.875, resize stretch {side} bilinear no-antialias"),
    Pipeline("Keras: pad_to_aspect_ratio", "pad aspect {side}, resize stretch {side} bilinear no-antialias"),
)


@dataclass(frozen=True)
class GeometryCost:
    """The differences between two geometries on the same images."""

    images: int
    changed_images: int
    """Number of images of which a pixel differs."""
    same_labels: float
    """Share of images with the same most probable label."""
    median_difference: float
    """Median of the largest difference of a probability of an image."""
    largest_difference: float
    level_difference: float
    """Mean difference of a pixel at `PIXEL_SIDE`, in levels of 255."""


def compare_geometries(pipeline: Pipeline, images: Sequence[Image.Image], engine: Engine) -> GeometryCost:
    """Run the model on both geometries of a pipeline. Raises `BenchError` for an oblong model."""
    side = engine.contract.input.height
    if engine.contract.input.width != side:
        raise BenchError("the model takes oblong images")
    right, other = (_prepare(images, pipeline.build(text, side)) for text in (pipeline.right, pipeline.other))
    rows, other_rows = _run(engine, right), _run(engine, other)
    differences = np.abs(rows - other_rows).max(axis=1)  # (images,)
    levels = [_compare_pixels(pipeline, image) for image in images]
    return GeometryCost(
        images=len(images),
        changed_images=int((right != other).any(axis=(1, 2, 3)).sum()),
        same_labels=float((rows.argmax(axis=1) == other_rows.argmax(axis=1)).mean()),
        median_difference=float(np.median(differences)),
        largest_difference=float(differences.max()),
        level_difference=float(np.mean(levels)),
    )


def _compare_pixels(pipeline: Pipeline, image: Image.Image) -> float:
    """Return the mean difference of a pixel at `PIXEL_SIDE`, in levels of 255."""
    right, other = (
        _run_steps(image, pipeline.build(text, PIXEL_SIDE)) for text in (pipeline.right, pipeline.other)
    )
    return float(np.abs(right.astype(np.int16) - other).mean())


def cut_windows(photographs: Sequence[Path], count: int = WINDOWS) -> Iterator[Image.Image]:
    """Yield windows of the photographs, the whole photograph first; always the same."""
    random = np.random.default_rng(0)
    for path in photographs:
        with Image.open(path) as file:
            photograph = file.convert("RGB")
        yield photograph
        for _ in range(count - 1):
            width, height = (int(side * random.uniform(0.5, 1)) for side in photograph.size)
            left = int(random.integers(0, photograph.width - width + 1))
            top = int(random.integers(0, photograph.height - height + 1))
            yield photograph.crop((left, top, left + width, top + height))


def _prepare(images: Sequence[Image.Image], geometry: Geometry) -> Pixels:
    return np.stack([_run_steps(image, geometry) for image in images])


def _run_steps(image: Image.Image, geometry: Geometry) -> Pixels:
    return apply_geometry(image, geometry, image.size, (0, 0, *image.size), None)


def _run(engine: Engine, pixels: Pixels) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    batches = range(0, len(pixels), _BATCH_SIZE)
    return np.concatenate([engine.run(pixels[start : start + _BATCH_SIZE]) for start in batches])


def format_row(pipeline: Pipeline, cost: GeometryCost) -> str:
    """Return a row of the table in Markdown."""
    return (
        f"| {pipeline.name} | {cost.changed_images / cost.images:.0%} | {cost.same_labels:.1%} | "
        f"{cost.median_difference:.3f} | {cost.largest_difference:.2f} | {cost.level_difference:.1f} |"
    )


def main(arguments: list[str] | None = None) -> None:
    """Compare all pipelines, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.geometry", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("zoo/cifar10/4/model.onnx"), help="model file")
    parser.add_argument("--images", type=Path, nargs="*", help="photographs (default: those of TEST_DATA)")
    options = parser.parse_args(arguments)
    engine = Engine.load(options.model, provider="cpu", threads=1)
    photographs = options.images or find_photographs()
    images = list(cut_windows(photographs))
    source = f"{len(images)} windows of {len(photographs)} photographs in {photographs[0].parent}"
    print(f"{describe_machine()}\n{options.model}, {source}")
    print(f"| pipeline | images that change | same label | median | largest | pixels at {PIXEL_SIDE} |")
    print("|---|---|---|---|---|---|")
    for pipeline in PIPELINES:
        print(format_row(pipeline, compare_geometries(pipeline, images, engine)), flush=True)


if __name__ == "__main__":
    main()
