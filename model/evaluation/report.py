"""The training report, `report.html`: one self-contained file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from PIL import Image
from torch import Tensor

from fovea.model.data.dataset import Dataset, Examples
from fovea.model.data.inventory import join_names
from fovea.model.evaluation import metrics
from fovea.model.evaluation.calibration import Calibration
from fovea.model.evaluation.plots import plot_curves, plot_reliability, render_legend
from fovea.model.networks.network import to_probabilities
from fovea.service.artifact.contract import Task
from fovea.service.atomic_files import write_file

REPORT_FILE: Final = "report.html"

_MAX_MATRIX_LABELS: Final = 30
"""Maximum number of labels for a confusion matrix; above it, the most frequent confusions are listed."""

_DARK_SHARE: Final = 0.8
"""Share of a row from which a cell is dark and its text white."""

_MAX_MISTAKES: Final = 24
"""Number of thumbnails of the most confident mistakes."""

_MAX_ROWS: Final = 200
"""Maximum number of table rows (labels) or list items (warnings)."""


@dataclass(frozen=True)
class _Evaluation:
    """The measured images and the predictions for them."""

    part: str
    examples: Examples
    raw_probabilities: Tensor
    """Probabilities without temperature scaling, float32 (N, labels)."""
    calibrated_probabilities: Tensor
    predictions: Tensor


def write_report(
    path: Path, metadata: dict[str, Any], data: Dataset, part: str, logits: Tensor, calibration: Calibration
) -> None:
    """Write the report; `logits`, float32 (N, n), belong to the images in `part` of `data`."""
    task, calibrated_probabilities = data.task, to_probabilities(logits, data.task, calibration.temperature)
    predictions = metrics.choose_labels(calibrated_probabilities, task, calibration.thresholds)
    evaluation = _Evaluation(
        part, getattr(data, part), to_probabilities(logits, task), calibrated_probabilities, predictions
    )
    parts = [
        _render_head(metadata, data, evaluation),
        _render_warnings(data),
        _render_data(data),
        _render_curves(metadata["progress"]["history"]),
        _render_confusion(data, evaluation) if task is not Task.MULTILABEL else "",
        _render_labels(data, evaluation, calibration),
        _render_calibration(metadata, data, evaluation, calibration),
        _render_mistakes(data, evaluation),
        _render_facts(metadata),
    ]
    style = Path(__file__).with_suffix(".css").read_text()
    write_file(
        path,
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(data.name)}</title><style>{style}</style><main>{''.join(parts)}</main></html>\n",
    )


# --- sections ------------------------------------------------------------------------------------


def _render_head(metadata: dict[str, Any], data: Dataset, evaluation: _Evaluation) -> str:
    figures = metadata["measured"]
    history = metadata["progress"]["history"]
    minutes = sum(epoch["seconds"] for epoch in history) / 60
    items = [
        (
            f"{figures['accuracy']:.2%}",
            f"{evaluation.part} accuracy, {_format_number(figures['images'])} images",
        ),
        (
            f"{figures['ece']:.4f}",
            f"calibration error, {figures['ece_before']:.4f} before temperature scaling",
        ),
        (
            _format_number(metadata["parameters"]),
            f"parameters, {metadata['net']['name']} at {metadata['net']['size']} px",
        ),
        (f"{minutes:.1f} min", f"for {len(history)} epochs of {_format_number(len(data.train))} images"),
    ]
    cards = "".join(
        f'<div class="figure"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for value, name in items
    )
    if evaluation.part == "test":
        note = "Accuracy is measured on test images, which were used neither for training nor for any choice."
    else:
        note = "There are no test images: all figures are measured on the held-out images that also determined temperature and thresholds."
    return (
        f"<h1>{escape(data.name)}</h1><p class='note'>{len(data.labels)} labels, {data.task.value}. {note}</p>"
        f'<div class="figures">{cards}</div>'
    )


def _render_warnings(data: Dataset) -> str:
    lines = [*data.inventory.notes, *data.warnings, *(f"skipped {line}" for line in data.unreadable_files)]
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines[:_MAX_ROWS])
    more = f"<p class='note'>and {len(lines) - _MAX_ROWS} more</p>" if len(lines) > _MAX_ROWS else ""
    open_attribute = " open" if len(lines) <= 5 else ""
    return (
        f"<h2>Warnings</h2><details{open_attribute}><summary>{len(lines)}</summary>"
        f'<ul class="warnings">{items}</ul>{more}</details>'
    )


def _render_data(data: Dataset) -> str:
    """Render the detected data layout and the files that were left out."""
    if not data.inventory.file_count:
        return ""
    lines = data.description[: -len(data.inventory.skipped_files) or None]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    rows = "".join(
        f"<tr><td class='wrap'>{escape(group.kind)}</td><td class='wrap'>{escape(group.reason)}</td>"
        f"<td class='number'>{_format_number(len(group.names))}</td><td class='wrap'>{escape(join_names(group.names, 10))}</td></tr>"
        for group in data.inventory.skipped_files[:_MAX_ROWS]
    )
    table = (
        "<div class='card'><table><tr><th>left out</th><th>reason</th><th class='number'>files</th><th>examples</th></tr>"
        f"{rows}</table></div>"
        if rows
        else ""
    )
    return f"<h2>Data</h2><ul>{items}</ul>{table}"


def _render_curves(history: Sequence[dict[str, float]]) -> str:
    if not history:
        return ""
    loss_plot = plot_curves([("blue", [epoch["loss"] for epoch in history])], percent=False)
    accuracy_plot = plot_curves(
        [
            ("blue", [epoch["train_accuracy"] for epoch in history]),
            ("orange", [epoch["validation_accuracy"] for epoch in history]),
        ],
        percent=True,
    )
    return (
        "<h2>Learning</h2><p class='note'>Training loss and accuracy are measured on augmented images, while the network still changes."
        f"</p><div class='row'><div class='card'>{render_legend(('blue', 'loss'))}{loss_plot}</div><div class='card'>"
        f"{render_legend(('blue', 'training accuracy'), ('orange', 'validation accuracy'))}{accuracy_plot}</div></div>"
    )


def _render_confusion(data: Dataset, evaluation: _Evaluation) -> str:
    counts = metrics.confusion_matrix(evaluation.predictions, evaluation.examples.targets, len(data.labels))
    head = "<h2>Confusion</h2><p class='note'>Rows are true labels, columns are predicted labels.</p>"
    if len(data.labels) > _MAX_MATRIX_LABELS:
        return head + _render_confusion_pairs(counts, data.labels)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    top = "".join(
        f"<th class='top' title='{escape(label)}'><span>{escape(label)}</span></th>" for label in data.labels
    )
    rows = "".join(
        f"<tr><th class='side' title='{escape(label)}'>{escape(label)}</th>"
        + "".join(
            f"<td style='--share:{share:.3f}'{' class=strong' if share > _DARK_SHARE else ''}>{count or ''}</td>"
            for count, share in zip(line.tolist(), part.tolist(), strict=True)
        )
        + "</tr>"
        for label, line, part in zip(data.labels, counts, shares, strict=True)
    )
    return f"{head}<div class='card'><table class='confusion'><tr><th></th>{top}</tr>{rows}</table></div>"


def _render_confusion_pairs(counts: Tensor, labels: Sequence[str]) -> str:
    """Render a table of the most frequent confusions."""
    error_counts = counts.clone().fill_diagonal_(0)
    top_errors = error_counts.flatten().topk(min(_MAX_MATRIX_LABELS, error_counts.numel()))
    rows = [
        (labels[index // len(labels)], labels[index % len(labels)], count)
        for count, index in zip(top_errors.values.tolist(), top_errors.indices.tolist(), strict=True)
        if count
    ]
    body = "".join(
        f"<tr><td class='wrap'>{escape(true_label)}</td><td class='wrap'>{escape(predicted_label)}</td><td class='number'>{count}</td></tr>"
        for true_label, predicted_label, count in rows
    )
    return f"<div class='card'><table><tr><th>true</th><th>predicted</th><th class='number'>images</th></tr>{body}</table></div>"


def _render_labels(data: Dataset, evaluation: _Evaluation, calibration: Calibration) -> str:
    scores = metrics.label_scores(evaluation.predictions, evaluation.examples.targets, len(data.labels))
    limits: Sequence[float | None] = [None] * len(data.labels)
    if data.task is Task.MULTILABEL:
        limits = calibration.thresholds
    rows = "".join(
        f"<tr><td class='wrap'>{escape(label)}</td><td class='number'>{_format_number(train_count)}</td>"
        f"<td class='number'>{_format_number(score.images)}</td>{_render_share(score.precision)}{_render_share(score.recall)}"
        f"{_render_share(score.f1)}"
        + (f"<td class='number'>{limit:.3f}</td>" if limit is not None else "")
        + "</tr>"
        for label, train_count, score, limit in list(
            zip(data.labels, data.label_counts, scores, limits, strict=True)
        )[:_MAX_ROWS]
    )
    more = len(data.labels) - _MAX_ROWS
    rest = f"<p class='note'>and {_format_number(more)} more labels</p>" if more > 0 else ""
    last = "<th class='number'>threshold</th>" if data.task is Task.MULTILABEL else ""
    threshold_note = ""
    if data.task is Task.BINARY:
        threshold_note = f" {escape(data.labels[1])} is predicted if its probability is at least {calibration.thresholds[0]:.3f}."
    return (
        "<h2>Labels</h2><p class='note'>Precision: fraction of the images with this predicted label that have it. "
        f"Recall: fraction of the images with this true label for which it is predicted.{threshold_note}</p><div class='card'><table>"
        "<tr><th>label</th><th class='number'>training images</th><th class='number'>measured images</th>"
        f"<th class='number'>precision</th><th class='number'>recall</th><th class='number'>F1</th>{last}</tr>"
        f"{rows}</table>{rest}</div>"
    )


def _render_calibration(
    metadata: dict[str, Any], data: Dataset, evaluation: _Evaluation, calibration: Calibration
) -> str:
    targets, figures = evaluation.examples.targets, metadata["measured"]
    bins_before, bins_after = (
        metrics.reliability_bins(one, targets, data.task)
        for one in (evaluation.raw_probabilities, evaluation.calibrated_probabilities)
    )
    rows = "".join(
        f"<tr><td class='number'>{level:.0%}</td><td class='number'>{share:.1%}</td><td class='number'>{size:.2f}</td></tr>"
        for level, share, size in figures["coverage"]
        if round(level * 100) in (80, 85, 90, 95, 98, 99)
    )
    sets = (
        "<div class='card'><table><tr><th class='number'>requested coverage</th><th class='number'>measured coverage</th>"
        f"<th class='number'>labels per set</th></tr>{rows}</table></div>"
        if rows
        else ""
    )
    coverage_note = " Coverage: fraction of the conformal sets that contain the true label." if rows else ""
    return (
        "<h2>Calibration</h2><p class='note'>Accuracy of the predictions against their confidence. Temperature "
        f"{calibration.temperature:.3f} changes the expected calibration error from {figures['ece_before']:.4f} to "
        f"{figures['ece']:.4f} ({metrics.BINS} bins of equal mass).{coverage_note}</p>"
        f"<div class='row'><div class='card'>{render_legend(('orange', 'uncalibrated'), ('blue', 'calibrated'))}"
        f"{plot_reliability(bins_before, bins_after)}</div>{sets}</div>"
    )


def _render_mistakes(data: Dataset, evaluation: _Evaluation) -> str:
    if data.task is Task.MULTILABEL:
        return ""
    confidence = evaluation.calibrated_probabilities.gather(1, evaluation.predictions[:, None])[:, 0]  # (N,)
    error_rows = (evaluation.predictions != evaluation.examples.targets).nonzero().flatten()  # (mistakes,)
    worst_rows = error_rows[confidence[error_rows].argsort(descending=True)][:_MAX_MISTAKES]
    if not len(worst_rows):
        return "<h2>Mistakes</h2><p class='note'>None.</p>"
    pictures = evaluation.examples.pixels[worst_rows]
    figures = "".join(
        f"<figure><img alt='' src='{_to_data_uri(picture)}'><figcaption><em>{escape(data.labels[predicted_label])}</em> {share:.1%}<br>"
        f"true label: {escape(data.labels[true_label])}</figcaption></figure>"
        for picture, predicted_label, true_label, share in zip(
            pictures, evaluation.predictions[worst_rows].tolist(), evaluation.examples.targets[worst_rows].tolist(), confidence[worst_rows].tolist(),
            strict=True,
        )
    )  # fmt: skip
    return (
        f"<h2>Mistakes</h2><p class='note'>{_format_number(len(error_rows))} of {_format_number(len(evaluation.predictions))} images have a wrong label; these "
        f"mistakes have the highest confidence.</p><div class='mistakes'>{figures}</div>"
    )


def _render_facts(metadata: dict[str, Any]) -> str:
    facts = {
        "command": metadata["command"],
        "commit": metadata["commit"],
        "hardware": metadata["hardware"],
        "torch": metadata["torch"],
    }
    facts |= {name: _format_value(value) for name, value in metadata["recipe"].items()}
    rows = "".join(
        f"<tr><td>{escape(name.replace('_', ' '))}</td><td class='wrap'>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<h2>Training run</h2><div class='card'><table>{rows}</table></div>"


# --- formatting ----------------------------------------------------------------------------------


def _render_share(value: float | None) -> str:
    if value is None:
        return "<td class='number'>–</td>"
    return f"<td class='number'>{value:.1%}<span class='bar'><i style='width:{value:.1%}'></i></span></td>"


def _to_data_uri(pixels: Tensor) -> str:
    """Return an image, uint8 (H, W, 3), as a data URI."""
    buffer = BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _format_number(number: int) -> str:
    return f"{number:,}"


def _format_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
