"""A run of bulk classification: entries go through an engine into a table, which survives a kill."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Final, TypeVar

from fovea.bulk.conditions import Condition
from fovea.bulk.engine import ClassifiedChunk, Engine
from fovea.bulk.finished_table import FinishedTable
from fovea.bulk.inputs.patterns import PathPattern, is_pattern
from fovea.bulk.progress import BulkProgress
from fovea.bulk.rows import Row
from fovea.bulk.run_options import RunOptions
from fovea.bulk.table_facts import find_facts_file
from fovea.bulk.tables.table_format import TableFormat
from fovea.bulk.unfinished_run import Counts, UnfinishedRun
from fovea.errors import FoveaError, StartError
from fovea.service import __version__
from fovea.service.image_files import ImageEntry

_PART_IMAGES: Final = 1000
"""Number of entries in a part: a kill costs at most the work on these. Rounded up to whole chunks."""

_T = TypeVar("_T")


def check_output(out: Path, table_format: TableFormat, *, resume: bool, force: bool) -> bool:
    """Return whether there is work to do; False if `resume` meets a finished table.

    Raises `StartError` if the table or an unfinished run exists, and neither option says what to do.
    """
    if resume and force:
        raise StartError("--resume continues a run and --force begins it anew; give one of them")
    if out.is_dir():
        raise StartError(f"--out is the folder {out}; give the name of a file in it")
    if force:
        return True
    if UnfinishedRun(out, table_format).exists():
        if not resume:
            raise StartError(
                f"there is an unfinished run for {out}; continue it with --resume, or begin anew with --force"
            )
        return True
    if out.exists() and not resume:
        raise StartError(f"{out} exists; replace it with --force")
    return not out.exists()


def is_own_file(name: str, out: Path) -> bool:
    """Return whether a path is that of the table `out`, or of the facts beside it."""
    own_paths = out, find_facts_file(out)
    return name.endswith(tuple(path.name for path in own_paths)) and os.path.abspath(name) in {  # noqa: PTH100
        os.path.abspath(path)  # noqa: PTH100
        for path in own_paths
    }


def leave_out_table(
    sources: Sequence[str], out: Path, table_format: TableFormat, *, is_written: bool
) -> list[str]:
    """Return the sources without the table `out` of an earlier run and the facts beside it.

    A pattern that the shell expands names them. Raises `StartError` if no source is left. With `is_written`,
    also if the run would replace a source: a file `out` that is no such table, or that a pattern matches.
    """
    own_paths = out, find_facts_file(out)
    remaining = [
        source
        for source in sources
        if not is_own_file(source, out) and not any(is_same_file(source, path) for path in own_paths)
    ]
    if is_written and out.exists():
        advice = "the run would replace it; give the table another name"
        if len(remaining) < len(sources) and not FinishedTable(out, table_format).is_readable():
            raise StartError(f"--out {out} is a source too, and {advice}")
        for source in remaining:
            if is_pattern(source) and not os.path.lexists(source) and _matches(source, out):
                raise StartError(f"--out {out} is a source too, by the pattern {source!r}, and {advice}")
    if not remaining:
        raise StartError(f"--out {out} is the only source too; give the table another name")
    return remaining


def is_same_file(one: str | Path, other: str | Path) -> bool:
    """Return whether two paths lead to one file that exists."""
    try:
        return os.path.samefile(one, other)  # noqa: PTH121 - also for names with a null byte
    except (OSError, ValueError):
        return False


def _matches(pattern: str, path: Path) -> bool:
    """Return whether a pattern of paths matches the path of a file."""
    parsed = PathPattern(pattern)
    folder, location = Path(parsed.folder).resolve(), path.parent.resolve() / path.name
    return location.is_relative_to(folder) and parsed.matches(location.relative_to(folder).parts)


class TableRun:
    """A run that writes one table."""

    def __init__(
        self,
        engine: Engine,
        out: Path,
        table_format: TableFormat,
        *,
        sources: Sequence[str],
        column: str | None = None,
        where: str | None = None,
        condition: Condition | None = None,
        allowed_hosts: Sequence[str] = (),
        max_bytes: int,
        max_pixels: int,
    ) -> None:
        """Create the run. `sources`, `column` and `where` are the user's words; `condition` is parsed.

        Images have at most `max_bytes` bytes and `max_pixels` pixels, and are read from `allowed_hosts`.
        """
        self._engine, self._out, self._condition = engine, out, condition
        self._run = UnfinishedRun(out, table_format)
        self._chunks_per_part = -(-_PART_IMAGES // engine.chunk_size)
        self.options = RunOptions(
            sources=tuple(sources),
            column=column,
            where=where,
            allowed_hosts=tuple(sorted({host.lower() for host in allowed_hosts})),
            max_bytes=max_bytes,
            max_pixels=max_pixels,
            facts=engine.facts,
            engine=engine.description,
            part_size=self._chunks_per_part * engine.chunk_size,
            fovea=__version__,
        )

    def write_table(
        self,
        entries: Iterator[ImageEntry],
        *,
        count_entries: Callable[[], int | None] = lambda: None,
        resume: bool,
    ) -> str:
        """Classify all entries, write the table, and return a sentence about the run.

        With `resume`, an unfinished run of the same options is continued. `count_entries` returns the number
        of entries, if it is known, for the time left; it runs in another thread, and only for a terminal.

        Raises `StartError` if there are no images, or if the unfinished run has other options or sources;
        `WriteError` for a full disk. Whatever ends the run, its finished parts stay.
        """
        with self._run.open(self.options, resume=resume):
            try:
                entries = self._leave_out_own_files(entries)
                self._run.check_names(self._list_finished_names(entries))
                counts = Counts()
                for record in self._run.records:
                    counts.add(record.counts)
                with BulkProgress(count_entries, counts) as progress:
                    self._write_parts(entries, counts, progress)
                if not counts.images:
                    self._run.records.clear()
                    raise StartError(f"there are no images in {', '.join(self.options.sources)}")
                self._run.finish(self.options)
            except (FoveaError, KeyboardInterrupt) as error:
                self._end_early(error)
                raise
        return progress.describe(counts)

    def _end_early(self, error: BaseException) -> None:
        """Say how to go on, in the message of the error or on stderr; or remove a run without a part."""
        finished = sum(record.counts.entries for record in self._run.records)
        if not finished:
            self._run.remove()
            return
        advice = f"{finished:,} images are finished and kept; continue with --resume"
        if isinstance(error, FoveaError):
            error.args = (f"{error}; {advice}",)
        else:
            print(f"fovea: interrupted; {advice}", file=sys.stderr)

    def _leave_out_own_files(self, entries: Iterator[ImageEntry]) -> Iterator[ImageEntry]:
        """Yield the entries but the table itself: it may lie in a folder that is a source."""
        own_ends = self._out.name, find_facts_file(self._out).name  # most names need no more than a look
        for entry in entries:
            if not entry.name.endswith(own_ends) or not is_own_file(entry.name, self._out):
                yield entry

    def _list_finished_names(self, entries: Iterator[ImageEntry]) -> Iterator[Sequence[str]]:
        """Yield the names of the entries in each finished part, which are thereby passed over."""
        for _ in self._run.records:
            yield [entry.name for entry in islice(entries, self.options.part_size)]

    def _write_parts(self, entries: Iterator[ImageEntry], counts: Counts, progress: BulkProgress) -> None:
        chunks = _cut(entries, self._engine.chunk_size)
        classified_chunks = self._engine.classify(chunks)
        try:
            for first in classified_chunks:
                with self._run.open_part() as part:
                    for chunk in chain([first], islice(classified_chunks, self._chunks_per_part - 1)):
                        rows, chunk_counts = self._select(chunk)
                        part.add(chunk, rows, chunk_counts)
                        counts.add(chunk_counts)
                        progress.update(counts)
        finally:
            classified_chunks.close()

    def _select(self, chunk: ClassifiedChunk) -> tuple[list[Row], Counts]:
        rows = [row for row in chunk.rows if row is not None]
        condition = self._condition
        selected_rows = rows if condition is None else [row for row in rows if condition(row)]
        return selected_rows, Counts(
            images=len(rows),
            errors=sum(row.error is not None for row in rows),
            skipped=len(chunk.rows) - len(rows),
            selected=len(selected_rows),
        )


def _cut(values: Iterator[_T], size: int) -> Iterator[Sequence[_T]]:
    while chunk := list(islice(values, size)):
        yield chunk
        del chunk  # before the next one is cut: it may hold images
