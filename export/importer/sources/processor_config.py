"""Preprocessing that a `preprocessor_config.json` of transformers states.

The rules are those of the classes `…ImageProcessorPil` of transformers 5.24, which compute with Pillow. A key
that the file lacks has the default of its class. The configuration of a class that is not in the table must
state every value that is used. Classes that are code of the repository (`auto_map`) are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, Final

from fovea.export.importer.preprocessing import ChannelValues, Normalization
from fovea.export.importer.sources.config_values import (
    ConfigError,
    to_channel_values,
    to_interpolation,
    to_mapping,
    to_number,
    to_side,
)
from fovea.export.importer.sources.facts import ImageFacts, StatedGeometry
from fovea.service.artifact.geometry import (
    CropStep,
    Fit,
    Interpolation,
    ResizeStep,
    Rounding,
    Step,
    find_last_size,
)

_HALF: Final = (0.5, 0.5, 0.5)
_IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
_IMAGENET_STD: Final = (0.229, 0.224, 0.225)
_CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)

_NO_CROP_FROM: Final = 384
"""Length from which ConvNeXt's processor stretches images instead of cropping them, in pixels."""


class SizeRule(Enum):
    """The meaning of `size`."""

    PLAIN = auto()
    """The length of the shorter side, or height and width."""
    CONVNEXT = auto()
    """The side of the crop. The shorter side is that divided by `crop_pct`."""
    LEVIT = auto()
    """The shorter side is 256/224 of it."""
    POOLFORMER = auto()
    """The shorter side is that divided by `crop_pct`, and the aspect ratio is kept in any case."""


@dataclass(frozen=True)
class ProcessorClass:
    """The defaults of one class of image processors; None where a configuration must state the value."""

    size: Any
    interpolation: Interpolation | None
    mean: ChannelValues | None
    std: ChannelValues | None
    crop_size: int | None = None
    crops: bool = False
    """Default of `do_center_crop`."""
    is_square: bool | None = True
    """Flag that one number as `size` is the side of a square, and not the length of the shorter side.

    None if that is not known.
    """
    size_rule: SizeRule = SizeRule.PLAIN
    crop_pct: float | None = None
    can_normalize: bool = True
    """False for a class that ignores mean and std."""
    reverses_channels: bool = False
    """Default of `do_flip_channel_order`."""
    normalizes_twice: bool = False
    """Default of EfficientNet's `include_top`: the values are divided by std once more."""


_SHORTER_SIDE: Final = ProcessorClass(
    {"shortest_edge": 224}, Interpolation.BICUBIC, _CLIP_MEAN, _CLIP_STD, 224, crops=True, is_square=False
)
_SQUARE: Final = ProcessorClass({"height": 224, "width": 224}, Interpolation.BILINEAR, _HALF, _HALF)

CLASSES: Final[dict[str, ProcessorClass]] = {
    "Beit": replace(_SQUARE, interpolation=Interpolation.BICUBIC, crop_size=224),
    "Bit": _SHORTER_SIDE,
    "CLIP": _SHORTER_SIDE,
    "ConvNext": ProcessorClass(
        {"shortest_edge": 384},
        Interpolation.BICUBIC,
        _HALF,
        _HALF,
        is_square=False,
        size_rule=SizeRule.CONVNEXT,
        crop_pct=224 / 256,
    ),
    "DINOv3ViT": replace(_SQUARE, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
    "DeiT": ProcessorClass(
        {"height": 256, "width": 256}, Interpolation.BICUBIC, _HALF, _HALF, 224, crops=True
    ),
    "EfficientFormer": replace(_SHORTER_SIDE, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
    "EfficientNet": ProcessorClass(
        {"height": 346, "width": 346}, Interpolation.BICUBIC, _HALF, _HALF, 289, normalizes_twice=True
    ),
    "Levit": replace(_SHORTER_SIDE, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, size_rule=SizeRule.LEVIT),
    "MobileNetV1": ProcessorClass(
        {"shortest_edge": 256}, Interpolation.BILINEAR, _HALF, _HALF, 224, crops=True, is_square=False
    ),
    "MobileNetV2": ProcessorClass(
        {"shortest_edge": 256}, Interpolation.BILINEAR, _HALF, _HALF, 224, crops=True, is_square=False
    ),
    "MobileViT": ProcessorClass(
        {"shortest_edge": 224},
        Interpolation.BICUBIC,
        _HALF,
        _HALF,
        256,
        crops=True,
        is_square=False,
        can_normalize=False,
        reverses_channels=True,
    ),
    "PoolFormer": replace(
        _SHORTER_SIDE,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        size_rule=SizeRule.POOLFORMER,
        crop_pct=0.9,
    ),
    "Pvt": replace(_SQUARE, interpolation=Interpolation.BICUBIC, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
    "Segformer": replace(_SQUARE, size={"height": 512, "width": 512}, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
    "Siglip": replace(_SQUARE, interpolation=Interpolation.BICUBIC, is_square=False),
    "ViT": _SQUARE,
}
"""Classes of transformers by their name without `ImageProcessor`."""

_UNKNOWN_CLASS: Final = ProcessorClass(None, None, None, None, is_square=None)

_OTHER_CLASSES: Final = {
    "Donut": "pads images at one side",
    "Gemma3": "cuts images into several",
    "ImageGPT": "turns pixels into colour clusters",
    "PPLCNet": "has no implementation with Pillow",
    "Perceiver": "crops a share of the image before it resizes",
    "Siglip2": "gives each image a number of patches of its own",
    "TextNet": "gives each image a size of its own",
}
"""Classes for image classification whose steps Fovea cannot reproduce, with the reason."""

CLASS_OF_MODEL: Final = {
    **dict.fromkeys(("beit", "data2vec-vision"), "Beit"),
    **dict.fromkeys(("bit", "dinov2", "dinov2_with_registers", "focalnet", "hiera"), "Bit"),
    **dict.fromkeys(("clip", "metaclip_2"), "CLIP"),
    **dict.fromkeys(("convnext", "convnextv2", "cvt", "hgnet_v2", "regnet", "resnet", "van"), "ConvNext"),
    "deit": "DeiT",
    "dinov3_vit": "DINOv3ViT",
    "efficientformer": "EfficientFormer",
    "efficientnet": "EfficientNet",
    "levit": "Levit",
    "mobilenet_v1": "MobileNetV1",
    "mobilenet_v2": "MobileNetV2",
    **dict.fromkeys(("mobilevit", "mobilevitv2"), "MobileViT"),
    "poolformer": "PoolFormer",
    **dict.fromkeys(("pvt", "pvt_v2"), "Pvt"),
    "segformer": "Segformer",
    "siglip": "Siglip",
    **dict.fromkeys(("dinat", "ijepa", "nat", "swiftformer", "swin", "swinv2", "vit", "vit_msn"), "ViT"),
}
"""Class of the processor by `model_type`, for a file that does not name its class."""


def read_processor_config(config: Mapping[str, Any], model_type: str | None = None) -> ImageFacts:
    """Return the preprocessing that a `preprocessor_config.json` states.

    `model_type` is that of `config.json`. Parts that Fovea cannot reproduce are in `problems`.
    """
    name = find_class_name(config, model_type)
    if config.get("auto_map"):
        return ImageFacts(problems=("its processor is code of the repository, which Fovea never runs",))
    if name in _OTHER_CLASSES:
        reason = _OTHER_CLASSES[name]
        return ImageFacts(problems=(f"{name}ImageProcessor {reason}, which Fovea cannot reproduce",))
    processor = CLASSES.get(name, _UNKNOWN_CLASS)
    problems: list[str] = []

    def try_reading(read: Callable[[Mapping[str, Any], ProcessorClass], Any]) -> Any:
        try:
            return read(config, processor)
        except ConfigError as error:
            problems.append(str(error))
            return None

    return ImageFacts(
        normalization=try_reading(_read_normalization),
        geometry=try_reading(_read_geometry),
        problems=tuple(problems),
    )


def find_class_name(config: Mapping[str, Any], model_type: str | None = None) -> str:
    """Return the name of the class without `ImageProcessor`; an empty text if nothing states it."""
    stated_name = config.get("image_processor_type") or config.get("feature_extractor_type")
    if not isinstance(stated_name, str):
        return CLASS_OF_MODEL.get(model_type or "", "")
    name = stated_name.removesuffix("Fast").removesuffix("Pil")
    for suffix in ("ImageProcessor", "FeatureExtractor"):
        name = name.removesuffix(suffix)
    return "ConvNext" if name == "ConvNeXT" else name


# --- normalisation -------------------------------------------------------------------------------


def _read_normalization(config: Mapping[str, Any], processor: ProcessorClass) -> Normalization:
    scale, offset = 1.0, 0.0
    if config.get("do_color_quantize") or config.get("do_grayscale"):
        raise ConfigError("its processor changes the colours of images, which Fovea cannot reproduce")
    if _get_flag(config, "do_rescale", True):
        scale = to_number("rescale_factor", _get(config, "rescale_factor", 1 / 255))
        offset = 1.0 if config.get("rescale_offset") else 0.0
    mean, std = (offset,) * 3, (1.0,) * 3
    divides_again = _get_flag(config, "include_top", processor.normalizes_twice)
    if processor.can_normalize and _get_flag(config, "do_normalize", True):
        stated_mean, stated_std = _read_mean_and_std(config, processor)
        mean, std = _map_channels(lambda one: one + offset, stated_mean), stated_std
        if divides_again:
            std = _map_channels(lambda one: one * one, stated_std)
    elif divides_again:
        _, std = _read_mean_and_std(config, processor)
    if scale == 0 or min(std) <= 0:
        raise ConfigError(f"rescale_factor is {scale:g} and image_std {std}; both must be greater than 0")
    normalization = Normalization(scale, mean, std)
    if not _get_flag(config, "do_flip_channel_order", processor.reverses_channels):
        return normalization
    return normalization.with_reversed_channels


def _read_mean_and_std(
    config: Mapping[str, Any], processor: ProcessorClass
) -> tuple[ChannelValues, ChannelValues]:
    return (
        to_channel_values("image_mean", _require(config, "image_mean", processor.mean)),
        to_channel_values("image_std", _require(config, "image_std", processor.std)),
    )


def _map_channels(function: Callable[[float], float], values: ChannelValues) -> ChannelValues:
    red, green, blue = map(function, values)
    return red, green, blue


# --- geometry ------------------------------------------------------------------------------------


def _read_geometry(config: Mapping[str, Any], processor: ProcessorClass) -> StatedGeometry:
    for key in ("do_pad", "do_thumbnail", "do_align_long_axis"):
        if config.get(key):
            raise ConfigError(f"{key} is on, which Fovea cannot reproduce")
    steps: list[Step] = []
    if _get_flag(config, "do_resize", True):
        steps += _read_resize_steps(config, processor)
    if _get_flag(config, "do_center_crop", processor.crops):
        height, width = _to_box(
            "crop_size", _require(config, "crop_size", processor.crop_size), is_square=True
        )
        steps.append(CropStep(height, width, Rounding.FLOOR))
    if not steps or (isinstance(steps[-1], ResizeStep) and steps[-1].fit is not Fit.STRETCH):
        raise ConfigError("it neither stretches nor crops images, which keep sizes of their own")
    return StatedGeometry(*find_last_size(tuple(steps)), tuple(steps))


def _read_resize_steps(config: Mapping[str, Any], processor: ProcessorClass) -> list[Step]:
    interpolation = to_interpolation("resample", _require(config, "resample", processor.interpolation))
    value = _require(config, "size", processor.size)
    is_square = False if config.get("use_square_size") else processor.is_square
    side, box = _parse_size(value, is_square=is_square)
    if config.get("use_square_size") and side:  # KOSMOS-2's files
        return [_stretch((side, side), interpolation)]
    if processor.size_rule is SizeRule.CONVNEXT:
        if side is None:
            raise ConfigError(f"size is {value!r}, without a shortest_edge")
        if side >= _NO_CROP_FROM:
            return [_stretch((side, side), interpolation)]
        return [
            _cover(int(side / _read_crop_pct(config, processor)), interpolation),
            CropStep(side, side, Rounding.FLOOR),
        ]
    if processor.size_rule is SizeRule.LEVIT and side is not None:
        return [_cover(int(256 / 224 * side), interpolation)]
    if processor.size_rule is SizeRule.POOLFORMER and config.get("crop_pct", 0) is not None:
        crop_pct = _read_crop_pct(config, processor)
        height, width = box or (side, side)
        if height is None or width is None:
            raise ConfigError(f"size is {value!r}, which is no size")
        if height != width:
            return [_stretch((int(height / crop_pct), int(width / crop_pct)), interpolation)]
        return [_cover(int(height / crop_pct), interpolation)]
    if box is not None:
        return [_stretch(box, interpolation)]
    return [_cover(side or 0, interpolation)]


def _read_crop_pct(config: Mapping[str, Any], processor: ProcessorClass) -> float:
    crop_pct = to_number("crop_pct", _require(config, "crop_pct", processor.crop_pct))
    if not 0 < crop_pct <= 1:
        raise ConfigError(f"crop_pct is {crop_pct:g}; it must be greater than 0 and at most 1")
    return crop_pct


def _parse_size(value: Any, *, is_square: bool | None) -> tuple[int | None, tuple[int, int] | None]:
    """Return the length of the shorter side or None, and height and width or None."""
    if isinstance(value, int | float) and is_square is None:
        raise ConfigError(
            f"size is {value!r}, which is the shorter side or both sides, depending on its class"
        )
    if isinstance(value, int | float) and not is_square:
        return to_side("size", value), None
    if isinstance(value, Mapping):
        keys = {key for key, one in value.items() if one is not None}
        if keys == {"shortest_edge"}:
            return to_side("size", value["shortest_edge"]), None
        if keys != {"height", "width"}:
            raise ConfigError(
                f"size has {', '.join(sorted(keys)) or 'nothing'}; Fovea reproduces shortest_edge, or height "
                "and width"
            )
    return None, _to_box("size", value, is_square=True)


def _to_box(key: str, value: Any, *, is_square: bool) -> tuple[int, int]:
    """Return height and width of a number, a list or an object. Raises `ConfigError`."""
    if isinstance(value, list | tuple):
        if len(value) not in (1, 2):
            raise ConfigError(f"{key} is {value!r}; it takes height and width")
        return to_side(key, value[0]), to_side(key, value[-1])
    if isinstance(value, Mapping):
        sides = to_mapping(key, value)
        if not {"height", "width"} <= sides.keys():
            raise ConfigError(f"{key} is {value!r}, without height and width")
        return to_side(key, sides["height"]), to_side(key, sides["width"])
    return to_side(key, value), to_side(key, value)


def _stretch(box: tuple[int, int], interpolation: Interpolation) -> ResizeStep:
    return ResizeStep(Fit.STRETCH, *box, interpolation)


def _cover(side: int, interpolation: Interpolation) -> ResizeStep:
    to_side("size", side)
    return ResizeStep(Fit.COVER, side, side, interpolation)


# --- values --------------------------------------------------------------------------------------


def _get(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value


def _get_flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = _get(config, key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}; it must be true or false")
    return value


def _require(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = _get(config, key, default)
    if value is None:
        raise ConfigError(f"it does not state {key}")
    return value
