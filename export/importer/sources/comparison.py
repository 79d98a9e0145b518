"""The comparison of an imported model with the source's own pipeline, from image files to probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from fovea.export.importer.foreign_model import Arithmetic, Array, ImportRefused
from fovea.export.importer.graph_output import to_probabilities
from fovea.export.importer.inspect import ForeignModel
from fovea.export.importer.output_choice import to_rows
from fovea.export.importer.sources.facts import ReferenceNetwork, ReferencePipeline
from fovea.export.verification_error import VerificationError
from fovea.service.artifact.geometry import Geometry, PixelPath
from fovea.service.inference.engine import Engine
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.preprocess import decode_image

GENERATED_IMAGES: Final = 32
"""Number of generated images."""

MAX_USER_IMAGES: Final = 32
"""Maximum number of the user's images that are compared too."""

PIXEL_TOLERANCE: Final = 1.0
"""Maximum difference of a pixel, in levels of 255: that of one rounding."""

PROBABILITY_TOLERANCE: Final = {Arithmetic.FLOAT32: 1e-3, Arithmetic.FLOAT16: 2e-2, Arithmetic.INT8: 1e-1}
"""Maximum difference of a probability, by the graph's arithmetic.

float32: pixels are the same or differ by a rounding, and torch adds in another order than ONNX Runtime. int8:
a value between two levels may be rounded to either, in several layers.
"""

NETWORK_TOLERANCE: Final = {**PROBABILITY_TOLERANCE, Arithmetic.FLOAT32: 1e-4}
"""Maximum difference of a probability where both networks get the same pixels."""

MIN_SAME_LABELS: Final = 0.95
"""Minimum share of images with the same most probable label, where the arithmetic is int8."""

_MAX_PIXELS: Final = 50_000_000
"""Maximum number of pixels of a user's image that is compared."""

_BATCH_SIZE: Final = 4
"""Number of images that run at once. Layers of a ViT-B need 10 MB for each image."""

_PIXEL_MARGIN: Final = 1e-2
"""Part of a level that float32 loses between normalised values and levels."""


@dataclass(frozen=True)
class Comparison:
    """The differences between the imported model and the source's own pipeline."""

    pipeline: str
    images: int
    user_images: int
    pixel_difference: float
    """Largest difference of a pixel, in levels of 255."""
    different_pixels: float
    """Share of pixel values that differ by more than a hundredth of a level."""
    probability_difference: float
    """Largest difference of a probability."""
    same_labels: int
    """Number of images with the same most probable label."""
    probability_tolerance: float
    has_own_pixels: bool = True
    """False if the source states no preprocessing, so that its network got the pixels of the import."""

    def __str__(self) -> str:
        user_images = f" and {self.user_images} of your" if self.user_images else ""
        labels = "all" if self.same_labels == self.images else f"{self.same_labels} of {self.images}"
        probabilities = (
            f"probabilities to {self.probability_difference:.1e} (at most {self.probability_tolerance:g}), "
            f"{labels} labels the same"
        )
        images = f"{self.images - self.user_images} generated{user_images} images"
        if not self.has_own_pixels:
            return (
                f"{self.pipeline} on {images}: {probabilities}; the file states no preprocessing to compare"
            )
        share = f" ({self.different_pixels:.2%} of them differ)" if self.different_pixels else ""
        return (
            f"{self.pipeline} on {images}: pixels to {self.pixel_difference:.2g} of 255 levels{share}, "
            f"{probabilities}"
        )


class PipelineRun(NamedTuple):
    """What a source's own pipeline makes of some images, and what it must agree with."""

    pipeline: str
    """Name and version of the pipeline."""
    pixels: Pixels
    """The same images as pixels of the import, uint8 (n, H, W, 3)."""
    differences: Array | None
    """Differences of the pixels in levels of 255, (n, H, W, 3); None if only the network ran."""
    probabilities: Array
    """Probabilities of the source's network, (n, labels)."""


def run_pipeline(
    pipeline: ReferencePipeline, foreign: ForeignModel, geometry: Geometry, user_images: Sequence[Path] = ()
) -> PipelineRun:
    """Run a source's own pipeline on generated images and on the user's images.

    Raises `VerificationError` if it makes images of another size, and `ImportRefused` if it does not run.
    """
    with TemporaryDirectory(prefix="fovea-import-") as folder:
        files = _write_files(Path(folder), geometry, user_images)
        answers = pipeline.run(files)
        pixels = _decode_files(files, geometry)
    theirs = answers.values.transpose(0, 2, 3, 1)  # (n, H, W, 3)
    if theirs.shape != pixels.shape:
        raise VerificationError(
            f"{answers.name} makes images of {theirs.shape[1]} x {theirs.shape[2]} pixels, and the import "
            f"makes {pixels.shape[1]} x {pixels.shape[2]}"
        )
    differences = _compute_pixel_differences(foreign, pixels, theirs)
    return PipelineRun(
        answers.name, pixels, differences, _compute_probabilities(foreign, theirs, answers.outputs)
    )


def run_network(
    network: ReferenceNetwork, foreign: ForeignModel, geometry: Geometry, user_images: Sequence[Path] = ()
) -> PipelineRun:
    """Run a source's own network on generated images and on the user's images, as the import prepares them.

    Raises `ImportRefused` if it does not run.
    """
    with TemporaryDirectory(prefix="fovea-import-") as folder:
        pixels = _decode_files(_write_files(Path(folder), geometry, user_images), geometry)
    answers = network.run(foreign.prepare_values(pixels))
    output = foreign.graph_output
    rows = answers.outputs.astype(np.float64)
    probabilities = to_probabilities(rows, output.kind, foreign.task, output.total)
    return PipelineRun(answers.name, pixels, None, probabilities)


def compare_with_pipeline(run: PipelineRun, foreign: ForeignModel, engine: Engine) -> Comparison:
    """Compare the imported model with the run of a source's own pipeline.

    Raises `VerificationError` if they disagree.
    """
    expected, count = run.probabilities, len(run.pixels)
    batches = range(0, count, _BATCH_SIZE)
    actual = np.concatenate([engine.run(run.pixels[start : start + _BATCH_SIZE]) for start in batches])
    if actual.shape != expected.shape:
        raise VerificationError(
            f"{run.pipeline} gives {expected.shape[1]} probabilities, and the import gives "
            f"{actual.shape[1]}; the ONNX file is of another network, choose another with --file"
        )
    tolerances = PROBABILITY_TOLERANCE if run.differences is not None else NETWORK_TOLERANCE
    comparison = Comparison(
        pipeline=run.pipeline,
        images=count,
        user_images=count - GENERATED_IMAGES,
        pixel_difference=0.0 if run.differences is None else float(run.differences.max()),
        different_pixels=0.0 if run.differences is None else float((run.differences > _PIXEL_MARGIN).mean()),
        probability_difference=float(np.abs(actual - expected).max()),
        same_labels=_count_same_labels(actual, expected),
        probability_tolerance=tolerances[foreign.arithmetic],
        has_own_pixels=run.differences is not None,
    )
    _require_agreement(comparison)
    if foreign.arithmetic is Arithmetic.INT8 and comparison.same_labels < MIN_SAME_LABELS * count:
        raise VerificationError(
            f"the import gives the most probable label of {comparison.pipeline} for {comparison.same_labels} "
            f"of {count} images; at least {MIN_SAME_LABELS:.0%} are needed"
        )
    return comparison


def _count_same_labels(actual: Array, expected: Array) -> int:
    """Return the number of images whose label is one of the source's most probable labels.

    An int8 network rounds probabilities, so that two labels often have the same.
    """
    chosen = np.take_along_axis(expected, actual.argmax(axis=1)[:, None], axis=1)[:, 0]
    return int((chosen == expected.max(axis=1)).sum())


def _require_agreement(comparison: Comparison) -> None:
    if not comparison.pixel_difference <= PIXEL_TOLERANCE + _PIXEL_MARGIN:  # a NaN is a disagreement too
        raise VerificationError(
            f"the import does not make the pixels of {comparison.pipeline}: they differ by up to "
            f"{comparison.pixel_difference:.3g} of 255 levels, and {comparison.different_pixels:.1%} of them "
            "differ; give the preprocessing as options, such as --preset imagenet"
        )
    if not comparison.probability_difference <= comparison.probability_tolerance:
        raise VerificationError(
            f"the import does not give the probabilities of {comparison.pipeline}: they differ by up to "
            f"{comparison.probability_difference:.3g}; at most {comparison.probability_tolerance:g}"
        )


def _compute_pixel_differences(foreign: ForeignModel, pixels: Pixels, theirs: Array) -> Array:
    """Return the differences in levels of 255, (n, H, W, 3)."""
    normalization = foreign.normalization
    if normalization is None:  # the graph takes pixels
        return np.abs(theirs - pixels)
    levels = np.array(normalization.std, np.float64) / abs(normalization.scale)
    differences: Array = np.abs(normalization(pixels) - theirs) * levels
    return differences


def _compute_probabilities(foreign: ForeignModel, theirs: Array, outputs: Array | None) -> Array:
    """Return the probabilities of the source's network, or of the original file in ONNX Runtime."""
    output = foreign.graph_output
    if outputs is None:
        images = foreign.graph_input.from_pixel_values(theirs)
        rows = to_rows(foreign.reference(images)[output.name], len(images))
        if rows is None:
            raise ImportRefused(f"the output {output.name!r} has another shape for each image")
    else:
        rows = outputs.astype(np.float64)
    return to_probabilities(rows, output.kind, foreign.task, output.total)


# --- images --------------------------------------------------------------------------------------


def _write_files(folder: Path, geometry: Geometry, user_images: Sequence[Path]) -> list[Path]:
    return [*write_images(folder, geometry.height, geometry.width), *_copy_user_images(user_images, folder)]


def _decode_files(files: Sequence[Path], geometry: Geometry) -> Pixels:
    exact_geometry = replace(geometry, pixel_path=PixelPath.EXACT)
    return np.stack([_decode(file, exact_geometry) for file in files])


def write_images(folder: Path, height: int, width: int) -> list[Path]:
    """Write generated images as PNG, larger and smaller than the input, oblong and with odd sides."""
    random = np.random.default_rng(0)
    files = []
    for index in range(GENERATED_IMAGES):
        scales = random.uniform(0.5, 2.5, 2)
        size = (max(2, int(width * scales[0])), max(2, int(height * scales[1])))
        coarse = random.integers(0, 256, (*random.integers(2, 9, 2), 3), dtype=np.uint8)
        shapes = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32)
        noise = random.normal(0, random.uniform(0, 40), shapes.shape)
        file = folder / f"{index}.png"
        Image.fromarray(np.clip(shapes + noise, 0, 255).astype(np.uint8)).save(file, compress_level=1)
        files.append(file)
    return files


def _copy_user_images(files: Sequence[Path], folder: Path) -> list[Path]:
    """Write the user's images as PNG, turned as EXIF says: how files are decoded is not compared."""
    copies: list[Path] = []
    for file in files:
        if len(copies) == MAX_USER_IMAGES:
            break
        try:
            with Image.open(file) as image:
                if image.width * image.height > _MAX_PIXELS:
                    continue
                copy = folder / f"user-{len(copies)}.png"
                pixels = ImageOps.exif_transpose(image).convert("RGB")
                pixels.info.clear()
                pixels.save(copy, compress_level=1)
        except (OSError, ValueError, SyntaxError):  # of Pillow, for damaged files
            continue
        copies.append(copy)
    return copies


def _decode(file: Path, geometry: Geometry) -> Pixels:
    return np.array(decode_image(file.read_bytes(), geometry, max_pixels=_MAX_PIXELS).pixels)
