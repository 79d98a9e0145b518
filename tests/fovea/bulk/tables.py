"""Folders of images and runs for the tests of bulk classification."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fovea.bulk.rows import Row
from fovea.bulk.tables.choice import choose_format
from tests.pictures import make_jpeg
from tests.servers import ROOT

PART_IMAGES = 16
"""Number of images in a part, so that few images make many parts."""

CHUNK_IMAGES = 8
"""Number of images in a chunk of `run_classify`: two chunks make a part."""

_RUN = """
import os, signal, sys
import fovea.bulk.table_run
from fovea.bulk.unfinished_run import OpenPart
from fovea.cli import main

fovea.bulk.table_run._PART_IMAGES = int(os.environ["PART_IMAGES"])
remaining = int(os.environ.get("KILL_AFTER", "-1"))
add = OpenPart.add


def add_or_die(*arguments):
    global remaining
    if remaining == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    remaining -= 1
    add(*arguments)


OpenPart.add = add_or_die
main()
"""


def write_images(folder: Path, count: int) -> Path:
    """Write different small JPEGs into a folder and its sub-folders; return the folder."""
    for number in range(count):
        path = folder / f"{number % 3}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_jpeg(20 + number % 7, 24, seed=number))
    return folder


def read_table(path: Path) -> list[Row]:
    """Return the rows of a table."""
    return list(choose_format(path).read_rows(path))


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Replace the rows of a table, as an editor would: the metadata stay."""
    table_format = choose_format(path)
    metadata = table_format.read_metadata(path)
    part = path.with_name("part")
    with table_format.open_part(part) as writer:
        writer.write_rows(rows)
    table_format.join_parts([part], path, metadata)
    part.unlink()


def run_classify(
    *arguments: str | Path, zoo: Path, kill_after: int = -1, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `fovea classify` with small parts in a process.

    The process kills itself (SIGKILL) when it has written `kill_after` chunks of `CHUNK_IMAGES`.
    """
    return subprocess.run(
        [sys.executable, "-c", _RUN, "classify", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "FOVEA_MODELS": str(zoo),
            "FOVEA_BATCH_MAX": str(CHUNK_IMAGES),
            "PART_IMAGES": str(PART_IMAGES),
            "KILL_AFTER": str(kill_after),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
