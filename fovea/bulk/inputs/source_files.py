"""Archives and tables as files that are read at any position: on this machine, or in an object store."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, Final, Protocol, TypeVar, cast

from fovea.bulk.inputs.basic_entries import describe_error, to_text
from fovea.service.errors import FileError
from fovea.service.remote.store import Store, open_store
from fovea.service.remote.store_uri import StoreError

_Result = TypeVar("_Result")

WINDOW_BYTES: Final = 1 << 20
"""Bytes that `WindowReader` reads at once."""


class OpenFile(Protocol):
    """An open file; may be read in several threads."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, or fewer at the end. Raises `FileError`."""


class SourceFile(Protocol):
    """The place of an archive or a table; picklable."""

    @property
    def name(self) -> str:
        """Path or URI as text."""

    def open(self) -> AbstractContextManager[OpenFile]:
        """Return a context with the open file. Raises `FileError`."""

    def open_stream(self) -> AbstractContextManager[BinaryIO]:
        """Return a context with a stream of the file from its start, which can seek. Raises `FileError`."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of this machine."""

    path: str

    @property
    def name(self) -> str:
        """The path as text."""
        return to_text(self.path)

    @contextmanager
    def open(self) -> Iterator[OpenFile]:
        """Open the file. Raises `FileError`."""
        with self.open_stream() as file:
            yield _OpenLocalFile(file.fileno(), os.fstat(file.fileno()).st_size)

    @contextmanager
    def open_stream(self) -> Iterator[BinaryIO]:
        """Open the file as a stream. Raises `FileError`."""
        try:
            file = cast(BinaryIO, open(self.path, "rb", buffering=0, opener=_open_without_waiting))  # noqa: SIM115
        except (OSError, ValueError) as error:
            raise FileError(f"the file cannot be read: {describe_error(error)}") from None
        with file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FileError("the file cannot be read: it is a device, a pipe or a socket")
            yield file


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


@dataclass(frozen=True, slots=True)
class _OpenLocalFile:
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
            raise FileError(f"the file cannot be read: {describe_error(error)}") from None
        return content


@dataclass(frozen=True, slots=True)
class StoreFile:
    """A file in an object store."""

    uri: str

    @property
    def name(self) -> str:
        """The URI as text."""
        return to_text(self.uri)

    @contextmanager
    def open(self) -> Iterator[OpenFile]:
        """Open the file. Raises `FileError`."""
        try:
            store = connect_store(self.uri)
            size = store.describe_file("").size
        except StoreError as error:
            raise FileError(str(error)) from None
        yield _OpenStoreFile(store, size)

    @contextmanager
    def open_stream(self) -> Iterator[BinaryIO]:
        """Open the file as a stream. Raises `FileError`."""
        try:
            store = connect_store(self.uri)
            file = store.open_file("")
        except StoreError as error:
            raise FileError(str(error)) from None
        with file:
            yield cast(BinaryIO, _StoreStream(store, file))


@dataclass(frozen=True, slots=True)
class _OpenStoreFile:
    store: Store
    size: int

    def read_at(self, offset: int, size: int) -> bytes:
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        try:
            return self.store.read_range("", offset, end)
        except StoreError as error:
            raise FileError(str(error)) from None


class _StoreStream(io.RawIOBase):
    """A stream of a file in a store, whose errors are `FileError`."""

    def __init__(self, store: Store, file: BinaryIO) -> None:
        self._store, self._file = store, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._call(lambda: self._file.read(len(buffer)))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._call(lambda: self._file.seek(offset, whence))

    def tell(self) -> int:
        return self._call(self._file.tell)

    def _call(self, call: Callable[[], _Result]) -> _Result:
        try:
            with self._store.translate_errors():
                return call()
        except StoreError as error:
            raise FileError(str(error)) from None


def connect_store(uri: str) -> Store:
    """Return the store at a URI, connected once for each process. Raises `StoreError`."""
    return _connect_store(uri, os.getpid())


@lru_cache(maxsize=16)
def _connect_store(uri: str, _: int) -> Store:
    return open_store(uri)


class WindowReader:
    """Reads a file forwards in small pieces, with few reads of the file itself."""

    def __init__(self, file: OpenFile, offset: int = 0, window_bytes: int = WINDOW_BYTES) -> None:
        self._file = file
        self._window_bytes = window_bytes
        self._window = b""
        self._start = offset
        self.offset = offset

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, or fewer at the end. Raises `FileError`."""
        begin = self.offset - self._start
        if not 0 <= begin <= begin + size <= len(self._window):
            self._window = self._file.read_at(self.offset, max(size, self._window_bytes))
            self._start, begin = self.offset, 0
        content = self._window[begin : begin + size]
        self.offset += len(content)
        return content
