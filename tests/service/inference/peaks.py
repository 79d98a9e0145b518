"""Measures the memory of decoding: `python -m tests.service.inference.peaks` prints JSON lines.

Run it in its own process with MALLOC_MMAP_THRESHOLD_=65536: the allocator then returns all memory at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image

from fovea.service.allocator import trim_heap
from fovea.service.artifact.geometry import Geometry, Interpolation, PixelPath, find_last_size
from fovea.service.artifact.geometry_text import parse_steps
from fovea.service.errors import TooManyPixels
from fovea.service.inference.boxes import Boxes
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.preprocess import configure_pillow, decode_image, open_upright
from tests import profiles
from tests.pictures import draw_picture, encode_image, make_jpeg, make_png16

WIDTH, HEIGHT = 1500, 1400
BOXES = ((0, 0, 1400, 1400), (0, 0, 100, 1400))
"""Boxes that fit before and after a rotation."""

GEOMETRIES = [
    Geometry.cropped(32, 32, 32, Interpolation.BILINEAR, PixelPath.FAST),
    Geometry.cropped(224, 224, 256, Interpolation.BILINEAR, PixelPath.EXACT),
    *(
        Geometry(*find_last_size(steps), steps, PixelPath.FAST)
        for steps in map(
            parse_steps,
            (
                "crop aspect 224, resize stretch 224 bilinear no-antialias",
                "crop 1300, resize contain 900 lanczos round, pad 900 x 1000",
            ),
        )
    ),
]


def make_pictures() -> Iterator[tuple[str, bytes]]:
    """Return an image for each format and mode with its own decoding path, rotated by EXIF if possible."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).normal(0, 6, (HEIGHT, WIDTH, 3))
    rgb = Image.fromarray((np.asarray(draw_picture(WIDTH, HEIGHT)) + noise).clip(0, 255).astype(np.uint8))
    rgba = rgb.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(rgb.size))
    palette = rgb.quantize(64)
    grey = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    yield "jpeg", encode_image(rgb, "JPEG", exif=exif)
    yield "jpeg grey", encode_image(rgb.convert("L"), "JPEG", exif=exif)
    for sampling in (0, 1, 2):
        yield (
            f"jpeg progressive {sampling}",
            encode_image(rgb, "JPEG", progressive=True, subsampling=sampling),
        )
    yield "jpeg cmyk", encode_image(rgb.convert("CMYK"), "JPEG", progressive=True, exif=exif)
    for mode in ("RGB", "RGBA", "L", "LA", "1"):
        yield f"png {mode}", encode_image(rgba.convert(mode), "PNG", exif=exif)
    yield "png palette", encode_image(palette, "PNG", transparency=bytes(range(64)), exif=exif)
    yield "png grey 16", encode_image(grey, "PNG", transparency=1000, exif=exif)
    yield "png key", encode_image(rgb, "PNG", transparency=(1, 2, 3), exif=exif)
    yield "gif", encode_image(palette, "GIF", transparency=3)
    yield "bmp", encode_image(rgb, "BMP")
    yield "bmp palette", encode_image(palette, "BMP")
    for image, name in ((rgb, "webp"), (rgba, "webp alpha")):
        yield name, encode_image(image, "WEBP", exif=exif, method=0)
        yield f"{name} lossless", encode_image(image, "WEBP", exif=exif, method=0, lossless=True, quality=0)
    for planes in ("4:2:0", "4:4:4"):
        yield f"avif {planes}", encode_image(rgba, "AVIF", exif=exif, speed=10, subsampling=planes)
    for mode in ("RGB", "RGBA", "L", "CMYK", "YCbCr", "1"):
        yield f"tiff {mode}", encode_image(rgba.convert("RGB").convert(mode), "TIFF", exif=exif)
        yield (
            f"tiff {mode} lzw",
            encode_image(rgba.convert("RGB").convert(mode), "TIFF", compression="tiff_lzw"),
        )
    plain = Image.new("RGB", (WIDTH, HEIGHT), "red")
    yield "tiff strips", encode_image(plain, "TIFF", compression="tiff_lzw", tiffinfo={278: 16, 274: 6})
    for bands in (2, 3, 4):
        yield (
            f"png 16 {bands}",
            make_png16(np.asarray(rgba.convert("RGBA"))[..., -bands:].astype(np.uint16) * 257),
        )
    p3 = profiles.display_p3_profile()
    yield "jpeg p3", encode_image(rgb, "JPEG", exif=exif, icc_profile=p3)
    yield "jpeg cmyk profile", encode_image(rgb.convert("CMYK"), "JPEG", icc_profile=profiles.cmyk_profile())
    for mode in ("RGB", "RGBA", "L"):
        profile = profiles.grey_profile(1.0) if mode == "L" else p3
        yield f"png {mode} profile", encode_image(rgba.convert(mode), "PNG", exif=exif, icc_profile=profile)
    yield "png palette p3", encode_image(palette, "PNG", icc_profile=p3)
    yield "tiff lab", encode_image(Image.new("LAB", (WIDTH, HEIGHT)), "TIFF")
    yield "tiff grey 16", encode_image(grey, "TIFF", exif=exif)
    yield "tiff jpeg", encode_image(rgb, "TIFF", compression="jpeg")


def make_heic_pictures() -> Iterator[tuple[str, bytes]]:
    """Yield names and files of HEIC, whose encoder leaves memory behind: encode them after the others."""
    rgba = draw_picture(WIDTH, HEIGHT).convert("RGBA")
    for mode in ("RGB", "RGBA", "L"):
        yield f"heic {mode}", encode_heic(rgba.convert(mode))


def encode_heic(image: Image.Image) -> bytes:
    stream = BytesIO()
    pillow_heif.from_pillow(image).save(stream, quality=60, enc_params={"preset": "ultrafast"})
    return stream.getvalue()


def main() -> None:
    """Print [name, pixel path, bytes measured, bytes estimated], one line each."""
    configure_pillow()
    for geometry in GEOMETRIES:
        for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "AVIF", "TIFF"):
            decode_image(
                encode_image(draw_picture(64, 48), kind), geometry, max_pixels=10**8
            )  # allocate first what stays allocated
        decode_image(make_jpeg(600, 500), geometry, max_pixels=10**8)
    _measure_pictures(list(make_pictures()))
    decode_image(encode_heic(draw_picture(64, 48)), GEOMETRIES[0], max_pixels=10**8)
    _measure_pictures(list(make_heic_pictures()))


def _measure_pictures(pictures: Sequence[tuple[str, bytes]]) -> None:
    for number, (name, content) in enumerate(pictures):
        # The first two are the paths of the pixels. The others have further steps, whatever the format is.
        for geometry in GEOMETRIES if number % 4 == 0 else GEOMETRIES[:2]:
            peak = _measure_peak(content, geometry)
            print(json.dumps([name, geometry.pixel_path, peak, estimate_bytes(content, geometry)]))
        for geometry in GEOMETRIES[1:2]:
            peak = _measure_peak(content, geometry, BOXES)
            estimate = estimate_bytes(content, geometry, BOXES)
            print(json.dumps([f"{name} with boxes", geometry.pixel_path, peak, estimate]))


def estimate_bytes(content: bytes, geometry: Geometry, boxes: Boxes | None = None) -> int:
    """Return the bytes that decoding reserves, from the error message of a memory of one byte."""
    try:
        _decode(content, geometry, boxes, DecodeMemory(1))
    except TooManyPixels as error:
        return int(str(error).split()[2])
    raise RuntimeError("one byte was enough")


def _measure_peak(content: bytes, geometry: Geometry, boxes: Boxes | None = None) -> int:
    trim_heap()  # memory that is free already would hide a part of the peak
    Path("/proc/self/clear_refs").write_text("5")  # reset the recorded peak (proc(5))
    before = _read_status("VmRSS")
    _decode(content, geometry, boxes, None)
    return _read_status("VmHWM") - before


def _decode(content: bytes, geometry: Geometry, boxes: Boxes | None, memory: DecodeMemory | None) -> None:
    if boxes is None:
        decode_image(content, geometry, max_pixels=10**8, memory=memory)
        return
    with open_upright(content, geometry, boxes, max_pixels=10**8, memory=memory) as upright_image:
        for box in boxes:
            upright_image.decode_box(box, geometry)


def _read_status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
