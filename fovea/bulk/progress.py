"""Progress of a run on a terminal, and the line that says what it did."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from fovea.bulk.unfinished_run import Counts
from fovea.errors import FoveaError

_REFRESHES_PER_SECOND: Final = 4.0
"""Fewer than rich's ten: drawing takes processor time from the images."""


class BulkProgress:
    """A bar with images per second, errors and the time left, on stderr. Without a terminal it is silent."""

    def __init__(self, count_entries: Callable[[], int | None], finished: Counts) -> None:
        """Create the bar. Some entries were `finished` before; `count_entries` takes its time for all."""
        self._count_entries = count_entries
        console = Console(stderr=True, highlight=False)
        self._finished_before = finished.entries
        self._started_at = time.monotonic()
        self._progress = Progress(
            BarColumn(),
            TextColumn("{task.completed:,}"),
            _TotalColumn(),
            _RateColumn(),
            TextColumn("{task.fields[errors]:,} errors"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            refresh_per_second=_REFRESHES_PER_SECOND,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "", total=None, completed=finished.entries, errors=finished.errors
        )

    def __enter__(self) -> BulkProgress:
        """Show the bar."""
        self._progress.start()
        if not self._progress.disable:
            # A daemon: no run waits for the end of the count.
            threading.Thread(target=self._show_total, name="count", daemon=True).start()
        return self

    def _show_total(self) -> None:
        with suppress(FoveaError, OSError):  # the run itself says what is wrong with a source
            self._progress.update(self._task, total=self._count_entries())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._progress.stop()

    def update(self, counts: Counts) -> None:
        """Show the numbers of all entries until now, with those that were finished before."""
        if not self._progress.disable:
            self._progress.update(self._task, completed=counts.entries, errors=counts.errors)

    def describe(self, counts: Counts) -> str:
        """Return a sentence about the whole run, in which `counts` entries were classified by now."""
        seconds = time.monotonic() - self._started_at
        number = counts.entries - self._finished_before
        parts = [f"{counts.images:,} {'image' if counts.images == 1 else 'images'}"]
        if self._finished_before:
            parts.append(f"{self._finished_before:,} of them finished before")
        if counts.errors:
            parts.append(f"{counts.errors:,} {'error' if counts.errors == 1 else 'errors'}")
        if counts.skipped:
            noun = "file" if counts.skipped == 1 else "files"
            parts.append(f"skipped {counts.skipped:,} {noun} without an image")
        if counts.selected != counts.images:
            parts.append(f"{counts.selected:,} selected")
        rate = f", {number / seconds:.3g} images/s" if seconds > 0 and number else ""
        return f"{', '.join(parts)} in {seconds:.1f} s{rate}"


class _TotalColumn(ProgressColumn):
    """The number of entries, if it is known."""

    def render(self, task: Task) -> Text:
        """Return the text."""
        return Text("images" if task.total is None else f"of {int(task.total):,} images")


class _RateColumn(ProgressColumn):
    """Entries per second during the last half minute."""

    def render(self, task: Task) -> Text:
        """Return the text."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.3g} images/s", style="green")
