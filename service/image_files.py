"""Reading of image files where Fovea runs without a server."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final, Protocol

from fovea.service.errors import BodyTooLarge, FileError, UnsupportedFormat

_PART_BYTES: Final = 1 << 20
"""Bytes of a pipe or a device that are read at once."""


class ImageEntry(Protocol):
    """One image of a source; picklable, so that another process or machine can read it."""

    @property
    def name(self) -> str:
        """Path or URI as text; for a file in an archive, the archive's path, `/`, and the member's."""

    @property
    def is_named(self) -> bool:
        """Whether the user named just this image. Other files that are no images may be skipped."""

    def read(self, max_bytes: int) -> bytes:
        """Return the encoded image.

        Called at most once, in any thread. Raises `FileError`, `BodyTooLarge` for more than `max_bytes`
        bytes, and `UnsupportedFormat` for what cannot be an image.
        """


def read_image_file(path: Path | str, max_bytes: int, *, only_regular: bool = False) -> bytes:
    """Return the content of a file of at most `max_bytes` bytes, the size that the service accepts.

    Raises `FileError` and `BodyTooLarge`, and with `only_regular` `UnsupportedFormat` for a device or a pipe,
    which could let the caller wait for ever. Never reads more than the limit, because a device has no end.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_NONBLOCK if only_regular else 0)  # a pipe may have no writer
    try:
        descriptor = os.open(path, flags)
        try:
            status = os.fstat(descriptor)
            if only_regular and not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                raise UnsupportedFormat("the file is a device, a pipe or a socket")
            content = _read_at_most(descriptor, max_bytes + 1, status.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise FileError.from_os_error(error) from error
    except ValueError as error:  # a null byte in the path
        raise FileError(f"the file cannot be read: {error}") from None
    check_image_size(len(content), max_bytes, "the file")
    return content


def _read_at_most(descriptor: int, max_bytes: int, expected: int) -> bytes:
    """Return at most `max_bytes` bytes of a file, with one call to the system if its size is as expected.

    A file object would take three times as long, and memory for `max_bytes` bytes.
    """
    content = os.read(descriptor, min(max_bytes, expected + 1))
    if len(content) == expected < max_bytes:
        return content
    parts, size = [content], len(content)  # of a pipe, a device, or a file that has changed since
    while content and size < max_bytes:
        content = os.read(descriptor, min(max_bytes - size, _PART_BYTES))
        parts.append(content)
        size += len(content)
    return b"".join(parts)


def check_image_size(size: int, max_bytes: int, subject: str) -> None:
    """Raise `BodyTooLarge` if an encoded image has more than `max_bytes` bytes."""
    if size > max_bytes:
        raise BodyTooLarge(f"{subject} has more than {max_bytes} bytes (FOVEA_BODY_BYTES)")
