"""The work behind `fovea classify`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from fovea.bulk.conditions import parse_condition
from fovea.bulk.inputs import count_entries, list_entries
from fovea.bulk.inputs.basic_entries import FileEntry
from fovea.bulk.local_engine import LocalEngine
from fovea.bulk.table_run import TableRun, check_output, is_own_file
from fovea.bulk.tables.choice import choose_format
from fovea.errors import StartError
from fovea.service.cli import classify_images
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
    **overrides: Any,
) -> None:
    """Classify all images of the sources, write a table, and print one line about the run.

    `overrides` are settings. Raises `StartError` for whatever hinders the run, also if there are no images,
    and `WriteError`; finished parts stay then. The error of an image is a row.
    """
    table_format = choose_format(out)
    condition = None if where is None else parse_condition(where)
    if not check_output(out, table_format, resume=resume, force=force):
        print(f"{out} is finished already; --force makes it anew")
        return
    settings = load_settings(**overrides)
    # A pattern that the shell expands may name the table of an earlier run.
    sources = [source for source in sources if not is_own_file(source, out)]
    if not sources:
        raise StartError(f"--out {out} is the only source too; give the table another name")
    entries = list_entries(sources, allowed_hosts=allowed_hosts, column=column, max_bytes=settings.body_bytes)
    engine = LocalEngine.load(settings, model, top_k=top_k, coverage=coverage)
    run = TableRun(
        engine, out, table_format, sources=sources, column=column, where=where, condition=condition
    )
    summary = run.write_table(entries, count_entries=lambda: count_entries(sources), resume=resume)
    print(f"wrote {out}: {summary}")


def classify_to_terminal(
    sources: Sequence[str],
    *,
    model: str | None,
    top_k: int,
    coverage: float | None,
    embedding: bool,
    as_json: bool,
    column: str | None,
    allowed_hosts: Sequence[str],
    **overrides: Any,
) -> int:
    """Classify all images of the sources one by one, and print the answers. See `classify_images`."""
    settings = load_settings(**overrides)
    entries = list_entries(sources, allowed_hosts=allowed_hosts, column=column, max_bytes=settings.body_bytes)
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
        as_json=as_json,
    )
