"""Reading of image files where Fovea runs without a server."""

from __future__ import annotations

from pathlib import Path

from fovea.service.errors import BodyTooLarge, FileError


def read_image_file(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file of at most `max_bytes` bytes, the size that the service accepts.

    Raises `FileError` and `BodyTooLarge`. Never reads more than the limit, because a device has no end.
    """
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise FileError.from_os_error(error) from error
    except ValueError as error:  # a null byte in the path
        raise FileError(f"the file cannot be read: {error}") from None
    check_image_size(len(content), max_bytes, "the file")
    return content


def check_image_size(size: int, max_bytes: int, subject: str) -> None:
    """Raise `BodyTooLarge` if an encoded image has more than `max_bytes` bytes."""
    if size > max_bytes:
        raise BodyTooLarge(f"{subject} has more than {max_bytes} bytes (FOVEA_BODY_BYTES)")
