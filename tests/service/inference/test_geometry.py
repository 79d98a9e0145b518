"""Geometries give the pixels of the libraries whose pipelines they describe, bit for bit.

Each reference is written as its library writes it, with Pillow and NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fovea.service.artifact.geometry import Geometry, PixelPath, find_last_size
from fovea.service.artifact.geometry_text import parse_steps
from fovea.service.errors import TooManyPixels
from fovea.service.inference.decode_trace import DecodeTrace
from fovea.service.inference.draft_scale import choose_draft_scale
from fovea.service.inference.geometry_plan import find_visible_box, plan_step, plan_steps
from fovea.service.inference.geometry_warnings import find_geometry_warnings
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.preprocess import decode_image
from fovea.service.inference.resize import apply_geometry
from fovea.service.inference.rotation import ROTATIONS
from fovea.service.inference.sampling import BAND_BYTES, sample_bilinear
from tests.pictures import draw_picture, encode_image, make_jpeg

BILINEAR, BICUBIC, LANCZOS = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS


def make_geometry(text: str, path: PixelPath = PixelPath.EXACT) -> Geometry:
    steps = parse_steps(text)
    return Geometry(*find_last_size(steps), steps, path)


def make_noise(width: int, height: int) -> Image.Image:
    """Return noise, which shows a difference of one value in the last bit, which smooth pictures hide."""
    random = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


def run_steps(image: Image.Image, geometry: Geometry) -> Pixels:
    return apply_geometry(image, geometry, image.size, (0, 0, *image.size), None)


# --- references ----------------------------------------------------------------------------------


def resize_by_torchvision(image: Image.Image, side: int, filter_: Image.Resampling) -> Image.Image:
    """`Resize(side)`: `_compute_resized_output_size` of torchvision 0.21."""
    width, height = image.size
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = side, int(side * long / short)
    size = (new_short, new_long) if width <= height else (new_long, new_short)
    return image.resize(size, filter_)


def crop_by_torchvision(image: Image.Image, height: int, width: int) -> Image.Image:
    """`CenterCrop((height, width))` of torchvision 0.21."""
    if width > image.width or height > image.height:
        left = (width - image.width) // 2 if width > image.width else 0
        top = (height - image.height) // 2 if height > image.height else 0
        right = (width - image.width + 1) // 2 if width > image.width else 0
        bottom = (height - image.height + 1) // 2 if height > image.height else 0
        image = ImageOps.expand(image, (left, top, right, bottom), fill=0)
    top, left = round((image.height - height) / 2.0), round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))


def crop_by_transformers(image: Image.Image, height: int, width: int) -> Image.Image:
    """`center_crop` of transformers 4.57 (`image_transforms.py`)."""
    array = np.asarray(image)
    own_height, own_width = array.shape[:2]
    top, left = (own_height - height) // 2, (own_width - width) // 2
    bottom, right = top + height, left + width
    if top >= 0 and bottom <= own_height and left >= 0 and right <= own_width:
        return Image.fromarray(array[top:bottom, left:right])
    new_height, new_width = max(height, own_height), max(width, own_width)
    new_array = np.zeros((new_height, new_width, 3), np.uint8)
    top_pad, left_pad = math.ceil((new_height - own_height) / 2), math.ceil((new_width - own_width) / 2)
    new_array[top_pad : top_pad + own_height, left_pad : left_pad + own_width] = array
    top, bottom, left, right = top + top_pad, bottom + top_pad, left + left_pad, right + left_pad
    return Image.fromarray(
        new_array[max(0, top) : min(new_height, bottom), max(0, left) : min(new_width, right)]
    )


def letterbox_by_ultralytics(image: Image.Image) -> Image.Image:
    """`LetterBox((40, 56), center=True)` of Ultralytics 8.3, with Pillow's resize."""
    ratio = min(40 / image.height, 56 / image.width)
    size = max(1, round(image.width * ratio)), max(1, round(image.height * ratio))
    image = image.resize(size, BILINEAR)
    across, down = (56 - size[0]) / 2, (40 - size[1]) / 2
    left, right = round(across - 0.1), round(across + 0.1)
    top, bottom = round(down - 0.1), round(down + 0.1)
    return ImageOps.expand(image, (left, top, right, bottom), fill=(114, 114, 114))


def crop_aspect_by_keras(image: Image.Image, height: int, width: int) -> Image.Image:
    """The crop of `smart_resize` of Keras 3 (`image_utils.py`)."""
    crop_height = max(min(image.height, int(float(image.width * height) / width)), 1)
    crop_width = max(min(image.width, int(float(image.height * width) / height)), 1)
    top, left = int(float(image.height - crop_height) / 2), int(float(image.width - crop_width) / 2)
    return image.crop((left, top, left + crop_width, top + crop_height))


def pad_aspect_by_keras(image: Image.Image, height: int, width: int) -> Image.Image:
    """The border of `ops.image.resize` with `pad_to_aspect_ratio` of Keras 3.15 (torch backend)."""
    pad_height = max(image.height, int(float(image.width * height) / width))
    pad_width = max(image.width, int(float(image.height * width) / height))
    top, left = int(float(pad_height - image.height) / 2), int(float(pad_width - image.width) / 2)
    array = np.asarray(image)  # (H, W, 3)
    if top > 0:
        border = np.full((top, image.width, 3), (9, 8, 7), np.uint8)
        array = np.concatenate([border, array, border])
    if left > 0:
        border = np.full((image.height, left, 3), (9, 8, 7), np.uint8)
        array = np.concatenate([border, array, border], axis=1)
    return Image.fromarray(array)


def crop_fraction_by_tensorflow(image: Image.Image, fraction: float) -> Image.Image:
    """`tf.image.central_crop` of TensorFlow 2.21 (`image_ops_impl.py`), which slim uses with 0.875."""
    top = int((float(image.height) - float(image.height) * fraction) / 2)
    left = int((float(image.width) - float(image.width) * fraction) / 2)
    height, width = image.height - top * 2, image.width - left * 2
    return image.crop((left, top, left + width, top + height))


def pad_by_pillow(image: Image.Image) -> Image.Image:
    """`ImageOps.pad`, which leaves an image of no width where a strip is too thin; Fovea keeps a pixel."""
    assume(max(image.size) < 40 * min(image.size))
    return ImageOps.pad(image, (56, 40), LANCZOS, color=(1, 2, 3))


PIPELINES: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    "torchvision": (
        "resize cover 36 x 36 bilinear, crop 32 x 32",
        lambda image: crop_by_torchvision(resize_by_torchvision(image, 36, BILINEAR), 32, 32),
    ),
    "torchvision, larger crop": (
        "resize cover 21 x 21 bicubic, crop 32 x 48",
        lambda image: crop_by_torchvision(resize_by_torchvision(image, 21, BICUBIC), 32, 48),
    ),
    "torchvision, crop larger by a pixel": (
        "resize cover 32 x 32 bilinear, crop 33 x 33",
        lambda image: crop_by_torchvision(resize_by_torchvision(image, 32, BILINEAR), 33, 33),
    ),
    "transformers": (
        "resize cover 36 x 36 bilinear, crop 31 x 32 floor",
        lambda image: crop_by_transformers(resize_by_torchvision(image, 36, BILINEAR), 31, 32),
    ),
    "transformers, larger crop": (
        "resize cover 21 x 21 bicubic, crop 32 x 48 floor",
        lambda image: crop_by_transformers(resize_by_torchvision(image, 21, BICUBIC), 32, 48),
    ),
    "DeiT": (
        "resize stretch 36 x 36 bicubic, crop 32 x 32 floor",
        lambda image: crop_by_transformers(image.resize((36, 36), BICUBIC), 32, 32),
    ),
    "open_nsfw": (
        "resize stretch 64 x 64 bilinear, crop 56 x 56",
        lambda image: image.resize((64, 64), BILINEAR).crop((4, 4, 60, 60)),
    ),
    "Ultralytics": (
        "resize contain 40 x 56 bilinear round, pad 40 x 56 fill 114/114/114",
        letterbox_by_ultralytics,
    ),
    "ImageOps.pad": (
        "resize contain 40 x 56 lanczos round, pad 40 x 56 fill 1/2/3 round",
        pad_by_pillow,
    ),
    "ImageOps.fit": (
        "crop aspect 40 x 56 unrounded, resize stretch 40 x 56 lanczos",
        lambda image: ImageOps.fit(image, (56, 40), LANCZOS),
    ),
    "Keras": (
        "crop aspect 40 x 56, resize stretch 40 x 56 bilinear",
        lambda image: crop_aspect_by_keras(image, 40, 56).resize((56, 40), BILINEAR),
    ),
    "Keras, border": (
        "pad aspect 40 x 56 fill 9/8/7, resize stretch 40 x 56 bilinear",
        lambda image: pad_aspect_by_keras(image, 40, 56).resize((56, 40), BILINEAR),
    ),
    "slim": (
        "crop fraction 0.875, resize stretch 32 x 32 bilinear",
        lambda image: crop_fraction_by_tensorflow(image, 0.875).resize((32, 32), BILINEAR),
    ),
    "a third": (
        "crop fraction 0.3333333333333333, resize stretch 32 x 32 box",
        lambda image: crop_fraction_by_tensorflow(image, 1 / 3).resize((32, 32), Image.Resampling.BOX),
    ),
    "crop, then resize": (
        "crop 50 x 50 floor, resize stretch 32 x 32 bicubic",
        lambda image: crop_by_transformers(image, 50, 50).resize((32, 32), BICUBIC),
    ),
    "two resizes": (
        "resize contain 50 x 50 box, resize stretch 32 x 24 bicubic",
        lambda image: resize_to_fit(image, 50).resize((24, 32), BICUBIC),
    ),
}


def resize_to_fit(image: Image.Image, side: int) -> Image.Image:
    longer = max(image.size)
    size = [max(1, side * length // longer) for length in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BOX)


@pytest.mark.parametrize("name", PIPELINES)
@given(width=st.integers(1, 180), height=st.integers(1, 180))
def test_exact_equals_the_pipeline_of_the_library(name: str, width: int, height: int) -> None:
    text, run_reference = PIPELINES[name]
    image = make_noise(width, height)
    expected = np.asarray(run_reference(image))
    assert np.array_equal(run_steps(image, make_geometry(text)), expected)


def test_border_that_makes_a_strip_huge_is_refused() -> None:
    geometry = make_geometry("pad aspect 24, resize stretch 24 bilinear")
    with pytest.raises(TooManyPixels, match="an image of 19999 x 20000 pixels of one of 1 x 20000"):
        run_steps(Image.new("RGB", (1, 20_000)), geometry)


@pytest.mark.parametrize(("height", "rounded"), [(3, 2), (5, 2), (7, 4), (9, 4), (4, 2)])
def test_side_of_half_a_pixel_is_rounded_to_the_even_number(height: int, rounded: int) -> None:
    step = make_geometry("resize contain 5 x 5 box round, pad 5").steps[0]
    assert plan_step(step, (10, height)).target_size == (5, rounded)


def test_strip_is_not_resized_as_a_whole() -> None:
    """The whole strip would have a billion pixels; the middle is the same up to rounding."""
    strip = make_noise(2, 20_000)
    for text in (
        "resize cover 224 x 224 bilinear, crop 224 x 224",
        "resize cover 99 x 99 box, crop 224 x 224",
    ):
        pixels = run_steps(strip, make_geometry(text))
        side = make_geometry(text).longest_resize_side
        middle = strip.crop((0, 9_990, 2, 10_010)).resize((side, 10 * side), BILINEAR)
        assert pixels.shape == (224, 224, 3)
        assert (pixels[:, : (224 - side) // 2] == 0).all()
        if side == 224:
            expected = np.asarray(middle.crop((0, 1008, 224, 1232)))
            assert np.abs(pixels.astype(int) - expected).max() <= 1


# --- without antialiasing ------------------------------------------------------------------------


def sample_by_formula(image: Image.Image, width: int, height: int) -> np.ndarray[tuple[int, ...]]:
    """Return the result of OpenCV's `INTER_LINEAR` in float64, not rounded."""
    pixels = np.asarray(image).astype(np.float64)
    for axis, target in ((0, height), (1, width)):
        length = pixels.shape[axis]
        places = ((np.arange(target) + 0.5) * length / target - 0.5).clip(0, length - 1)
        lower = np.floor(places).astype(int)
        upper = np.minimum(lower + 1, length - 1)
        fraction = (places - lower).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        pixels = pixels.take(lower, axis) * (1 - fraction) + pixels.take(upper, axis) * fraction
    return pixels


@given(
    width=st.integers(1, 200), height=st.integers(1, 200), columns=st.integers(1, 90), rows=st.integers(1, 90)
)
def test_resize_without_antialiasing_is_bilinear_between_four_pixels(
    width: int, height: int, columns: int, rows: int
) -> None:
    image = make_noise(width, height)
    pixels = run_steps(image, make_geometry(f"resize stretch {rows} x {columns} bilinear no-antialias"))
    expected = sample_by_formula(image, columns, rows)
    # Weights of 11 bits are off by up to 1/4096, on each axis, of 255.
    assert np.abs(pixels - expected).max() <= 0.5 + 0.35


@given(width=st.integers(1, 200), height=st.integers(1, 200), crop=st.integers(1, 60), floor=st.booleans())
def test_crop_without_antialiasing_is_the_middle_of_the_whole(
    width: int, height: int, crop: int, floor: bool
) -> None:
    image, rounding = make_noise(width, height), "floor" if floor else "round"
    text = f"resize cover 40 x 40 bilinear no-antialias, crop {crop} x {crop} {rounding}"
    size = (40, 40 * height // width) if width <= height else (40 * width // height, 40)
    whole = Image.fromarray(sample_bilinear(image, size, (0, 0, *size)))
    crop_image = crop_by_transformers if floor else crop_by_torchvision
    assert np.array_equal(run_steps(image, make_geometry(text)), np.asarray(crop_image(whole, crop, crop)))


def test_bands_join_without_a_seam() -> None:
    """The result is computed in bands of limited memory: 700 rows of 900 pixels are several."""
    image = make_noise(500, 400)
    assert 3 * BAND_BYTES < 3 * 900 * 700
    pixels = sample_bilinear(image, (900, 700), (0, 0, 900, 700))
    assert np.abs(pixels - sample_by_formula(image, 900, 700)).max() <= 0.85


# --- fast ----------------------------------------------------------------------------------------

FAST_TEXTS = [
    "resize cover 40 x 48 bilinear, crop 32 x 32",
    "resize stretch 48 x 40 bicubic, crop 32 x 32 floor",
    "resize contain 40 x 56 bilinear round, pad 44 x 56 fill 114/114/114",
    "crop aspect 40 x 56 unrounded, resize stretch 40 x 56 lanczos",
    "crop aspect 1 x 2, resize stretch 40 x 56 bilinear, pad 60 x 60",
    "crop aspect 3 x 2, resize cover 40 x 40 bilinear, crop 40 x 32, pad 41 x 41 fill 255/0/0 round",
]

EXACT_TEXTS = {
    "resize stretch 32 x 32 bilinear no-antialias": "without antialiasing",
    "resize contain 40 x 40 bilinear, resize stretch 32 x 32 bilinear": "exactly one resize",
    "crop 32 x 32": "exactly one resize",
    "crop 50 x 50, resize stretch 32 x 32 bilinear": "precedes the resize",
    "crop fraction 0.875, resize stretch 32 x 32 bilinear": "precedes the resize",
    "pad aspect 32 x 32, resize stretch 32 x 32 bilinear": "precedes the resize",
    "resize stretch 64 x 64 bilinear, crop fraction 0.5, resize stretch 32 x 32 box": "exactly one resize",
    "resize stretch 40 x 64 bilinear, crop fraction 0.8, crop 32 x 32": "depends on the size",
    "resize cover 24 x 24 bilinear, crop 32 x 32": "larger than the resized image",
    "resize contain 40 x 40 bilinear, crop 32 x 32": "larger than the resized image",
    "resize contain 24 x 24 bilinear, pad 40 x 40, crop 32 x 32": "follows the border",
}


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
@pytest.mark.parametrize("text", FAST_TEXTS)
@pytest.mark.parametrize("size", [(1700, 1100), (700, 1500)])
def test_fast_is_close_to_exact(text: str, orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode_image(draw_picture(*size), "JPEG", quality=95, exif=exif)
    fast = make_geometry(text, PixelPath.FAST)
    assert not fast.fast_obstacle
    traces = DecodeTrace(), DecodeTrace()
    pixels = decode_image(content, fast, max_pixels=10**7, trace=traces[0]).pixels
    exact = replace(fast, pixel_path=PixelPath.EXACT)
    expected = decode_image(content, exact, max_pixels=10**7, trace=traces[1]).pixels
    assert "scale" in dict(traces[0].steps)  # a smaller decode, or the path is not tried
    assert "scale" not in dict(traces[1].steps)
    assert traces[0].crop_box == traces[1].crop_box
    assert np.abs(pixels.astype(int) - expected).mean() < 1
    border = (expected == expected[0, 0]).all(axis=2)
    if "pad" in text:
        assert np.array_equal(pixels[border], expected[border])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("text", EXACT_TEXTS)
def test_fast_is_exact_where_it_cannot_save_work(text: str, orientation: int) -> None:
    fast = make_geometry(text, PixelPath.FAST)
    assert EXACT_TEXTS[text] in fast.fast_obstacle
    assert choose_draft_scale((1700, 1100), fast) == 1
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = make_jpeg(1700, 1100, exif=exif)
    exact = replace(fast, pixel_path=PixelPath.EXACT)
    fast_pixels = decode_image(content, fast, max_pixels=10**7).pixels
    assert np.array_equal(fast_pixels, decode_image(content, exact, max_pixels=10**7).pixels)


# --- places --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size", "box"),
    [
        ("resize cover 20 x 20 bilinear, crop 10 x 10", (80, 40), (30, 10, 50, 30)),
        ("resize stretch 20 x 20 bilinear, crop 10 x 10", (80, 40), (20, 10, 60, 30)),
        ("resize contain 20 x 20 bilinear, pad 20 x 20", (80, 40), (0, -20, 80, 60)),
        ("resize contain 20 x 20 bilinear, pad 40 x 40", (40, 80), (-60, -40, 100, 120)),
        ("crop aspect 1 x 1 unrounded, resize stretch 9 x 9 box", (81, 40), (20.5, 0, 60.5, 40)),
        ("crop aspect 2 x 3 unrounded, resize stretch 4 x 4 box", (10, 10), (0, 5 / 3, 10, 25 / 3)),
        ("crop 60 x 60, resize stretch 30 x 30 box", (80, 40), (10, -10, 70, 50)),
    ],
)
def test_visible_box_is_the_place_of_the_input_in_the_photo(
    text: str, size: tuple[int, int], box: tuple[float, ...]
) -> None:
    assert find_visible_box(plan_steps(size, make_geometry(text))) == pytest.approx(box)


def test_trace_names_the_steps_that_change_the_image() -> None:
    trace = DecodeTrace()
    text = "crop aspect 2 x 3, resize contain 40 x 40 bilinear no-antialias, pad 40 x 44 fill 1/2/3"
    decode_image(
        encode_image(draw_picture(90, 70), "PNG"), make_geometry(text), max_pixels=10**5, trace=trace
    )
    assert trace.steps[1:] == [
        ("crop", "the middle 90 x 60, 0 from the left and 5 from the top"),
        ("resize", "from 90 x 60 to 40 x 26, bilinear without antialiasing"),
        ("pad", "to 44 x 40 with a border of the colour 1/2/3, 2 on the left and 7 at the top"),
    ]


def test_trace_names_a_crop_that_begins_in_the_corner() -> None:
    trace = DecodeTrace()
    geometry = make_geometry("resize cover 32 x 32 bilinear, crop 32 x 32")
    decode_image(encode_image(draw_picture(66, 64), "PNG"), geometry, max_pixels=10**5, trace=trace)
    assert trace.steps[1:] == [
        ("resize", "from 66 x 64 to 33 x 32, bilinear"),
        ("crop", "the middle 32 x 32, 0 from the left and 0 from the top"),
    ]


@pytest.mark.parametrize(
    ("text", "orientation", "steps"),
    [
        (
            "resize cover 32 x 32 bilinear, crop 32 x 32",
            1,
            [
                ("resize", "from 400 x 300 to 42 x 32, bilinear"),
                ("crop", "the middle 32 x 32, 5 from the left and 0 from the top"),
            ],
        ),
        (
            "crop aspect 1 x 1, resize stretch 32 x 32 bilinear",
            6,
            [
                ("crop", "the middle 300 x 300, 0 from the left and 50 from the top"),
                ("resize", "from 300 x 300 to 32 x 32, bilinear"),
            ],
        ),
    ],
)
def test_trace_of_a_smaller_decoding_does_not_contradict_itself(
    text: str, orientation: int, steps: list[tuple[str, str]]
) -> None:
    """The JPEG decoder scales the image first, so the later steps begin with what it made."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode_image(draw_picture(800, 600), "JPEG", exif=exif)
    trace = DecodeTrace()
    decode_image(content, make_geometry(text, PixelPath.FAST), max_pixels=10**6, trace=trace)
    assert [step for step in trace.steps if step[0] != "orient"] == [
        ("decode", "JPEG of 800 x 600 pixels"),
        ("scale", "to 400 x 300 by the JPEG decoder, which leaves out detail"),
        *steps,
    ]


def test_trace_names_the_black_border_of_a_large_crop() -> None:
    trace = DecodeTrace()
    geometry = make_geometry("crop 40 x 50")
    decode_image(encode_image(draw_picture(31, 44), "PNG"), geometry, max_pixels=10**5, trace=trace)
    assert trace.steps[1:] == [
        ("crop", "to 50 x 40 with a border of black, 9 on the left and 0 at the top"),
    ]


@pytest.mark.parametrize(
    ("text", "size", "codes"),
    [
        ("resize contain 40 x 40 bilinear, pad 40 x 40", (400, 40), []),
        ("crop aspect 1 x 1, resize stretch 40 x 40 bilinear", (400, 40), ["mostly_cropped"]),
        ("crop 40 x 40", (400, 400), ["mostly_cropped"]),
        ("resize stretch 40 x 40 bilinear, crop 32 x 32", (400, 40), ["strongly_stretched"]),
        ("crop 400 x 400", (10, 10), []),
    ],
)
def test_warnings_follow_from_the_steps(text: str, size: tuple[int, int], codes: list[str]) -> None:
    assert [one.code for one in find_geometry_warnings(size, make_geometry(text))] == codes


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    text=st.sampled_from([*FAST_TEXTS, *EXACT_TEXTS, *(text for text, _ in PIPELINES.values())]),
)
def test_plan_ends_with_the_size_of_the_input(width: int, height: int, text: str) -> None:
    geometry = make_geometry(text)
    assert plan_steps((width, height), geometry)[-1].target_size == (geometry.width, geometry.height)


@pytest.mark.parametrize("orientation", [2, 5, 8])
@pytest.mark.parametrize("text", FAST_TEXTS)
def test_fast_turns_the_region_and_not_the_border(text: str, orientation: int) -> None:
    """Without a smaller decode, fast before the rotation and exact after it differ by rounding only."""
    upright, geometry = draw_picture(130, 90), make_geometry(text, PixelPath.FAST)
    rotation = ROTATIONS[orientation]
    undo = {5: Image.Transpose.TRANSPOSE, 8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(undo.get(orientation, Image.Transpose.FLIP_LEFT_RIGHT))
    pixels = apply_geometry(stored, geometry, upright.size, (0, 0, *stored.size), rotation)
    expected = run_steps(upright, replace(geometry, pixel_path=PixelPath.EXACT))
    difference = np.abs(pixels.astype(int) - expected)
    assert difference.mean() < 1
    assert difference.max() < 30
