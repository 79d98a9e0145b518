"""Draw the sample pictures: an airliner in the sky, a ship at sea and a lorry on a road.

    python samples/draw.py

The command writes the pictures beside this file and into the page. The same versions of Pillow and numpy
write the same bytes. Each subject fills the central square, because the model sees only that square.
Gradients, clouds, waves and grain make the picture look like a photograph at 32 x 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageDraw, ImageFilter

WIDTH: Final = 512
HEIGHT: Final = 384
SCALE: Final = 4
"""Factor by which pictures are drawn larger; averaging them down smooths the edges."""

BUTTON_SIZE: Final = (192, 144)
"""Size of the pictures on the page's buttons: twice their size in CSS pixels, for dense screens."""

HERE: Final = Path(__file__).parent
Array: TypeAlias = npt.NDArray[np.float64]
Outline: TypeAlias = Array | Sequence[tuple[float, float]]
"""Corners (N, 2) of a closed polygon, x to the right; y down in pixels, up in metres."""

ROW_POSITIONS: Final[Array] = np.arange(HEIGHT, dtype=np.float64)[:, None]
"""Each row's distance from the top in pixels, (HEIGHT, 1)."""


class Canvas:
    """A picture in progress, which starts as a cloudy sky; lengths are in pixels of the finished picture."""

    def __init__(self, zenith: str, horizon: str, *, clouds: int) -> None:
        self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE))
        self.fill(make_box(0, 0, WIDTH, HEIGHT), zenith, horizon, soft=0)
        self.overlay("#ffffff", np.tanh(0.5 * make_noise(clouds, 3, 3) - 0.5 + 0.5 * ROW_POSITIONS / HEIGHT))

    def fill(self, outline: Outline, top: str, bottom: str, soft: float = 0.3, opacity: float = 1) -> None:
        """Fill a polygon from one colour down to another, its edge blurred by `soft`."""
        corners = np.asarray(outline, np.float64) * SCALE
        margin = 3 * soft * SCALE
        left, upper = (int(low) for low in np.floor(corners.min(0) - margin))
        right, lower = (int(high) for high in np.ceil(corners.max(0) + margin))
        mask = Image.new("L", (right - left, lower - upper))
        ImageDraw.Draw(mask).polygon([(x - left, y - upper) for x, y in corners], fill=round(255 * opacity))
        mask = mask.filter(ImageFilter.GaussianBlur(soft * SCALE))
        first, last = np.array([ImageColor.getrgb(top), ImageColor.getrgb(bottom)], np.float64)
        rows = first + np.linspace(0, 1, mask.height)[:, None, None] * (last - first)  # (height, 1, 3)
        shades = Image.fromarray(np.rint(rows).astype(np.uint8)).resize(mask.size)
        self.image.paste(shades, (left, upper), mask)

    def overlay(self, colour: str, opacity: Array) -> None:
        """Lay a colour over the whole picture, with `opacity` (HEIGHT, WIDTH) from 0 to 1."""
        mask = Image.fromarray(np.rint(255 * opacity.clip(0, 1)).astype(np.uint8))
        self.image.paste(colour, (0, 0, *self.image.size), mask.resize(self.image.size))

    def render_image(self, grain: float) -> Image.Image:
        """Return the finished picture; `grain` is the standard deviation of its film grain in grey levels."""
        picture = np.asarray(self.image.reduce(SCALE), np.float64)
        grain_noise = np.random.default_rng(0).standard_normal((HEIGHT, WIDTH, 1))
        return Image.fromarray(np.rint(picture + grain * grain_noise).clip(0, 255).astype(np.uint8))


def make_noise(seed: int, rows: int, columns: int) -> Array:
    """Return cloudy noise (HEIGHT, WIDTH), mean 0, deviation 1.

    The largest blobs form a grid of `rows` x `columns`.
    """
    generator = np.random.default_rng(seed)
    total = np.zeros((HEIGHT, WIDTH))
    for octave in range(5):
        grid = generator.standard_normal((rows << octave, columns << octave)).astype(np.float32)
        blobs = Image.fromarray(grid).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        total += np.asarray(blobs) / 2**octave
    return np.asarray((total - total.mean()) / total.std())


def make_box(left: float, top: float, right: float, bottom: float) -> Outline:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def make_disc(x: float, y: float, radius: float) -> Array:
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack((x + radius * np.cos(angles), y + radius * np.sin(angles)), 1)


def smooth_polygon(*corners: tuple[float, float]) -> Array:
    """Round a polygon by cutting its corners three times (Chaikin, 1974)."""
    path: Array = np.array(corners, np.float64)
    for _ in range(3):
        next_corners = np.roll(path, -1, axis=0)
        path = np.stack((0.75 * path + 0.25 * next_corners, 0.25 * path + 0.75 * next_corners), 1).reshape(
            -1, 2
        )
    return path


def draw_airplane() -> Canvas:
    canvas = Canvas("#2b66ad", "#a4cbea", clouds=7)
    canvas.fill(
        tilt_outline([(34, -16), (-62, -82), (-82, -82), (-34, -16)]), "#828d9c", "#b9c2cc"
    )  # far wing
    canvas.fill(tilt_outline([(-138, -12), (-184, -42), (-199, -42), (-170, -10)]), "#828d9c", "#b6bfca")
    canvas.fill(tilt_outline([(-104, -20), (-164, -92), (-192, -92), (-166, -12)]), "#16407e", "#2a66b8")
    _draw_fuselage(canvas)
    _draw_near_wing(canvas)
    return canvas


def tilt_outline(outline: Outline) -> Array:
    """Return an outline in pixels of the picture, tilted with the airliner.

    `outline` is in pixels of the level airliner, relative to its middle.
    """
    angle = np.radians(9)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.asarray(0.95 * np.asarray(outline) @ rotation + (262, 190))


def _draw_fuselage(canvas: Canvas) -> None:
    hull = smooth_polygon(
        (-190, -16), (-150, -20), (-60, -24), (60, -25), (130, -24), (168, -12), (186, 6), (174, 17),
        (120, 24), (0, 25), (-70, 23), (-140, 6), (-190, -9),
    )  # fmt: skip
    belly = smooth_polygon(
        (184, 7), (172, 16), (120, 24), (0, 26), (-70, 24), (-140, 7), (-60, 14), (100, 12)
    )
    canvas.fill(tilt_outline(hull), "#ffffff", "#9aa6b5")
    canvas.fill(tilt_outline(belly), "#75818f", "#525f6f", soft=2, opacity=0.7)
    canvas.fill(tilt_outline([(-160, -2), (-60, 7), (150, 4), (150, 8), (-60, 11)]), "#2a66b8", "#2a66b8")
    for x in range(-124, 126, 10):
        canvas.fill(tilt_outline(make_box(x, -9, x + 5, -2)), "#34475e", "#34475e")
    canvas.fill(tilt_outline([(139, -17), (157, -12), (165, -4), (143, -6)]), "#1c2a3c", "#33465e")


def _draw_near_wing(canvas: Canvas) -> None:
    canvas.fill(tilt_outline([(44, 6), (-112, 104), (-136, 106), (-56, 12)]), "#dde3e9", "#66727f")
    canvas.fill(tilt_outline([(44, 6), (-112, 104), (-118, 104), (24, 8)]), "#ffffff", "#c9d2db", soft=0.8)
    canvas.fill(tilt_outline([(-4, 38), (12, 40), (-6, 56), (-24, 54)]), "#9aa5b1", "#7b8794")  # pylon
    nacelle = smooth_polygon((26, 46), (30, 62), (-4, 69), (-38, 60), (-34, 50))
    canvas.fill(tilt_outline(nacelle), "#f2f5f8", "#4e5a69")
    canvas.fill(tilt_outline(smooth_polygon((22, 46), (29, 54), (24, 64), (17, 55))), "#2a3440", "#161d25")
    canvas.fill(tilt_outline([(-136, -2), (-192, 28), (-210, 28), (-174, -4)]), "#dde3e9", "#76828f")


def draw_ship() -> Canvas:
    canvas = _draw_sea(horizon=198)
    for tier, (left, right) in enumerate(((148, 356), (166, 334), (182, 312), (262, 306))):
        _draw_deck(canvas, left, 189 - 23 * tier, right)
    for x in (196, 234):
        canvas.fill([(x + 4, 142), (x - 4, 94), (x + 20, 94), (x + 28, 142)], "#e0432f", "#a32a1d")
        canvas.fill([(x - 2, 104), (x - 4, 92), (x + 20, 92), (x + 22, 104)], "#2a2d31", "#17191c")
    for x, top, bottom in ((284, 70, 120), (380, 140, 214), (120, 150, 214)):
        canvas.fill(make_box(x, top, x + 3, bottom), "#7d8790", "#59636c")
    _draw_hull(canvas)
    return canvas


def _draw_sea(horizon: int) -> Canvas:
    canvas = Canvas("#8dbce2", "#ffffff", clouds=16)
    canvas.fill(make_box(0, horizon, WIDTH, HEIGHT), "#4d86a8", "#103555", soft=0)
    swell = make_noise(5, 24, 4) * (horizon < ROW_POSITIONS)
    canvas.overlay("#0b2c4a", swell * (ROW_POSITIONS - horizon) / 500)
    canvas.overlay("#b9d9ea", 0.25 * (-swell - 0.5))
    return canvas


def _draw_deck(canvas: Canvas, left: int, top: int, right: int) -> None:
    canvas.fill(make_box(left, top, right, top + 26), "#ffffff", "#cdd5dc")
    canvas.fill(make_box(left, top + 22, right, top + 25), "#8c99a6", "#77848f", soft=0.8)
    for x in range(left + 7, right - 8, 13):
        canvas.fill(make_box(x, top + 8, x + 7, top + 15), "#2c4257", "#3d566e")


def _draw_hull(canvas: Canvas) -> None:
    shadow = smooth_polygon((84, 268), (430, 268), (400, 318), (120, 318))
    canvas.fill(shadow, "#0a2238", "#0f3250", soft=7, opacity=0.75)
    canvas.fill([(78, 206), (150, 212), (362, 212), (438, 194), (404, 277), (98, 277)], "#2b4668", "#101f33")
    canvas.fill([(93, 259), (412, 259), (404, 278), (98, 278)], "#b03a2e", "#6e1f1a")
    rail = [(78, 205), (150, 211), (362, 211), (438, 193), (436, 200), (364, 216), (150, 216), (79, 210)]
    canvas.fill(rail, "#ffffff", "#e4e9ec")
    for x in range(120, 400, 18):
        canvas.fill(make_disc(x, 232, 2.2), "#c9d6e2", "#c9d6e2")
    foam = smooth_polygon((80, 275), (250, 272), (402, 268), (434, 282), (396, 287), (240, 283), (84, 288))
    canvas.fill(foam, "#ffffff", "#cfe3ee", soft=2, opacity=0.45)


def draw_truck() -> Canvas:
    canvas = _draw_road()
    canvas.fill(
        project_points([-0.3, -0.3, 7.7, 7.7], [0] * 4, [2.7, -0.3, -0.5, 2.7]), "#1d1f22", "#1d1f22", 6, 0.8
    )
    for along in (1.2, 5.6):
        _draw_wheel(canvas, along, depth=2)
    canvas.fill(project_side(make_box(0.3, 0.95, 7.2, 0.5), depth=0.3), "#26292d", "#1a1c1f")
    canvas.fill(project_points([2.1] * 4, [3.5, 3.5, 1, 1], [0, 2.4, 2.4, 0]), "#b9bfc2", "#9fa5a9")
    canvas.fill(project_side(make_box(2.1, 3.5, 7.3, 1)), "#f6f7f4", "#d2d5d5")
    canvas.fill(project_side(make_box(2.1, 1.5, 7.3, 1.3)), "#2f6fb0", "#255b94")
    canvas.fill(project_side(make_box(2.1, 1.08, 7.3, 0.95)), "#6c7277", "#5b6166")
    _draw_cab(canvas)
    for along in (1.2, 5.6):
        _draw_wheel(canvas, along)
    return canvas


def _draw_road() -> Canvas:
    canvas = Canvas("#86b6e0", "#ffffff", clouds=13)
    trees = ((ROW_POSITIONS - 112 - 18 * make_noise(6, 1, 4)[:1]) / 4).clip(0, 1)
    leaves = make_noise(11, 6, 10)
    canvas.overlay("#3f5c37", trees)
    canvas.overlay("#1c3119", 0.3 * trees * leaves)
    canvas.overlay("#8fae6a", -0.25 * trees * leaves)
    canvas.fill(make_box(0, 226, WIDTH, HEIGHT), "#93a868", "#6f8a4a", soft=0)
    canvas.fill(make_box(0, 246, WIDTH, HEIGHT), "#98999b", "#626468", soft=0)
    return canvas


def project_points(along: Sequence[float], up: Sequence[float], depth: Sequence[float]) -> Array:
    """Project points of the lorry to pixels of the picture.

    Coordinates are metres behind the bumper, above the road and from the near side. The camera stands 9 m
    from the bumper's near end, 1.5 m high, and looks 40 degrees along the lorry.
    """
    a, u, d = np.array(along), np.array(up), np.array(depth)
    yaw = np.radians(40)
    right, distance = a * np.cos(yaw) - d * np.sin(yaw), 9 + a * np.sin(yaw) + d * np.cos(yaw)
    return np.stack((163 + 650 * right / distance, 223 + 650 * (1.5 - u) / distance), 1)


def project_side(outline: Outline, depth: float = 0) -> Array:
    along, up = np.asarray(outline, np.float64).T
    return project_points(along, up, np.full_like(up, depth))


def project_front(outline: Outline) -> Array:
    """Project an outline onto the front of the cab, which leans back above 1.75 m like its windscreen."""
    depth, up = np.asarray(outline, np.float64).T
    return project_points(0.28 * (up - 1.75).clip(0), up, depth)


def _draw_cab(canvas: Canvas) -> None:
    canvas.fill(
        project_side([(0, 1.75), (0.32, 2.9), (1.9, 2.9), (1.9, 0.6), (0, 0.6)]), "#d8322a", "#961d18"
    )
    canvas.fill(project_side([(0.16, 1.8), (0.36, 2.5), (1.25, 2.5), (1.25, 1.8)]), "#4c6379", "#22303e")
    canvas.fill(project_side(make_box(1.4, 2.6, 1.43, 0.75)), "#8d1c18", "#701512")
    canvas.fill(project_side(make_disc(1.2, 0.55, 0.64)), "#151618", "#151618")
    canvas.fill(project_front(make_box(0, 2.9, 2.4, 0.6)), "#ea4a3f", "#b32a22")
    canvas.fill(project_front(make_box(0.12, 2.55, 2.28, 1.8)), "#64809a", "#26343f")
    canvas.fill(project_front(make_box(0.5, 1.45, 1.9, 0.95)), "#24282c", "#3c4248")
    canvas.fill(project_front(make_box(0, 0.8, 2.4, 0.45)), "#dfe2e4", "#8e9499")
    for depth in (0.1, 1.98):
        canvas.fill(project_front(make_box(depth, 1.2, depth + 0.32, 0.92)), "#fffbe6", "#d9d4b8")


def _draw_wheel(canvas: Canvas, along: float, depth: float = 0) -> None:
    for inner in (0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0):
        canvas.fill(project_side(make_disc(along, 0.52, 0.52), depth + inner), "#1b1c1e", "#242629")
    canvas.fill(project_side(make_disc(along, 0.52, 0.3), depth), "#c3c8cd", "#7b8188")
    canvas.fill(project_side(make_disc(along, 0.52, 0.12), depth), "#3c4046", "#2b2e33")


def main() -> None:
    page_folder = HERE.parent / "service" / "web" / "page" / "samples"
    for folder in (HERE, page_folder):
        draw_airplane().render_image(grain=2).save(folder / "airplane.jpg", quality=88)
        draw_ship().render_image(grain=2).save(folder / "ship.jpg", quality=88)
        # a PNG with grain is 4 times the size
        draw_truck().render_image(grain=0).save(folder / "truck.png", optimize=True)
    for name, draw in (("airplane", draw_airplane), ("ship", draw_ship), ("truck", draw_truck)):
        small_image = draw().render_image(grain=0).resize(BUTTON_SIZE, Image.Resampling.LANCZOS)
        small_image.save(page_folder / f"{name}-small.jpg", quality=80, optimize=True)


if __name__ == "__main__":
    main()
