"""Preprocessing for a foreign model: published recipes and individual options."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np

from fovea.export.importer.foreign_model import Array, ImportRefused, MissingInformation
from fovea.service.artifact.geometry import (
    MAX_SIDE,
    Geometry,
    Interpolation,
    PixelPath,
    Step,
    find_last_size,
)
from fovea.service.inference.pixels import Pixels

ChannelValues: TypeAlias = tuple[float, float, float]
"""One number for each channel."""


@dataclass(frozen=True)
class Normalization:
    """The normalisation `(pixels * scale - mean) / std` of pixels 0 to 255, in float32 and in this order.

    Scales such as 1/255 and 1/127.5 are divisions, as in torchvision's `ToTensor` and Keras'
    `preprocess_input`, so that every bit is the same. With `bgr` the channels are reversed first; blue then
    comes first in `mean` and `std` too.
    """

    scale: float
    mean: ChannelValues
    std: ChannelValues
    bgr: bool = False

    def __call__(self, pixels: Pixels) -> Array:
        """Return the normalised values, float32 (n, H, W, 3)."""
        values = (pixels[..., ::-1] if self.bgr else pixels).astype(np.float32)
        values = values / np.float32(self.divisor) if self.divisor else values * np.float32(self.scale)
        result: Array = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return result

    @property
    def divisor(self) -> float | None:
        """Divisor of the pixels if the scale is one over a round number, else None."""
        halves = 2 / self.scale
        return round(halves) / 2 if self.scale < 1 and abs(halves - round(halves)) < 1e-6 else None

    @property
    def operations(self) -> tuple[tuple[str, Array], ...]:
        """The arithmetic as ONNX operators with their constants, () or (3,), without steps of no effect."""
        mean, std = (np.array(one, np.float32) for one in (self.mean, self.std))
        scale = ("Div", self.divisor) if self.divisor else ("Mul", self.scale)
        steps = (
            (scale[0], np.array(scale[1], np.float32), self.scale != 1),
            ("Sub", mean, bool(mean.any())),
            ("Div", std, bool((std != 1).any())),
        )
        return tuple((op_type, values) for op_type, values, is_needed in steps if is_needed)

    @property
    def with_reversed_channels(self) -> Normalization:
        """Normalisation for the reversed channel order; each colour keeps its numbers."""
        (a, b, c), (d, e, f) = self.mean, self.std
        return replace(self, mean=(c, b, a), std=(f, e, d), bgr=not self.bgr)

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        order, operation = (
            "BGR" if self.bgr else "RGB",
            f"/ {self.divisor:g}" if self.divisor else f"* {self.scale:g}",
        )
        return f"{order}, (pixels {operation} - ({mean})) / ({std})"


@dataclass(frozen=True)
class Preset:
    """A published recipe with published accuracy, and its source."""

    name: str
    source: str
    normalization: Normalization
    resize: int
    """Length of the shorter side, in pixels, before the crop to `crop`; other sizes scale in proportion."""
    crop: int
    interpolation: Interpolation
    rounds_down: bool = False
    """Flag that rounds the shorter side down if the proportion is not exact."""
    stretches_oblong: bool = False
    """Flag that stretches images to a non-square input."""

    def resize_to(self, side: int) -> int:
        """Return the shorter side for an input of another size, in the same proportion."""
        return side * self.resize // self.crop if self.rounds_down else round(side * self.resize / self.crop)


IMAGENET: Final = Preset(
    "imagenet",
    "torchvision's ResNet-50 and others, weights IMAGENET1K_V1",
    Normalization(1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    256,
    224,
    Interpolation.BILINEAR,
)
"""Recipe of torchvision's `transforms._presets.ImageClassification(crop_size=224)`.

It has `resize_size=256`, bilinear and antialiased, with its mean and std, and is the `transforms()` of
`ResNet50_Weights.IMAGENET1K_V1`, whose `_metrics` state 76.130 % top-1 on ImageNet. Newer weights
(`IMAGENET1K_V2`) resize to 232, and some of timm's resize bicubically: `--resize`, `--interpolation`.
"""

KERAS_MOBILENET: Final = Preset(
    "keras-mobilenet",
    "MobileNet and others of keras.applications in mode 'tf', resized as for Google's MobileNetV2",
    Normalization(1 / 127.5, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    256,
    224,
    Interpolation.BILINEAR,
)
"""Recipe of `keras.applications.mobilenet_v2.preprocess_input`, which computes `x / 127.5 - 1`.

The function is `imagenet_utils` in mode `tf`. Keras does not specify the resize. The weights' published
accuracy (71.8 % top-1 on ImageNet for MobileNetV2, `tensorflow/models`, `slim/nets/mobilenet`) uses the
middle 87.5 % of an image, resized bilinearly: `inception_preprocessing.preprocess_for_eval`. transformers'
`MobileNetV2ImageProcessor` and Google's `google/mobilenet_v2_1.0_224` agree: `shortest_edge` 256, `crop_size`
224, `BILINEAR`, mean and std 0.5. `keras.utils.load_img(path, target_size=...)` is not the recipe of these
weights: it stretches with nearest neighbour and loses 7 points. For networks that were trained on its images,
use `--stretch --interpolation nearest`.
"""

INCEPTION: Final = Preset(
    "inception",
    "timm's inception_v3.tf_in1k, the weights of TensorFlow's slim",
    Normalization(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    8,
    7,
    Interpolation.BICUBIC,
    rounds_down=True,
)
"""Recipe of `timm/models/inception_v3.py`: mean and std 0.5, `crop_pct` 0.875, bicubic.

The resize is 341 for 299, because timm's `transforms_factory.py` rounds 299 / 0.875 down (77.86 % top-1 on
ImageNet in timm's results). slim itself crops first and then stretches (`inception_preprocessing.py`).
"""

CLIP: Final = Preset(
    "clip",
    "OpenAI's CLIP",
    Normalization(1 / 255, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    224,
    224,
    Interpolation.BICUBIC,
)
"""Recipe of `clip/clip.py`, `_transform`: `Resize(n_px, BICUBIC)`, `CenterCrop(n_px)`, its mean and std.

transformers' `CLIPImageProcessor` and open_clip's `image_transform` with `resize_mode="shortest"` do the
same.
"""

ZERO_ONE: Final = Preset(
    "zero-one",
    "Ultralytics' classifiers",
    Normalization(1 / 255, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    224,
    224,
    Interpolation.BILINEAR,
    stretches_oblong=True,
)
"""Recipe of `ultralytics/data/augment.py`, `classify_transforms`, with which Ultralytics validates.

The steps are `Resize(size)`, bilinear, `CenterCrop(size)`, `ToTensor()`, mean 0 and std 1. For a non-square
input, `Resize` gets both sides and stretches.
"""

PRESETS: Final = {one.name: one for one in (IMAGENET, KERAS_MOBILENET, INCEPTION, CLIP, ZERO_ONE)}


@dataclass(frozen=True)
class PreprocessingOptions:
    """The preprocessing options for facts that a graph does not state; None means not given."""

    preset: Preset | None = None
    mean: ChannelValues | None = None
    std: ChannelValues | None = None
    scale: float | None = None
    bgr: bool | None = None
    resize: int | None = None
    stretch: bool = False
    interpolation: Interpolation | None = None
    geometry: tuple[Step, ...] | None = None
    """All steps, in place of those of the preset and of `resize`, `stretch` and `interpolation`."""

    @property
    def geometry_size(self) -> tuple[int, int] | None:
        """Height and width of the input that the steps of `geometry` end with, if there are steps."""
        return None if self.geometry is None else find_last_size(self.geometry)

    @property
    def normalization(self) -> Normalization:
        """Normalisation of the preset, overridden by the options.

        Raises `MissingInformation` if neither specifies it, and `ImportRefused` for invalid numbers.
        """
        preset_normalization = self.preset.normalization if self.preset else None
        mean = self.mean or (preset_normalization.mean if preset_normalization else None)
        std = self.std or (preset_normalization.std if preset_normalization else None)
        if mean is None or std is None:
            raise MissingInformation(
                "the file does not say how to normalise pixels: give --preset "
                f"({', '.join(PRESETS)}), or --mean and --std"
            )
        scale = self.scale
        if scale is None:
            scale = (
                preset_normalization.scale
                if preset_normalization and not (self.mean and self.std)
                else _derive_scale(mean, std)
            )
        _require_valid_numbers(scale, mean, std)
        bgr = self.bgr if self.bgr is not None else bool(preset_normalization and preset_normalization.bgr)
        return Normalization(scale, mean, std, bgr)

    def build_geometry(self, height: int, width: int) -> Geometry:
        """Return the geometry that fits any image to the input's size.

        Raises `ImportRefused` if the options do not specify it.
        """
        if self.geometry is not None:
            return self._build_given_geometry(self.geometry, height, width)
        preset = self.preset
        interpolation = self.interpolation or (preset.interpolation if preset else None)
        if self.stretch and self.resize is not None:
            raise ImportRefused("--stretch resizes to the input's own size; leave out --resize")
        is_oblong = preset is not None and preset.stretches_oblong and height != width
        stretch = self.stretch or (self.resize is None and is_oblong)
        resize = 0
        if not stretch:
            resize = self.resize or (preset.resize_to(max(height, width)) if preset else 0)
        if interpolation is None or not (stretch or resize):
            raise MissingInformation(
                "the file does not say how to resize images: give --preset, or --interpolation "
                f"({', '.join(Interpolation)}) and one of --resize and --stretch, or --geometry"
            )
        if resize > MAX_SIDE:
            raise ImportRefused(f"--resize is {resize} pixels; the maximum is {MAX_SIDE}")
        if resize and resize < max(height, width):
            raise ImportRefused(
                f"--resize {resize} is less than the input of {height} x {width} that is cropped from it"
            )
        if stretch:
            return Geometry.stretched(height, width, interpolation, PixelPath.EXACT)
        return Geometry.cropped(height, width, resize, interpolation, PixelPath.EXACT)

    def _build_given_geometry(self, steps: tuple[Step, ...], height: int, width: int) -> Geometry:
        options = [option for option in self._geometry_options if option != "--geometry"]
        if options:
            raise ImportRefused(f"--geometry names every step; leave out {', '.join(options)}")
        size = find_last_size(steps)
        if size != (height, width):
            raise ImportRefused(
                f"--geometry ends with {size[0]} x {size[1]} pixels; the graph takes {height} x {width}"
            )
        return Geometry(height, width, steps, PixelPath.EXACT)

    @property
    def arithmetic_options(self) -> tuple[str, ...]:
        """Options in use that change pixel values."""
        options = {"--mean": self.mean, "--std": self.std, "--scale": self.scale, "--bgr": self.bgr or None}
        return tuple(option for option, value in options.items() if value is not None)

    @property
    def arithmetic_origin(self) -> str:
        """Origin of the normalisation."""
        parts = [*self._preset_origin, *self.arithmetic_options]
        if self.mean and self.std and self.scale is None:
            parts.append("scale derived from mean and std")
        return ", ".join(parts)

    @property
    def geometry_origin(self) -> str:
        """Origin of the geometry."""
        if self.geometry is not None:
            return "--geometry"
        return ", ".join([*self._preset_origin, *self._geometry_options])

    @property
    def _geometry_options(self) -> tuple[str, ...]:
        options = {
            "--resize": self.resize,
            "--stretch": self.stretch or None,
            "--interpolation": self.interpolation,
            "--geometry": self.geometry,
        }
        return tuple(option for option, value in options.items() if value is not None)

    @property
    def _preset_origin(self) -> tuple[str, ...]:
        return (f"preset {self.preset.name}: {self.preset.source}",) if self.preset else ()


def _derive_scale(mean: ChannelValues, std: ChannelValues) -> float:
    """Return the scale that fits mean and std: they are for pixels 0 to 255, or for 0 to 1.

    Raises `ImportRefused` if the scale is ambiguous.
    """
    if max(*mean, *std) > 1:
        return 1.0
    if max(std) < 1:
        return 1 / 255
    raise MissingInformation(
        "--mean and --std do not tell whether pixels go from 0 to 255 or from 0 to 1: "
        "give --scale 1 or --scale 1/255"
    )


def _require_valid_numbers(scale: float, mean: ChannelValues, std: ChannelValues) -> None:
    if not all(map(math.isfinite, (scale, *mean, *std))) or scale == 0 or min(std) <= 0:
        raise ImportRefused(
            "--mean, --std and --scale must be finite, --std greater than 0 and --scale not 0; they are "
            f"{mean}, {std} and {scale:g}"
        )
