"""The comparison as text for the terminal."""

from __future__ import annotations

from typing import Final

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fovea.bulk.comparison.folder_comparison import FolderComparison
from fovea.bulk.comparison.sentences import describe_no_match, format_images, list_measurement_sentences
from fovea.model.data.inventory import to_printable
from fovea.model.evaluation.report_page import find_confusions
from fovea.model.evaluation.scores import LabelScore

_MAX_MATRIX_LABELS: Final = 12
"""Maximum number of labels for a matrix; above it, the most frequent confusions are listed."""

_HEADING_WIDTHS: Final = (12, 8, 5)
"""Widest label above a column of a matrix, in cells of the terminal: the first with which the matrix fits."""

_COUNT_WIDTH: Final = 3
"""Narrowest column of a matrix in cells of the terminal."""

_MAX_ROWS: Final = 30
"""Maximum number of labels in the table; above it, those with the lowest recall are listed."""

_MAX_CONFUSIONS: Final = 10
_MAX_MISTAKES: Final = 5
_MAX_FOLDERS: Final = 10
_MAX_FAILURES: Final = 5


def print_comparison(console: Console, comparison: FolderComparison) -> None:
    """Print accuracy, labels, confusions, the most confident mistakes, and what was not measured."""
    for sentence in list_measurement_sentences(comparison):
        _print_line(console, sentence)
    if not comparison.image_count:
        _print_line(console, describe_no_match(comparison), "yellow")
    else:
        for number, figure in enumerate(_list_figures(comparison)):
            _print_line(console, figure, "" if number else "bold")
        _print_label_table(console, comparison)
        _print_confusions(console, comparison)
        _print_line(console, "")
        for mistake in comparison.mistakes[:_MAX_MISTAKES]:
            _print_line(
                console,
                f"mistake: {mistake.path}: {mistake.predicted_label} {mistake.probability:.1%}, "
                f"true label {mistake.true_label}",
            )
    for sentence in comparison.list_unknown_folders(_MAX_FOLDERS):
        _print_line(console, f"folder {sentence}", "yellow")
    more = len(comparison.unknown_folders) - _MAX_FOLDERS
    if more > 0:
        _print_line(console, f"and {more} more folders that are named after no label", "yellow")
    for failure in comparison.failures[:_MAX_FAILURES]:
        _print_line(console, f"{failure.path}: {failure.code}: {failure.message}", "red")


def _print_line(console: Console, text: str, style: str = "") -> None:
    console.print(to_printable(text), style=style, markup=False, highlight=False, soft_wrap=True)


def _list_figures(comparison: FolderComparison) -> list[str]:
    low, high = comparison.interval
    figures = [
        f"accuracy {comparison.accuracy:.2%} of {format_images(comparison.image_count)} "
        f"(95% interval {low:.1%} to {high:.1%})"
    ]
    if comparison.top_accuracy is not None:
        figures.append(f"true label among the first {comparison.top_k}: {comparison.top_accuracy:.2%}")
    if comparison.threshold_accuracy is not None:
        figures.append(
            f"accuracy at the threshold {comparison.threshold:.3f}: {comparison.threshold_accuracy:.2%}"
        )
    figures.append(f"mean recall {comparison.mean_recall:.2%}")
    figures.append(f"calibration error {comparison.calibration_error:.4f}")
    if comparison.set_count:
        figures.append(
            f"label sets with the true label {comparison.covered_count / comparison.set_count:.1%}, "
            f"{comparison.set_label_count / comparison.set_count:.2f} labels per set"
        )
    if comparison.known_count + comparison.unknown_count:
        figures.append(f"unlike the training images: {format_images(comparison.unknown_count)}")
    return figures


def _print_label_table(console: Console, comparison: FolderComparison) -> None:
    scores = comparison.scores
    _print_line(console, "")
    if len(scores) > _MAX_ROWS:
        _print_line(console, f"The {_MAX_ROWS} labels with the lowest recall, of {len(scores)}:")
        scores = sorted(scores, key=_rate_recall)[:_MAX_ROWS]
    table = Table(box=None, padding=(0, 1))
    table.add_column("label", overflow="fold")
    for name in ("images", "precision", "recall", "F1"):
        table.add_column(name, justify="right")
    for label, score in scores:
        shares = (score.precision, score.recall, score.f1)
        table.add_row(Text(label), f"{score.images:,}", *map(_format_share, shares))
    console.print(table)


def _rate_recall(entry: tuple[str, LabelScore]) -> float:
    """Return the recall; labels without images come last."""
    recall = entry[1].recall
    return 2.0 if recall is None else recall


def _format_share(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _print_confusions(console: Console, comparison: FolderComparison) -> None:
    """Print the matrix, or the most frequent confusions where the matrix would be too wide."""
    is_small = len(comparison.true_indices) <= _MAX_MATRIX_LABELS
    for heading_width in _HEADING_WIDTHS if is_small else ():
        table = _create_matrix(comparison, heading_width)
        if table.__rich_measure__(console, console.options).minimum <= console.width:
            _print_line(console, "\nRows are true labels, columns are predicted labels:")
            console.print(table)
            return
    _print_line(console, "\nThe most frequent confusions:")
    console.print(_create_pair_table(comparison))


def _create_matrix(comparison: FolderComparison, heading_width: int) -> Table:
    indices = comparison.true_indices
    table = Table(box=None, padding=(0, 1))
    labels = [comparison.labels[index] for index in indices]
    headings = [_shorten(label, heading_width) for label in labels]
    has_others = len(indices) < len(comparison.labels)
    for heading in (Text(), *headings, *([Text("other labels")] if has_others else [])):
        width = max(cell_len(heading.plain), _COUNT_WIDTH) if heading else None
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True, min_width=width)
    row_headings = [_shorten(label, _HEADING_WIDTHS[0]) for label in labels]
    for row, heading in zip(indices, row_headings, strict=True):
        counts = [comparison.counts[row, column] for column in indices]
        if has_others:
            total = sum(count for (true, _), count in comparison.counts.items() if true == row)
            counts.append(total - sum(counts))
        table.add_row(heading, *(f"{count:,}" if count else "·" for count in counts))
    table.columns[0].min_width = max((cell_len(heading.plain) for heading in row_headings), default=0)
    return table


def _shorten(label: str, width: int) -> Text:
    """Return a label of at most `width` cells."""
    text = Text(label)
    text.truncate(width, overflow="ellipsis")
    return text


def _create_pair_table(comparison: FolderComparison) -> Table:
    table = Table(box=None, padding=(0, 1))
    table.add_column("true", overflow="fold")
    table.add_column("predicted", overflow="fold")
    table.add_column("images", justify="right")
    for true, predicted, count in find_confusions(comparison.counts, _MAX_CONFUSIONS):
        table.add_row(Text(comparison.labels[true]), Text(comparison.labels[predicted]), f"{count:,}")
    return table
