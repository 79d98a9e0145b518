"""The parts of a report, `report.html`: one self-contained file. Needs no PyTorch.

The training report and the comparison of bulk classification have these parts in common. All texts are
escaped here.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final, Literal

from fovea.model.evaluation.scores import LabelScore

REPORT_FILE: Final = "report.html"

MAX_MATRIX_LABELS: Final = 30
"""Maximum number of labels for a confusion matrix; above it, the most frequent confusions are listed."""

MAX_MISTAKES: Final = 24
"""Number of thumbnails of the most confident mistakes."""

_DARK_SHARE: Final = 0.8
"""Share of a row from which a cell is dark and its text white."""

_MAX_ROWS: Final = 200
"""Maximum number of table rows (labels) or list items (warnings)."""

_STYLE_FILE: Final = Path(__file__).with_name("report.css")


def render_page(title: str, parts: Iterable[str]) -> str:
    """Return the whole page from its title and its rendered parts."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE_FILE.read_text()}</style>"
        f"<main>{''.join(parts)}</main></html>\n"
    )


def render_head(title: str, note: str, figures: Iterable[tuple[str, str]]) -> str:
    """Render the heading, a note, and cards from (value, name) pairs."""
    cards = "".join(
        f'<div class="figure"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for value, name in figures
    )
    return f"<h1>{escape(title)}</h1><p class='note'>{escape(note)}</p><div class=\"figures\">{cards}</div>"


def render_warnings(lines: Sequence[str], *, heading: str = "Warnings", count: int | None = None) -> str:
    """Render a list, which is collapsed if it is long; nothing without lines.

    `count` is the number of all lines if `lines` are only the first ones.
    """
    if not lines:
        return ""
    count = len(lines) if count is None else count
    shown_lines = lines[:_MAX_ROWS]
    items = "".join(f"<li>{escape(line)}</li>" for line in shown_lines)
    rest = count - len(shown_lines)
    more = f"<p class='note'>and {format_number(rest)} more</p>" if rest > 0 else ""
    open_attribute = " open" if count <= 5 else ""
    return (
        f"<h2>{escape(heading)}</h2><details{open_attribute}><summary>{format_number(count)}</summary>"
        f'<ul class="warnings">{items}</ul>{more}</details>'
    )


ConfusionCounts = Mapping[tuple[int, int], int]
"""Number of images for each pair of a true label and a predicted label, as indices; zeros may be missing."""


def render_confusion(
    counts: ConfusionCounts, labels: Sequence[str], true_labels: Sequence[int] | None = None
) -> str:
    """Render a matrix, or the most frequent confusions of more than `MAX_MATRIX_LABELS` labels.

    `true_labels` are the indices of the labels that have images; by default all. A last column then counts
    the predictions of other labels.
    """
    shown_labels = list(range(len(labels)) if true_labels is None else true_labels)
    head = "<h2>Confusion</h2><p class='note'>Rows are true labels, columns are predicted labels.</p>"
    if len(shown_labels) > MAX_MATRIX_LABELS:
        return head + _render_confusion_pairs(counts, labels)
    column_names = [labels[index] for index in shown_labels]
    lines = [[counts.get((row, column), 0) for column in shown_labels] for row in shown_labels]
    if len(shown_labels) < len(labels):
        column_names.append("other labels")
        totals = dict.fromkeys(shown_labels, 0)
        for (row, _), count in counts.items():
            totals[row] += count
        lines = [[*line, totals[row] - sum(line)] for row, line in zip(shown_labels, lines, strict=True)]
    top = "".join(
        f"<th class='top' title='{escape(label)}'><span>{escape(label)}</span></th>" for label in column_names
    )
    rows = "".join(
        f"<tr><th class='side' title='{escape(labels[row])}'>{escape(labels[row])}</th>"
        + "".join(_render_cell(count, sum(line)) for count in line)
        + "</tr>"
        for row, line in zip(shown_labels, lines, strict=True)
    )
    return f"{head}<div class='card'><table class='confusion'><tr><th></th>{top}</tr>{rows}</table></div>"


def _render_cell(count: int, row_total: int) -> str:
    share = count / max(row_total, 1)
    return (
        f"<td style='--share:{share:.3f}'{' class=strong' if share > _DARK_SHARE else ''}>{count or ''}</td>"
    )


def find_confusions(counts: ConfusionCounts, max_pairs: int) -> list[tuple[int, int, int]]:
    """Return the most frequent confusions as (true label, predicted label, images), the largest first."""
    pairs = [
        (true, predicted, count) for (true, predicted), count in counts.items() if true != predicted and count
    ]
    return sorted(pairs, key=lambda pair: (-pair[2], pair[:2]))[:max_pairs]


def _render_confusion_pairs(counts: ConfusionCounts, labels: Sequence[str]) -> str:
    """Render a table of the most frequent confusions."""
    body = "".join(
        f"<tr><td class='wrap'>{escape(labels[true_label])}</td><td class='wrap'>{escape(labels[predicted_label])}</td><td class='number'>{count}</td></tr>"
        for true_label, predicted_label, count in find_confusions(counts, MAX_MATRIX_LABELS)
    )
    return f"<div class='card'><table><tr><th>true</th><th>predicted</th><th class='number'>images</th></tr>{body}</table></div>"


@dataclass(frozen=True)
class LabelRow:
    """One label in the table of labels."""

    label: str
    score: LabelScore
    train_images: int | None = None
    """Number of images that the model was trained on; None for a table without this column."""
    threshold: float | None = None
    """Probability from which the label is selected; None for a table without this column."""


def render_labels(rows: Sequence[LabelRow], note: str = "") -> str:
    """Render precision and recall of each label. `note` is a further sentence."""
    has_train_images, has_thresholds = (
        any(value is not None for value in values)
        for values in zip(*((row.train_images, row.threshold) for row in rows), strict=True)
    )
    body = "".join(
        f"<tr><td class='wrap'>{escape(row.label)}</td>"
        + (_render_number(row.train_images) if has_train_images else "")
        + _render_number(row.score.images)
        + "".join(map(_render_share, (row.score.precision, row.score.recall, row.score.f1)))
        + (f"<td class='number'>{row.threshold:.3f}</td>" if row.threshold is not None else "")
        + "</tr>"
        for row in rows[:_MAX_ROWS]
    )
    more = len(rows) - _MAX_ROWS
    rest = f"<p class='note'>and {format_number(more)} more labels</p>" if more > 0 else ""
    first = "<th class='number'>training images</th>" if has_train_images else ""
    last = "<th class='number'>threshold</th>" if has_thresholds else ""
    return (
        "<h2>Labels</h2><p class='note'>Precision: fraction of the images with this predicted label that have it. "
        f"Recall: fraction of the images with this true label for which it is predicted.{escape(f' {note}' if note else '')}</p>"
        f"<div class='card'><table><tr><th>label</th>{first}<th class='number'>measured images</th>"
        f"<th class='number'>precision</th><th class='number'>recall</th><th class='number'>F1</th>{last}</tr>"
        f"{body}</table>{rest}</div>"
    )


@dataclass(frozen=True)
class Mistake:
    """An image with a wrong label."""

    predicted_label: str
    true_label: str
    confidence: float
    """Probability of the predicted label."""
    picture: str | None
    """Thumbnail as a data URI; None if the image cannot be read."""
    path: str = ""
    """Path of the image, for people."""


def render_mistakes(mistakes: Sequence[Mistake], mistake_count: int, image_count: int) -> str:
    """Render the most confident of `mistake_count` mistakes among `image_count` images."""
    if not mistake_count:
        return "<h2>Mistakes</h2><p class='note'>None.</p>"
    figures = "".join(map(_render_mistake, mistakes))
    return (
        f"<h2>Mistakes</h2><p class='note'>{format_number(mistake_count)} of {format_number(image_count)} images have a wrong label; these "
        f"mistakes have the highest confidence.</p><div class='mistakes'>{figures}</div>"
    )


def _render_mistake(mistake: Mistake) -> str:
    picture = (
        f"<img alt='' src='{mistake.picture}'>"
        if mistake.picture
        else "<div class='missing'>no picture</div>"
    )
    path = f"<br><span class='path'>{escape(mistake.path)}</span>" if mistake.path else ""
    return (
        f"<figure>{picture}<figcaption><em>{escape(mistake.predicted_label)}</em> {mistake.confidence:.1%}<br>"
        f"true label: {escape(mistake.true_label)}{path}</figcaption></figure>"
    )


def render_facts(heading: str, facts: Mapping[str, Any]) -> str:
    """Render a table of names and values."""
    rows = "".join(
        f"<tr><td>{escape(name.replace('_', ' '))}</td><td class='wrap'>{escape(_format_value(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<h2>{escape(heading)}</h2><div class='card'><table>{rows}</table></div>"


# --- formatting ----------------------------------------------------------------------------------


def format_number(number: int) -> str:
    """Format a number with separators of thousands."""
    return f"{number:,}"


def to_data_uri(picture: bytes, kind: Literal["png", "jpeg"]) -> str:
    """Return an encoded image as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _render_number(number: int | None) -> str:
    return f"<td class='number'>{'–' if number is None else format_number(number)}</td>"


def _render_share(value: float | None) -> str:
    if value is None:
        return "<td class='number'>–</td>"
    return f"<td class='number'>{value:.1%}<span class='bar'><i style='width:{value:.1%}'></i></span></td>"


def _format_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
