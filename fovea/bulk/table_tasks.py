"""Tasks with a finished table: the comparison with the names of folders, and the sorting into folders."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fovea.bulk.comparison.folder_comparison import compare_rows
from fovea.bulk.comparison.html_report import write_html_report
from fovea.bulk.comparison.terminal_report import print_comparison
from fovea.bulk.comparison.thumbnails import make_thumbnails
from fovea.bulk.finished_table import FinishedTable
from fovea.bulk.inputs.basic_entries import FileEntry, to_path, to_text
from fovea.bulk.rows import Row
from fovea.bulk.run_options import RunOptions
from fovea.bulk.sorting.names import name_folders
from fovea.bulk.sorting.plan import plan_sorting
from fovea.bulk.sorting.sorter import Action, Sorter
from fovea.bulk.table_facts import find_facts_file
from fovea.bulk.table_run import is_same_file
from fovea.errors import StartError
from fovea.model.evaluation.report_page import REPORT_FILE
from fovea.service.artifact.contract import Contract
from fovea.service.image_files import ImageEntry

_MAX_FAILURES: Final = 5
"""Number of images that could not be sorted that are named on stderr."""


_REPORT_SUFFIXES: Final = frozenset({".html", ".htm"})
"""Ends of a report's name. With them, no report takes the place of a table or an image."""


@dataclass(frozen=True)
class TaskOptions:
    """The options of the command that use the finished table."""

    labels_from: Literal["folders"] | None = None
    report: Path | None = None
    """File of the report; by default `report.html` beside the table."""
    copy_to: Path | None = None
    move_to: Path | None = None
    dry_run: bool = False

    def __bool__(self) -> bool:
        """Return whether there is anything to do."""
        return self.labels_from is not None or self.sorting is not None

    @property
    def sorting(self) -> tuple[Action, Path] | None:
        """What to do with the images and where; None to leave them."""
        if self.move_to is not None:
            return Action.MOVE, self.move_to
        return None if self.copy_to is None else (Action.COPY, self.copy_to)

    def find_report(self, out: Path) -> Path:
        """Return the file of the report."""
        return out.with_name(REPORT_FILE) if self.report is None else self.report

    def check(self, out: Path | None, *, may_replace: bool, sources: Sequence[str] = ()) -> None:
        """Raise `StartError` for options that contradict each other, before any image is read.

        `may_replace` allows an existing report, as --force and --resume do. No report replaces a source.
        """
        if self.copy_to is not None and self.move_to is not None:
            raise StartError("--copy-to and --move-to exclude each other; give one of them")
        if self.dry_run and self.sorting is None:
            raise StartError("--dry-run shows what --copy-to or --move-to would do; give one of them")
        if self.report is not None and self.labels_from is None:
            raise StartError("--report needs --labels-from folders")
        if self and out is None:
            name = "--labels-from" if self.labels_from else "--move-to" if self.move_to else "--copy-to"
            raise StartError(f"{name} needs --out: the labels of all images are in the table")
        if out is not None and self.labels_from is not None:
            report = self.find_report(out)
            if report.is_dir():
                raise StartError(f"--report is the folder {report}; give the name of a file in it")
            if report.suffix.lower() not in _REPORT_SUFFIXES:
                raise StartError(f"--report is {str(report)!r}; end the name with .html")
            if any(is_same_file(report, one) for one in (*map(Path, sources), out, find_facts_file(out))):
                raise StartError(f"--report {report} is a source or the table too; give it another name")
            if report.exists() and not may_replace:
                raise StartError(f"{report} exists; replace it with --force, or name another with --report")
        if self.sorting is not None and self.sorting[1].exists() and not self.sorting[1].is_dir():
            raise StartError(f"{self.sorting[1]} is no folder; images cannot be sorted into it")


class TableTasks:
    """The work that the options ask for, on a finished table."""

    def __init__(
        self,
        options: TaskOptions,
        table: FinishedTable,
        contract: Contract,
        *,
        list_entries: Callable[[], Iterator[ImageEntry]],
        max_bytes: int,
        max_pixels: int,
    ) -> None:
        """Create the tasks for a table of the model with this contract.

        `list_entries` lists the sources once more; images have at most `max_bytes` bytes and `max_pixels`
        pixels.
        """
        self._options, self._table, self._contract = options, table, contract
        self._list_entries, self._max_bytes, self._max_pixels = list_entries, max_bytes, max_pixels

    def run(self) -> bool:
        """Compare first, because images may then be moved. Return whether all images were sorted.

        Raises `StartError` for a damaged table and for one with labels of another model, before any image is
        moved; and `WriteError`.
        """
        if self._options.labels_from is not None:
            self._compare(self._check_rows())
        if self._options.sorting is None:
            return True
        if self._options.labels_from is None:
            deque(self._check_rows(), maxlen=0)
        action, folder = self._options.sorting
        return self._sort(self._table.read_rows(), action, folder)

    def _check_rows(self) -> Iterator[Row]:
        """Yield the rows. Raises `StartError` for a label that the model does not have."""
        labels = frozenset(self._contract.labels)
        for row in self._table.read_rows():
            if row.label is not None and row.label not in labels:
                raise StartError(
                    f"{self._table.path} has the label {row.label!r}, which the model does not have: another "
                    "model made the table, or it was changed; name that model, or another table with --out"
                )
            yield row

    def _compare(self, rows: Iterator[Row]) -> None:
        contract = self._contract
        comparison = compare_rows(rows, contract.labels, contract.task, contract.thresholds)
        print_comparison(Console(highlight=False), comparison)
        paths = (to_path(one.path) for one in comparison.mistakes)
        files = (FileEntry(path) for path in paths if os.path.lexists(path))
        thumbnails = make_thumbnails(
            chain(files, self._list_entries()),  # sources are listed for images that are no files
            comparison.mistakes,
            max_bytes=self._max_bytes,
            max_pixels=self._max_pixels,
        )
        report = self._options.find_report(self._table.path)
        title, facts = describe_options(self._table.read_options())
        write_html_report(report, comparison, title=title, facts=facts, thumbnails=thumbnails)
        print(f"wrote {report}")

    def _sort(self, rows: Iterator[Row], action: Action, folder: Path) -> bool:
        sorter = Sorter(folder, action, list_entries=self._list_entries, max_bytes=self._max_bytes)
        planned_files = plan_sorting(rows, folder, name_folders(self._contract.labels))
        if self._options.dry_run:
            count = 0
            for line in sorter.preview(planned_files):
                count += line.target is not None
                outcome = line.reason if line.target is None else f"-> {to_one_name(str(line.target))}"
                print(f"{to_one_name(line.source)} {outcome}")
            print(f"fovea: {count:,} images would be {action.value}; nothing was done", file=sys.stderr)
            return True
        console = Console(stderr=True, highlight=False)
        columns = TextColumn(f"{action.value} {{task.completed:,}} images"), BarColumn()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=None)
            try:
                summary = sorter.sort(planned_files, lambda: bar.advance(task))
            except KeyboardInterrupt:
                done = sorter.summary.describe(action, folder)
                print(f"fovea: interrupted; {done}; continue with --resume", file=sys.stderr)
                raise
        print(summary.describe(action, folder))
        for failure in summary.failures[:_MAX_FAILURES]:
            print(f"fovea: {to_one_name(failure.source)}: {failure.message}", file=sys.stderr)
        return not summary.failure_count


def to_one_name(path: str) -> str:
    r"""Return a path for a line of its own: control characters become `\n` or `\x1b`."""
    return "".join(repr(one)[1:-1] if unicodedata.category(one) in ("Cc", "Cs") else one for one in path)


def describe_options(options: RunOptions) -> tuple[str, dict[str, str]]:
    """Return the title and the facts of a report on the table of a run with these options."""
    model = f"{options.facts.model} version {options.facts.version}"
    sources = list(map(to_text, options.sources))
    facts = {"model": model, "SHA-256": options.facts.digest, "sources": ", ".join(sources)}
    if options.where is not None:
        facts["only images with"] = options.where
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    return f"{model} on {''.join(sources[:1])}{more}", facts
