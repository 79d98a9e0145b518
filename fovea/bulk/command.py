"""The work behind `fovea classify`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from fovea.bulk.conditions import parse_condition
from fovea.bulk.engine import Engine
from fovea.bulk.finished_table import FinishedTable
from fovea.bulk.inputs import count_entries, list_entries
from fovea.bulk.inputs.basic_entries import FileEntry
from fovea.bulk.inputs.sources import STANDARD_INPUT
from fovea.bulk.local_engine import LocalEngine
from fovea.bulk.recorded_input import RecordedInput
from fovea.bulk.table_run import TableRun, check_output, leave_out_table
from fovea.bulk.table_tasks import TableTasks, TaskOptions
from fovea.bulk.tables.choice import choose_format
from fovea.service.cli import classify_images
from fovea.service.image_files import ImageEntry
from fovea.service.inference.boxes import Boxes
from fovea.service.settings import load_settings


def classify_to_table(
    sources: Sequence[str],
    out: Path,
    *,
    model: str | None,
    top_k: int,
    coverage: float | None,
    column: str | None,
    allowed_hosts: Sequence[str],
    resume: bool,
    force: bool,
    where: str | None,
    tasks: TaskOptions,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    **overrides: Any,
) -> int:
    """Classify all images of the sources, write a table, print one line about the run, and do the `tasks`.

    `engine` classifies in this process or in a Ray cluster at `address` (`RayEngine`). `overrides` are
    settings. Return 0, or 1 if an image could not be sorted. Raises `StartError` for whatever hinders the
    run, also if there are no images, and `WriteError`; finished parts stay then. The error of an image is a
    row.
    """
    table_format = choose_format(out)
    condition = None if where is None else parse_condition(where)
    tasks.check(out, may_replace=resume or force, sources=sources)
    is_unfinished = check_output(out, table_format, resume=resume, force=force)
    settings = load_settings(**overrides)
    sources = leave_out_table(sources, out, table_format, is_written=is_unfinished)
    # Tasks may list the sources again, and standard input has its list only once.
    stdin = RecordedInput(sys.stdin.buffer) if tasks and STANDARD_INPUT in sources else None

    def list_all(
        all_sources: Sequence[str] = sources, *, allow_missing: bool = False
    ) -> Iterator[ImageEntry]:
        return list_entries(
            all_sources,
            allowed_hosts=allowed_hosts,
            column=column,
            max_bytes=settings.body_bytes,
            allow_missing=allow_missing,
            stdin=None if stdin is None else stdin.open(),
        )

    # Images that were moved may have left nothing that a source names.
    entries = list_all() if is_unfinished else iter(())
    classifier: Engine
    if engine == "ray":
        from fovea.bulk.ray_engine import RayEngine

        classifier = RayEngine.load(settings, model, top_k=top_k, coverage=coverage, address=address)
    else:
        classifier = LocalEngine.load(settings, model, top_k=top_k, coverage=coverage)
    table = FinishedTable(out, table_format)
    run = TableRun(
        classifier,
        out,
        table_format,
        sources=sources,
        column=column,
        where=where,
        condition=condition,
        allowed_hosts=allowed_hosts,
        max_bytes=settings.body_bytes,
        max_pixels=settings.image_pixels,
    )
    if is_unfinished:
        summary = run.write_table(entries, count_entries=lambda: count_entries(sources), resume=resume)
        print(f"wrote {out}: {summary}")
    else:
        table.check_options(run.options)
        # After a move, a new table would have the remaining images only.
        print(f"{out} is finished already" + ("" if tasks else "; --force makes it anew"))
    if not tasks:
        return 0

    def list_again() -> Iterator[ImageEntry]:
        """List the sources again, but no list that nobody writes."""
        is_silent = stdin is not None and stdin.isatty()
        yield from list_all(
            [one for one in sources if one != STANDARD_INPUT or not is_silent], allow_missing=True
        )

    table_tasks = TableTasks(
        tasks,
        table,
        classifier.contract,
        list_entries=list_again,
        max_bytes=settings.body_bytes,
        max_pixels=settings.image_pixels,
    )
    return int(not table_tasks.run())


def classify_to_terminal(
    sources: Sequence[str],
    *,
    model: str | None,
    top_k: int,
    coverage: float | None,
    embedding: bool,
    boxes: Boxes | None = None,
    as_json: bool,
    column: str | None,
    allowed_hosts: Sequence[str],
    **overrides: Any,
) -> int:
    """Classify all images of the sources one by one, and print the answers. See `classify_images`."""
    settings = load_settings(**overrides)
    entries = list_entries(
        sources,
        allowed_hosts=allowed_hosts,
        column=column,
        max_bytes=settings.body_bytes,
        allow_missing=True,
    )
    first = next(entries, None)
    return classify_images(
        entries if first is None else chain([first], entries),
        settings,
        sources=sources,
        is_single=len(sources) == 1
        and isinstance(first, FileEntry)
        and first.is_named
        and Path(first.path) == Path(sources[0]),
        model=model,
        top_k=top_k,
        coverage=coverage,
        embedding=embedding,
        boxes=boxes,
        as_json=as_json,
    )
