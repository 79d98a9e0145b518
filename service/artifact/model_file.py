"""Open model files, the memory files of their weights, and the fingerprint of a model file.

An open file stays readable after the file or its folder has been replaced or deleted.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fovea.service.errors import ModelError

WEIGHTS_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
"""Seals of the memory file of weights (fcntl(2)): no process can change it any more."""


@dataclass(frozen=True)
class MemoryFile:
    """A memory file that another process of the service keeps open; a part of messages."""

    path: str
    """Path of the open file. When the other process closes the file, the path may lead to a newer one."""
    inode: int

    @classmethod
    def from_descriptor(cls, descriptor: int) -> MemoryFile:
        """Describe a memory file that this process keeps open."""
        return cls(f"/proc/{os.getpid()}/fd/{descriptor}", os.fstat(descriptor).st_ino)

    def open(self) -> int:
        """Open the file for reading and writing, and return a descriptor.

        Raises `OSError`: `FileNotFoundError` when the file has been closed, also if the path leads to another
        file by now.
        """
        descriptor = os.open(self.path, os.O_RDWR)
        if os.fstat(descriptor).st_ino == self.inode:
            return descriptor
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)


class PinnedFile:
    """A model file that is kept open, and a memory file in which processes share its weights."""

    def __init__(self, path: Path, fingerprint: Sequence[int]) -> None:
        """Open the file. Raises `ModelError` when it is missing or its fingerprint has changed."""
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            try:
                self._weights_descriptor = os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            except OSError:
                os.close(self._descriptor)
                raise
        except OSError as error:
            raise ModelError(f"cannot read the model {path}: {error.strerror}") from None
        # Compare the open file, not the path: another file may take the path at any time.
        if fingerprint_of(self._descriptor) != tuple(fingerprint):
            self.close()
            raise ModelError(f"{path} has changed since it was found")

    @property
    def path(self) -> str:
        """Path at which other processes of the service can open the file.

        The path is valid until `close`, and while this process lives: the system resolves the path to the
        open file, not to the file that has the original name by now.
        """
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @property
    def weights_file(self) -> MemoryFile:
        """The memory file, which is empty at first. It can be opened as long as `path`."""
        return MemoryFile.from_descriptor(self._weights_descriptor)

    def seal_weights(self) -> None:
        """Seal the memory file, because every process that may write it has ended or has sealed it.

        A file that is not sealed yet is not complete. It becomes empty, and processes do not share weights.
        """
        if not fcntl.fcntl(self._weights_descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE:
            fcntl.fcntl(self._weights_descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW)
            os.ftruncate(self._weights_descriptor, 0)  # no process can write any more
            fcntl.fcntl(self._weights_descriptor, fcntl.F_ADD_SEALS, WEIGHTS_SEALS)

    def close(self) -> None:
        """Close both files. Processes that have opened them can still read them."""
        os.close(self._descriptor)
        os.close(self._weights_descriptor)


def fingerprint_of(file: Path | int) -> tuple[int, ...]:
    """Return the inode, the size in bytes and the modification time in ns of a path or an open file.

    A replaced file has another fingerprint. Raises `ModelError` when there is no file.
    """
    try:
        status = os.fstat(file) if isinstance(file, int) else file.stat()
    except OSError as error:
        raise ModelError(f"cannot read the model {file}: {error.strerror}") from None
    return status.st_ino, status.st_size, status.st_mtime_ns
