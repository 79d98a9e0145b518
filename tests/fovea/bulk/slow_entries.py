"""Entries for tests of engines with processes, in a module that workers can import."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from fovea.service.image_files import read_image_file

READ_SECONDS = 0.1
"""Time that a slow entry takes."""


@dataclass(frozen=True)
class FileEntry:
    """A file."""

    path: Path
    is_named: bool = False

    @property
    def name(self) -> str:
        """Path of the file."""
        return str(self.path)

    def read(self, max_bytes: int) -> bytes:
        """Read the file."""
        return read_image_file(self.path, max_bytes)


@dataclass(frozen=True)
class SlowEntry(FileEntry):
    """A file that is read slowly until the test has opened the gate, a file in a folder.

    The process that reads it writes its id into the folder. It must not wait for the gate alone: Ray runs the
    tasks of an actor in any order, and the first result may be that of its second task.
    """

    folder: Path = Path()

    def read(self, max_bytes: int) -> bytes:
        """Wait unless the gate is open, and read the file."""
        (self.folder / f"reading-{os.getpid()}").touch()
        if not (self.folder / "gate").exists():
            time.sleep(READ_SECONDS)
        return super().read(max_bytes)


@dataclass(frozen=True)
class HangingEntry(FileEntry):
    """A file whose reading does not end before the test has opened the gate, like a pipe without a writer."""

    folder: Path = Path()

    def read(self, max_bytes: int) -> bytes:
        """Wait for the gate, and read the file."""
        (self.folder / f"reading-{os.getpid()}").touch()
        while not (self.folder / "gate").exists():
            time.sleep(READ_SECONDS)
        return super().read(max_bytes)


@dataclass(frozen=True)
class DeadlyEntry(FileEntry):
    """An image that ends every process that reads it."""

    number: int = 0
    """Signal that ends the process; 0 for an exit with status 1."""

    def read(self, max_bytes: int) -> bytes:
        """End this process."""
        if self.number:
            os.kill(os.getpid(), self.number)
        os._exit(1)


@dataclass(frozen=True)
class FaultyEntry(FileEntry):
    """An entry whose reading fails by a mistake in the code."""

    def read(self, max_bytes: int) -> bytes:
        """Fail."""
        raise ZeroDivisionError("a mistake")
