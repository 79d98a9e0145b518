"""The golden set: small images that every host must map to the same pixels and logits.

The images are drawn from a seed. Together they exercise every step of `service.inference.preprocess`: scaled
JPEG decoding, orientation, each kind of conversion, upscaling, downscaling, and a long strip.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from io import BytesIO
from itertools import count
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from fovea.service.artifact.contract import MAX_GOLDEN_PIXELS, Geometry, GoldenImage
from fovea.service.inference.draft_scale import choose_draft_scale
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.preprocess import decode_image

LOGIT_TOLERANCE: Final = {"cpu/float32": 1e-3, "cuda/float32": 5e-2}
"""Maximum absolute difference of a logit, by provider and precision.

On CPUs, float32 sums of some thousand terms in another order differ by about 1e-5; 1e-3 changes no
probability by more than 0.00025. CUDA multiplies convolutions in TF32, with 10 bits of mantissa: an error of
1e-3 of a logit around 10, over ten layers.
"""

OPENVINO_INT8_TOLERANCE: Final = 0.25
"""Maximum absolute difference of a logit near 10 of an int8 model on OpenVINO, key `openvino/float32`.

OpenVINO fuses other layers than ONNX Runtime and so rounds elsewhere. A logit differed by 0.1 on the CIFAR-10
model, with the same labels on 2,000 images, and by 0.15 on a MobileNetV2 with random weights.
"""

JPEG_TOLERANCE: Final = 1.0
"""Maximum mean absolute difference of pixels, in levels of 255.

Conforming JPEG decoders may differ by one level in the inverse DCT (ISO/IEC 10918-2), and a little more with
chroma upsampling. A wrong resize, orientation or colour conversion of these images differs by at least 5.
"""


def draw_golden_images(
    geometry: Geometry, compute_logits: Callable[[Pixels], npt.NDArray[np.float32]]
) -> tuple[GoldenImage, ...]:
    """Draw the golden set for `geometry`.

    `compute_logits` maps a batch of pixels, uint8 (n, H, W, 3), to the reference logits, float32 (n, labels).
    """
    side = geometry.longest_resize_side
    encoded_images = {
        "jpeg-420-orientation-6": _encode_image(
            _draw_scene(5 * side // 4, 3 * side // 2, 1), "JPEG", exif=_build_exif(6)
        ),
        "jpeg-progressive-large": _encode_image(_draw_large_scene(geometry), "JPEG", progressive=True),
        "jpeg-cmyk": _encode_image(_draw_scene(side, side, 3).convert("CMYK"), "JPEG"),
        "png-palette-alpha": _encode_image(_draw_palette_with_alpha(2 * side, side), "PNG"),
        "png-grey-16-bit": _encode_image(_draw_grey_16_bit(side // 2, side // 2), "PNG"),
        "webp-lossless-alpha": _encode_image(_draw_with_alpha(3 * side // 2, side), "WEBP", lossless=True),
        "gif-two-frames": _draw_two_frames(side, 4 * side // 3),
        "png-strip": _encode_image(_draw_scene(3, 20 * side, 7), "PNG"),
    }
    golden = []
    for name, image in encoded_images.items():
        pixels = decode_image(image, geometry, max_pixels=MAX_GOLDEN_PIXELS).pixels
        golden.append(
            GoldenImage(
                name=name,
                image=_encode_base64(image),
                pixels=_encode_base64(_encode_image(Image.fromarray(pixels), "PNG", optimize=True)),
                pixel_tolerance=JPEG_TOLERANCE if name.startswith("jpeg") else 0.0,
                logits=tuple(
                    float(value) for value in compute_logits(pixels[None])[0]
                ),  # pixels (1, H, W, 3)
            )
        )
    return tuple(golden)


def _draw_scene(width: int, height: int, seed: int) -> Image.Image:
    """Draw soft colours, a hard edge in one corner and a little noise; all orientations look different."""
    random = np.random.default_rng(seed)
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    planes = [np.sin(down * a + across * b + c) for a, b, c in random.uniform(0.5, 4, (3, 3))]
    picture = 128 + 100 * np.stack(planes, axis=-1) + random.normal(0, 4, (height, width, 3))
    picture[: height // 3, : width // 3] = random.uniform(0, 255, 3)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.5))


def _draw_large_scene(geometry: Geometry) -> Image.Image:
    """Draw a soft scene that is just large enough for the `fast` path to decode at half size, if allowed."""
    side = next(
        side
        for side in count(256, 256)
        if geometry.fast_obstacle or choose_draft_scale((side, side), geometry) > 1
    )
    size = 5 * side // 4, 9 * side // 8
    # the limit applies above a resize to 430 px; above 512 px the image is decoded at full scale
    if math.prod(size) > MAX_GOLDEN_PIXELS:
        size = (min(side, math.isqrt(MAX_GOLDEN_PIXELS)),) * 2
    return _draw_scene(160, 144, 2).resize(size, Image.Resampling.BICUBIC)


def _draw_with_alpha(width: int, height: int) -> Image.Image:
    picture = _draw_scene(width, height, 6)
    picture.putalpha(Image.linear_gradient("L").resize((width, height)))
    return picture


def _draw_palette_with_alpha(width: int, height: int) -> Image.Image:
    picture = _draw_scene(width, height, 4).quantize(32)
    picture.info["transparency"] = bytes(range(0, 256, 8))
    return picture


def _draw_grey_16_bit(width: int, height: int) -> Image.Image:
    down, across = np.mgrid[0 : 1 : max(height, 1) * 1j, 0 : 1 : max(width, 1) * 1j]
    return Image.fromarray((65535 * (0.2 * down + 0.8 * across)).astype(np.uint16))


def _draw_two_frames(width: int, height: int) -> bytes:
    first, second = _draw_scene(width, height, 5).quantize(64), _draw_scene(width, height, 8).quantize(64)
    return _encode_image(first, "GIF", save_all=True, append_images=[second])


def _build_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _encode_image(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    if "transparency" in image.info:
        options["transparency"] = image.info["transparency"]
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _encode_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
