"""Reading of xz streams with a limit of memory, which `lzma.LZMAFile` does not have."""

from __future__ import annotations

import io
import lzma
from typing import Any, BinaryIO, Final

_INPUT_BYTES: Final = 64 << 10

_MEMORY_BYTES: Final = 160 << 20
"""Memory for one decompressor; the largest preset, `xz -9`, takes 65 MiB. An archive may ask for 4 GiB."""


class XzStream(io.RawIOBase):
    """A stream of what an xz stream, or several in a row, unpacks to."""

    def __init__(self, file: BinaryIO) -> None:
        """Read from a stream of compressed bytes, which the caller closes."""
        self._file = file
        self._decompressor: lzma.LZMADecompressor | None = None
        self._rest = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some bytes. Raises `lzma.LZMAError` and `EOFError`."""
        while True:
            if self._decompressor is None:
                # Zeros may stand between streams and behind the last.
                self._rest = (self._rest or self._file.read(_INPUT_BYTES) or b"").lstrip(b"\0")
                if not self._rest:
                    if self._file_is_at_end():
                        return 0
                    continue
                self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_BYTES)
            chunk = self._rest
            self._rest = b""
            if not chunk and self._decompressor.needs_input:
                chunk = self._file.read(_INPUT_BYTES) or b""
                if not chunk:
                    raise EOFError("the compressed data is cut short")
            content = self._decompressor.decompress(chunk, len(buffer))
            if self._decompressor.eof:
                self._rest = self._decompressor.unused_data
                self._decompressor = None
            if content:
                buffer[: len(content)] = content
                return len(content)

    def _file_is_at_end(self) -> bool:
        self._rest = self._file.read(_INPUT_BYTES) or b""
        return not self._rest
