"""Archives as files that are read at any position: on this machine, or in an object store."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Final, Protocol, cast

from fovea.bulk.inputs.basic_entries import describe_error, to_text
from fovea.service.errors import FileError

WINDOW_BYTES: Final = 1 << 20
"""Bytes that `WindowReader` reads at once."""


class OpenArchive(Protocol):
    """An open archive; may be read in several threads."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, or fewer at the end. Raises `FileError`."""


class ArchiveFile(Protocol):
    """The place of an archive; picklable."""

    @property
    def name(self) -> str:
        """Path or URI as text."""

    def open(self) -> AbstractContextManager[OpenArchive]:
        """Return a context with the open archive. Raises `FileError`."""

    def open_stream(self) -> AbstractContextManager[BinaryIO]:
        """Return a context with a stream of the archive from its start. Raises `FileError`."""


@dataclass(frozen=True, slots=True)
class LocalArchive:
    """An archive on this machine."""

    path: str

    @property
    def name(self) -> str:
        """The path as text."""
        return to_text(self.path)

    @contextmanager
    def open(self) -> Iterator[OpenArchive]:
        """Open the archive. Raises `FileError`."""
        with self.open_stream() as file:
            yield _LocalFile(file.fileno(), os.fstat(file.fileno()).st_size)

    @contextmanager
    def open_stream(self) -> Iterator[BinaryIO]:
        """Open the archive as a stream. Raises `FileError`."""
        try:
            file = cast(BinaryIO, open(self.path, "rb", buffering=0, opener=_open_without_waiting))  # noqa: SIM115
        except (OSError, ValueError) as error:
            raise FileError(f"the archive cannot be read: {describe_error(error)}") from None
        with file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FileError("the archive cannot be read: it is a device, a pipe or a socket")
            yield file


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


@dataclass(frozen=True, slots=True)
class _LocalFile:
    descriptor: int
    size: int

    def read_at(self, offset: int, size: int) -> bytes:
        try:
            content = os.pread(self.descriptor, size, offset)
            while len(content) < size and (
                more := os.pread(self.descriptor, size - len(content), offset + len(content))
            ):
                content += more
        except (OSError, OverflowError) as error:
            raise FileError(f"the archive cannot be read: {describe_error(error)}") from None
        return content


class WindowReader:
    """Reads an archive forwards in small pieces, with few reads of the file."""

    def __init__(self, archive: OpenArchive, offset: int = 0, window_bytes: int = WINDOW_BYTES) -> None:
        self._archive = archive
        self._window_bytes = window_bytes
        self._window = b""
        self._start = offset
        self.offset = offset

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, or fewer at the end. Raises `FileError`."""
        begin = self.offset - self._start
        if not 0 <= begin <= begin + size <= len(self._window):
            self._window = self._archive.read_at(self.offset, max(size, self._window_bytes))
            self._start, begin = self.offset, 0
        content = self._window[begin : begin + size]
        self.offset += len(content)
        return content
