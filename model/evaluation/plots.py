"""The plots of the reports, as SVG. Needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from fovea.model.evaluation.scores import CalibrationBin

_WIDTH: Final = 460
_HEIGHT: Final = 260
_LEFT_MARGIN: Final = 44
_BOTTOM_MARGIN: Final = 24
_RIGHT_MARGIN: Final = 18

Point = tuple[float, float]


def plot_curves(curves: Sequence[tuple[str, Sequence[float]]], *, percent: bool) -> str:
    """Plot curves over epochs 1 to n."""
    values = [value for _, curve in curves for value in curve]
    ticks = choose_ticks(min(values), max(values), max_value=1.0 if percent else math.inf)
    low, high = ticks[0], ticks[-1]
    count = max(len(curve) for _, curve in curves)

    def to_point(epoch: float, value: float) -> Point:
        return _to_svg_point((epoch - 1) / max(1, count - 1), (value - low) / (high - low))

    shapes = [
        _draw_gridline(to_point(1, tick), f"{100 * tick:.4g}%" if percent else f"{tick:.4g}")
        for tick in ticks
    ]
    shapes += [
        _draw_tick_label(to_point(epoch, low), str(epoch)) for epoch in sorted({1, (count + 1) // 2, count})
    ]
    for colour, curve in curves:
        points = [to_point(epoch, value) for epoch, value in enumerate(curve, 1)]
        shapes += [_draw_line(points, colour), _draw_dot(points[-1], colour, 3)]
    return _wrap_svg(shapes)


def choose_ticks(low: float, high: float, *, max_value: float) -> list[float]:
    """Return round numbers that enclose `low` and `high`, about a quarter of the range apart."""
    if high - low < 1e-9:
        low, high = max(0.0, low - 0.5), min(max_value, high + 0.5)
    quarter = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(quarter))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= quarter - 1e-9)
    return [step * n for n in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def plot_reliability(curves: Iterable[tuple[str, Sequence[CalibrationBin]]]) -> str:
    """Plot accuracy against confidence, both from 0 to 1; the diagonal is perfect calibration.

    Each curve has a colour and the bins that it joins.
    """
    quarters = [(tick / 4, f"{tick / 4:.0%}") for tick in range(5)]
    shapes = [_draw_gridline(_to_svg_point(0, share), text) for share, text in quarters]
    shapes += [_draw_tick_label(_to_svg_point(share, 0), text) for share, text in quarters]
    (x1, y1), (x2, y2) = _to_svg_point(0, 0), _to_svg_point(1, 1)
    shapes.append(
        f"<line class='diagonal' stroke-dasharray='4' x1='{x1:.1f}' y1='{y1:.1f}' "
        f"x2='{x2:.1f}' y2='{y2:.1f}'/>"
    )
    for colour, bins in curves:
        points = [_to_svg_point(one.confidence, one.accuracy) for one in bins]
        shapes += [_draw_line(points, colour), *(_draw_dot(point, colour, 3.5) for point in points)]
    return _wrap_svg(shapes)


def _wrap_svg(shapes: Iterable[str]) -> str:
    return f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'>{''.join(shapes)}</svg>"


def _to_svg_point(across: float, up: float) -> Point:
    """Return a point in SVG units from shares of the plot's width and height."""
    return _LEFT_MARGIN + across * (_WIDTH - _LEFT_MARGIN - _RIGHT_MARGIN), 8 + (1 - up) * (
        _HEIGHT - _BOTTOM_MARGIN - 8
    )


def _draw_gridline(point: Point, text: str) -> str:
    y = point[1]
    return (
        f"<line class='axis' x1='{_LEFT_MARGIN}' x2='{_WIDTH - _RIGHT_MARGIN}' y1='{y:.1f}' y2='{y:.1f}'/>"
        f"<text x='{_LEFT_MARGIN - 6}' y='{y + 4:.1f}' text-anchor='end'>{text}</text>"
    )


def _draw_tick_label(point: Point, text: str) -> str:
    return f"<text x='{point[0]:.1f}' y='{_HEIGHT - 6}' text-anchor='middle'>{text}</text>"


def _draw_line(points: Sequence[Point], colour: str) -> str:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f"<polyline class='curve {colour}' points='{line}'/>"


def _draw_dot(point: Point, colour: str, radius: float) -> str:
    return f"<circle class='fill-{colour}' cx='{point[0]:.1f}' cy='{point[1]:.1f}' r='{radius}'/>"


def render_legend(*entries: tuple[str, str]) -> str:
    """Render the key of a plot from (colour, name) pairs."""
    items = "".join(
        f"<span><i style='background:var(--{colour})'></i>{name}</span>" for colour, name in entries
    )
    return f"<div class='key'>{items}</div>"
