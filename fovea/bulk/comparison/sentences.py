"""Sentences about a comparison, for the terminal and for the report."""

from __future__ import annotations

from typing import Final

from fovea.bulk.comparison.folder_comparison import FolderComparison
from fovea.model.data.inventory import format_count, join_names
from fovea.service.artifact.contract import Task

_MAX_NAMES: Final = 5
"""Number of folders, or of labels, in one sentence."""


def format_images(count: int) -> str:
    """Format a number of images."""
    return "1 image" if count == 1 else f"{count:,} images"


def list_measurement_sentences(comparison: FolderComparison) -> list[str]:
    """Return sentences on the images that were measured, and on those that were not."""
    labels = format_count(len(comparison.true_indices), "label")
    sentences = [
        "The true label of an image is the name of its folder. "
        f"Measured: {format_images(comparison.image_count)} of {labels} out of {len(comparison.labels)}, "
        f"{comparison.task.value}."
    ]
    if comparison.task is Task.MULTILABEL:
        sentences.append(
            "The model may give an image several labels; only the most probable one counts here."
        )
    if comparison.unlabelled_count:
        sentences.append(
            f"Not measured: {format_images(comparison.unlabelled_count)} in folders "
            "that are named after no label."
        )
    if comparison.error_counts:
        errors = ", ".join(f"{count:,} {code}" for code, count in comparison.error_counts.most_common())
        sentences.append(
            f"Not measured: {format_images(comparison.error_counts.total())} without an answer ({errors})."
        )
    return sentences


def describe_no_match(comparison: FolderComparison) -> str:
    """Return a sentence that says why no image could be measured."""
    folders = [folder for folder, _ in comparison.unknown_folders.most_common(_MAX_NAMES + 1)]
    if not folders:
        return "no image has an answer and a folder"
    return (
        f"no folder is named after a label of the model; folders: {join_names(folders, _MAX_NAMES)}; "
        f"labels: {join_names(comparison.labels, _MAX_NAMES)}"
    )
