"""Reading of image files where Fovea runs without a server."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Protocol

from fovea.service.errors import BodyTooLarge, FileError, UnsupportedFormat


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
    try:
        with open(path, "rb", opener=_open_without_waiting if only_regular else None) as file:
            if only_regular and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnsupportedFormat("the file is a device, a pipe or a socket")
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise FileError.from_os_error(error) from error
    except ValueError as error:  # a null byte in the path
        raise FileError(f"the file cannot be read: {error}") from None
    check_image_size(len(content), max_bytes, "the file")
    return content


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe without a writer would let the caller wait."""
    return os.open(path, flags | os.O_NONBLOCK)


def check_image_size(size: int, max_bytes: int, subject: str) -> None:
    """Raise `BodyTooLarge` if an encoded image has more than `max_bytes` bytes."""
    if size > max_bytes:
        raise BodyTooLarge(f"{subject} has more than {max_bytes} bytes (FOVEA_BODY_BYTES)")
