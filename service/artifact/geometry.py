"""The geometry of a model: the steps from an image of any size to the model's input.

Each step states its rounding rule, because libraries differ in it and one pixel can change a label. All sizes
are height x width in pixels, and all steps are centred. `geometry_text` writes and reads steps as text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

from fovea.service.artifact.strict_json import require

MAX_SIDE: Final = 2800
"""Maximum side of an input and of a step, in pixels.

The golden set needs at most `MAX_GOLDEN_PIXELS`, 16 megapixels: its largest image is 5/4 by 3/2 of a side.
"""

MIN_FRACTION: Final = 0.01
"""Minimum fraction of a side that a crop keeps. Known pipelines keep 0.875."""

MAX_STEPS: Final = 8
"""Maximum number of steps. Known pipelines have at most four."""


class Interpolation(StrEnum):
    """A Pillow resampling filter. All filters except `nearest` antialias when they shrink."""

    NEAREST = "nearest"
    BOX = "box"
    BILINEAR = "bilinear"
    HAMMING = "hamming"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class PixelPath(StrEnum):
    """The fidelity of decoding and resizing to a hand-written Pillow pipeline."""

    EXACT = "exact"
    """Full decode, all steps one by one: identical bit for bit."""
    FAST = "fast"
    """Scaled JPEG decoding, and a resize of the region only that the steps keep."""


class Fit(StrEnum):
    """The relation of a resized image to the box height x width; the words are those of CSS `object-fit`."""

    COVER = "cover"
    """The smallest image of the same aspect ratio that covers the box."""
    CONTAIN = "contain"
    """The largest image of the same aspect ratio inside the box."""
    STRETCH = "stretch"
    """The box itself. The aspect ratio is ignored."""


class Rounding(StrEnum):
    """The rounding of a length that is not whole."""

    FLOOR = "floor"
    ROUND = "round"
    """To the nearest number; halves to the even number, as Python's `round`."""
    NONE = "none"
    """Not at all: the resize that follows reads a box with fractions, as `PIL.ImageOps.fit`."""


@dataclass(frozen=True)
class ResizeStep:
    """A resize of the whole image.

    `rounding` is that of the side that follows from the aspect ratio. torchvision and transformers floor it;
    timm's `ResizeKeepRatio`, Ultralytics' `LetterBox` and `PIL.ImageOps.contain` round it.
    """

    step: Literal["resize"] = field(default="resize", init=False)
    fit: Fit
    height: int
    width: int
    interpolation: Interpolation
    rounding: Rounding = Rounding.FLOOR
    antialias: bool = True
    """False: each pixel is interpolated between its four neighbours only, at any scale, as OpenCV's
    `INTER_LINEAR` and `tf.image.resize` do."""

    def __post_init__(self) -> None:
        _require_sides("resize", self.height, self.width)
        require(self.rounding is not Rounding.NONE, "input: resize rounds a side: by floor or round")
        require(
            self.fit is not Fit.STRETCH or self.rounding is Rounding.FLOOR,
            "input: resize stretch rounds no side: leave rounding at floor",
        )
        require(
            self.antialias or self.interpolation is Interpolation.BILINEAR,
            f"input: resize with {self.interpolation} has no form without antialiasing; bilinear has one",
        )


@dataclass(frozen=True)
class CropStep:
    """The centre of the image.

    `rounding` is that of the corner: `round` as torchvision's `CenterCrop`, `floor` as `center_crop` of
    transformers. An image that is smaller gets a black border, of which the half on the left or at the top is
    floored by torchvision and rounded up by transformers.
    """

    step: Literal["crop"] = field(default="crop", init=False)
    height: int
    width: int
    rounding: Rounding = Rounding.ROUND

    def __post_init__(self) -> None:
        _require_sides("crop", self.height, self.width)
        require(self.rounding is not Rounding.NONE, "input: crop rounds its corner: by floor or round")


@dataclass(frozen=True)
class AspectCropStep:
    """The largest centred part of the image with the aspect ratio of height x width.

    `rounding` is that of the side and of the corner: `floor` as Keras' `crop_to_aspect_ratio`, `none` as
    `PIL.ImageOps.fit`, which Teachable Machine uses.
    """

    step: Literal["aspect_crop"] = field(default="aspect_crop", init=False)
    height: int
    width: int
    rounding: Rounding = Rounding.FLOOR

    def __post_init__(self) -> None:
        _require_sides("crop aspect", self.height, self.width)


@dataclass(frozen=True)
class FractionCropStep:
    """The centre of the image, with the same fraction of both sides.

    The corner is rounded down, and the other corner is as far from its edge, as in `tf.image.central_crop`.
    """

    step: Literal["fraction_crop"] = field(default="fraction_crop", init=False)
    fraction: float

    def __post_init__(self) -> None:
        require(
            MIN_FRACTION <= self.fraction < 1,
            f"input: crop fraction {self.fraction}: the fraction must be from {MIN_FRACTION} to less than 1",
        )


@dataclass(frozen=True)
class PadStep:
    """A border around an image that is at most height x width.

    `rounding` is that of the border on the left and at the top: `floor` as Ultralytics' `LetterBox`, `round`
    as `PIL.ImageOps.pad`.
    """

    step: Literal["pad"] = field(default="pad", init=False)
    height: int
    width: int
    fill: tuple[int, int, int] = (0, 0, 0)
    """Colour of the border: red, green and blue, 0 … 255."""
    rounding: Rounding = Rounding.FLOOR

    def __post_init__(self) -> None:
        _require_sides("pad", self.height, self.width)
        _require_colour("pad", self.fill)
        require(self.rounding is not Rounding.NONE, "input: pad rounds its border: by floor or round")


@dataclass(frozen=True)
class AspectPadStep:
    """The smallest image with the aspect ratio of height x width that has the image in its centre.

    The side is rounded down, and so is half the border. Opposite borders are equal, as in Keras'
    `pad_to_aspect_ratio`, so that a pixel may be missing.
    """

    step: Literal["aspect_pad"] = field(default="aspect_pad", init=False)
    height: int
    width: int
    fill: tuple[int, int, int] = (0, 0, 0)
    """Colour of the border: red, green and blue, 0 … 255."""

    def __post_init__(self) -> None:
        _require_sides("pad aspect", self.height, self.width)
        _require_colour("pad aspect", self.fill)


def _require_colour(name: str, fill: tuple[int, int, int]) -> None:
    require(
        len(fill) == 3 and all(0 <= value <= 255 for value in fill),
        f"input: the fill of a {name} is {fill}; it takes three numbers from 0 to 255",
    )


def _require_sides(name: str, height: int, width: int) -> None:
    require(
        0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE,
        f"input: {name} {height} x {width}: sides must be from 1 to {MAX_SIDE} pixels",
    )


Step: TypeAlias = ResizeStep | CropStep | AspectCropStep | FractionCropStep | PadStep | AspectPadStep


@dataclass(frozen=True)
class Geometry:
    """The transformation from an image of any size to the model's input. Sizes are in pixels."""

    height: int
    width: int
    steps: tuple[Step, ...]
    """Steps in order. The last size is height x width for an image of any size."""
    pixel_path: PixelPath

    def __post_init__(self) -> None:
        require(self.height > 0 and self.width > 0, "input: height and width must be positive")
        require(
            0 < len(self.steps) <= MAX_STEPS,
            f"input: there are {len(self.steps)} steps; between 1 and {MAX_STEPS} are needed",
        )
        size = find_last_size(self.steps)
        require(
            size == (self.height, self.width),
            f"input: the steps end with {size[0]} x {size[1]} pixels; the input has "
            f"{self.height} x {self.width}",
        )

    def __hash__(self) -> int:
        return self._hash  # caches of plans look it up for every image

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields only, to be pickled: the hash of text is another one in another process."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @cached_property
    def _hash(self) -> int:
        return hash((self.height, self.width, self.steps, self.pixel_path))

    @classmethod
    def cropped(
        cls, height: int, width: int, side: int, interpolation: Interpolation, pixel_path: PixelPath
    ) -> Geometry:
        """Return torchvision's usual geometry: resize the shorter side to `side`, crop the centre."""
        resize = ResizeStep(Fit.COVER, side, side, interpolation)
        return cls(height, width, (resize, CropStep(height, width)), pixel_path)

    @classmethod
    def stretched(
        cls, height: int, width: int, interpolation: Interpolation, pixel_path: PixelPath
    ) -> Geometry:
        """Return the geometry that resizes both sides and ignores the aspect ratio."""
        return cls(height, width, (ResizeStep(Fit.STRETCH, height, width, interpolation),), pixel_path)

    @cached_property
    def fast_obstacle(self) -> str:
        """Reason why `fast` computes the same as `exact` for these steps; empty if it can save work."""
        return _find_fast_obstacle(self.steps)

    @cached_property
    def is_exact(self) -> bool:
        """True if the steps run one by one: the pixel path is `exact`, or `fast` cannot save work."""
        return self.pixel_path is PixelPath.EXACT or bool(self.fast_obstacle)

    @cached_property
    def longest_resize_side(self) -> int:
        """Longer side of the largest box of a resize, or of the input if nothing is resized."""
        sides = [max(step.height, step.width) for step in self.steps if isinstance(step, ResizeStep)]
        return max(sides, default=max(self.height, self.width))


def find_last_size(steps: tuple[Step, ...]) -> tuple[int, int]:
    """Return height and width after the steps, which must be the same for images of any size.

    Raises `ContractError` if the size depends on the image, or if a step does not fit the step before it.
    """
    smallest: tuple[int, int] = (1, 1)
    largest: tuple[int, int] | None = None  # an image may have any size
    for index, step in enumerate(steps):
        following = steps[index + 1] if index + 1 < len(steps) else None
        box = (0, 0) if isinstance(step, FractionCropStep) else (step.height, step.width)
        match step:
            case ResizeStep(fit=Fit.COVER):
                require(
                    isinstance(following, CropStep),
                    "input: a crop must follow resize cover, which makes long images long",
                )
                smallest, largest = box, None
            case ResizeStep(fit=Fit.CONTAIN):
                smallest, largest = (1, 1), box
            case AspectCropStep():
                is_read_by_box = (
                    isinstance(following, ResizeStep) and following.fit is Fit.STRETCH and following.antialias
                )
                require(
                    is_read_by_box or step.rounding is not Rounding.NONE,
                    "input: a resize stretch with antialiasing must follow an aspect crop without rounding",
                )
                smallest = (1, 1)
            case FractionCropStep():
                smallest = (1, 1)
            case AspectPadStep():
                smallest, largest = (1, 1), None
            case PadStep():
                require(
                    largest is not None and largest[0] <= box[0] and largest[1] <= box[1],
                    f"input: pad {box[0]} x {box[1]} needs a smaller image: resize contain before it",
                )
                smallest, largest = box, box
            case _:  # a stretch or a crop
                smallest, largest = box, box
    require(
        smallest == largest,
        "input: the last size depends on the image: end with resize stretch, crop or pad",
    )
    return smallest


def _find_fast_obstacle(steps: tuple[Step, ...]) -> str:
    """Return why one resize of one region of the image cannot replace the steps; empty if it can."""
    kinds = tuple(type(step) for step in steps)
    if kinds.count(ResizeStep) != 1:
        return "there is not exactly one resize"
    position = kinds.index(ResizeStep)
    resize, crops, pads = steps[position], 0, 0
    for step in steps[position + 1 :]:
        crops, pads = crops + isinstance(step, CropStep), pads + isinstance(step, PadStep)
        if crops > 1 or pads > 1 or (pads and isinstance(step, CropStep)):
            return "a crop follows the border or another crop"
        if not isinstance(step, CropStep | PadStep):
            return "a step that depends on the size of the image follows the resize"
        if isinstance(step, CropStep) and isinstance(resize, ResizeStep):
            fits = resize.height >= step.height and resize.width >= step.width
            if resize.fit is Fit.CONTAIN or not fits:
                return "the crop may be larger than the resized image"
    if kinds[:position] not in ((), (AspectCropStep,)):
        return "another step than one crop to an aspect ratio precedes the resize"
    if isinstance(resize, ResizeStep) and not resize.antialias:
        return "a resize without antialiasing reads single pixels of the full image"
    return ""
