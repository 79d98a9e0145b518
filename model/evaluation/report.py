"""The training report, `report.html`: one self-contained file."""

from __future__ import annotations

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
from fovea.model.evaluation.report_page import (
    MAX_MISTAKES,
    LabelRow,
    Mistake,
    format_number,
    render_confusion,
    render_facts,
    render_head,
    render_labels,
    render_mistakes,
    render_page,
    render_warnings,
    to_data_uri,
)
from fovea.model.evaluation.scores import BINS
from fovea.model.networks.network import to_probabilities
from fovea.service.artifact.contract import Task
from fovea.service.atomic_files import write_file

_MAX_ROWS: Final = 200
"""Maximum number of table rows for the kinds of files that were left out."""


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
        render_warnings(
            [*data.inventory.notes, *data.warnings, *(f"skipped {line}" for line in data.unreadable_files)]
        ),
        _render_data(data),
        _render_curves(metadata["progress"]["history"]),
        _render_confusion(data, evaluation) if task is not Task.MULTILABEL else "",
        _render_labels(data, evaluation, calibration),
        _render_calibration(metadata, data, evaluation, calibration),
        _render_mistakes(data, evaluation),
        _render_facts(metadata),
    ]
    write_file(path, render_page(data.name, parts))


# --- sections ------------------------------------------------------------------------------------


def _render_head(metadata: dict[str, Any], data: Dataset, evaluation: _Evaluation) -> str:
    figures = metadata["measured"]
    history = metadata["progress"]["history"]
    minutes = sum(epoch["seconds"] for epoch in history) / 60
    items = [
        (
            f"{figures['accuracy']:.2%}",
            f"{evaluation.part} accuracy, {format_number(figures['images'])} images",
        ),
        (
            f"{figures['ece']:.4f}",
            f"calibration error, {figures['ece_before']:.4f} before temperature scaling",
        ),
        (
            format_number(metadata["parameters"]),
            f"parameters, {metadata['net']['name']} at {metadata['net']['size']} px",
        ),
        (f"{minutes:.1f} min", f"for {len(history)} epochs of {format_number(len(data.train))} images"),
    ]
    if evaluation.part == "test":
        note = "Accuracy is measured on test images, which were used neither for training nor for any choice."
    else:
        note = "There are no test images: all figures are measured on the held-out images that also determined temperature and thresholds."
    return render_head(data.name, f"{len(data.labels)} labels, {data.task.value}. {note}", items)


def _render_data(data: Dataset) -> str:
    """Render the detected data layout and the files that were left out."""
    if not data.inventory.file_count:
        return ""
    lines = data.description[: -len(data.inventory.skipped_files) or None]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    rows = "".join(
        f"<tr><td class='wrap'>{escape(group.kind)}</td><td class='wrap'>{escape(group.reason)}</td>"
        f"<td class='number'>{format_number(len(group.names))}</td><td class='wrap'>{escape(join_names(group.names, 10))}</td></tr>"
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
    matrix = metrics.confusion_matrix(evaluation.predictions, evaluation.examples.targets, len(data.labels))
    pairs = matrix.nonzero()  # (pairs, 2)
    counts = matrix[pairs[:, 0], pairs[:, 1]]
    return render_confusion(
        {
            (true, predicted): count
            for (true, predicted), count in zip(pairs.tolist(), counts.tolist(), strict=True)
        },
        data.labels,
    )


def _render_labels(data: Dataset, evaluation: _Evaluation, calibration: Calibration) -> str:
    scores = metrics.label_scores(evaluation.predictions, evaluation.examples.targets, len(data.labels))
    limits: Sequence[float | None] = [None] * len(data.labels)
    if data.task is Task.MULTILABEL:
        limits = calibration.thresholds
    rows = [
        LabelRow(label, score, train_count, limit)
        for label, train_count, score, limit in zip(
            data.labels, data.label_counts, scores, limits, strict=True
        )
    ]
    threshold_note = ""
    if data.task is Task.BINARY:
        threshold_note = (
            f"{data.labels[1]} is predicted if its probability is at least {calibration.thresholds[0]:.3f}."
        )
    return render_labels(rows, threshold_note)


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
        f"{figures['ece']:.4f} ({BINS} bins of equal mass).{coverage_note}</p>"
        f"<div class='row'><div class='card'>{render_legend(('orange', 'uncalibrated'), ('blue', 'calibrated'))}"
        f"{plot_reliability([('orange', bins_before), ('blue', bins_after)])}</div>{sets}</div>"
    )


def _render_mistakes(data: Dataset, evaluation: _Evaluation) -> str:
    if data.task is Task.MULTILABEL:
        return ""
    confidence = evaluation.calibrated_probabilities.gather(1, evaluation.predictions[:, None])[:, 0]  # (N,)
    error_rows = (evaluation.predictions != evaluation.examples.targets).nonzero().flatten()  # (mistakes,)
    worst_rows = error_rows[confidence[error_rows].argsort(descending=True)][:MAX_MISTAKES]
    pictures = evaluation.examples.pixels[worst_rows] if len(worst_rows) else ()
    mistakes = [
        Mistake(data.labels[predicted_label], data.labels[true_label], share, _to_data_uri(picture))
        for picture, predicted_label, true_label, share in zip(
            pictures,
            evaluation.predictions[worst_rows].tolist(),
            evaluation.examples.targets[worst_rows].tolist(),
            confidence[worst_rows].tolist(),
            strict=True,
        )
    ]
    return render_mistakes(mistakes, len(error_rows), len(evaluation.predictions))


def _render_facts(metadata: dict[str, Any]) -> str:
    facts = {
        "command": metadata["command"],
        "commit": metadata["commit"],
        "hardware": metadata["hardware"],
        "torch": metadata["torch"],
    }
    return render_facts("Training run", facts | metadata["recipe"])


def _to_data_uri(pixels: Tensor) -> str:
    """Return an image, uint8 (H, W, 3), as a data URI."""
    buffer = BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG", optimize=True)
    return to_data_uri(buffer.getvalue(), "png")
