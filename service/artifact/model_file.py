"""Model files that are kept open: what one was stays there, whatever takes its place or its folder's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fovea.service.errors import ModelError


class Held:
    """One file."""

    def __init__(self, path: Path, stamp: Sequence[int]) -> None:
        """Raises `ModelError` when the file is not there, or not the one with this stamp any more."""
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ModelError(f"cannot read the model {path}: {error.strerror}") from None
        if stamp_of(self._descriptor) != tuple(stamp):
            self.close()
            raise ModelError(f"{path} has changed since it was found")

    @property
    def path(self) -> str:
        """Where our own processes find it while it is held."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)


def stamp_of(file: Path | int) -> tuple[int, ...]:
    """What tells a file, or an open one, from another that was there before.

    Raises `ModelError` when there is none.
    """
    try:
        status = os.fstat(file) if isinstance(file, int) else file.stat()
    except OSError as error:
        raise ModelError(f"cannot read the model {file}: {error.strerror}") from None
    return status.st_ino, status.st_size, status.st_mtime_ns
