"""Entries of files, of images that are in memory already, and of what cannot be read."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from fovea.service.errors import BodyTooLarge, FileError, UnsupportedFormat, to_one_line
from fovea.service.image_files import check_image_size, read_image_file
from fovea.service.image_folders import is_clutter

MAX_IMAGE_BYTES: Final = 64 << 20
"""Default of the largest image in bytes, as that of `FOVEA_BODY_BYTES`."""

_CONTROL_CHARACTERS: Final = re.compile("[\0-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of this machine."""

    path: str
    """Path as the system knows it; a name that is not UTF-8 is decoded by `os.fsdecode`."""
    is_named: bool = False

    @property
    def name(self) -> str:
        """The path as text."""
        return to_text(self.path)

    def read(self, max_bytes: int) -> bytes:
        """Return the content. Raises `FileError`, `BodyTooLarge`, and `UnsupportedFormat` for a device."""
        return read_image_file(self.path, max_bytes, only_regular=not self.is_named)


@dataclass(frozen=True, slots=True)
class BytesEntry:
    """An image that was read with its source, such as a compressed archive."""

    name: str
    content: bytes = field(repr=False)
    is_named: bool = False

    def read(self, max_bytes: int) -> bytes:
        """Return the content. Raises `BodyTooLarge`."""
        check_image_size(len(self.content), max_bytes, "the file")
        return self.content


@dataclass(frozen=True, slots=True)
class FailedEntry:
    """An image, or the rest of a source, that cannot be read."""

    name: str
    message: str
    is_named: bool = True

    def read(self, max_bytes: int) -> bytes:
        """Raise `FileError`."""
        raise FileError(self.message)


@dataclass(frozen=True, slots=True)
class SpecialEntry:
    """A link or a device in an archive. Like a file that is no image, it may be skipped."""

    name: str
    message: str
    is_named: bool = False

    def read(self, max_bytes: int) -> bytes:
        """Raise `UnsupportedFormat`."""
        raise UnsupportedFormat(self.message)


@dataclass(frozen=True, slots=True)
class LargeEntry:
    """A file of a stream that is larger than the largest image, and was passed over."""

    name: str
    limit: int
    """Largest number of bytes, which the file exceeds."""
    is_named: bool = False

    def read(self, max_bytes: int) -> bytes:
        """Raise `BodyTooLarge`."""
        raise BodyTooLarge(f"the file has more than {min(max_bytes, self.limit)} bytes (FOVEA_BODY_BYTES)")


def to_text(path: str) -> str:
    r"""Return a path as text in valid UTF-8: other bytes become `\xe9`, so that two names stay different."""
    if path.isascii():
        return path
    try:
        return path.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # half a character of UTF-16, from a table
        return path.encode(errors="backslashreplace").decode()


def describe_error(error: Exception) -> str:
    """Return what an error of the system or of a library says, in one line."""
    if isinstance(error, OSError) and not isinstance(error, FileError) and error.strerror:
        return error.strerror
    return to_one_line(error) or type(error).__name__


def clean_member_name(name: str) -> str | None:
    r"""Return the path of a member in its archive, without `.`, `//` and a leading `/`.

    Control characters and bytes that are not UTF-8 become `\x00`. Returns None if the name leads out of the
    archive, or names nothing.
    """
    name = posixpath.normpath(name.lstrip("/"))
    if name in (".", "..") or name.startswith("../"):
        return None
    return _CONTROL_CHARACTERS.sub(_escape, name)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xDC00 if code >= 0xDC80 else code:02x}"


def is_hidden_member(name: str) -> bool:
    """Return True if a file in an archive, or a folder that holds it, is hidden or a system's own."""
    folder, _, file = name.rpartition("/")
    return is_clutter(file) or (folder != "" and _is_hidden_folder(folder))


@lru_cache(maxsize=1024)
def _is_hidden_folder(folder: str) -> bool:
    return any(map(is_clutter, folder.split("/")))
