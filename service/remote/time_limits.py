"""Time limits for calls that take none: the system's resolver, and packages of stores that wait for ever.

A call that takes too long goes on in a thread of its own, which ends with the process.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, Final, TypeVar, cast

_Result = TypeVar("_Result")

_BUFFER_BYTES: Final = 256 << 10
"""Bytes to ask for at once where less is read: each read that a limit guards starts a thread (50 µs)."""


def call_within(call: Callable[[], _Result], seconds: float) -> _Result:
    """Return the result of a call. Raises its error, or `TimeoutError` after some seconds."""
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="call with a time limit", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]


class LimitedFileSystem:
    """A file system of fsspec whose calls end within a time limit, or raise `TimeoutError`.

    It has the methods that `Store` calls.
    """

    def __init__(self, file_system: Any, seconds: float) -> None:
        """Limit each call of `file_system`, and each read of its files, to `seconds`."""
        self._file_system: Final = file_system
        self._seconds: Final = seconds

    def invalidate_cache(self) -> None:
        """Forget what was listed. Asks nobody."""
        self._file_system.invalidate_cache()

    def exists(self, path: str) -> bool:
        """Return True if there is a file or a folder."""
        return bool(self._call(lambda: self._file_system.exists(path)))

    def isfile(self, path: str) -> bool:
        """Return True if there is a file."""
        return bool(self._call(lambda: self._file_system.isfile(path)))

    def info(self, path: str) -> dict[str, Any]:
        """Return what the store says about a file or a folder."""
        return cast(dict[str, Any], self._call(lambda: self._file_system.info(path)))

    def ls(self, path: str, detail: bool = True) -> list[Any]:
        """Return the entries of a folder."""
        return cast(list[Any], self._call(lambda: self._file_system.ls(path, detail=detail)))

    def find(self, path: str, detail: bool = False) -> Any:
        """Return all files below a folder."""
        return self._call(lambda: self._file_system.find(path, detail=detail))

    def open(self, path: str, mode: str = "rb") -> BinaryIO:
        """Open a file for reading."""
        file = self._call(lambda: self._file_system.open(path, mode))
        return io.BufferedReader(_LimitedFile(file, self._seconds), _BUFFER_BYTES)

    def _call(self, call: Callable[[], _Result]) -> _Result:
        return call_within(call, self._seconds)


class _LimitedFile(io.RawIOBase):
    """A file of a store whose reads end within a time limit."""

    def __init__(self, file: BinaryIO, seconds: float) -> None:
        self._file = file
        self._seconds = seconds

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, target: Any, /) -> int:
        content = call_within(lambda: self._file.read(len(target)), self._seconds)
        target[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            try:
                self._file.close()
            finally:
                super().close()
