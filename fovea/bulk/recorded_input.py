"""Standard input that can be read again from its beginning."""

from __future__ import annotations

import io
import os
from tempfile import TemporaryFile
from typing import BinaryIO
from weakref import finalize


class RecordedInput:
    """A stream that is read as its content arrives, and is kept in a temporary file meanwhile.

    Use it in one thread.
    """

    def __init__(self, stream: BinaryIO) -> None:
        """Create the object; nothing is read."""
        self._stream = stream
        self._file = TemporaryFile(buffering=0)  # noqa: SIM115 - closed with the object
        finalize(self, self._file.close)
        self._size = 0
        self._is_complete = False

    def open(self) -> BinaryIO:
        """Return a stream of the whole content, from its beginning."""
        return io.BufferedReader(_Reader(self))

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream.isatty()

    def read_at(self, position: int, size: int) -> bytes:
        """Return at most `size` bytes from a position on, which are recorded or arrive next; none at the end.

        Raises `OSError`, also if there is no space for the temporary file.
        """
        if position == self._size and not self._is_complete:
            read = getattr(self._stream, "read1", self._stream.read)
            block: bytes = read(size)
            self._is_complete = not block
            self._size += len(block)
            rest = memoryview(block)
            while rest:
                rest = rest[self._file.write(rest) :]
            return block
        return os.pread(self._file.fileno(), size, position)


class _Reader(io.RawIOBase):
    def __init__(self, recorded: RecordedInput) -> None:
        self._recorded, self._position = recorded, 0

    def readable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._recorded.isatty()

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        block = self._recorded.read_at(self._position, len(buffer))
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)
