"""A comparison from rows to the report, for a process in which PyTorch cannot be imported."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fovea.bulk.comparison.folder_comparison import compare_rows
from fovea.bulk.comparison.html_report import write_html_report
from fovea.bulk.comparison.terminal_report import print_comparison
from fovea.bulk.comparison.thumbnails import make_thumbnails
from fovea.bulk.rows import Row
from fovea.service.artifact.contract import Task


def write_report(path: str) -> None:
    """Compare one row, print the comparison and write its report."""
    row = Row("/ant/1.jpg", "ant", 0.9, ("ant",), (0.9,), width=4, height=3)
    comparison = compare_rows([row], ("ant", "bee"), Task.MULTICLASS)
    print_comparison(Console(width=100), comparison)
    thumbnails = make_thumbnails([], comparison.mistakes, max_bytes=1, max_pixels=1)
    write_html_report(Path(path), comparison, title="photos", facts={}, thumbnails=thumbnails)
