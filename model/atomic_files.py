"""Atomic file writes: a file is either complete or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fovea.service.errors import FoveaError


class WriteError(FoveaError):
    """A file cannot be written because the disk is full or permission is missing."""


def write_file(path: Path, content: str | bytes) -> None:
    """Write the file and create its folders; on failure, keep the previous file and raise `WriteError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as partial:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces `path` at the end or is removed on failure.

    Readers never see a partial file. A kill or a full disk leaves the previous file intact.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        yield partial
        # The content must reach the disk before the name: after a power failure, the final name would
        # otherwise belong to an empty file.
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)  # does nothing after the rename
