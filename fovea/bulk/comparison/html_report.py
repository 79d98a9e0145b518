"""The comparison as `report.html`, with the parts of the training report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fovea.bulk.comparison.folder_comparison import ConfidentMistake, FolderComparison
from fovea.bulk.comparison.sentences import describe_no_match, format_images, list_measurement_sentences
from fovea.model.evaluation.plots import plot_reliability, render_legend
from fovea.model.evaluation.report_page import (
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
)
from fovea.model.evaluation.scores import BINS
from fovea.service.atomic_files import write_file

_MAX_FOLDERS = 100
"""Number of folders without a label that the report names."""


def write_html_report(
    path: Path,
    comparison: FolderComparison,
    *,
    title: str,
    facts: Mapping[str, str],
    thumbnails: Mapping[str, str],
) -> None:
    """Write the report. `facts` are shown at its end; `thumbnails` are data URIs by the path of the image.

    Raises `WriteError`.
    """
    write_file(path, render_html_report(comparison, title=title, facts=facts, thumbnails=thumbnails))


def render_html_report(
    comparison: FolderComparison, *, title: str, facts: Mapping[str, str], thumbnails: Mapping[str, str]
) -> str:
    """Return the page; see `write_html_report`."""
    unknown_folders = comparison.list_unknown_folders(_MAX_FOLDERS)
    parts = [
        render_head(title, " ".join(list_measurement_sentences(comparison)), _list_figures(comparison)),
        render_warnings(
            unknown_folders, heading="Folders without a label", count=len(comparison.unknown_folders)
        ),
        render_warnings(
            [f"{one.path}: {one.code}: {one.message}" for one in comparison.failures],
            heading="Images without an answer",
            count=comparison.error_counts.total(),
        ),
    ]
    if comparison.image_count:
        parts += [
            render_confusion(comparison.counts, comparison.labels, comparison.true_indices),
            render_labels([LabelRow(label, score) for label, score in comparison.scores]),
            _render_calibration(comparison),
            render_mistakes(
                [_to_mistake(one, thumbnails) for one in comparison.mistakes],
                comparison.image_count - comparison.correct_count,
                comparison.image_count,
            ),
        ]
    return render_page(title, [*parts, render_facts("Classification", facts)])


def _list_figures(comparison: FolderComparison) -> list[tuple[str, str]]:
    """Return the cards as (value, name) pairs."""
    if not comparison.image_count:
        return [("–", describe_no_match(comparison))]
    low, high = comparison.interval
    figures = [
        (
            f"{comparison.accuracy:.2%}",
            f"accuracy, {format_images(comparison.image_count)}; 95% interval {low:.1%} to {high:.1%}",
        )
    ]
    if comparison.top_accuracy is not None:
        figures.append((f"{comparison.top_accuracy:.2%}", f"true label among the first {comparison.top_k}"))
    if comparison.threshold_accuracy is not None:
        figures.append(
            (f"{comparison.threshold_accuracy:.2%}", f"accuracy at the threshold {comparison.threshold:.3f}")
        )
    figures += [
        (f"{comparison.mean_recall:.2%}", f"mean recall of {len(comparison.true_indices)} labels"),
        (f"{comparison.calibration_error:.4f}", "calibration error"),
    ]
    if comparison.set_count:
        mean_size = comparison.set_label_count / comparison.set_count
        figures.append(
            (
                f"{comparison.covered_count / comparison.set_count:.1%}",
                f"label sets with the true label, {mean_size:.2f} labels per set",
            )
        )
    if comparison.known_count + comparison.unknown_count:
        figures.append((format_number(comparison.unknown_count), "images unlike the training images"))
    return figures


def _render_calibration(comparison: FolderComparison) -> str:
    return (
        "<h2>Calibration</h2><p class='note'>Accuracy of the predictions against their confidence. "
        f"The expected calibration error is {comparison.calibration_error:.4f} ({BINS} bins of equal mass)."
        f"</p><div class='row'><div class='card'>{render_legend(('blue', 'predictions'))}"
        f"{plot_reliability([('blue', comparison.bins)])}</div></div>"
    )


def _to_mistake(mistake: ConfidentMistake, thumbnails: Mapping[str, str]) -> Mistake:
    return Mistake(
        mistake.predicted_label,
        mistake.true_label,
        mistake.probability,
        thumbnails.get(mistake.path),
        mistake.path,
    )
