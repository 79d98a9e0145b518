"""The training report, `report.html`: one self-contained file."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from PIL import Image
from torch import Tensor

from fovea.model.atomic_files import write
from fovea.model.data.dataset import Data, Examples
from fovea.model.data.inventory import some
from fovea.model.evaluation import metrics
from fovea.model.evaluation.calibration import Calibration
from fovea.model.networks.network import probabilities
from fovea.service.artifact.contract import Task

REPORT: Final = "report.html"

_MATRIX: Final = 30
"""Maximum number of labels for a confusion matrix; above it, the most frequent confusions are listed."""

_STRONG: Final = 0.8
"""Share of a row from which a cell is dark and its text white."""

_MISTAKES: Final = 24
"""Number of thumbnails of the most confident mistakes."""

_LISTED: Final = 200
"""Maximum number of table rows (labels) or list items (warnings)."""


@dataclass(frozen=True)
class _Measured:
    """The measured images and the predictions for them."""

    part: str
    examples: Examples
    before: Tensor
    """Probabilities without temperature scaling, float32 (N, labels)."""
    after: Tensor
    chosen: Tensor


def write_report(
    path: Path, about: dict[str, Any], data: Data, part: str, logits: Tensor, calibration: Calibration
) -> None:
    """Write the report; `logits`, float32 (N, n), belong to the images in `part` of `data`."""
    task, after = data.task, probabilities(logits, data.task, calibration.temperature)
    chosen = metrics.choose(after, task, calibration.thresholds)
    measured = _Measured(part, getattr(data, part), probabilities(logits, task), after, chosen)
    parts = [
        _head(about, data, measured),
        _warnings(data),
        _contents(data),
        _curves(about["progress"]["history"]),
        _confusion(data, measured) if task is not Task.MULTILABEL else "",
        _labels(data, measured, calibration),
        _honesty(about, data, measured, calibration),
        _mistakes(data, measured),
        _facts(about),
    ]
    style = Path(__file__).with_suffix(".css").read_text()
    write(
        path,
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(data.name)}</title><style>{style}</style><main>{''.join(parts)}</main></html>\n",
    )


# --- sections ------------------------------------------------------------------------------------


def _head(about: dict[str, Any], data: Data, measured: _Measured) -> str:
    figures = about["measured"]
    history = about["progress"]["history"]
    minutes = sum(epoch["seconds"] for epoch in history) / 60
    shown = [
        (f"{figures['accuracy']:.2%}", f"{measured.part} accuracy, {_count(figures['images'])} images"),
        (f"{figures['ece']:.4f}", f"calibration error, {figures['ece_before']:.4f} before temperature"),
        (_count(about["parameters"]), f"parameters, {about['net']['name']} at {about['net']['size']} px"),
        (f"{minutes:.1f} min", f"for {len(history)} epochs of {_count(len(data.train))} images"),
    ]
    cards = "".join(
        f'<div class="figure"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for value, name in shown
    )
    if measured.part == "test":
        of = "Accuracy is of images that were neither trained on nor chosen by."
    else:
        of = "There are no test images: figures are of the held-out half by which temperature and thresholds were chosen."
    return (
        f"<h1>{escape(data.name)}</h1><p class='note'>{len(data.labels)} labels, {data.task.value}. {of}</p>"
        f'<div class="figures">{cards}</div>'
    )


def _warnings(data: Data) -> str:
    lines = [*data.inventory.notes, *data.warnings, *(f"skipped {line}" for line in data.unreadable)]
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines[:_LISTED])
    more = f"<p class='note'>and {len(lines) - _LISTED} more</p>" if len(lines) > _LISTED else ""
    opened = " open" if len(lines) <= 5 else ""
    return (
        f"<h2>Warnings</h2><details{opened}><summary>{len(lines)}</summary>"
        f'<ul class="warnings">{items}</ul>{more}</details>'
    )


def _contents(data: Data) -> str:
    """Render the detected data layout and the files that were left out."""
    if not data.inventory.found:
        return ""
    lines = data.description[: -len(data.inventory.left_out) or None]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    rows = "".join(
        f"<tr><td class='wrap'>{escape(group.kind)}</td><td class='wrap'>{escape(group.reason)}</td>"
        f"<td class='number'>{_count(len(group.names))}</td><td class='wrap'>{escape(some(group.names, 10))}</td></tr>"
        for group in data.inventory.left_out[:_LISTED]
    )
    table = (
        "<div class='card'><table><tr><th>left out</th><th>why</th><th class='number'>files</th><th>such as</th></tr>"
        f"{rows}</table></div>"
        if rows
        else ""
    )
    return f"<h2>Data</h2><ul>{items}</ul>{table}"


def _curves(history: Sequence[dict[str, float]]) -> str:
    if not history:
        return ""
    loss = _plot([("blue", [epoch["loss"] for epoch in history])], percent=False)
    both = _plot(
        [
            ("blue", [epoch["train_accuracy"] for epoch in history]),
            ("orange", [epoch["validation_accuracy"] for epoch in history]),
        ],
        percent=True,
    )
    return (
        "<h2>Learning</h2><p class='note'>Training figures are of augmented images, while the network still changed."
        f"</p><div class='row'><div class='card'>{_key(('blue', 'loss'))}{loss}</div><div class='card'>"
        f"{_key(('blue', 'training accuracy'), ('orange', 'validation accuracy'))}{both}</div></div>"
    )


def _confusion(data: Data, measured: _Measured) -> str:
    counts = metrics.confusion(measured.chosen, measured.examples.targets, len(data.labels))
    head = "<h2>Confusion</h2><p class='note'>Rows are true labels, columns what was said.</p>"
    if len(data.labels) > _MATRIX:
        return head + _confused(counts, data.labels)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    top = "".join(
        f"<th class='top' title='{escape(label)}'><span>{escape(label)}</span></th>" for label in data.labels
    )
    rows = "".join(
        f"<tr><th class='side' title='{escape(label)}'>{escape(label)}</th>"
        + "".join(
            f"<td style='--share:{share:.3f}'{' class=strong' if share > _STRONG else ''}>{count or ''}</td>"
            for count, share in zip(line.tolist(), part.tolist(), strict=True)
        )
        + "</tr>"
        for label, line, part in zip(data.labels, counts, shares, strict=True)
    )
    return f"{head}<div class='card'><table class='confusion'><tr><th></th>{top}</tr>{rows}</table></div>"


def _confused(counts: Tensor, labels: Sequence[str]) -> str:
    """Render a table of the most frequent confusions."""
    wrong = counts.clone().fill_diagonal_(0)
    best = wrong.flatten().topk(min(_MATRIX, wrong.numel()))
    rows = [
        (labels[index // len(labels)], labels[index % len(labels)], count)
        for count, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if count
    ]
    body = "".join(
        f"<tr><td class='wrap'>{escape(true)}</td><td class='wrap'>{escape(said)}</td><td class='number'>{count}</td></tr>"
        for true, said, count in rows
    )
    return f"<div class='card'><table><tr><th>true</th><th>said</th><th class='number'>images</th></tr>{body}</table></div>"


def _labels(data: Data, measured: _Measured, calibration: Calibration) -> str:
    scores = metrics.label_scores(measured.chosen, measured.examples.targets, len(data.labels))
    limits: Sequence[float | None] = [None] * len(data.labels)
    if data.task is Task.MULTILABEL:
        limits = calibration.thresholds
    rows = "".join(
        f"<tr><td class='wrap'>{escape(label)}</td><td class='number'>{_count(trained)}</td>"
        f"<td class='number'>{_count(score.images)}</td>{_share(score.precision)}{_share(score.recall)}"
        f"{_share(score.f1)}"
        + (f"<td class='number'>{limit:.3f}</td>" if limit is not None else "")
        + "</tr>"
        for label, trained, score, limit in list(zip(data.labels, data.counts, scores, limits, strict=True))[
            :_LISTED
        ]
    )
    more = len(data.labels) - _LISTED
    rest = f"<p class='note'>and {_count(more)} more labels</p>" if more > 0 else ""
    last = "<th class='number'>threshold</th>" if data.task is Task.MULTILABEL else ""
    chosen = ""
    if data.task is Task.BINARY:
        chosen = f" {escape(data.labels[1])} is chosen from probability {calibration.thresholds[0]:.3f} on."
    return (
        "<h2>Labels</h2><p class='note'>Precision: of the images for which it was said, those where it is true. "
        f"Recall: of the images where it is true, those for which it was said.{chosen}</p><div class='card'><table>"
        "<tr><th>label</th><th class='number'>trained on</th><th class='number'>measured on</th>"
        f"<th class='number'>precision</th><th class='number'>recall</th><th class='number'>F1</th>{last}</tr>"
        f"{rows}</table>{rest}</div>"
    )


def _honesty(about: dict[str, Any], data: Data, measured: _Measured, calibration: Calibration) -> str:
    targets, figures = measured.examples.targets, about["measured"]
    before, after = (
        metrics.reliability(one, targets, data.task) for one in (measured.before, measured.after)
    )
    rows = "".join(
        f"<tr><td class='number'>{level:.0%}</td><td class='number'>{share:.1%}</td><td class='number'>{size:.2f}</td></tr>"
        for level, share, size in figures["coverage"]
        if round(level * 100) in (80, 85, 90, 95, 98, 99)
    )
    sets = (
        "<div class='card'><table><tr><th class='number'>asked for</th><th class='number'>true label inside</th>"
        f"<th class='number'>labels in a set</th></tr>{rows}</table></div>"
        if rows
        else ""
    )
    promise = " Conformal sets hold the true label as often as asked for." if rows else ""
    return (
        "<h2>Honesty</h2><p class='note'>How often an answer is right, against how sure it is. Temperature "
        f"{calibration.temperature:.3f} takes the expected calibration error from {figures['ece_before']:.4f} to "
        f"{figures['ece']:.4f} ({metrics.BINS} bins of equal mass).{promise}</p>"
        f"<div class='row'><div class='card'>{_key(('orange', 'before'), ('blue', 'with temperature'))}"
        f"{_diagram(before, after)}</div>{sets}</div>"
    )


def _mistakes(data: Data, measured: _Measured) -> str:
    if data.task is Task.MULTILABEL:
        return ""
    sure = measured.after.gather(1, measured.chosen[:, None])[:, 0]  # (N,)
    wrong = (measured.chosen != measured.examples.targets).nonzero().flatten()  # (mistakes,)
    worst = wrong[sure[wrong].argsort(descending=True)][:_MISTAKES]
    if not len(worst):
        return "<h2>Mistakes</h2><p class='note'>None.</p>"
    pictures = measured.examples.pixels[worst]
    shown = "".join(
        f"<figure><img alt='' src='{_png(picture)}'><figcaption><em>{escape(data.labels[said])}</em> {share:.1%}<br>"
        f"is {escape(data.labels[true])}</figcaption></figure>"
        for picture, said, true, share in zip(
            pictures, measured.chosen[worst].tolist(), measured.examples.targets[worst].tolist(), sure[worst].tolist(),
            strict=True,
        )
    )  # fmt: skip
    return (
        f"<h2>Mistakes</h2><p class='note'>{_count(len(wrong))} of {_count(len(measured.chosen))}; these are the ones "
        f"that it was most sure of.</p><div class='mistakes'>{shown}</div>"
    )


def _facts(about: dict[str, Any]) -> str:
    facts = {
        "command": about["command"],
        "commit": about["commit"],
        "hardware": about["hardware"],
        "torch": about["torch"],
    }
    facts |= {name: _plain(value) for name, value in about["recipe"].items()}
    rows = "".join(
        f"<tr><td>{escape(name.replace('_', ' '))}</td><td class='wrap'>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<h2>How it was made</h2><div class='card'><table>{rows}</table></div>"


# --- plots and formatting ------------------------------------------------------------------------

_WIDTH: Final = 460
_HEIGHT: Final = 260
_LEFT: Final = 44
_BELOW: Final = 24
_RIGHT: Final = 18

Point = tuple[float, float]


def _plot(curves: Sequence[tuple[str, Sequence[float]]], *, percent: bool) -> str:
    """Plot curves over epochs 1 to n."""
    values = [value for _, curve in curves for value in curve]
    ticks = _ticks(min(values), max(values), most=1.0 if percent else math.inf)
    low, high = ticks[0], ticks[-1]
    count = max(len(curve) for _, curve in curves)

    def place(epoch: float, value: float) -> Point:
        return _place((epoch - 1) / max(1, count - 1), (value - low) / (high - low))

    shown = [_level(place(1, tick), f"{100 * tick:.4g}%" if percent else f"{tick:.4g}") for tick in ticks]
    shown += [_below(place(epoch, low), str(epoch)) for epoch in sorted({1, (count + 1) // 2, count})]
    for colour, curve in curves:
        points = [place(epoch, value) for epoch, value in enumerate(curve, 1)]
        shown += [_line(points, colour), _dot(points[-1], colour, 3)]
    return _svg(shown)


def _ticks(low: float, high: float, *, most: float) -> list[float]:
    """Return round numbers that enclose `low` and `high`, about a quarter of the range apart."""
    if high - low < 1e-9:
        low, high = max(0.0, low - 0.5), min(most, high + 0.5)
    quarter = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(quarter))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= quarter - 1e-9)
    return [step * n for n in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _diagram(before: Sequence[metrics.Bin], after: Sequence[metrics.Bin]) -> str:
    """Plot accuracy against confidence, both from 0 to 1; the diagonal is perfect calibration."""
    quarters = [(tick / 4, f"{tick / 4:.0%}") for tick in range(5)]
    shown = [_level(_place(0, share), text) for share, text in quarters]
    shown += [_below(_place(share, 0), text) for share, text in quarters]
    (x1, y1), (x2, y2) = _place(0, 0), _place(1, 1)
    shown.append(
        f"<line class='diagonal' stroke-dasharray='4' x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}'/>"
    )
    for colour, bins in (("orange", before), ("blue", after)):
        points = [_place(one.confidence, one.accuracy) for one in bins]
        shown += [_line(points, colour), *(_dot(point, colour, 3.5) for point in points)]
    return _svg(shown)


def _svg(shapes: Iterable[str]) -> str:
    return f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'>{''.join(shapes)}</svg>"


def _place(across: float, up: float) -> Point:
    """Return a point in SVG units from shares of the plot's width and height."""
    return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), 8 + (1 - up) * (_HEIGHT - _BELOW - 8)


def _level(point: Point, text: str) -> str:
    y = point[1]
    return (
        f"<line class='axis' x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>"
        f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{text}</text>"
    )


def _below(point: Point, text: str) -> str:
    return f"<text x='{point[0]:.1f}' y='{_HEIGHT - 6}' text-anchor='middle'>{text}</text>"


def _line(points: Sequence[Point], colour: str) -> str:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f"<polyline class='curve {colour}' points='{line}'/>"


def _dot(point: Point, colour: str, radius: float) -> str:
    return f"<circle class='fill-{colour}' cx='{point[0]:.1f}' cy='{point[1]:.1f}' r='{radius}'/>"


def _key(*entries: tuple[str, str]) -> str:
    items = "".join(
        f"<span><i style='background:var(--{colour})'></i>{name}</span>" for colour, name in entries
    )
    return f"<div class='key'>{items}</div>"


def _share(value: float | None) -> str:
    if value is None:
        return "<td class='number'>–</td>"
    return f"<td class='number'>{value:.1%}<span class='bar'><i style='width:{value:.1%}'></i></span></td>"


def _png(pixels: Tensor) -> str:
    """Return an image, uint8 (H, W, 3), as a data URI."""
    buffer = BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _count(number: int) -> str:
    return f"{number:,}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
