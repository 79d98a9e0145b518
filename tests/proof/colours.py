"""Measure what colour profiles cost: `python -m tests.proof.colours` prints milliseconds of processor time.

JPEG files of 500 x 375 and of 12 MP for a model of 224: without a profile, with one that means sRGB, and with
Display P3, decoded by turns so that all have the same neighbours.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Final

from PIL import Image, ImageCms

from fovea.service.artifact.contract import Geometry, Interpolation, PixelPath
from fovea.service.inference.colour import Profile
from fovea.service.inference.preprocess import decode_image
from tests.pictures import draw_picture, encode_image
from tests.profiles import display_p3_profile
from tests.proof.large import PHONE_SIZE

FAST: Final = Geometry.cropped(224, 224, 256, Interpolation.BILINEAR, PixelPath.FAST)


def main() -> None:
    """Print a line for each size, path and profile, and one for the first sight of a profile."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profiles = {"no profile": None, "sRGB": srgb, "Display P3": display_p3_profile()}
    for size, rounds in (((500, 375), 200), (PHONE_SIZE, 7)):
        noise = Image.effect_noise(size, 20).convert("RGB")
        image = Image.blend(draw_picture(*size), noise, 0.3)
        files = {
            name: encode_image(image, "JPEG", quality=90, icc_profile=icc) for name, icc in profiles.items()
        }
        for path in PixelPath:
            geometry = replace(FAST, pixel_path=path)
            times: dict[str, list[float]] = {name: [] for name in files}
            for _ in range(rounds):
                for name, content in files.items():
                    times[name].append(_measure_milliseconds(content, geometry))
            summary = ", ".join(
                f"{name} {statistics.median(values):.2f} ms" for name, values in times.items()
            )
            print(f"{size[0]} x {size[1]}, {path}: {summary}")
    started_at = time.thread_time()
    for number in range(100):
        Profile(display_p3_profile() + bytes(number)).get_conversion()
    print(f"first sight of Display P3: {10 * (time.thread_time() - started_at):.2f} ms")


def _measure_milliseconds(content: bytes, geometry: Geometry) -> float:
    started_at = time.thread_time()
    decode_image(content, geometry, max_pixels=20_000_000)
    return 1000 * (time.thread_time() - started_at)


if __name__ == "__main__":
    main()
