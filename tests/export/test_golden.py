"""Golden images and the check against them."""

from __future__ import annotations

import base64
from dataclasses import replace
from functools import cache
from io import BytesIO

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFile, JpegImagePlugin

from fovea.export.golden import JPEG_TOLERANCE, LOGIT_TOLERANCE, draw_golden_images
from fovea.model.data.dataset import square_geometry
from fovea.service.artifact.contract import Geometry, GoldenImage, Interpolation, PixelPath
from fovea.service.errors import ModelError
from fovea.service.inference.draft_scale import choose_draft_scale
from fovea.service.inference.engine import Engine, decode_golden_pixels
from fovea.service.inference.pixels import Pixels
from tests.graphs import build_model, read_contract, with_contract

PHOTO = Geometry.cropped(224, 224, 256, Interpolation.BICUBIC, PixelPath.FAST)
STRETCHED = Geometry.stretched(24, 40, Interpolation.BILINEAR, PixelPath.FAST)
SMALL = square_geometry(32)
GEOMETRIES = [square_geometry(16), SMALL, replace(PHOTO, pixel_path=PixelPath.EXACT), PHOTO, STRETCHED]


def compute_three_logits(pixels: Pixels) -> npt.NDArray[np.float32]:
    """Return three logits that depend on every pixel."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float32)
    return np.stack([flat.mean(axis=1), flat.std(axis=1), flat[:, ::7].mean(axis=1)], axis=1)


@cache
def draw_golden_by_name(geometry: Geometry = SMALL) -> dict[str, GoldenImage]:
    return {image.name: image for image in draw_golden_images(geometry, compute_three_logits)}


def open_golden_image(image: GoldenImage) -> ImageFile.ImageFile:
    return Image.open(BytesIO(base64.b64decode(image.image)))


def compute_mean_difference(left: Pixels, right: Pixels) -> float:
    return float(np.abs(left.astype(int) - right).mean())


# --- the golden images ---------------------------------------------------------------------------


def test_golden_images_are_deterministic() -> None:
    assert draw_golden_images(SMALL, compute_three_logits) == draw_golden_images(SMALL, compute_three_logits)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_engine_passes_the_golden_set_of_every_geometry(geometry: Geometry) -> None:
    """Check a real graph with this geometry in the engine of the service."""
    model = build_model(geometry=geometry)
    images = read_contract(model).golden.images
    assert 0 < len(images) <= 8
    assert all(decode_golden_pixels(image).shape == (geometry.height, geometry.width, 3) for image in images)
    differences = Engine(model.SerializeToString(), provider="cpu", threads=1).check_golden_set()
    assert (differences.images, differences.pixel_difference) == (len(images), 0)
    assert differences.logit_difference < LOGIT_TOLERANCE["cpu/float32"]


def test_recorded_logits_belong_to_the_recorded_pixels() -> None:
    for image in draw_golden_by_name().values():
        assert image.logits == pytest.approx(
            compute_three_logits(decode_golden_pixels(image)[None])[0].tolist()
        )


def test_only_jpegs_have_a_pixel_tolerance() -> None:
    for image in draw_golden_by_name().values():
        is_lossy = open_golden_image(image).format == "JPEG"
        assert image.pixel_tolerance == (JPEG_TOLERANCE if is_lossy else 0)


def test_golden_images_are_small() -> None:
    """Every model file contains them: less than 100 kB at 32 x 32, less than 2 MB at 224 x 224."""
    for geometry, limit in ((SMALL, 100_000), (PHOTO, 2_000_000)):
        assert (
            sum(len(image.image) + len(image.pixels) for image in draw_golden_by_name(geometry).values())
            < limit
        )


# --- conversions ---------------------------------------------------------------------------------


def test_one_jpeg_is_rotated_and_subsampled() -> None:
    image = open_golden_image(draw_golden_by_name()["jpeg-420-orientation-6"])
    assert image.getexif()[0x0112] == 6
    assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0
    assert image.width != image.height


@pytest.mark.parametrize("geometry", [square_geometry(16), SMALL, PHOTO, STRETCHED])
def test_one_jpeg_is_progressive_and_decoded_at_a_smaller_scale(geometry: Geometry) -> None:
    image = open_golden_image(draw_golden_by_name(geometry)["jpeg-progressive-large"])
    assert image.info["progressive"]
    assert choose_draft_scale(image.size, geometry) > 1


def test_golden_images_cover_every_conversion() -> None:
    images = draw_golden_by_name()
    palette = open_golden_image(images["png-palette-alpha"])
    assert (palette.mode, palette.has_transparency_data) == ("P", True)
    assert len(set(palette.info["transparency"])) > 16  # more than two levels
    assert open_golden_image(images["png-grey-16-bit"]).mode == "I;16"
    assert open_golden_image(images["jpeg-cmyk"]).mode == "CMYK"
    assert open_golden_image(images["webp-lossless-alpha"]).mode == "RGBA"
    assert open_golden_image(images["gif-two-frames"]).n_frames == 2  # type: ignore[attr-defined]  # GIF has it


def test_golden_images_include_strip_small_and_large_sizes() -> None:
    sizes = {name: open_golden_image(image).size for name, image in draw_golden_by_name().items()}
    width, height = sizes["png-strip"]
    assert height > 100 * width
    assert max(sizes["png-grey-16-bit"]) < 32
    assert min(sizes["jpeg-progressive-large"]) > 64


# --- detection of mistakes -----------------------------------------------------------------------


@pytest.mark.parametrize("geometry", [square_geometry(16), SMALL, PHOTO])
def test_decoding_mistakes_exceed_the_tolerance(geometry: Geometry) -> None:
    for name, image in draw_golden_by_name(geometry).items():
        pixels = decode_golden_pixels(image)
        mistakes = {
            "not turned": np.rot90(pixels),
            "mirrored": pixels[:, ::-1],
            "negative": 255 - pixels,
        }
        if name != "png-grey-16-bit":
            mistakes["blue for red"] = pixels[..., ::-1]
        for mistake, wrong_pixels in mistakes.items():
            if name != "png-strip":  # it is three pixels wide: stripes in any orientation
                assert compute_mean_difference(pixels, wrong_pixels) > 5 * JPEG_TOLERANCE, (name, mistake)


@pytest.mark.parametrize("name", list(draw_golden_by_name()))
def test_golden_check_fails_for_another_decoder(name: str) -> None:
    """The recorded pixels of one image are those of another decoder, off by 2 levels of 255."""
    model = build_model()
    contract = read_contract(model)
    images = {image.name: image for image in contract.golden.images}
    buffer = BytesIO()
    Image.fromarray(decode_golden_pixels(images[name]) ^ 2).save(buffer, "PNG")
    images[name] = replace(images[name], pixels=base64.b64encode(buffer.getvalue()).decode())
    changed_contract = replace(contract, golden=replace(contract.golden, images=tuple(images.values())))
    engine = Engine(with_contract(model, changed_contract).SerializeToString(), provider="cpu", threads=1)
    with pytest.raises(ModelError, match=f"golden image '{name}': pixels are off by 2 of 255"):
        engine.check_golden_set()
