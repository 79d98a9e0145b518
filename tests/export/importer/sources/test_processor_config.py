"""Preprocessing in `preprocessor_config.json`: files as the hub has them, and values that cannot be used."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from fovea.export.importer.preprocessing import Normalization
from fovea.export.importer.sources.processor_config import (
    CLASS_OF_MODEL,
    CLASSES,
    find_class_name,
    read_processor_config,
)
from fovea.service.artifact.geometry import (
    CropStep,
    Fit,
    Interpolation,
    ResizeStep,
    Rounding,
    Step,
    find_last_size,
)

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BILINEAR, BICUBIC = Interpolation.BILINEAR, Interpolation.BICUBIC


def stretch(height: int, width: int, interpolation: Interpolation) -> ResizeStep:
    return ResizeStep(Fit.STRETCH, height, width, interpolation)


def cover(side: int, interpolation: Interpolation) -> ResizeStep:
    return ResizeStep(Fit.COVER, side, side, interpolation)


def crop(height: int, width: int | None = None) -> CropStep:
    return CropStep(height, width or height, Rounding.FLOOR)


def mean_and_std(mean: tuple[float, float, float], std: tuple[float, float, float]) -> dict[str, Any]:
    return {"image_mean": list(mean), "image_std": list(std)}


HUB_FILES: dict[str, tuple[dict[str, Any], tuple[Step, ...], Normalization]] = {
    "google/vit-base-patch16-224": (
        {"do_normalize": True, "do_resize": True, **mean_and_std(HALF, HALF), "size": 224},
        (stretch(224, 224, BILINEAR),),
        Normalization(1 / 255, HALF, HALF),
    ),
    "a model that transformers 4.40 saved": (
        {
            "_valid_processor_keys": ["images", "do_resize"],
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            **mean_and_std(HALF, HALF),
            "image_processor_type": "ViTImageProcessor",
            "resample": 2,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": 384, "width": 384},
        },
        (stretch(384, 384, BILINEAR),),
        Normalization(1 / 255, HALF, HALF),
    ),
    "facebook/deit-base-distilled-patch16-224": (
        {
            "crop_size": 224,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "DeiTFeatureExtractor",
            **mean_and_std(*IMAGENET),
            "resample": 3,
            "size": 256,
        },
        (stretch(256, 256, BICUBIC), crop(224)),
        Normalization(1 / 255, *IMAGENET),
    ),
    "facebook/convnext-tiny-224": (
        {
            "crop_pct": 0.875,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "ConvNextFeatureExtractor",
            **mean_and_std(*IMAGENET),
            "resample": 3,
            "size": 224,
        },
        (cover(256, BICUBIC), crop(224)),
        Normalization(1 / 255, *IMAGENET),
    ),
    "facebook/convnext-base-384": (
        {
            "image_processor_type": "ConvNextImageProcessor",
            "size": {"shortest_edge": 384},
            "crop_pct": 0.875,
            **mean_and_std(*IMAGENET),
            "resample": 3,
        },
        (stretch(384, 384, BICUBIC),),
        Normalization(1 / 255, *IMAGENET),
    ),
    "microsoft/resnet-50": (
        {
            "crop_pct": 0.875,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "ConvNextFeatureExtractor",
            **mean_and_std(*IMAGENET),
            "resample": 3,
            "size": 224,
        },
        (cover(256, BICUBIC), crop(224)),
        Normalization(1 / 255, *IMAGENET),
    ),
    "openai/clip-vit-base-patch32 with a head": (
        {
            "crop_size": 224,
            "do_center_crop": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            **mean_and_std(*CLIP),
            "resample": 3,
            "size": 224,
        },
        (cover(224, BICUBIC), crop(224)),
        Normalization(1 / 255, *CLIP),
    ),
    "facebook/dinov2-small-imagenet1k-1-layer": (
        {
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "image_processor_type": "BitImageProcessor",
            **mean_and_std(*IMAGENET),
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": 256},
        },
        (cover(256, BICUBIC), crop(224)),
        Normalization(1 / 255, *IMAGENET),
    ),
    "google/mobilenet_v2_1.0_224": (
        {
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
            "do_rescale": True,
            "image_processor_type": "MobileNetV2ImageProcessor",
            **mean_and_std(HALF, HALF),
            "resample": 2,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": 256},
        },
        (cover(256, BILINEAR), crop(224)),
        Normalization(1 / 255, HALF, HALF),
    ),
    "apple/mobilevit-small": (
        {
            "crop_size": 256,
            "do_center_crop": True,
            "do_flip_channel_order": True,
            "do_resize": True,
            "feature_extractor_type": "MobileViTFeatureExtractor",
            "resample": 2,
            "size": 288,
        },
        (cover(288, BILINEAR), crop(256)),
        Normalization(1 / 255, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), bgr=True),
    ),
    "facebook/levit-128S": (
        {
            "crop_size": {"height": 224, "width": 224},
            "feature_extractor_type": "LevitFeatureExtractor",
            **mean_and_std(*IMAGENET),
            "resample": 3,
            "size": {"shortest_edge": 224},
        },
        (cover(256, BICUBIC), crop(224)),
        Normalization(1 / 255, *IMAGENET),
    ),
    "sail/poolformer_s12": (
        {
            "crop_pct": 0.9,
            "do_normalize": True,
            "feature_extractor_type": "PoolFormerFeatureExtractor",
            **mean_and_std(*IMAGENET),
            "resample": 3,
            "size": 224,
        },
        (cover(248, BICUBIC), crop(224)),
        Normalization(1 / 255, *IMAGENET),
    ),
    "google/efficientnet-b0": (
        {
            "crop_size": {"height": 289, "width": 289},
            "do_center_crop": False,
            "image_processor_type": "EfficientNetImageProcessor",
            **mean_and_std((0.485, 0.456, 0.406), (0.47853944, 0.4732864, 0.47434163)),
            "include_top": True,
            "resample": 0,
            "rescale_offset": False,
            "size": {"height": 224, "width": 224},
        },
        (stretch(224, 224, Interpolation.NEAREST),),
        Normalization(1 / 255, (0.485, 0.456, 0.406), (0.47853944**2, 0.4732864**2, 0.47434163**2)),
    ),
    "microsoft/beit-base-patch16-224": (
        {
            "crop_size": 224,
            "do_center_crop": False,
            "do_normalize": True,
            "feature_extractor_type": "BeitFeatureExtractor",
            **mean_and_std(HALF, HALF),
            "resample": 2,
            "size": 224,
        },
        (stretch(224, 224, BILINEAR),),
        Normalization(1 / 255, HALF, HALF),
    ),
    "nvidia/mit-b0": (
        {"feature_extractor_type": "SegformerFeatureExtractor", **mean_and_std(*IMAGENET), "size": 512},
        (stretch(512, 512, BILINEAR),),
        Normalization(1 / 255, *IMAGENET),
    ),
    "a fine-tuned siglip2": (
        {
            "do_convert_rgb": None,
            "image_processor_type": "SiglipImageProcessor",
            **mean_and_std(HALF, HALF),
            "processor_class": "SiglipProcessor",
            "resample": 2,
            "size": {"height": 224, "width": 224},
        },
        (stretch(224, 224, BILINEAR),),
        Normalization(1 / 255, HALF, HALF),
    ),
    "snap-research/efficientformer-l1-300": (
        {
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
            "image_processor_type": "EfficientFormerImageProcessor",
            **mean_and_std(*IMAGENET),
            "resample": 3,
            "size": {"shortest_edge": 224},
        },
        (cover(224, BICUBIC), crop(224)),
        Normalization(1 / 255, *IMAGENET),
    ),
    "a fast processor that transformers 5 saved": (
        {
            "crop_size": None,
            "data_format": "channels_first",
            "device": None,
            "do_center_crop": None,
            "do_convert_rgb": None,
            "do_pad": None,
            "image_processor_type": "ViTImageProcessorFast",
            **mean_and_std(HALF, HALF),
            "input_data_format": None,
            "pad_size": None,
            "resample": 2,
            "rescale_factor": 0.00392156862745098,
            "return_tensors": None,
            "size": {"height": 32, "width": 48},
        },
        (stretch(32, 48, BILINEAR),),
        Normalization(1 / 255, HALF, HALF),
    ),
    "timm's mean as one number, and pixels from 0 to 255": (
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_rescale": False,
            "image_mean": 127.5,
            "image_std": [127.5],
            "resample": "bilinear",
            "size": [256, 320],
            "crop_size": [224, 288],
        },
        (stretch(256, 320, BILINEAR), crop(224, 288)),
        Normalization(1.0, (127.5,) * 3, (127.5,) * 3),
    ),
    "without a resize": (
        {"image_processor_type": "CLIPImageProcessor", "do_resize": False, **mean_and_std(*CLIP)},
        (crop(224),),
        Normalization(1 / 255, *CLIP),
    ),
    "without normalisation": (
        {"image_processor_type": "ViTImageProcessor", "do_normalize": False},
        (stretch(224, 224, BILINEAR),),
        Normalization(1 / 255, (0.0,) * 3, (1.0,) * 3),
    ),
    "Keras' EfficientNet with an offset": (
        {
            "image_processor_type": "EfficientNetImageProcessor",
            "do_normalize": False,
            "include_top": False,
            "rescale_factor": 1 / 127.5,
            "rescale_offset": True,
            "size": {"height": 300, "width": 300},
        },
        (stretch(300, 300, BICUBIC),),
        Normalization(1 / 127.5, (1.0,) * 3, (1.0,) * 3),
    ),
    "a class of its own that states every value": (
        {
            "image_processor_type": "HouseImageProcessor",
            "do_center_crop": True,
            "crop_size": 96,
            **mean_and_std(HALF, HALF),
            "resample": 1,
            "size": {"shortest_edge": 100},
        },
        (cover(100, Interpolation.LANCZOS), crop(96)),
        Normalization(1 / 255, HALF, HALF),
    ),
}


@pytest.mark.parametrize("name", HUB_FILES)
def test_configurations_of_the_hub_are_read(name: str) -> None:
    config, steps, normalization = HUB_FILES[name]
    model_type = "vit" if name.startswith("google/vit") else None
    facts = read_processor_config(config, model_type)
    assert facts.problems == ()
    assert facts.geometry is not None
    assert facts.normalization is not None
    assert facts.geometry.steps == steps
    assert (facts.geometry.height, facts.geometry.width) == find_last_size(steps)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), dtype=np.uint8)
    np.testing.assert_allclose(facts.normalization(pixels), normalization(pixels), rtol=1e-6, atol=1e-6)
    assert facts.normalization.bgr == normalization.bgr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": "large"}, "size is 'large', which is not a number of pixels from 1 to 2800"),
        ({"size": 0}, "size is 0, which"),
        ({"size": 1e9}, "size is 1000000000, which"),
        ({"size": True}, "size is True, which"),
        ({"size": {"shortest_edge": 224}}, "it neither stretches nor crops images"),
        (
            {"size": {"shortest_edge": 224, "longest_edge": 448}},
            "size has longest_edge, short",
        ),
        ({"size": {"max_height": 224, "max_width": 448}}, "size has max_height, max_width; Fovea"),
        ({"size": {"height": 224}}, "size has height; Fovea"),
        ({"size": [1, 2, 3]}, r"size is \[1, 2, 3\]; it takes height and width"),
        ({"do_resize": False}, "it neither stretches nor crops"),
        ({"do_resize": "yes"}, "do_resize is 'yes'; it must be true or false"),
        ({"resample": 6}, "resample is 6, which is not a filter"),
        ({"do_center_crop": True}, "it does not state crop_size"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 9}}, "without height and width"),
        ({"do_pad": True}, "do_pad is on"),
        ({"image_mean": [1, 2]}, "image_mean has 2 values"),
        ({"image_mean": [0, "a", 0]}, "image_mean is 'a', which is not a number"),
        ({"image_std": [0, 1, 1]}, "must be greater than 0"),
        ({"image_std": [float("nan")] * 3}, "image_std is nan, which is not a number"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"do_grayscale": True}, "changes the colours"),
    ],
)
def test_unusable_values_are_problems(config: dict[str, Any], message: str) -> None:
    facts = read_processor_config({"image_processor_type": "ViTImageProcessor", **config})
    assert len(facts.problems) == 1
    assert re.search(message, facts.problems[0])
    assert (facts.geometry is None) != (facts.normalization is None)  # the other part is still known


MISSING_VALUES = ("it does not state image_mean", "it does not state resample")


def test_unknown_class_must_state_every_value() -> None:
    config = {"image_processor_type": "HouseImageProcessor", "size": {"height": 8, "width": 8}}
    assert read_processor_config(config).problems == (
        "it does not state image_mean",
        "it does not state resample",
    )


def test_code_of_a_repository_is_not_read_as_a_class_of_transformers() -> None:
    """The code may do anything with the values, even if the file states all of them."""
    config, _, _ = HUB_FILES["a class of its own that states every value"]
    facts = read_processor_config({**config, "auto_map": {"AutoImageProcessor": "own.Own"}})
    assert (facts.geometry, facts.normalization) == (None, None)
    assert facts.problems == ("its processor is code of the repository, which Fovea never runs",)


def test_one_number_as_size_has_no_meaning_for_an_unknown_class() -> None:
    config, _, normalization = HUB_FILES["a class of its own that states every value"]
    facts = read_processor_config({**config, "size": 100})
    assert (facts.geometry, facts.normalization) == (None, normalization)
    assert facts.problems[0].startswith("size is 100, which is the shorter side or both sides")


@pytest.mark.parametrize("name", ["Perceiver", "TextNet", "ImageGPT", "Donut", "Siglip2", "PPLCNet"])
def test_steps_that_cannot_be_reproduced_are_named(name: str) -> None:
    facts = read_processor_config({"image_processor_type": f"{name}ImageProcessorFast"})
    assert (facts.geometry, facts.normalization) == (None, None)
    assert facts.problems[0].startswith(f"{name}ImageProcessor ")


@pytest.mark.parametrize(("model_type", "name"), CLASS_OF_MODEL.items())
def test_class_follows_from_model_type_without_a_name(model_type: str, name: str) -> None:
    assert find_class_name({}, model_type) == name
    facts = read_processor_config({}, model_type)
    assert facts.normalization is not None
    assert name in CLASSES


def test_configuration_without_class_and_model_type_has_no_defaults() -> None:
    assert find_class_name({}, "new") == find_class_name({}) == ""
    assert len(read_processor_config({}).problems) == 2
