"""The import report on the terminal."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console

from fovea.export.importer.check_result import CheckReport
from fovea.export.importer.pipeline import ImportReport
from fovea.service.artifact.repository import MODEL_FILE


def show_report(report: ImportReport, out: Path) -> None:
    """Print the facts that were read, given and assumed, one per line, then the measurements."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for fact_name, fact in report.facts:
        console.print(f"{fact_name:<10}  {fact}")
    for agreement in report.agreement:
        logits = "" if agreement.logits is None else f", logits to {agreement.logits:.1e} of the largest"
        console.print(
            f"batch {agreement.batch}: probabilities agree with the file's to {agreement.probabilities:.1e}"
            f"{logits}"
        )
    console.print(
        f"golden set: {report.golden.images} images, logits to {report.golden.logit_difference:.1e}"
    )
    if report.check:
        _show_check_report(console, report.check)
    console.print(f"wrote {out / report.model / report.version / MODEL_FILE}, {report.bytes / 1e6:.1f} MB")
    console.print(f"next: fovea serve --models {shlex.quote(str(out))}")


def _show_check_report(console: Console, report: CheckReport) -> None:
    console.print(
        f"top-1 {report.top1:.2%}, top-5 {report.top5:.2%} of {report.images} images ({report.data})"
    )
    if len(report.others) > 1:
        console.print(f"recipes on {report.tried} of them:")
        for recipe, (top1, true) in report.others.items():
            console.print(f"  {recipe:<24}  top-1 {top1:.1%}, mean probability of the true label {true:.3f}")
    if report.unreadable:
        console.print(f"{len(report.unreadable)} files cannot be read, and were left out:")
        for path, reason in report.unreadable.items():
            console.print(f"  {path.encode(errors='replace').decode()}: {reason}")
