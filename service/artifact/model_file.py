"""Open model files, and the identity of a model file.

An open file stays readable after the file or its folder has been replaced or deleted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fovea.service.errors import ModelError


class PinnedFile:
    """A model file that is kept open."""

    def __init__(self, path: Path, fingerprint: Sequence[int]) -> None:
        """Open the file. Raises `ModelError` when it is missing or does not have this stamp any more."""
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ModelError(f"cannot read the model {path}: {error.strerror}") from None
        if fingerprint_of(self._descriptor) != tuple(fingerprint):
            self.close()
            raise ModelError(f"{path} has changed since it was found")

    @property
    def path(self) -> str:
        """Path under which our own processes can open the file while it is held."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def fingerprint_of(file: Path | int) -> tuple[int, ...]:
    """Return the inode, the size in bytes and the modification time in ns of a path or an open file.

    A replaced file has another stamp. Raises `ModelError` when there is no file.
    """
    try:
        status = os.fstat(file) if isinstance(file, int) else file.stat()
    except OSError as error:
        raise ModelError(f"cannot read the model {file}: {error.strerror}") from None
    return status.st_ino, status.st_size, status.st_mtime_ns
