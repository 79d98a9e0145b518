"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fovea.service.errors import FoveaError


class WriteError(FoveaError):
    """A file cannot be written: the disk is full, or not ours."""


def write(path: Path, content: str | bytes) -> None:
    """Write the whole file and its folders, or leave the earlier one as it was and raise `WriteError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place at the end, or goes if that fails.

    A reader never sees half a file, and a kill or a full disk leaves the earlier one whole.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
